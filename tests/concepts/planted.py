"""Feature maps with known concepts: cells of planted subspaces, in random order."""

from __future__ import annotations

import torch
from torch import Tensor


def make_generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def to_map(cells: Tensor, side: int = 8) -> Tensor:
    """Puts `[n, c]` into maps `[n / side², c, side, side]`, in raster order."""
    return cells.reshape(-1, side, side, cells.shape[1]).permute(0, 3, 1, 2).contiguous()


def to_cells(features: Tensor) -> Tensor:
    return features.permute(0, 2, 3, 1).flatten(0, 2)


def make_union(
    n_subspaces: int = 3, dim: int = 3, channels: int = 32, n: int = 384, noise: float = 0.01
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns maps, the subspace of each cell `[n]`, and bases `[n_subspaces, dim, channels]`."""
    generator = make_generator()
    frames = torch.randn(n_subspaces, channels, dim, generator=generator)
    bases = torch.linalg.qr(frames)[0].transpose(1, 2)
    labels = torch.randint(n_subspaces, (n,), generator=generator)
    codes = torch.randn(n, 1, dim, generator=generator)
    cells = torch.bmm(codes, bases[labels])[:, 0]
    cells = cells + noise * torch.randn(n, channels, generator=generator)
    return to_map(cells), labels, bases
