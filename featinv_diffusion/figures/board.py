"""Building blocks of the studies' figures: tiles of pictures and maps, in matplotlib.

The colours of Okabe and Ito and the map cividis can be told apart by colour-blind readers too.
Text stays text in PDF and SVG, and a figure has the same bytes each time it is written.
"""

from __future__ import annotations

import os
import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from featinv_diffusion.errors import InputError
from featinv_diffusion.features.edits import CellMask
from featinv_diffusion.figures.grid import GREY, INK
from featinv_diffusion.files import replacing
from featinv_diffusion.images import to_pil
from featinv_diffusion.metrics.statistics import Interval
from featinv_diffusion.types import Images

SUFFIXES = (".png", ".pdf", ".svg")
BLUE, GREEN, PURPLE = "#0072B2", "#009E73", "#CC79A7"
"""Series, in this order; a single one, or what is measured, may be `INK`, and nulls are `GREY`."""
ORANGE, YELLOW = "#D55E00", "#F0E442"
"""Outside of the scope; the border of a region. Neither colour means anything else."""
HEAT, SIGNED = "cividis", "RdBu_r"
"""Colours of maps from 0 on, and of maps with a sign: blue below 0, white, red above."""
DPI = 200
TITLE, TEXT = 10.0, 7.5  # points
_TITLE_LETTER, _LETTER = 0.084, 0.054  # inches per letter, a little above the average

_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, and has the letters of most languages
    "font.size": TEXT,
    "text.color": INK,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": TEXT,
    "ytick.labelsize": TEXT,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
    "svg.hashsalt": "featinv",
}
_UNDATED: dict[str, dict[str, Any]] = {
    ".png": {},
    ".pdf": {"CreationDate": None},
    ".svg": {"Date": None},
}


MAX_NAME = 200
"""Bytes of a file name; file systems take 255."""


def check_name(name: str) -> None:
    """Raises `InputError` unless a figure can be written under this name in the output folder."""
    fits = PurePath(name).name == name and PurePath(name).suffix.lower() in SUFFIXES
    if not fits or name.startswith(".") or "\\" in name or not name.isprintable():
        raise InputError(
            "A figure must be a printable file name that ends in "
            f"{', '.join(SUFFIXES)}, got {name!r}."
        )
    if len(os.fsencode(name)) > MAX_NAME:
        raise InputError(
            f"A figure's name must have at most {MAX_NAME} bytes, but has "
            f"{len(os.fsencode(name))}. Choose a shorter one."
        )


def write_figure(figure: Figure, path: Path) -> None:
    """Writes a figure in the format of the suffix, whole or not at all."""
    suffix = path.suffix.lower()
    with mpl.rc_context(_STYLE), replacing(path) as partial:
        figure.savefig(
            partial, format=suffix[1:], dpi=DPI, facecolor="white", metadata=_UNDATED[suffix]
        )


@dataclass(frozen=True)
class Board:
    """A figure with a heading and rows of equal square tiles below it, in inches.

    Args:
        right: free width at the right of the tiles.
        after_first: free width between the first column and the others.
        header: height above the tiles for `label`s.
        headers: whether all rows have a header, or only the first one.
        caption: height below each tile.
        extra: free height below the tiles.
    """

    n_rows: int
    n_columns: int
    title: str
    notes: Sequence[str]
    tile: float = 1.15
    gap: float = 0.08
    margin: float = 0.3
    right: float = 0.0
    after_first: float = 0.0
    header: float = 0.2
    headers: Literal["all", "first"] = "all"
    caption: float = 0.2
    extra: float = 0.0

    @property
    def width(self) -> float:
        tiles = self.n_columns * (self.tile + self.gap) - self.gap
        return 2 * self.margin + tiles + self.after_first + self.right

    @property
    def height(self) -> float:
        return self.bottom_of(self.n_rows - 1) + self.margin + self.extra

    def make(self) -> Figure:
        """Returns the figure with its heading."""
        with mpl.rc_context(_STYLE):
            figure = Figure(figsize=(self.width, self.height))
            x, top = self.margin / self.width, self.margin
            for line, height, style in self._lines:
                figure.text(x, 1 - top / self.height, line, va="top", **style)
                top += height
        return figure

    def tile_axes(self, figure: Figure, row: int, column: int) -> Axes:
        """Returns the axes of a tile; they run from 0 to 1, from the upper left corner."""
        top = self.bottom_of(row) - self.caption - self.tile
        axes = self.axes(figure, self.left_of(column), top, self.tile, self.tile)
        axes.set(xlim=(0, 1), ylim=(1, 0), xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        return axes

    def axes(self, figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
        """Returns axes at a place in inches from the upper left corner."""
        bottom = self.height - top - height
        box = (
            left / self.width,
            bottom / self.height,
            width / self.width,
            height / self.height,
        )
        with mpl.rc_context(_STYLE):
            return figure.add_axes(box)

    def left_of(self, column: int) -> float:
        """Returns how far from the left of the figure a column starts."""
        start = self.margin + (self.after_first if column else 0)
        return start + column * (self.tile + self.gap)

    def bottom_of(self, row: int) -> float:
        """Returns how far from the top of the figure a row ends, with its captions."""
        further = (self.header if self.headers == "all" else self.gap) + self.tile + self.caption
        return self._heading + self.header + self.tile + self.caption + row * further

    @property
    def _heading(self) -> float:
        return self.margin + sum(height for _, height, _ in self._lines) + 0.08

    @property
    def _lines(self) -> list[tuple[str, float, dict[str, Any]]]:
        """Returns each line of the heading, wrapped to the width, with its height and style."""
        room = self.width - 2 * self.margin
        titles = textwrap.wrap(self.title, int(room / _TITLE_LETTER))
        notes = [line for note in self.notes for line in textwrap.wrap(note, int(room / _LETTER))]
        title_style = {"size": TITLE, "weight": "bold"}
        return [(line, 0.22, title_style) for line in titles] + [
            (line, 0.16, {"color": GREY}) for line in notes
        ]


def show_picture(axes: Axes, picture: Image.Image | Float[Tensor, "3 height width"]) -> None:
    """Draws a picture over the whole tile, smoothly enlarged as in the grids of `sample`."""
    image = to_pil(picture[None])[0] if isinstance(picture, Tensor) else picture
    axes.imshow(np.asarray(image), extent=(0, 1, 1, 0), interpolation="bicubic", aspect="auto")


def show_map(axes: Axes, values: Float[Tensor, "h w"], low: float, high: float) -> Any:
    """Draws a map in colours that run from `low` to `high`; returns what a colour bar needs."""
    return axes.imshow(
        values.numpy(),
        extent=(0, 1, 1, 0),
        cmap=HEAT,
        vmin=low,
        vmax=high,
        interpolation="nearest",
        aspect="auto",
    )


def show_signed(axes: Axes, values: Float[Tensor, "h w"], high: float) -> Any:
    """Draws a map with a sign in colours that run from −high to high; see `show_map`."""
    image = show_map(axes, values, -high, high)
    image.set_cmap(SIGNED)
    return image


def add_colour_bar(
    board: Board,
    figure: Figure,
    row: int,
    image: Any,
    label: str,
    column: int | None = None,
    mark: float | None = None,
) -> None:
    """Draws the scale of a row's maps in a column, by default right of all; takes 0.6 inches.

    Args:
        mark: value at which a line is drawn across the scale.
    """
    left = board.left_of(board.n_columns if column is None else column)
    top = board.bottom_of(row) - board.caption - board.tile
    axes = board.axes(figure, left, top, 0.09, board.tile)
    with mpl.rc_context(_STYLE):
        bar = figure.colorbar(image, cax=axes, ticks=MaxNLocator(4))
        bar.set_label(label, size=TEXT)
        if mark is not None and mark <= image.get_clim()[1]:
            for colour, width in ((INK, 3), ("white", 1.2)):
                axes.axhline(mark, color=colour, linewidth=width)
        axes.spines[:].set_visible(False)


def outline(axes: Axes, mask: CellMask) -> None:
    """Draws the border of the marked cells over a tile, yellow on black."""
    lines = border_lines(mask)
    for colour, width in (("black", 2.6), (YELLOW, 1.3)):
        axes.add_collection(
            LineCollection(
                lines, colors=colour, linewidths=width, capstyle="projecting", clip_on=False
            ),
            autolim=False,
        )


def border_lines(mask: CellMask) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """Returns the lines ((x, y), (x, y)) between marked and unmarked cells, as fractions."""
    h, w = mask.shape
    cells = np.pad(mask.numpy(), 1).astype(int)
    upright = np.argwhere(np.diff(cells, axis=1)[1:-1])
    level = np.argwhere(np.diff(cells, axis=0)[:, 1:-1])
    lines = [((x / w, y / h), (x / w, (y + 1) / h)) for y, x in upright.tolist()]
    return lines + [((x / w, y / h), ((x + 1) / w, y / h)) for y, x in level.tolist()]


def label(axes: Axes, words: str, **style: Any) -> None:
    """Writes a line above a tile."""
    axes.text(0.5, -0.04, words, ha="center", va="bottom", size=TEXT, **style)


def caption(axes: Axes, words: str, **style: Any) -> None:
    """Writes a line below a tile."""
    axes.text(0.5, 1.04, words, ha="center", va="top", size=TEXT, **style)


def side_label(axes: Axes, words: str) -> None:
    """Writes a vertical line of text at the left of a tile."""
    axes.text(-0.06, 0.5, words, ha="right", va="center", rotation=90, size=TEXT)


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Moves heights apart until none are closer than `gap`, and keeps their order."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    places = [heights[i] for i in order]
    for _ in range(100):
        for i in range(1, len(places)):
            short = gap - (places[i] - places[i - 1])
            if short > 0:
                places[i - 1] -= short / 2
                places[i] += short / 2
    return [places[order.index(i)] for i in range(len(heights))]


def number(value: float) -> str:
    """Returns the value with two decimals, never as -0.00."""
    return f"{round(value, 2) + 0.0:.2f}"


def exact_number(value: float) -> str:
    """Returns the shortest text that means exactly this number, so that names stay distinct."""
    rounded = round(value, 12) + 0.0
    return f"{rounded:g}" if float(f"{rounded:g}") == rounded else repr(rounded)


def short_name(path: str, length: int = 19) -> str:
    """Returns a file name without suffix, cut to the width of a tile; its end is kept."""
    stem = unicodedata.normalize("NFC", PurePath(path).stem)
    stem = stem.encode("utf-8", "replace").decode()
    short = stem if len(stem) <= length else f"{stem[:4]}…{stem[5 - length :]}"
    return short.replace("$", r"\$")


# ---- Whole figures: grids of pictures, bars with intervals ---------------------------------------


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
        axes.axhline(baseline[1].value, color=GREY, linestyle="--", label=baseline[0])
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
