"""Regions of the cells of a feature map, from what a person says of the picture."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from featinv_diffusion.errors import InputError
from featinv_diffusion.images import center_square, to_tensor

CellMask = Bool[Tensor, "h w"]

_ROUNDING = 1e-6  # of a cell: 0.3 of 10 cells are 3 cells, whatever 0.3 · 10 is in binary
_ASPECT_TOLERANCE = 0.02


def box_mask(box: Sequence[float], grid: tuple[int, int]) -> CellMask:
    """Marks the cells that a box touches.

    Args:
        box: (y0, x0, y1, x1) as fractions of the square that the backbone sees, (0, 0) its upper
            left corner; rounded out to whole cells. A box without area marks no cell.
        grid: (h, w).

    Raises:
        InputError: not four numbers, out of [0, 1], or ends before starts.
    """
    if len(box) != 4 or not all(math.isfinite(value) and 0 <= value <= 1 for value in box):
        raise InputError(
            "A box must be four fractions y0,x0,y1,x1 of the picture, each in 0 … 1, "
            f"but {_listed(box)} came."
        )
    y0, x0, y1, x1 = box
    if y1 < y0 or x1 < x0:
        raise InputError(
            f"A box must have y0 ≤ y1 and x0 ≤ x1, but y0,x0,y1,x1 = {_listed(box)} came."
        )
    mask = torch.zeros(grid, dtype=torch.bool)
    if y0 < y1 and x0 < x1:
        mask[_rounded_out(y0, y1, grid[0]), _rounded_out(x0, x1, grid[1])] = True
    return mask


def picture_mask(
    picture: Image.Image, grid: tuple[int, int], size: tuple[int, int] | None = None
) -> CellMask:
    """Marks the cells in which any pixel of a picture is lighter than half grey.

    Args:
        picture: its centre square is laid over the square that the backbone sees.
        grid: (h, w).
        size: (width, height) of the picture that the mask belongs to: the mask must be square or
            have its proportions, else it would lie elsewhere than it was drawn.

    Raises:
        InputError: a mask of other proportions.
    """
    if size is not None and picture.width != picture.height:
        ratio = (picture.width / picture.height) / (size[0] / size[1])
        if abs(ratio - 1) > _ASPECT_TOLERANCE:
            raise InputError(
                f"A mask must be square or have the proportions of its picture, which is "
                f"{size[0]}×{size[1]}, but it is {picture.width}×{picture.height}."
            )
    square = center_square(picture, min(picture.size))
    light = to_tensor(square).mean(dim=1, keepdim=True)
    return F.adaptive_max_pool2d(light, grid)[0, 0] > 0.5


def to_pixels(mask: CellMask, size: tuple[int, int]) -> Bool[Tensor, "height width"]:
    """Marks the pixels, (height, width) of them, whose centres lie in marked cells."""
    return F.interpolate(mask[None, None].float(), size, mode="nearest-exact")[0, 0] > 0.5


def _rounded_out(start: float, end: float, n_cells: int) -> slice:
    first = math.floor(start * n_cells + _ROUNDING)
    return slice(first, max(first + 1, math.ceil(end * n_cells - _ROUNDING)))


def _listed(box: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in box)
