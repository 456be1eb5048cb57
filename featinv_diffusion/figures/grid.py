"""Figures: the labelled grid of originals and their reconstructions."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from featinv_diffusion.errors import InputError
from featinv_diffusion.files import replacing
from featinv_diffusion.images import write_png

if TYPE_CHECKING:  # slow to import, and a PNG needs neither
    from matplotlib.figure import Figure

INK, GREY, PAPER, FRAME = "#1a1a1a", "#6b6b6b", "#ffffff", "#d9d9d9"
"""Of all figures."""
MARGIN, GAP, ROW_GAP, CAPTION_GAP = 28, 14, 20, 8
TITLE_SIZE, TEXT_SIZE = 20, 14


_Line: TypeAlias = tuple[int, str, ImageFont.FreeTypeFont, str]


@dataclass(frozen=True)
class GridRow:
    """One original, its reconstructions, and the line under each.

    Args:
        label: the line under the original, usually the file name; shortened to fit.
        captions: the line under each sample.
    """

    original: Image.Image
    label: str
    samples: Sequence[Image.Image]
    captions: Sequence[str]


@dataclass(frozen=True)
class Grid:
    """Originals | samples with a heading, column headers and a caption under each picture.

    Rows may have different numbers of samples. Their columns are named by `headers`, and beyond
    these by the number that ends the samples' file names.

    Args:
        title: above all.
        subtitle: below the title; lines.
        min_tile: pixels of a tile at least.
        headers: of the first columns of samples.

    Raises:
        InputError: no row.
    """

    rows: Sequence[GridRow]
    title: str = ""
    subtitle: str = ""
    min_tile: int = 160
    headers: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not self.rows:
            raise InputError("A grid must have at least one row, got none.")

    @property
    def columns(self) -> list[str]:
        """The name of each column, the originals' first."""
        n_samples = max(len(row.samples) for row in self.rows)
        names = [*self.headers, *(f"sample {j}" for j in range(len(self.headers), n_samples))]
        return ["original", *names[:n_samples]]

    def write(self, path: Path) -> None:
        """Writes a PNG pixel by pixel, or a PDF or SVG whose text is text.

        Raises:
            OSError: a place where nothing can be written.
        """
        if path.suffix.lower() == ".png":
            write_png(self.image(), path)
        else:
            from featinv_diffusion.figures.board import write_figure

            write_figure(self.figure(), path)

    def figure(self) -> Figure:
        """Draws the grid on the board of all figures."""
        from featinv_diffusion.figures import board as figures

        notes = self.subtitle.splitlines()
        names = self.columns
        board = figures.Board(len(self.rows), len(names), self.title, notes, headers="first")
        figure = board.make()
        for number, row in enumerate(self.rows):
            captions = [figures.short_name(row.label), *row.captions]
            pictures = [row.original, *row.samples]
            for column, (picture, words) in enumerate(zip(pictures, captions, strict=True)):
                axes = board.tile_axes(figure, number, column)
                figures.show_picture(axes, picture)
                figures.caption(axes, words, color=INK if column else GREY)
                if number == 0:
                    figures.label(axes, names[column])
        return figure

    def image(self) -> Image.Image:
        """Draws the grid pixel by pixel, fast and without plotting libraries.

        All tiles are squares of one size: that of the samples, times the smallest whole number
        that gives at least `min_tile` pixels. Pictures are enlarged bicubically, so that an
        original and its samples look equally smooth.
        """
        tile, names = _tile_size(self.rows, self.min_tile), self.columns
        text = load_font(TEXT_SIZE)
        line = _line_height(text)
        row_height = tile + CAPTION_GAP + line + ROW_GAP
        width = len(names) * (tile + GAP) - GAP
        heading_lines, heading_height = _heading(self.title, self.subtitle, width)
        top = MARGIN + heading_height
        height = top + line + CAPTION_GAP + len(self.rows) * row_height - ROW_GAP + MARGIN
        canvas = Image.new("RGB", (width + 2 * MARGIN, height), PAPER)
        draw = ImageDraw.Draw(canvas)
        for y, words, font, colour in heading_lines:
            draw.text((MARGIN, MARGIN + y), words, font=font, fill=colour)
        for column, name in enumerate(names):
            _centered(draw, name, MARGIN + column * (tile + GAP), top, tile, text, INK)
        for number, row in enumerate(self.rows):
            below = top + line + CAPTION_GAP + number * row_height
            _draw_row(canvas, draw, row, below, tile, text)
        return canvas


def make_grid(
    rows: Sequence[GridRow],
    *,
    title: str = "",
    subtitle: str = "",
    min_tile: int = 160,
    headers: Sequence[str] = (),
) -> Image.Image:
    """Draws a `Grid` pixel by pixel."""
    return Grid(rows, title, subtitle, min_tile, headers).image()


@cache
def load_font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Returns the font of all figures, which comes with matplotlib, without importing it."""
    found = find_spec("matplotlib")
    assert found is not None
    assert found.origin is not None
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(found.origin).parent / "mpl-data/fonts/ttf" / name, size)


def _tile_size(rows: Sequence[GridRow], min_tile: int) -> int:
    size = max(max(sample.size) for row in rows for sample in (row.samples or [row.original]))
    return size * math.ceil(min_tile / size)


def _heading(
    title: str, subtitle: str, width: int
) -> tuple[list[tuple[int, str, ImageFont.FreeTypeFont, str]], int]:
    """Returns (y, words, font, colour) of each line and the height of them all."""
    lines, y = [], 0
    fonts = (load_font(TITLE_SIZE, bold=True), load_font(TEXT_SIZE))
    for words, font, colour in ((title, fonts[0], INK), (subtitle, fonts[1], GREY)):
        for paragraph in words.splitlines():
            for piece in _wrapped(_drawable(paragraph), font, width):
                lines.append((y, piece, font, colour))
                y += _line_height(font) + 4
    return lines, y + 12 if lines else 0


def _draw_row(
    canvas: Image.Image,
    draw: ImageDraw.ImageDraw,
    row: GridRow,
    y: int,
    tile: int,
    font: ImageFont.FreeTypeFont,
) -> None:
    pictures = [row.original, *row.samples]
    captions = [row.label, *row.captions]
    for column, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        x = MARGIN + column * (tile + GAP)
        canvas.paste(picture.resize((tile, tile), Image.Resampling.BICUBIC), (x, y))
        draw.rectangle((x - 1, y - 1, x + tile, y + tile), outline=FRAME)
        _centered(draw, caption, x, y + tile + CAPTION_GAP, tile, font, INK if column else GREY)


def _centered(
    draw: ImageDraw.ImageDraw,
    words: str,
    x: int,
    y: int,
    width: int,
    font: ImageFont.FreeTypeFont,
    colour: str,
) -> None:
    words = _shortened(_drawable(words), font, width)
    draw.text((x + (width - font.getlength(words)) / 2, y), words, font=font, fill=colour)


def _shortened(words: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Takes letters out of the middle until the words fit, to keep the end of a file name."""
    if font.getlength(words) <= width:
        return words
    keep = len(words)
    while keep > 2 and font.getlength(_middle_cut(words, keep)) > width:
        keep -= 1
    return _middle_cut(words, keep)


def _middle_cut(words: str, keep: int) -> str:
    return words[: (keep + 1) // 2] + "…" + words[len(words) - keep // 2 :]


def _wrapped(words: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    lines: list[str] = []
    for word in words.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return [_shortened(line, font, width) for line in lines]


def _drawable(words: str) -> str:
    """Replaces what the font of figures cannot draw by `?`."""
    return "".join(c if _has_glyph(c) else "?" for c in unicodedata.normalize("NFC", words))


@cache
def _has_glyph(letter: str) -> bool:
    draw: Any = load_font(TEXT_SIZE).getmask
    return letter.isspace() or bytes(draw(letter)) != bytes(draw("\uffff"))


def _line_height(font: ImageFont.FreeTypeFont) -> int:
    return math.ceil(font.getbbox("Ag")[3])


def draw_map(values: Float[Tensor, "h w"], size: tuple[int, int]) -> Image.Image:
    """Returns a map of shares in [0, 1] in the colours of the figures, as a picture of a size."""
    from matplotlib import colormaps  # slow to import, and few grids hold a map

    colours = colormaps["cividis"](values.clamp(0, 1).numpy(), bytes=True)[..., :3]
    return Image.fromarray(colours).resize(size, Image.Resampling.NEAREST)


# ---- Pictures in their order -----------------------------------------------------------------


def make_strip(pictures: Sequence[Image.Image]) -> Image.Image:
    """Returns pictures of one size side by side."""
    width, height = pictures[0].size
    strip = Image.new("RGB", (width * len(pictures), height))
    for i, picture in enumerate(pictures):
        strip.paste(picture, (i * width, 0))
    return strip


def write_film(pictures: Sequence[Image.Image], path: Path, *, milliseconds: int = 200) -> None:
    """Writes pictures as an animated GIF that repeats, each for so long."""
    with replacing(path) as partial:
        pictures[0].save(
            partial,
            format="GIF",
            save_all=True,
            append_images=pictures[1:],
            duration=milliseconds,
            loop=0,
        )
