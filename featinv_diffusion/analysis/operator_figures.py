"""Figures of an operator: its eigenvalues, its measures, and what an inverter shows of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from featinv_diffusion.analysis import figures
from featinv_diffusion.analysis.modular_figures import write_grid
from featinv_diffusion.analysis.operator_measures import CEILING, FLOOR, OPERATOR, Pictures
from featinv_diffusion.analysis.operator_spectrum import TOLERANCE, Spectrum
from featinv_diffusion.metrics.statistics import Interval
from featinv_diffusion.types import Images

PIXEL_LABELS = {"delta_e": "ΔE2000", "mse": "MSE of pixels"}
SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def to_symbol(power: int) -> str:
    """Returns `Q` for 1, `Q¹²` for 12."""
    return "Q" if power == 1 else f"Q{str(power).translate(SUPERSCRIPTS)}"


def _to_title(title: str, power: int) -> str:
    return title if power == 1 else f"{title}, {to_symbol(power)}"


def _transformed(power: int) -> str:
    return "transformed" if power == 1 else f"{power}× transformed"


def write_spectra(spectra: Sequence[Spectrum], title: str, path: Path) -> None:
    """Draws the eigenvalues of each power in the complex plane, with the unit circle."""
    with mpl.rc_context({"font.size": figures.TEXT}):
        figure = Figure(figsize=(2.7 * len(spectra) + 0.4, 3.3), layout="constrained")
        figure.suptitle(title, fontsize=figures.TITLE, fontweight="bold")
        for axes, spectrum in zip(
            figure.subplots(1, len(spectra), squeeze=False)[0], spectra, strict=True
        ):
            _draw_spectrum(axes, spectrum)
    figures.write_figure(figure, path)


def _draw_spectrum(axes: Axes, spectrum: Spectrum) -> None:
    around = torch.linspace(0, 2 * torch.pi, 200)
    axes.plot(around.cos(), around.sin(), color=figures.GREY, linewidth=0.7, zorder=1)
    axes.axhline(0, color=figures.GREY, linewidth=0.4, zorder=0)
    axes.axvline(0, color=figures.GREY, linewidth=0.4, zorder=0)
    values = spectrum.eigenvalues
    axes.scatter(values.real, values.imag, s=9, alpha=0.6, color=figures.BLUE, linewidths=0)
    reach = max(1.15, 1.08 * values.abs().max().item())
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    moduli = values.abs()
    counts = f"{spectrum.count_near(1)} near +1, {spectrum.count_near(-1)} near −1"
    axes.set_title(
        f"{to_symbol(spectrum.power)}: {counts}\n"
        f"(within {TOLERANCE:g}) of {len(values)}; moduli {moduli.min():.2f} … {moduli.max():.2f}",
        fontsize=figures.TEXT,
    )
    axes.set_xlabel("real part", fontsize=figures.TEXT)
    axes.set_ylabel("imaginary part", fontsize=figures.TEXT)
    axes.tick_params(labelsize=figures.TEXT)


def write_measures(
    summary: Mapping[str, Interval | None], power: int, title: str, path: Path
) -> None:
    """Draws a power's distance to the true features, and its pixel errors by floor and ceiling."""
    symbol = to_symbol(power)
    names = {FLOOR: "R(true f)\nfloor", OPERATOR: f"R(f {symbol})\n", CEILING: "R(f)\ndo nothing"}
    drawn = [metric for metric in PIXEL_LABELS if f"{metric}_{FLOOR}" in summary]
    figure = Figure(figsize=(2.3 * (1 + len(drawn)) + 0.6, 3.0), layout="constrained")
    figure.suptitle(
        f"{_to_title(title, power)}, held out", fontsize=figures.TITLE, fontweight="bold"
    )
    panels = figure.subplots(1, 1 + len(drawn), squeeze=False)[0]
    cosines = {f"f {symbol}\n": summary["cosine"], "f\ndo nothing": summary["cosine_nothing"]}
    distances = {name: _from_one(value) for name, value in cosines.items()}
    _draw_bars(panels[0], distances, "1 − cosine to the true features")
    for axes, metric in zip(panels[1:], drawn, strict=True):
        bars = {words: summary[f"{metric}_{role}"] for role, words in names.items()}
        _draw_bars(axes, bars, f"{PIXEL_LABELS[metric]} to the {_transformed(power)}")
    figures.write_figure(figure, path)


def _from_one(value: Interval | None) -> Interval | None:
    if value is None:
        return None
    return Interval(1 - value.value, 1 - value.high, 1 - value.low, value.n)


def _draw_bars(axes: Axes, bars: Mapping[str, Interval | None], ylabel: str) -> None:
    values = {name: value for name, value in bars.items() if value is not None}
    errors = [
        [v.value - v.low for v in values.values()],
        [v.high - v.value for v in values.values()],
    ]
    colours = [figures.ORANGE if "Q" in name else figures.BLUE for name in values]
    heights = [v.value for v in values.values()]
    axes.bar(list(values), heights, yerr=errors, color=colours, capsize=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylabel(f"{ylabel}\n95 % interval", fontsize=figures.TEXT)
    axes.tick_params(labelsize=figures.TEXT)


def write_pictures(
    pictures: Pictures, power: int, title: str, notes: Sequence[str], path: Path
) -> None:
    """Draws given, transformed, R(f), R(f Qⁿ) and R(true features), an image a row."""
    columns = {
        "given": pictures.given,
        _transformed(power): pictures.wanted[power],
        "R(f)": pictures.reconstructed,
        f"R(f {to_symbol(power)})": pictures.edited[power],
        "R(true f)": pictures.true[power],
    }
    write_grid(_stacked(columns), path, _to_title(title, power), notes)


def write_powers(pictures: Pictures, title: str, notes: Sequence[str], path: Path) -> None:
    """Draws, for each power, the transformed image beside R(f Qⁿ)."""
    columns = {"given": pictures.given, "R(f)": pictures.reconstructed}
    for n in pictures.wanted:
        columns |= {
            _transformed(n): pictures.wanted[n],
            f"R(f {to_symbol(n)})": pictures.edited[n],
        }
    write_grid(_stacked(columns), path, title, notes)


def _stacked(columns: Mapping[str, list[Tensor]]) -> dict[str, Images]:
    return {name: torch.stack(images) for name, images in columns.items()}
