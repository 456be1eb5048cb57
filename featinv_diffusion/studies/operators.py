"""The study of `featinv operator analyze`: an operator's eigenvalues, and what it does held out."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from featinv_diffusion import __version__
from featinv_diffusion.backbones.base import Backbone, weights_sha256
from featinv_diffusion.data.selection import digest
from featinv_diffusion.errors import InputError
from featinv_diffusion.features.operator_methods import LINEAR
from featinv_diffusion.features.operators import MAX_POWER, Operator
from featinv_diffusion.features.pixel_operations import (
    PixelMap,
    PixelOperation,
    keep,
    make_operation,
)
from featinv_diffusion.figures import board as figures
from featinv_diffusion.figures.board import write_grid
from featinv_diffusion.figures.grid import GridRow, make_grid
from featinv_diffusion.files import write_text
from featinv_diffusion.images import center_square, read_image, to_pil, to_tensor, write_png
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.metrics.statistics import Interval
from featinv_diffusion.runs.record import MANIFEST, read_environment
from featinv_diffusion.runs.sampling import (
    Encoded,
    Job,
    OnFailure,
    backbone_of,
    encode_picture,
    sample_all,
)
from featinv_diffusion.runs.scope import Scope
from featinv_diffusion.settings import SampleSettings
from featinv_diffusion.studies.operator_measures import (
    CEILING,
    FLOOR,
    OPERATOR,
    TOLERANCE,
    Advance,
    Drawn,
    HeldOut,
    Pictures,
    Spectrum,
    check_powers,
    measure_held_out,
    measure_spectrum,
    summarise_power,
)
from featinv_diffusion.types import Images

# ---- Figures of an operator ----

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


POWERS = {"suppress": (1, 4, 8, 12), "swap": (1, 2)}
"""Powers that are measured unless others are asked for; of other operations 1 alone."""


def operation_of(operator: Operator) -> PixelOperation:
    """Returns the operation on pixels that an operator was fitted for.

    Raises:
        InputError: it was none of `pixel_operations.OPERATIONS`; pass it to `study_operator`.
    """
    return make_operation(operator.record.operation, **operator.record.parameters)


def default_powers(operation: PixelOperation) -> tuple[int, ...]:
    """Returns the powers that are measured unless others are asked for."""
    return POWERS.get(operation.name, (1,))


def study_operator(
    operator: Operator,
    operation: PixelOperation,
    backbone: Backbone,
    drawn: Iterable[Drawn],
    folder: Path,
    *,
    inverter: Inverter | None = None,
    powers: Sequence[int] | None = None,
    batch_size: int = 8,
    seed: int = 0,
    advance: Advance = lambda n: None,
) -> dict[str, Any]:
    """Measures an operator on images of no part in its fit, writes figures, returns the numbers.

    Args:
        drawn: images that the operator was not fitted on.
        inverter: of the backbone's features; it was never used in the fit. None leaves pixels out.
        powers: default by operation, see `POWERS`; of the first, pictures and measures are drawn.

    Raises:
        InputError: an operator of other features or weights, and as `measure_held_out`.
    """
    operator.check(backbone.spec, weights_sha256({"": backbone.model}))
    powers = default_powers(operation) if powers is None else powers
    check_powers(powers)
    spectra = [measure_spectrum(operator, n) for n in powers]  # refuses powers before the work
    found = measure_held_out(
        operator,
        operation,
        backbone,
        drawn,
        inverter=inverter,
        powers=powers,
        batch_size=batch_size,
        seed=seed,
        advance=advance,
    )
    summaries = {n: summarise_power(found.columns[n]) for n in powers}
    title = f"{operation} on {operator.spec.backbone}, {operator.record.method} operator"
    write_spectra(spectra, title, folder / "eigenvalues.png")
    write_measures(summaries[powers[0]], powers[0], title, folder / "measures.png")
    _write_pictures(found, title, folder)
    record = asdict(operator.record)
    record["n_images"] = len(record.pop("image_digests"))
    return {
        "operator": {**record, "spec": asdict(operator.spec)},
        "spectrum": [spectrum.figures() for spectrum in spectra],
        "n_images": len(found.ids),
        "ids_sha256": digest(found.ids),
        "seed": seed,
        "held_out": {str(n): _to_dicts(summaries[n]) for n in powers},
    }


def _write_pictures(found: HeldOut, title: str, folder: Path) -> None:
    if not found.is_inverted:
        return
    note = f"Of {len(found.ids)} images that the operator was not fitted on; R is the inverter."
    first = next(iter(found.columns))
    write_pictures(found.pictures, first, title, [note], folder / "pictures.png")
    if len(found.columns) > 1:
        write_powers(found.pictures, title, [note], folder / "powers.png")


def _to_dicts(summary: Mapping[str, Interval | None]) -> dict[str, Any]:
    return {k: None if value is None else asdict(value) for k, value in summary.items()}


def to_lines(metrics: Mapping[str, Any]) -> list[str]:
    """Returns what the terminal says: the fit, the eigenvalues, and the measures of each power."""
    lines = []
    for spectrum in metrics["spectrum"]:
        moduli = spectrum["modulus"]
        lines.append(
            f"Power {spectrum['power']}: {spectrum['n_near_plus_one']} eigenvalues near +1 and "
            f"{spectrum['n_near_minus_one']} near −1 (within {spectrum['tolerance']:g}), "
            f"{spectrum['n_negative_real']} with a negative real part, of "
            f"{spectrum['n_eigenvalues']}; moduli {moduli['min']:.3f} … {moduli['max']:.3f}, "
            f"twice is {spectrum['twice_from_identity']:.3f} from the identity."
        )
    for power, held in metrics["held_out"].items():
        parts = [f"cosine {_cell(held['cosine'])}, doing nothing {_cell(held['cosine_nothing'])}"]
        for metric, name in (("delta_e", "ΔE2000"), ("mse", "MSE")):
            if f"{metric}_floor" in held:
                parts.append(_between(held, metric, name))
        lines.append(f"Held out, power {power}: {'; '.join(parts)}.")
    if metrics["operator"]["method"] == LINEAR:
        lines.append("Eigenvalues are of Q alone; features are scaled to unit norm after it.")
    return lines


def _between(held: Mapping[str, Any], metric: str, name: str) -> str:
    values = [held[f"{metric}_{role}"]["value"] for role in (FLOOR, OPERATOR, CEILING)]
    floor, found, ceiling = (f"{value:.4g}" for value in values)
    stands = f"{found} between" if values == sorted(values) else f"{found}, beside"
    position = held[f"{metric}_position"]
    where = _why_none(held[f"{metric}_room"]) if position is None else f"position {_cell(position)}"
    return f"{name} {stands} {floor} (floor) and {ceiling} (doing nothing), {where}"


def _why_none(room: Mapping[str, float]) -> str:
    if room["high"] < 0:
        return "no position: the floor is above doing nothing"
    return "no position: floor and doing nothing do not differ"


def _cell(interval: Mapping[str, float]) -> str:
    return f"{interval['value']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


# ---- Pictures through an operator and an inverter, for `featinv operator apply` ------------------

GRID = "grid.png"
MAX_GRID_ROWS = 100

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Applied:
    """What became of one picture; every list has one value per power.

    Args:
        original: what the backbone saw: the square, or what the operation's source makes of it.
        pictures: R(f Qⁿ).
        cosine: of the features of each picture to the map that was inverted.
        scope_p_value: of each map, whether it is like natural ones; None where not known.
    """

    job: Job
    original: Image.Image
    pictures: list[Image.Image]
    cosine: list[float]
    scope_p_value: list[float] | None


def make_apply_jobs(jobs: Sequence[Job], powers: Sequence[int]) -> list[Job]:
    """Names an output for each power of jobs of one sample; all powers share its seed.

    Raises:
        InputError: no powers, one that comes twice, or one outside of 0 … `MAX_POWER`.
    """
    if not powers or not all(0 <= n <= MAX_POWER for n in powers) or len({*powers}) < len(powers):
        raise InputError(
            f"Powers must be distinct whole numbers in 0 … {MAX_POWER}, but {[*powers]} came."
        )
    return [
        Job(
            job.input,
            tuple(f"{job.outputs[0].removesuffix('_0.png')}_power{n}.png" for n in powers),
            job.seeds,
        )
        for job in jobs
    ]


def source_of(operator: Operator) -> PixelMap | None:
    """Returns what makes of a picture what the operation starts from; None where not known."""
    try:
        return operation_of(operator).source
    except InputError:
        return None


def apply_operator(
    operator: Operator,
    inverter: Inverter,
    jobs: Sequence[Job],
    powers: Sequence[int],
    on_failure: OnFailure,
    scope: Scope,
) -> Iterator[Applied]:
    """Yields the pictures of each job; one that cannot be read is reported instead.

    Pictures go through the operation's source first, e.g. they are made grey to be colourised;
    where the operation is not known, which is logged, they must be what it starts from.

    Raises:
        InputError: an operator of other features or weights than the inverter's.
    """
    operator.check(inverter.spec, weights_sha256({"": backbone_of(inverter).model}))
    edits = [operator.edit(n, spec=inverter.spec) for n in powers]
    if (source := source_of(operator)) is None:
        logger.warning(
            "The operation %r is none of this package's; pictures must be what it starts from, for "
            "they are given as they are.",
            operator.record.operation,
        )
    for job in jobs:
        try:
            encoded = _encode(inverter, job.input, source or keep)
        except InputError as error:
            on_failure(job, str(error))
            continue
        pictures, cosines, p_values = [], [], []
        for edit in edits:
            features = edit(encoded.features)
            sample = sample_all(inverter, features, job.seeds, batch_size=1)
            pictures += to_pil(sample.images)
            cosines.append(sample.cosine.double().mean().item())
            p_values.append(scope.p_value(features, cosines[-1]))
        known = None if None in p_values else [p for p in p_values if p is not None]
        yield Applied(job, encoded.square, pictures, cosines, known)


@torch.no_grad()
def _encode(inverter: Inverter, path: Path, source: PixelMap) -> Encoded:
    if source is keep:
        return encode_picture(inverter, path)
    backbone, picture = backbone_of(inverter), read_image(path)
    pixels = source(to_tensor(center_square(picture, max(backbone.input_size))))
    features = backbone.features(pixels.to(backbone.device))
    inverter.spec.check_features(features)
    return Encoded(picture.size, to_pil(pixels)[0], features)


def write_applied(
    applied: Sequence[Applied],
    failures: Sequence[dict[str, str]],
    operator: Operator,
    name: str,
    powers: Sequence[int],
    settings: SampleSettings,
    scope: Scope,
    folder: Path,
) -> None:
    """Writes the pictures, a grid of the first ones, and last a manifest, which has no replay.

    Args:
        name: of the operator, as it was opened.
        settings: of the inverter, resolved.
    """
    (folder / MANIFEST).unlink(missing_ok=True)
    for done in applied:
        for output, picture in zip(done.job.outputs, done.pictures, strict=True):
            write_png(picture, folder / output)
    write_png(_draw(applied[:MAX_GRID_ROWS], operator, powers, settings), folder / GRID)
    record = asdict(operator.record)
    del record["image_digests"]
    content = {
        "version": __version__,
        "command": "operator apply",
        **asdict(settings),
        "operator": name,
        "record": record,
        "powers": list(powers),
        "given": _given(operator),
        "environment": read_environment(settings.device),
        "scope_basis": scope.basis,
        "images": [_to_entry(done) for done in applied],
        "failures": list(failures),
    }
    write_text(folder / MANIFEST, json.dumps(content, indent=2, allow_nan=False) + "\n")


def _given(operator: Operator) -> str:
    """Says what of a picture the backbone saw."""
    source = source_of(operator)
    if source is None:
        return "the picture, for the operation is not known"
    return "the picture" if source is keep else f"what {operator.record.operation} starts from"


def _to_entry(done: Applied) -> dict[str, Any]:
    return {
        "input": str(done.job.input.absolute()),
        "outputs": list(done.job.outputs),
        "seed": list(done.job.seeds),
        "cosine": done.cosine,
        "scope_p_value": done.scope_p_value,
    }


def _draw(
    applied: Sequence[Applied],
    operator: Operator,
    powers: Sequence[int],
    settings: SampleSettings,
) -> Image.Image:
    rows = [
        GridRow(
            done.original,
            done.job.input.name,
            done.pictures,
            [f"cosine {round(value, 2) + 0.0:.2f}" for value in done.cosine],
        )
        for done in applied
    ]
    record = operator.record
    values = "".join(f", {key} {value}" for key, value in record.parameters.items())
    inverter = Path(settings.inverter).name
    given = "" if source_of(operator) in (keep, None) else f" First column: {_given(operator)}."
    return make_grid(
        rows,
        title=f"{record.operation} in the features of {operator.spec.backbone}",
        subtitle=f"{record.method} operator{values} · layer {operator.spec.layer} · inverter "
        f"{inverter}\nUnder each picture: cosine of its features to the map it was made from."
        f"{given}",
        headers=["unedited" if n == 0 else "Q" if n == 1 else f"Q to the {n}" for n in powers],
    )
