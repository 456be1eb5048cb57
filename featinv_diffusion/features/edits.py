"""Edits of feature maps: pure functions, randomness enters as a generator.

The features come first, so `functools.partial` makes a `FeatureEdit` of each, which any inverter
can be preceded by and `FeatInvPipeline` takes: `partial(paste, other=b, mask=box_mask(box, grid))`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from featinv_diffusion.errors import InputError
from featinv_diffusion.types import Features

FeatureEdit: TypeAlias = Callable[[Features], Features]
"""From features to others of the same shape, which leaves its input as it was."""

OtherFeatures: TypeAlias = Float[Tensor, "..."]
"""Feature maps to combine with others: as many of the same shape, or one for all."""

Cells: TypeAlias = Bool[Tensor, "..."]
"""Which cells, `[h, w]` for all maps or `[b, h, w]`."""


def mix(maps: Sequence[OtherFeatures], weights: Sequence[float]) -> Features:
    """Returns Σ_k weights[k] · maps[k]; weights may be negative and need not sum to 1.

    Raises:
        InputError: no maps, maps of several shapes, or not one finite weight for each.
    """
    if not maps or len(maps) != len(weights):
        raise InputError(
            "There must be one weight for each of at least one feature map, but "
            f"{len(weights)} weights came for {len(maps)} maps."
        )
    if not all(math.isfinite(weight) for weight in weights):
        raise InputError(f"Weights must be finite numbers, but {list(weights)} came.")
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
        other: what the cells in the mask become.
        mask: which cells; see `box_mask`.

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
        part: what is attenuated, or how to get it from the features, such as
            `partial(dictionary.part, concept=0)`.
        factor: below 1 attenuates, 0 removes, 1 leaves the features, above 1 amplifies.
        mask: cells outside of it are left as they are; None is all.

    Raises:
        InputError: a factor that is not finite, or another shape.
    """
    if not math.isfinite(factor):
        raise InputError(f"A factor must be a finite number, but {factor} came.")
    parts = part if isinstance(part, Tensor) else part(features)
    change = (1 - factor) * _alike(parts, features)
    return features - (change if mask is None else change * _over_channels(mask, features))


def in_sequence(*edits: FeatureEdit) -> FeatureEdit:
    """Returns the edit that applies these one after the other; none of them leave all as it is."""

    def apply(features: Features) -> Features:
        for edit in edits:
            features = edit(features)
        return features

    return apply


def permute_cells(
    features: Features, generator: torch.Generator | Sequence[torch.Generator]
) -> Features:
    """Shuffles the h·w feature vectors of each map: the same vectors, every place forgotten.

    Args:
        features: `[b, c, h, w]`.
        generator: CPU generator that all maps draw from in turn, or one per map.
    """
    b, _, h, w = features.shape
    generators = [generator] * b if isinstance(generator, torch.Generator) else list(generator)
    if len(generators) != b:
        raise InputError(
            f"One generator per map must come, but {len(generators)} came for {b} maps."
        )
    order = torch.stack([torch.randperm(h * w, generator=g) for g in generators])
    cells = features.flatten(2)
    return cells.gather(2, order.to(cells.device)[:, None].expand_as(cells)).reshape(features.shape)


def _alike(other: OtherFeatures, features: Features) -> Features:
    """Returns `other` with the dtype, device and number of maps of `features`."""
    if other.shape[1:] != features.shape[1:] or len(other) not in (1, len(features)):
        raise InputError(
            "Feature maps to combine must have one shape, but came with "
            f"{list(features.shape)} and {list(other.shape)}."
        )
    return other.to(features).expand_as(features)


def _over_channels(mask: Cells, features: Features) -> Bool[Tensor, "b 1 h w"]:
    masks = mask if mask.ndim == 3 else mask[None]
    if masks.ndim != 3 or masks.shape[1:] != features.shape[2:]:
        raise InputError(
            f"A mask must have the grid of the features, {list(features.shape[2:])}, but came with "
            f"shape {list(mask.shape)}. Make it with box_mask or picture_mask."
        )
    if len(masks) not in (1, len(features)):
        raise InputError(
            f"There must be one mask, or one per map, but {len(masks)} came for {len(features)}."
        )
    return masks.to(features.device)[:, None].expand(len(features), -1, -1, -1)
