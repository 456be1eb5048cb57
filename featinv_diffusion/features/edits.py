"""Edits of feature maps: pure functions, where randomness enters as a generator.

The features are the first argument, so `functools.partial` makes a `FeatureEdit` of each function,
such as `partial(paste, other=b, mask=box_mask(box, grid))`, which `FeatInvPipeline` takes too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from featinv_diffusion.errors import InputError
from featinv_diffusion.images import center_square, to_tensor
from featinv_diffusion.types import Features

FeatureEdit: TypeAlias = Callable[[Features], Features]
"""A function of features that returns others of the same shape and leaves its input unchanged."""

OtherFeatures: TypeAlias = Float[Tensor, "..."]
"""Feature maps to combine with others: equally many of the same shape, or one for all."""

HIGH = 0.5
"""Share of the greatest activation that a cell needs to count as one of the concept."""

Cells: TypeAlias = Bool[Tensor, "..."]
"""Marked cells, `[h, w]` for all maps or `[b, h, w]`."""


def mix(maps: Sequence[OtherFeatures], weights: Sequence[float]) -> Features:
    """Returns Σ_k weights[k] · maps[k]; weights may be negative and need not sum to 1.

    Raises:
        InputError: no maps, maps of several shapes, or not one finite weight for each.
    """
    if not maps or len(maps) != len(weights):
        raise InputError(
            "There must be at least one feature map, and one weight for each, got "
            f"{len(weights)} weights and {len(maps)} maps."
        )
    if not all(math.isfinite(weight) for weight in weights):
        raise InputError(f"Weights must be finite numbers, got {list(weights)}.")
    total = torch.zeros_like(maps[0])
    for features, weight in zip(maps, weights, strict=True):
        total = total + weight * _alike(features, maps[0])
    return total


def interpolate(features: Features, other: OtherFeatures, weight: float) -> Features:
    """Returns weight · features + (1 − weight) · other (FeatInv, section 4.3)."""
    return mix([features, _alike(other, features)], [weight, 1 - weight])


def paste(features: Features, other: OtherFeatures, mask: Cells) -> Features:
    """Returns the features with the cells in `mask` replaced by those of `other`.

    Args:
        features: `[b, c, h, w]`.
        other: where the new cells come from.
        mask: the cells to replace; see `box_mask`.

    Raises:
        InputError: `other` or the mask has another grid.
    """
    return torch.where(_over_channels(mask, features), _alike(other, features), features)


def scale_part(
    features: Features,
    part: OtherFeatures | FeatureEdit,
    factor: float,
    mask: Cells | None = None,
) -> Features:
    """Returns features − (1 − factor) · part (FeatInv, algorithm 1, where the factor is 0.25).

    Args:
        features: `[b, c, h, w]`.
        part: what to attenuate, or a function that gives it from the features, such as
            `partial(dictionary.part, concept=0)`.
        factor: below 1 attenuates, 0 removes, 1 changes nothing, above 1 amplifies.
        mask: cells to change; None is all.

    Raises:
        InputError: a factor that is not finite, or another shape.
    """
    if not math.isfinite(factor):
        raise InputError(f"A factor must be a finite number, got {factor}.")
    parts = part if isinstance(part, Tensor) else part(features)
    change = (1 - factor) * _alike(parts, features)
    return features - (change if mask is None else change * _over_channels(mask, features))


def in_sequence(*edits: FeatureEdit) -> FeatureEdit:
    """Returns the edit that applies these one after the other; without any it changes nothing."""

    def apply(features: Features) -> Features:
        for edit in edits:
            features = edit(features)
        return features

    return apply


def permute_cells(
    features: Features, generator: torch.Generator | Sequence[torch.Generator]
) -> Features:
    """Shuffles the h·w feature vectors of each map, which forgets where each of them was.

    Args:
        features: `[b, c, h, w]`.
        generator: CPU generator that all maps draw from in turn, or one per map.
    """
    b, _, h, w = features.shape
    generators = [generator] * b if isinstance(generator, torch.Generator) else list(generator)
    if len(generators) != b:
        raise InputError(
            f"There must be one generator per map, got {len(generators)} for {b} maps."
        )
    order = torch.stack([torch.randperm(h * w, generator=g) for g in generators])
    cells = features.flatten(2)
    return cells.gather(2, order.to(cells.device)[:, None].expand_as(cells)).reshape(features.shape)


def _alike(other: OtherFeatures, features: Features) -> Features:
    """Returns `other` with the dtype, device and number of maps of `features`."""
    if other.shape[1:] != features.shape[1:] or len(other) not in (1, len(features)):
        raise InputError(
            "Feature maps to combine must have one shape, got "
            f"{list(features.shape)} and {list(other.shape)}."
        )
    return other.to(features).expand_as(features)


def _over_channels(mask: Cells, features: Features) -> Bool[Tensor, "b 1 h w"]:
    masks = mask if mask.ndim == 3 else mask[None]
    if masks.ndim != 3 or masks.shape[1:] != features.shape[2:]:
        raise InputError(
            f"A mask must have the grid of the features, {list(features.shape[2:])}, got the shape "
            f"{list(mask.shape)}. Make it with box_mask or picture_mask."
        )
    if len(masks) not in (1, len(features)):
        raise InputError(
            f"There must be one mask, or one per map, got {len(masks)} for {len(features)} maps."
        )
    return masks.to(features.device)[:, None].expand(len(features), -1, -1, -1)


# ---- Regions of a feature map, given as boxes or pictures ----------------------------------------

CellMask = Bool[Tensor, "h w"]

_ROUNDING = 1e-6  # of a cell, so that 0.3 of 10 cells are 3 cells in spite of rounding errors
_ASPECT_TOLERANCE = 0.02


def box_mask(box: Sequence[float], grid: tuple[int, int]) -> CellMask:
    """Marks the cells that a box touches.

    Args:
        box: (y0, x0, y1, x1) as fractions of the square that the backbone sees, from its upper left
            corner; rounded out to whole cells. A box without area marks no cell.
        grid: (h, w).

    Raises:
        InputError: not four numbers in [0, 1], or an end before its start.
    """
    if len(box) != 4 or not all(math.isfinite(value) and 0 <= value <= 1 for value in box):
        raise InputError(
            "A box must be four fractions y0,x0,y1,x1 of the picture, each in 0 … 1, "
            f"got {_listed(box)}."
        )
    y0, x0, y1, x1 = box
    if y1 < y0 or x1 < x0:
        raise InputError(f"A box must have y0 ≤ y1 and x0 ≤ x1, got y0,x0,y1,x1 = {_listed(box)}.")
    mask = torch.zeros(grid, dtype=torch.bool)
    if y0 < y1 and x0 < x1:
        mask[_rounded_out(y0, y1, grid[0]), _rounded_out(x0, x1, grid[1])] = True
    return mask


def picture_mask(
    picture: Image.Image, grid: tuple[int, int], size: tuple[int, int] | None = None
) -> CellMask:
    """Marks the cells in which any pixel of a picture is lighter than half grey.

    Args:
        picture: the mask; its centre square is laid over the square that the backbone sees.
        grid: (h, w).
        size: (width, height) of the picture that the mask belongs to. The mask must be square or
            have these proportions, else it would not lie where it was drawn.

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
    """Marks the pixels of a picture of `size` (height, width) whose centres lie in marked cells."""
    return F.interpolate(mask[None, None].float(), size, mode="nearest-exact")[0, 0] > 0.5


def _rounded_out(start: float, end: float, n_cells: int) -> slice:
    first = math.floor(start * n_cells + _ROUNDING)
    return slice(first, max(first + 1, math.ceil(end * n_cells - _ROUNDING)))


def _listed(box: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in box)


def high_cells(
    activation: Float[Tensor, "... h w"], threshold: float | None = None
) -> Bool[Tensor, "... h w"]:
    """Marks the cells with at least this activation; those without any are never marked.

    Args:
        threshold: None is `HIGH` of the greatest activation given.
    """
    low = HIGH * activation.max() if threshold is None else threshold
    return (activation >= low) & (activation > 0)


# ---- Edits of the same size that mean nothing ----------------------------------------------------


def random_like(
    change: Features, frame: Float[Tensor, "c k"], generator: torch.Generator
) -> Features:
    """Turns a change of maps to random directions: the null of an edit.

    Each cell of the change keeps its length, and any two the angle between them as far as the
    frame has directions for it, so that a change along one direction becomes one along a random
    one.

    Args:
        change: `[b, c, h, w]`, edited minus unedited maps; all of them turn alike.
        frame: directions whose span is drawn from, each as long as data vary along it: the axes of
            natural maps times their standard deviations, or `frame_of_cells`.
        generator: on the CPU.

    Raises:
        InputError: a frame of another width.
    """
    b, c, h, w = change.shape
    if len(frame) != c:
        raise InputError(f"The frame must be one of {c} channels, got {len(frame)}.")
    frame = frame.cpu().double()
    cells = change.detach().cpu().double().permute(0, 2, 3, 1).reshape(-1, c)
    codes, lengths, _ = torch.linalg.svd(cells, full_matrices=False)
    rank = min(len(lengths), frame.shape[1])
    noise = torch.randn(rank, frame.shape[1], generator=generator, dtype=torch.float64)
    drawn = torch.linalg.qr(frame @ noise.T).Q
    turned = (codes * lengths)[:, :rank] @ drawn.T
    # A cell in directions that the frame has no room for goes along the first one.
    tiny = 1e-9 * cells.norm(dim=1, keepdim=True)
    turned = F.normalize(turned + tiny * drawn[:, 0], dim=1, eps=1e-300)
    turned = turned * cells.norm(dim=1, keepdim=True)
    return turned.reshape(b, h, w, c).permute(0, 3, 1, 2).to(change)


def random_part(
    features: Features,
    part: Features,
    frame: Float[Tensor, "c k"],
    generator: torch.Generator,
    n_directions: int = 1,
) -> tuple[Features, int]:
    """Returns an equally long part of a map in a random subspace: the null of a removal.

    The map is projected on random directions of the frame, `n_directions` of them and then as many
    more as it takes to be as long as `part`, and the projection is shortened to that length.
    Removing it takes away what the map has, as removing a concept does.

    Args:
        features: `[1, c, h, w]`.
        part: whose length over the whole map is taken, as long as the map or shorter.
        frame: directions whose span is drawn from, see `random_like`; of a rank below their number
            shortened by `shorten`.
        generator: on the CPU.
        n_directions: dimensions of the concept that is compared.

    Returns:
        The part, and the dimensions of its subspace. Where the whole span of the frame holds less
        than `part`, its projection is lengthened.

    Raises:
        InputError: a frame of another width.
    """
    b, c, h, w = features.shape
    if len(frame) != c:
        raise InputError(f"The frame must be one of {c} channels, got {len(frame)}.")
    frame = frame.cpu().double()
    cells = features.detach().cpu().double().permute(0, 2, 3, 1).reshape(-1, c)
    noise = torch.randn(frame.shape[1], min(frame.shape), generator=generator, dtype=torch.float64)
    directions = torch.linalg.qr(frame @ noise).Q
    codes = cells @ directions
    lengths = codes.square().sum(dim=0).cumsum(dim=0).sqrt()
    wanted = part.detach().double().norm().cpu()
    rank = min(max(n_directions, int((lengths < wanted).sum()) + 1), len(lengths))
    drawn = codes[:, :rank] @ directions[:, :rank].T
    drawn = drawn * (wanted / lengths[rank - 1].clamp_min(1e-300))
    return drawn.reshape(b, h, w, c).permute(0, 3, 1, 2).to(features), rank


def shorten(frame: Float[Tensor, "c k"]) -> Float[Tensor, "c r"]:
    """Returns as many orthogonal directions as a frame has dimensions, of the same second moment.

    Combinations of both with standard normal weights have the same distribution.
    """
    directions, lengths, _ = torch.linalg.svd(frame.cpu().double(), full_matrices=False)
    kept = lengths >= 1e-6 * lengths.max()
    return (directions[:, kept] * lengths[kept]).to(frame.dtype)


def frame_of_cells(features: Features) -> Float[Tensor, "c n"]:
    """Returns the deviations of a map's cells from their mean, a frame for `random_like`."""
    cells = features.flatten(2)[0].float().cpu()
    return cells - cells.mean(dim=1, keepdim=True)
