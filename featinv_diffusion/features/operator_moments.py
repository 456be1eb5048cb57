"""What a fit of operators needs of pairs of feature maps: three c×c matrices."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from featinv_diffusion.errors import InputError
from featinv_diffusion.types import Features

_BLOCK = 2048
"""Locations that are held in float64 at a time."""


class PairMoments:
    """Sums of products of unit-norm location vectors of maps X and Y, in float64 on the CPU.

    Maps come in batches and are not kept, so that memory is that of three matrices. Each location
    is scaled to unit L2 norm; a vector of zeros stays zero.

    Args:
        channels: c.

    Attributes:
        xx: XᵀX, `[c, c]`, where rows of X are locations.
        xy: XᵀY.
        yy: YᵀY.
        n: locations so far.
    """

    def __init__(self, channels: int):
        self.channels = channels
        self.n = 0
        self.xx, self.xy, self.yy = torch.zeros(3, channels, channels, dtype=torch.float64)

    def update(self, features: Features, others: Float[Tensor, ...]) -> None:
        """Adds a batch of maps and of what becomes of them.

        Raises:
            InputError: not two batches of one shape and of c channels, or values that are NaN or
                infinite.
        """
        if features.shape != others.shape or features.shape[1] != self.channels:
            raise InputError(
                f"Pairs of feature maps must have one shape and {self.channels} channels, but "
                f"came with {list(features.shape)} and {list(others.shape)}."
            )
        if not bool(features.isfinite().all() and others.isfinite().all()):
            raise InputError(
                "Features to fit an operator on must be finite, but NaN or infinite values came. "
                "Look for overflow in half precision."
            )
        n_maps = max(1, _BLOCK // (features.shape[2] * features.shape[3]))
        for x, y in zip(features.split(n_maps), others.split(n_maps), strict=True):
            self._add(to_unit_rows(x), to_unit_rows(y))

    def merge(self, other: PairMoments) -> None:
        """Adds the maps that `other` has seen, e.g. those of another process.

        Raises:
            InputError: another number of channels.
        """
        if other.channels != self.channels:
            raise InputError(
                "Moments must be of maps of as many channels, but "
                f"{self.channels} and {other.channels} came."
            )
        self.xx += other.xx
        self.xy += other.xy
        self.yy += other.yy
        self.n += other.n

    def residual(self, matrix: Float[Tensor, "c c"]) -> float:
        """Returns ‖X Q − Y‖² / ‖Y‖²; 0 is a perfect fit, that of the identity is doing nothing."""
        total = self.yy.trace()
        left = (matrix * (self.xx @ matrix)).sum() - 2 * (matrix * self.xy).sum() + total
        return (left.clamp_min(0) / total).item()

    def _add(self, x: Float[Tensor, "n c"], y: Float[Tensor, "n c"]) -> None:
        self.xx.addmm_(x.T, x)
        self.xy.addmm_(x.T, y)
        self.yy.addmm_(y.T, y)
        self.n += len(x)


def to_unit_rows(features: Features) -> Float[Tensor, "n c"]:
    """Returns the vector of each location, scaled to unit norm, in float64 on the CPU."""
    rows = features.detach().cpu().movedim(1, -1).flatten(0, 2).double()
    norms = rows.norm(dim=1, keepdim=True)
    return rows / torch.where(norms > 0, norms, 1.0)
