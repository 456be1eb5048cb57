"""Figures: the labelled grid of originals and their reconstructions."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from featinv_diffusion.errors import InputError
from featinv_diffusion.files import replacing

Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont

INK, GREY, PAPER, FRAME = "#1a1a1a", "#6b6b6b", "#ffffff", "#d9d9d9"
MARGIN, GAP, ROW_GAP, CAPTION_GAP = 28, 14, 20, 8
TITLE_SIZE, TEXT_SIZE = 22, 15


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


def make_grid(
    rows: Sequence[GridRow],
    *,
    title: str = "",
    subtitle: str = "",
    min_tile: int = 160,
    headers: Sequence[str] = (),
) -> Image.Image:
    """Draws originals | samples with a heading, column headers and a caption under each picture.

    All tiles are squares of one size: that of the samples, times the smallest whole number that
    gives at least `min_tile` pixels. Pictures are enlarged bicubically, so that an original and
    its samples look equally smooth. Rows may have different numbers of samples; their columns are
    named by `headers`, and numbered beyond these.
    """
    if not rows:
        raise InputError("A grid must have at least one row, got none.")
    tile = _tile_size(rows, min_tile)
    n_columns = 1 + max(len(row.samples) for row in rows)
    text = ImageFont.load_default(TEXT_SIZE)
    line = _line_height(text)
    row_height = tile + CAPTION_GAP + line + ROW_GAP
    heading_lines, heading_height = _heading(title, subtitle, n_columns * (tile + GAP) - GAP)
    width = 2 * MARGIN + n_columns * tile + (n_columns - 1) * GAP
    top = MARGIN + heading_height
    height = top + line + CAPTION_GAP + len(rows) * row_height - ROW_GAP + MARGIN
    canvas = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(canvas)
    for y, words, font, colour in heading_lines:
        draw.text((MARGIN, MARGIN + y), words, font=font, fill=colour)
    names = ["original", *headers]
    names += [f"sample {column}" for column in range(len(names), n_columns)]
    for column in range(n_columns):
        _centered(draw, names[column], MARGIN + column * (tile + GAP), top, tile, text, INK)
    for number, row in enumerate(rows):
        _draw_row(canvas, draw, row, top + line + CAPTION_GAP + number * row_height, tile, text)
    return canvas


def _tile_size(rows: Sequence[GridRow], min_tile: int) -> int:
    size = max(max(sample.size) for row in rows for sample in (row.samples or [row.original]))
    return size * math.ceil(min_tile / size)


def _heading(title: str, subtitle: str, width: int) -> tuple[list[tuple[int, str, Font, str]], int]:
    """Returns (y, words, font, colour) of each line and the height of them all."""
    lines, y = [], 0
    for words, size, colour in ((title, TITLE_SIZE, INK), (subtitle, TEXT_SIZE, GREY)):
        font = ImageFont.load_default(size)
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
    font: Font,
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
    font: Font,
    colour: str,
) -> None:
    words = _shortened(_drawable(words), font, width)
    draw.text((x + (width - font.getlength(words)) / 2, y), words, font=font, fill=colour)


def _shortened(words: str, font: Font, width: int) -> str:
    """Takes letters out of the middle until the words fit, to keep the end of a file name."""
    if font.getlength(words) <= width:
        return words
    keep = len(words)
    while keep > 2 and font.getlength(_middle_cut(words, keep)) > width:
        keep -= 1
    return _middle_cut(words, keep)


def _middle_cut(words: str, keep: int) -> str:
    return words[: (keep + 1) // 2] + "…" + words[len(words) - keep // 2 :]


def _wrapped(words: str, font: Font, width: int) -> list[str]:
    lines: list[str] = []
    for word in words.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return [_shortened(line, font, width) for line in lines]


def _drawable(words: str) -> str:
    """Replaces what PIL's own font cannot draw: accents are dropped, other scripts become `?`."""
    plain = unicodedata.normalize("NFKD", words.replace("…", "\0").replace("·", "\1"))
    plain = "".join(c for c in plain if not unicodedata.combining(c))
    plain = plain.encode("ascii", "replace").decode()
    return plain.replace("\0", "…").replace("\1", "·")


def _line_height(font: Font) -> int:
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
