"""Figures of the analyses of stages: grids of pictures, bars and the λ curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from featinv_diffusion.analysis import figures
from featinv_diffusion.analysis.figures import Board
from featinv_diffusion.metrics.statistics import Interval
from featinv_diffusion.types import Images


def write_grid(
    columns: Mapping[str, Images], path: Path, title: str, notes: Sequence[str], n_rows: int = 8
) -> None:
    """Draws the first images of each column side by side, an image a row."""
    n_rows = min(n_rows, len(next(iter(columns.values()))))
    board = Board(n_rows, len(columns), title, notes, headers="first", caption=0.02, tile=0.9)
    figure = board.make()
    for j, (name, images) in enumerate(columns.items()):
        for i in range(n_rows):
            axes = board.tile_axes(figure, i, j)
            figures.show_picture(axes, images[i])
            if i == 0:
                figures.label(axes, name)
    figures.write_figure(figure, path)


def write_bars(
    values: Mapping[str, Interval],
    path: Path,
    title: str,
    ylabel: str,
    baseline: tuple[str, Interval] | None = None,
) -> None:
    """Draws a bar with its interval for each name, and a line for the baseline."""
    figure, axes = _plain_figure(1.2 + 0.75 * len(values), 3.0)
    heights = [v.value for v in values.values()]
    errors = [
        [v.value - v.low for v in values.values()],
        [v.high - v.value for v in values.values()],
    ]
    axes.bar(list(values), heights, yerr=errors, color=figures.BLUE, capsize=3)
    if baseline is not None:
        axes.axhline(baseline[1].value, color=figures.ORANGE, linestyle="--", label=baseline[0])
        axes.set_ylim(top=1.25 * max(*heights, baseline[1].value))  # room for the legend
        axes.legend(frameon=False, fontsize=figures.TEXT, loc="upper left")
    axes.set_title(title, fontsize=figures.TITLE)
    axes.set_ylabel(ylabel, fontsize=figures.TEXT)
    axes.tick_params(axis="x", labelrotation=30)
    figures.write_figure(figure, path)


def write_tradeoff(
    names: Sequence[str], mse: Sequence[Interval], ap: Sequence[float], path: Path
) -> None:
    """Draws average precision against MSE, a point per λ."""
    figure, axes = _plain_figure(4.2, 3.2)
    errors = [[v.value - v.low for v in mse], [v.high - v.value for v in mse]]
    axes.errorbar([v.value for v in mse], ap, xerr=errors, fmt="o", color=figures.BLUE, capsize=3)
    for i, (name, value, precision) in enumerate(zip(names, mse, ap, strict=True)):
        axes.annotate(
            name,
            (value.value, precision),
            xytext=(4, -11 if i % 2 else 4),  # two neighbours may be alike
            textcoords="offset points",
            fontsize=figures.TEXT,
        )
    axes.margins(0.12)  # room for the names
    axes.set_xlabel("MSE of the reconstruction, 95 % interval", fontsize=figures.TEXT)
    axes.set_ylabel("average precision", fontsize=figures.TEXT)
    figures.write_figure(figure, path)


def _plain_figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=figures.TEXT)
    return figure, axes
