"""A feature map summarised by a few dozen numbers, on the principal axes of natural cells."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from featinv_diffusion.errors import InputError
from featinv_diffusion.metrics.statistics import FeatureMoments
from featinv_diffusion.types import Features

MAX_AXES = 256
"""Largest number of axes; what lies off them is one figure."""

N_MAIN = 64
"""Number of main axes; centres, seams and the oddest cell are of these alone."""
BAND_STARTS = (0, 4, 12, 28)
"""First axes of the bands in which the main axes are summarised; later bands are wider."""
FINE_STARTS = (64, 112, 176)
"""First axes of the bands behind the main axes, of which less is said."""

N_CENTRES = 64
_MAX_CLUSTERED_CELLS = 20_000
_CELLS_PER_CENTRE = 10
_TINY = 1e-8
_ROUNDING = 1e-4  # share of a cell off the axes below which it cannot be told from 0
_NEGLIGIBLE = 1e-6
"""Share of the largest variance below which an axis holds only rounding errors."""


@dataclass(frozen=True, eq=False)
class CellBasis:
    """A basis of the cells of natural maps.

    Args:
        mean: mean of all cells.
        axes: principal axes of the cells, orthonormal, by falling variance.
        std: standard deviation of the cells along each axis; coordinates are divided by it.
        place_mean: mean of the first l coordinates of the cells at each place.
        cell_centres: k-means centres of the first l coordinates of cells.
        map_centres: k-means centres of the first l mean coordinates of maps.
    """

    mean: Float[Tensor, " c"]
    axes: Float[Tensor, "c k"]
    std: Float[Tensor, " k"]
    place_mean: Float[Tensor, "l h w"]
    cell_centres: Float[Tensor, "n_cells l"]
    map_centres: Float[Tensor, "n_maps l"]

    def coordinates(self, features: Features) -> Float[Tensor, "b k h w"]:
        """Returns the cells along the axes, scaled so that natural cells have variance 1."""
        centred = features - self.mean[:, None, None]
        return torch.einsum("bchw,ck->bkhw", centred, self.axes / self.std)

    @property
    def frame(self) -> Float[Tensor, "c l"]:
        """The main axes, each as long as natural maps vary along it."""
        return (self.axes * self.std)[:, :N_MAIN]

    @property
    def bands(self) -> list[slice]:
        """The bands of the main axes as ranges."""
        return _bands(BAND_STARTS, min(N_MAIN, len(self.std)))

    @property
    def fine_bands(self) -> list[slice]:
        """The bands behind the main axes; none where there are no such axes."""
        return _bands(FINE_STARTS, len(self.std))


def _bands(starts: Sequence[int], n_axes: int) -> list[slice]:
    bounds = [*(start for start in starts if start < n_axes), n_axes]
    return [slice(a, b) for a, b in itertools.pairwise(bounds)]


def fit_basis(features: Features, seed: int = 0) -> CellBasis:
    """Fits the basis of natural maps.

    Args:
        features: natural maps, hundreds of them, in any precision.
        seed: random seed of k-means.

    Raises:
        InputError: maps that are all the same.
    """
    moments = FeatureMoments(features.shape[1])
    for batch in features.split(64):
        moments.update(_to_cells(batch.float()))
    variance, axes = torch.linalg.eigh(torch.from_numpy(moments.covariance))
    if not variance[-1] > 0:
        raise InputError("Natural maps must differ, got cells that are all the same.")
    n_axes = min(MAX_AXES, int((variance > _NEGLIGIBLE * variance[-1]).sum()))
    mean = torch.from_numpy(moments.mean).float()
    std = variance[-n_axes:].flip(0).sqrt().float()
    axes = axes[:, -n_axes:].flip(1).float().contiguous()
    blank = torch.zeros(0, n_axes)
    bare = CellBasis(mean, axes, std, torch.zeros(n_axes, *features.shape[2:]), blank, blank)
    coordinates = torch.cat([bare.coordinates(batch.float()) for batch in features.split(64)])
    cells = _to_cells(coordinates[:, :N_MAIN])
    every = max(1, len(cells) // _MAX_CLUSTERED_CELLS)
    map_means = coordinates[:, :N_MAIN].mean(dim=(2, 3))
    centres = [_centres(rows, seed) for rows in (cells[::every], map_means)]
    return CellBasis(mean, axes, std, coordinates[:, :N_MAIN].mean(dim=0), *centres)


@torch.no_grad()
def summarise(features: Features, basis: CellBasis) -> Float[Tensor, "b m"]:
    """Returns m statistics of each map, most of them logarithms of mean squares.

    For each band of the main axes: kurtosis and the energies of the cells, of the map's mean, of
    the deviation from the mean at each place, and of the differences between cells one cell and
    half a map apart. For each band behind them: the energies of the cells and of the map's mean,
    where steering towards a class shows. For the whole map: the norms of the cells and their
    spread, the part off all axes, the sharpest seam, the oddest cell, and the distances to the
    nearest centres. Permuting or pasting cells raises the differences; mixing maps lowers energy
    and kurtosis, and moves maps between the centres.
    """
    features = features.detach().cpu().float()
    coordinates = basis.coordinates(features)
    figures = [*_of_norms(features, coordinates, basis), *_of_centres(coordinates, basis)]
    main = coordinates[:, :N_MAIN]
    figures += [_sharpest_seam(main), _oddest_cell(main)]
    for band in basis.bands:
        figures += _of_band(coordinates[:, band], basis.place_mean[band])
    for band in basis.fine_bands:
        figures += _of_fine_band(coordinates[:, band])
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
    coordinates = coordinates[:, : basis.cell_centres.shape[1]]
    cells = _nearest(_to_cells(coordinates), basis.cell_centres)
    means = _nearest(coordinates.mean(dim=(2, 3)), basis.map_centres)
    return [_log(cells.unflatten(0, (len(coordinates), -1)).mean(dim=1)), _log(means)]


def _sharpest_seam(coordinates: Float[Tensor, "b k h w"]) -> Float[Tensor, " b"]:
    """Returns the largest mean square difference of neighbouring rows or columns, by their mean."""
    seams = [
        coordinates.diff(dim=axis).square().mean(dim=(1, 5 - axis))
        for axis in (2, 3)
        if coordinates.shape[axis] > 1
    ]
    if not seams:
        return coordinates.new_zeros(len(coordinates))
    both = torch.cat(seams, dim=1)
    return _log(both.amax(dim=1)) - _log(both.mean(dim=1))


def _oddest_cell(coordinates: Float[Tensor, "b k h w"]) -> Float[Tensor, " b"]:
    """Returns the largest mean square difference of a cell to the mean of its neighbours, by the
    mean of all cells."""
    ones = torch.ones_like(coordinates[:1, :1])
    around = _sum_of_neighbours(coordinates) / _sum_of_neighbours(ones).clamp(min=1)
    odd = (coordinates - around).square().mean(dim=1).flatten(1)
    return _log(odd.amax(dim=1)) - _log(odd.mean(dim=1))


def _sum_of_neighbours(maps: Float[Tensor, "b k h w"]) -> Float[Tensor, "b k h w"]:
    wide = F.pad(maps, (1, 1, 1, 1))
    rows, columns = wide[:, :, :, 1:-1], wide[:, :, 1:-1]
    return rows[:, :, :-2] + rows[:, :, 2:] + columns[..., :-2] + columns[..., 2:]


def _of_band(
    coordinates: Float[Tensor, "b k h w"], place_mean: Float[Tensor, "k h w"]
) -> list[Float[Tensor, " b"]]:
    energy = _log(_mean_square(coordinates))
    kurtosis = _log(coordinates.pow(4).mean(dim=(1, 2, 3))) - 2 * energy
    map_mean = _energy_of_mean(coordinates)
    off_place = _log(_mean_square(coordinates - place_mean))
    differences = [
        _log(_mean_square(_shifted_difference(coordinates, axis, lag)))
        for axis in (2, 3)
        for lag in _lags(coordinates.shape[axis])
    ]
    return [energy, kurtosis, map_mean, off_place, *differences]


def _of_fine_band(coordinates: Float[Tensor, "b k h w"]) -> list[Float[Tensor, " b"]]:
    return [_log(_mean_square(coordinates)), _energy_of_mean(coordinates)]


def _lags(size: int) -> list[int]:
    """Returns the distances of cells to compare along an axis: one cell, and half the map."""
    return sorted({1, size // 2}) if size > 1 else []


def _shifted_difference(
    maps: Features, axis: int, lag: int
) -> Float[Tensor, "b c h_pairs w_pairs"]:
    """Returns each cell minus the one that lies `lag` before it."""
    n_pairs = maps.shape[axis] - lag
    return maps.narrow(axis, lag, n_pairs) - maps.narrow(axis, 0, n_pairs)


def _centres(rows: Float[Tensor, "n k"], seed: int) -> Float[Tensor, "n_centres k"]:
    from sklearn.cluster import KMeans  # slow to import, and only fitting needs it

    n_centres = max(1, min(N_CENTRES, len(rows) // _CELLS_PER_CENTRE))
    n_init: Any = 1  # annotated as a string
    model = KMeans(n_centres, n_init=n_init, random_state=seed).fit(rows.numpy())
    return torch.from_numpy(model.cluster_centers_).float()


def _nearest(rows: Float[Tensor, "n k"], centres: Float[Tensor, "m k"]) -> Float[Tensor, " n"]:
    """Returns the squared distances to the nearest centres."""
    return torch.cdist(rows, centres).square().amin(dim=1)


def _to_cells(maps: Features) -> Float[Tensor, "cells c"]:
    return maps.permute(0, 2, 3, 1).flatten(0, 2)


def _energy_of_mean(maps: Features) -> Float[Tensor, " b"]:
    return _log(maps.mean(dim=(2, 3)).square().mean(dim=1))


def _mean_square(maps: Features) -> Float[Tensor, " b"]:
    return maps.square().mean(dim=(1, 2, 3))


def _log(values: Tensor) -> Tensor:
    """Returns the logarithm, which for zeros is finite and far from all other values."""
    return (values + _TINY).log()
