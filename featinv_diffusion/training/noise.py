"""Random draws that belong to a sample, not to a batch or a process."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


class SampleNoise:
    """Draws for a batch, each sample from its own CPU generator, so batches may be split anyhow.

    Args:
        seeds: one per sample, e.g. `batch["seed"]`.
    """

    def __init__(self, seeds: Sequence[int] | Tensor, device: torch.device):
        self.generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        self.device = device

    def normal(self, *shape: int) -> Float[Tensor, "b ..."]:
        return torch.stack([torch.randn(shape, generator=g) for g in self.generators]).to(
            self.device
        )

    def uniform(self, *shape: int) -> Float[Tensor, "b ..."]:
        return torch.stack([torch.rand(shape, generator=g) for g in self.generators]).to(
            self.device
        )

    def timesteps(self, n_train_timesteps: int) -> Tensor:
        """Integers `[b]`, uniform in [0, n_train_timesteps)."""
        draws = [torch.randint(0, n_train_timesteps, (), generator=g) for g in self.generators]
        return torch.stack(draws).to(self.device)
