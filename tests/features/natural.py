"""Feature maps that are smooth over cells, as natural ones are."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

CHANNELS, GRID = 12, (6, 8)


def make_maps(n: int, seed: int, channels: int = CHANNELS) -> Tensor:
    """Coarse patterns of few directions, of many strengths, with an offset and a little noise."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, 5, generator=torch.Generator().manual_seed(0))
    coarse = torch.randn(n, 5, 2, 3, generator=generator).pow(3)
    smooth = F.interpolate(coarse, GRID, mode="bilinear")
    strength = torch.rand(n, 1, 1, 1, generator=generator) + 0.5
    noise = 0.05 * torch.randn(n, channels, *GRID, generator=generator)
    return 1 + strength * torch.einsum("ck,bkhw->bchw", mixing, smooth) + noise
