"""Edits of feature maps: pure functions, randomness enters as a generator."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from featinv_diffusion.errors import InputError
from featinv_diffusion.types import Features


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
