"""A feature map in a few dozen figures, which tell natural maps from others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from featinv_diffusion.errors import InputError
from featinv_diffusion.metrics.statistics import FeatureMoments
from featinv_diffusion.types import Features

MAX_AXES = 64
BAND_STARTS = (0, 4, 12, 28)
"""Axes are summed up in bands: few of much variance, many of little."""

N_CENTRES = 64
_MAX_CLUSTERED_CELLS = 20_000
_CELLS_PER_CENTRE = 10
_TINY = 1e-8
_ROUNDING = 1e-4  # share of a cell off the axes, below which it cannot be told from 0
_NEGLIGIBLE = 1e-6
"""Share of the largest variance below which an axis holds rounding errors alone."""


@dataclass(frozen=True, eq=False)
class CellBasis:
    """Where the cells of natural maps lie.

    Args:
        mean: of all cells.
        axes: the principal axes of the cells, orthonormal, by falling variance.
        std: of the cells along each axis; coordinates are divided by it.
        place_mean: mean coordinates of the cells at each place.
        cell_centres: coordinates that stand for those of all cells (k-means).
        map_centres: coordinates that stand for those of all maps' means (k-means).
    """

    mean: Float[Tensor, " c"]
    axes: Float[Tensor, "c k"]
    std: Float[Tensor, " k"]
    place_mean: Float[Tensor, "k h w"]
    cell_centres: Float[Tensor, "n_cells k"]
    map_centres: Float[Tensor, "n_maps k"]

    def coordinates(self, features: Features) -> Float[Tensor, "b k h w"]:
        """Returns each cell along the axes, where natural cells have mean 0 and variance 1."""
        centred = features - self.mean[:, None, None]
        return torch.einsum("bchw,ck->bkhw", centred, self.axes / self.std)

    @property
    def bands(self) -> list[slice]:
        """Ranges of axes."""
        n_axes = len(self.std)
        starts = [start for start in BAND_STARTS if start < n_axes]
        return [slice(a, b) for a, b in zip(starts, [*starts[1:], n_axes], strict=True)]


def fit_basis(features: Features, seed: int = 0) -> CellBasis:
    """Finds the basis of natural maps.

    Args:
        features: natural maps, hundreds of them; any precision.
        seed: of k-means.

    Raises:
        InputError: maps that are all the same.
    """
    moments = FeatureMoments(features.shape[1])
    for batch in features.split(64):
        moments.update(_to_cells(batch.float()))
    variance, axes = torch.linalg.eigh(torch.from_numpy(moments.covariance))
    if not variance[-1] > 0:
        raise InputError("Natural maps must differ, but all their cells are the same.")
    n_axes = min(MAX_AXES, int((variance > _NEGLIGIBLE * variance[-1]).sum()))
    mean = torch.from_numpy(moments.mean).float()
    std = variance[-n_axes:].flip(0).sqrt().float()
    axes = axes[:, -n_axes:].flip(1).float().contiguous()
    blank = torch.zeros(0, n_axes)
    bare = CellBasis(mean, axes, std, torch.zeros(n_axes, *features.shape[2:]), blank, blank)
    coordinates = torch.cat([bare.coordinates(batch.float()) for batch in features.split(64)])
    cells = _to_cells(coordinates)
    every = max(1, len(cells) // _MAX_CLUSTERED_CELLS)
    place_mean, map_means = coordinates.mean(dim=0), coordinates.mean(dim=(2, 3))
    centres = [_centres(rows, seed) for rows in (cells[::every], map_means)]
    return CellBasis(mean, axes, std, place_mean, *centres)


@torch.no_grad()
def summarise(features: Features, basis: CellBasis) -> Float[Tensor, "b m"]:
    """Returns m figures of each map, most of them logarithms of mean squares.

    Per band of axes: energy, energy of the map's mean, of the deviation from the place's mean, and
    of differences of cells one cell and half a map apart, and kurtosis. Besides: norms of cells and
    their spread, what lies off the axes, the sharpest seam, distances to the nearest centres.
    Permuted or pasted cells raise differences; mixed maps lie low, between centres and with less
    kurtosis.
    """
    features = features.detach().cpu().float()
    coordinates = basis.coordinates(features)
    figures = [*_of_norms(features, coordinates, basis), *_of_centres(coordinates, basis)]
    figures.append(_sharpest_seam(coordinates))
    for band in basis.bands:
        figures += _of_band(coordinates[:, band], basis.place_mean[band])
    return torch.stack(figures, dim=1)


def _of_norms(
    features: Features, coordinates: Float[Tensor, "b k h w"], basis: CellBasis
) -> list[Float[Tensor, " b"]]:
    norms = _log(features.square().sum(dim=1)).flatten(1)
    off_mean = (features - basis.mean[:, None, None]).square().sum(dim=1)
    on_axes = (coordinates * basis.std[:, None, None]).square().sum(dim=1)
    off_axes = (off_mean - on_axes).maximum(_ROUNDING * off_mean).mean(dim=(1, 2))
    spread = norms.var(dim=1, unbiased=False)
    return [norms.mean(dim=1), _log(spread), _log(off_axes)]


def _of_centres(
    coordinates: Float[Tensor, "b k h w"], basis: CellBasis
) -> list[Float[Tensor, " b"]]:
    cells = _nearest(_to_cells(coordinates), basis.cell_centres)
    means = _nearest(coordinates.mean(dim=(2, 3)), basis.map_centres)
    return [_log(cells.unflatten(0, (len(coordinates), -1)).mean(dim=1)), _log(means)]


def _sharpest_seam(coordinates: Float[Tensor, "b k h w"]) -> Float[Tensor, " b"]:
    """Largest mean square difference of two neighbouring rows or columns, over the mean of all."""
    seams = [
        coordinates.diff(dim=axis).square().mean(dim=(1, 5 - axis))
        for axis in (2, 3)
        if coordinates.shape[axis] > 1
    ]
    if not seams:
        return coordinates.new_zeros(len(coordinates))
    both = torch.cat(seams, dim=1)
    return _log(both.amax(dim=1)) - _log(both.mean(dim=1))


def _of_band(
    coordinates: Float[Tensor, "b k h w"], place_mean: Float[Tensor, "k h w"]
) -> list[Float[Tensor, " b"]]:
    energy = _log(_mean_square(coordinates))
    kurtosis = _log(coordinates.pow(4).mean(dim=(1, 2, 3))) - 2 * energy
    map_mean = _log(coordinates.mean(dim=(2, 3)).square().mean(dim=1))
    off_place = _log(_mean_square(coordinates - place_mean))
    differences = [
        _log(_mean_square(_shifted_difference(coordinates, axis, lag)))
        for axis in (2, 3)
        for lag in _lags(coordinates.shape[axis])
    ]
    return [energy, kurtosis, map_mean, off_place, *differences]


def _lags(size: int) -> list[int]:
    """Distances of cells to compare along an axis: one cell, and half the map."""
    return sorted({1, size // 2}) if size > 1 else []


def _shifted_difference(
    maps: Features, axis: int, lag: int
) -> Float[Tensor, "b c h_pairs w_pairs"]:
    """Each cell minus the one that lies `lag` before it."""
    n_pairs = maps.shape[axis] - lag
    return maps.narrow(axis, lag, n_pairs) - maps.narrow(axis, 0, n_pairs)


def _centres(rows: Float[Tensor, "n k"], seed: int) -> Float[Tensor, "n_centres k"]:
    from sklearn.cluster import KMeans  # slow to import, and only fitting needs it

    n_centres = max(1, min(N_CENTRES, len(rows) // _CELLS_PER_CENTRE))
    n_init: Any = 1  # annotated as a string
    model = KMeans(n_centres, n_init=n_init, random_state=seed).fit(rows.numpy())
    return torch.from_numpy(model.cluster_centers_).float()


def _nearest(rows: Float[Tensor, "n k"], centres: Float[Tensor, "m k"]) -> Float[Tensor, " n"]:
    """Square distance to the nearest centre."""
    return torch.cdist(rows, centres).square().amin(dim=1)


def _to_cells(maps: Features) -> Float[Tensor, "cells c"]:
    return maps.permute(0, 2, 3, 1).flatten(0, 2)


def _mean_square(maps: Features) -> Float[Tensor, " b"]:
    return maps.square().mean(dim=(1, 2, 3))


def _log(values: Tensor) -> Tensor:
    """The logarithm; of a map of zeros it is far from all others and finite."""
    return (values + _TINY).log()
