"""Ridge regression from feature maps to pictures or latents, fitted on a stream of any length."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from featinv_diffusion.errors import InputError
from featinv_diffusion.types import Features

PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Shares of the mean variance of an input, of which the best on held-out images is taken."""
HELD_OUT = 10
"""Every tenth image chooses the penalty."""
_WIDEST = 2304
"""Inputs of a cell at most: the matrices have the square of this."""


class _Sums:
    """Sums over rows that a ridge and its error are computed from, whatever the number of rows."""

    def __init__(self, n_in: int, n_out: int):
        self.n = 0
        self.x, self.y = torch.zeros(n_in).double(), torch.zeros(n_out).double()
        self.xx, self.xy = torch.zeros(n_in, n_in).double(), torch.zeros(n_in, n_out).double()
        self.yy = torch.zeros(n_out).double()

    def add(self, x: Float[Tensor, "n p"], y: Float[Tensor, "n q"]) -> None:
        # Products of a batch in float32, several times as fast; their sums in float64.
        self.n += len(x)
        self.x += x.sum(dim=0, dtype=torch.float64)
        self.y += y.sum(dim=0, dtype=torch.float64)
        self.xx += x.T @ x
        self.xy += x.T @ y
        self.yy += y.square().sum(dim=0, dtype=torch.float64)

    def error(self, weight: Float[Tensor, "p q"], bias: Float[Tensor, " q"]) -> Float[Tensor, " q"]:
        """Returns the mean squared error of x W + b over all rows."""
        fitted = ((self.xx @ weight) * weight).sum(dim=0) + 2 * bias * (weight.T @ self.x)
        cross = (weight * self.xy).sum(dim=0) + bias * self.y
        total = fitted + self.n * bias.square() - 2 * cross + self.yy
        return total / self.n

    def solve(self, penalty: float) -> tuple[Float[Tensor, "p q"], Float[Tensor, " q"]]:
        mean_x, mean_y = self.x / self.n, self.y / self.n
        covariance = self.xx / self.n - mean_x.outer(mean_x)
        scale = covariance.diagonal().mean().clamp_min(1e-12)
        covariance.diagonal().add_(penalty * scale)
        cross = self.xy / self.n - mean_x.outer(mean_y)
        weight = torch.linalg.solve(covariance, cross)
        return weight, mean_y - mean_x @ weight


@dataclass(frozen=True, eq=False)
class LocalRidge:
    """A linear map from each cell and its neighbours to the patch of the picture that it covers.

    Args:
        weight: from `window`² cells of c channels to a patch.
        bias: of a patch.
        window: 3, or 1 where three by three cells have too many channels.
        shape: (channels, h, w) of what is predicted.
        grid: cells of the map, resized where the picture is no multiple of them.
        penalty: as a share of the mean variance of an input; of `PENALTIES` the best on held-out
            images.
        n_images: that it was fitted on, the held-out ones among them.
    """

    weight: Float[Tensor, "p q"]
    bias: Float[Tensor, " q"]
    window: int
    shape: tuple[int, int, int]
    grid: tuple[int, int]
    penalty: float
    n_images: int

    def __call__(self, features: Features) -> Float[Tensor, "b k height width"]:
        """Returns the prediction of each map, float32 on the device of the maps."""
        cells = to_windows(features, self.grid, self.window)
        device = features.device
        patches = cells @ self.weight.float().to(device) + self.bias.float().to(device)
        side = (self.shape[1] // self.grid[0], self.shape[2] // self.grid[1])
        rows = patches.unflatten(0, (len(features), -1)).movedim(1, 2)
        return F.fold(rows, self.shape[1:], side, stride=side)


class RidgeFit:
    """Fits a `LocalRidge` for each target to maps that come in batches (Hoerl and Kennard 1970).

    Memory is that of the products of inputs, whatever the number of images; all targets share it.

    Args:
        features: (c, h, w) of a map.
        targets: (channels, h, w) of what is predicted, by name; the sides of each must divide
            those of the largest or be divided by them.
    """

    def __init__(self, features: tuple[int, int, int], targets: Mapping[str, tuple[int, int, int]]):
        channels, *cells = features
        self.targets = dict(targets)
        self.window = 3 if 9 * channels <= _WIDEST else 1
        sides = [math.gcd(*(shape[axis] for shape in targets.values())) for axis in (1, 2)]
        self.grid = (_divisor(sides[0], cells[0]), _divisor(sides[1], cells[1]))
        self.widths = {
            name: shape[0] * (shape[1] // self.grid[0]) * (shape[2] // self.grid[1])
            for name, shape in targets.items()
        }
        n_in, n_out = channels * self.window**2, sum(self.widths.values())
        self.n_images = 0
        self.fitted, self.held_out = _Sums(n_in, n_out), _Sums(n_in, n_out)

    def add(self, features: Features, targets: Mapping[str, Float[Tensor, "b ..."]]) -> None:
        """Adds a batch; every tenth image of all is held out."""
        x = to_windows(features, self.grid, self.window).cpu()
        y = torch.cat([self._to_patches(targets[name], name) for name in self.targets], dim=1)
        held = torch.arange(self.n_images, self.n_images + len(features)) % HELD_OUT == HELD_OUT - 1
        rows = held.repeat_interleave(len(x) // len(features))
        self.n_images += len(features)
        for sums, chosen in ((self.fitted, ~rows), (self.held_out, rows)):
            if chosen.any():
                sums.add(x[chosen], y[chosen])

    def _to_patches(self, target: Float[Tensor, "b ..."], name: str) -> Float[Tensor, "n q"]:
        _, height, width = self.targets[name]
        side = (height // self.grid[0], width // self.grid[1])
        return F.unfold(target.float(), side, stride=side).movedim(1, 2).flatten(0, 1).cpu()

    def solve(self) -> dict[str, LocalRidge]:
        """Returns for each target the ridge of the penalty with the least error when held out.

        Raises:
            InputError: too few images to hold one out.
        """
        if self.held_out.n == 0:
            raise InputError(
                f"A ridge must be fitted on at least {HELD_OUT} images, got {self.n_images}."
            )
        best: dict[str, tuple[float, LocalRidge]] = {}
        for penalty in PENALTIES:
            weight, bias = self.fitted.solve(penalty)
            parts = [part.split(list(self.widths.values()), dim=-1) for part in (weight, bias)]
            errors = self.held_out.error(weight, bias).split(list(self.widths.values()))
            for name, error, w, b in zip(self.widths, errors, *parts, strict=True):
                if name not in best or float(error.mean()) < best[name][0]:
                    ridge = LocalRidge(
                        w, b, self.window, self.targets[name], self.grid, penalty, self.n_images
                    )
                    best[name] = float(error.mean()), ridge
        return {name: ridge for name, (_, ridge) in best.items()}


def to_windows(features: Features, grid: tuple[int, int], window: int) -> Float[Tensor, "n p"]:
    """Returns each cell with its neighbours as a row; beyond the edge stand the cells at it."""
    maps = features.float()
    if (maps.shape[2], maps.shape[3]) != grid:
        maps = F.interpolate(maps, grid, mode="bilinear", align_corners=False, antialias=True)
    pad = window // 2
    maps = F.pad(maps, (pad,) * 4, mode="replicate")
    return F.unfold(maps, window).movedim(1, 2).flatten(0, 1)


def _divisor(side: int, at_least: int) -> int:
    """Returns the least divisor of a side that is no smaller than the number of cells."""
    return next(n for n in range(min(at_least, side), side + 1) if side % n == 0)
