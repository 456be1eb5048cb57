"""What the studies of many images share: a result with several figures, and how these are drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from featinv_diffusion.figures.board import BLUE, ORANGE, TEXT, TITLE, Board, label, show_picture
from featinv_diffusion.metrics.statistics import Interval
from featinv_diffusion.runs.record import RunFolder, to_png
from featinv_diffusion.types import Images

METRICS = "metrics.json"
N_DEFAULT = 250
"""Number of images, if the data have as many and no number is asked for."""


@dataclass(frozen=True, eq=False, repr=False)
class Analysis:
    """What a study of many images found. It shows its first figure in a notebook.

    Args:
        metrics: everything that was measured, as `metrics.json` holds it.
        figures: the figures by file name.
        lines: the main results, a sentence each.
        table: the measurements as rows.
    """

    metrics: dict[str, Any]
    figures: dict[str, Figure]
    lines: list[str] = field(default_factory=list)
    table: list[dict[str, Any]] = field(default_factory=list)

    def figure(self) -> Figure:
        """Returns the first figure; `figures` holds all of them by file name."""
        return next(iter(self.figures.values()))

    def rows(self) -> list[dict[str, Any]]:
        """Returns the measurements as a table, one dict per row."""
        return self.table

    def summary(self) -> str:
        """Returns the main results."""
        return "\n".join(self.lines)

    def save(self, folder: str | Path, **made_by: Any) -> Path:
        """Writes the figures and, last, `metrics.json`.

        Args:
            made_by: further entries, which `metrics.json` holds before the measurements.
        """
        run = RunFolder(folder, METRICS)
        self._write(run, made_by)
        for name, figure in self.figures.items():
            run.figure(name, figure)
        run.complete({**made_by, **self.metrics})
        return run.folder

    def _write(self, run: RunFolder, made_by: Mapping[str, Any]) -> None:
        """Writes what a study has besides."""

    def _repr_png_(self) -> bytes:
        return to_png(self.figure())

    def __repr__(self) -> str:
        return f"{type(self).__name__}: {self.summary()}"


def to_dicts(intervals: Mapping[str, Interval | None]) -> dict[str, Any]:
    """Returns intervals as JSON holds them."""
    return {name: None if value is None else asdict(value) for name, value in intervals.items()}


def to_rows(intervals: Mapping[str, Interval | None], **key: Any) -> list[dict[str, Any]]:
    """Returns intervals as rows of a table, after a key that they share; None is left out."""
    known = {name: value for name, value in intervals.items() if value is not None}
    return [{**key, "name": name, **asdict(value)} for name, value in known.items()]


# ---- Figures -------------------------------------------------------------------------------------


def draw_grid(
    columns: Mapping[str, Images], title: str, notes: Sequence[str], n_rows: int = 8
) -> Figure:
    """Draws the first images of each column side by side, one image per row."""
    n_rows = min(n_rows, len(next(iter(columns.values()))))
    board = Board(n_rows, len(columns), title, notes, headers="first", caption=0.02, tile=0.9)
    figure = board.make()
    for j, (name, images) in enumerate(columns.items()):
        for i in range(n_rows):
            axes = board.tile_axes(figure, i, j)
            show_picture(axes, images[i])
            if i == 0:
                label(axes, name)
    return figure


def draw_bars(
    values: Mapping[str, Interval],
    title: str,
    ylabel: str,
    baseline: tuple[str, Interval] | None = None,
) -> Figure:
    """Draws a bar with its interval for each name, and a line for the baseline."""
    figure, axes = plain_figure(1.2 + 0.75 * len(values), 3.0)
    add_bars(axes, list(values), list(values.values()))
    if baseline is not None:
        axes.axhline(baseline[1].value, color=ORANGE, linestyle="--", label=baseline[0])
        highest = max(*(v.value for v in values.values()), baseline[1].value)
        axes.set_ylim(top=1.25 * highest)  # leaves room for the legend
        axes.legend(frameon=False, fontsize=TEXT, loc="upper left")
    axes.set_title(title, fontsize=TITLE)
    axes.set_ylabel(ylabel, fontsize=TEXT)
    axes.tick_params(axis="x", labelrotation=30)
    return figure


def add_bars(
    axes: Axes,
    places: Sequence[Any],
    values: Sequence[Interval],
    color: Any = BLUE,
    width: float = 0.8,
) -> None:
    """Draws bars with their intervals."""
    errors = [[v.value - v.low for v in values], [v.high - v.value for v in values]]
    heights = [v.value for v in values]
    axes.bar(places, heights, width, yerr=errors, color=color, capsize=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=TEXT)


def plain_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """Returns a figure of this size in inches with one pair of axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=TEXT)
    return figure, axes
