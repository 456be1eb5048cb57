"""Statistics of natural feature maps, those of real images, and p-values of other maps."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from featinv_diffusion import schema
from featinv_diffusion.backbones.names import read_spec
from featinv_diffusion.errors import InputError
from featinv_diffusion.files import read_tensors, write_tensors
from featinv_diffusion.metrics.statistics import FeatureMoments
from featinv_diffusion.types import Features, FeatureSpec

# ---- A feature map summarised by a few dozen numbers ---------------------------------------------

MAX_AXES = 64
BAND_STARTS = (0, 4, 12, 28)
"""First axes of the bands in which axes are summarised; later bands are wider."""

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
        place_mean: mean coordinates of the cells at each place.
        cell_centres: k-means centres of the coordinates of cells.
        map_centres: k-means centres of the mean coordinates of maps.
    """

    mean: Float[Tensor, " c"]
    axes: Float[Tensor, "c k"]
    std: Float[Tensor, " k"]
    place_mean: Float[Tensor, "k h w"]
    cell_centres: Float[Tensor, "n_cells k"]
    map_centres: Float[Tensor, "n_maps k"]

    def coordinates(self, features: Features) -> Float[Tensor, "b k h w"]:
        """Returns the cells along the axes, scaled so that natural cells have variance 1."""
        centred = features - self.mean[:, None, None]
        return torch.einsum("bchw,ck->bkhw", centred, self.axes / self.std)

    @property
    def bands(self) -> list[slice]:
        """The bands as ranges of axes."""
        n_axes = len(self.std)
        starts = [start for start in BAND_STARTS if start < n_axes]
        return [slice(a, b) for a, b in zip(starts, [*starts[1:], n_axes], strict=True)]


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
    cells = _to_cells(coordinates)
    every = max(1, len(cells) // _MAX_CLUSTERED_CELLS)
    place_mean, map_means = coordinates.mean(dim=0), coordinates.mean(dim=(2, 3))
    centres = [_centres(rows, seed) for rows in (cells[::every], map_means)]
    return CellBasis(mean, axes, std, place_mean, *centres)


@torch.no_grad()
def summarise(features: Features, basis: CellBasis) -> Float[Tensor, "b m"]:
    """Returns m statistics of each map, most of them logarithms of mean squares.

    For each band of axes: kurtosis and the energies of the cells, of the map's mean, of the
    deviation from the mean at each place, and of the differences between cells one cell and half a
    map apart. For the whole map: the norms of the cells and their spread, the part off the axes,
    the sharpest seam, and the distances to the nearest centres. Permuting or pasting cells raises
    the differences; mixing maps lowers energy and kurtosis, and moves maps between the centres.
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


def _mean_square(maps: Features) -> Float[Tensor, " b"]:
    return maps.square().mean(dim=(1, 2, 3))


def _log(values: Tensor) -> Tensor:
    """Returns the logarithm, which for zeros is finite and far from all other values."""
    return (values + _TINY).log()


# ---- p-values ------------------------------------------------------------------------------------

LEVEL = 0.05
"""A map with a smaller p-value is called out of scope."""

MIN_CALIBRATION = 99
"""Smallest number of held-out maps; p-values then go down to 0.01."""

N_BASIS = 2000
"""Number of maps that the basis is fitted on."""
_MAX_BASIS_VALUES = 2**27  # 512 MiB
_MAPS_PER_FIGURE = 5
_RIDGE = 1e-3


@dataclass(frozen=True, eq=False)
class MapDensity:
    """The distribution of natural maps.

    Args:
        centre: mean of the statistics of natural maps.
        whitening: matrix after which the statistics are uncorrelated and have variance 1.
    """

    basis: CellBasis
    centre: Float[Tensor, " m"]
    whitening: Float[Tensor, "m m"]

    def distance(self, features: Features) -> Float[Tensor, " b"]:
        """Returns the squared Mahalanobis distance of each map's statistics from natural ones."""
        batches = features.split(64)
        figures = torch.cat([summarise(batch, self.basis) for batch in batches])
        return ((figures - self.centre) @ self.whitening).square().sum(dim=1)


def fit_density(batches: Iterable[Float[Tensor, "_ c h w"]]) -> MapDensity:
    """Fits the distribution of natural maps.

    The basis is fitted on the first `N_BASIS` maps, or on fewer if maps are large. The others are
    read batch by batch and not kept.

    Args:
        batches: maps in random order.

    Raises:
        InputError: too few maps for a covariance of the statistics.
    """
    batches = iter(batches)
    first = _take(batches)
    basis = fit_basis(first)
    moments: FeatureMoments | None = None
    for batch in itertools.chain(first.split(64), batches):
        figures = summarise(batch, basis)
        moments = moments or FeatureMoments(figures.shape[1])
        moments.update(figures)
    assert moments is not None
    if moments.count < _MAPS_PER_FIGURE * moments.dim:
        raise InputError(
            f"The distribution of natural maps needs at least {_MAPS_PER_FIGURE * moments.dim} "
            f"images, got {moments.count}."
        )
    covariance = torch.from_numpy(moments.covariance)
    loaded = covariance + torch.diag(_RIDGE * covariance.diag() + 1e-9)
    whitening = torch.linalg.cholesky(torch.linalg.inv(loaded))
    return MapDensity(basis, torch.from_numpy(moments.mean).float(), whitening.float())


@dataclass(frozen=True, eq=False)
class Calibration:
    """Scores of held-out natural maps.

    Args:
        distances: distances of n maps.
        cosines: cosines between the first r of them and the features of one reconstruction each; r
            may be 0.
    """

    distances: Float[Tensor, " n"]
    cosines: Float[Tensor, " r"]

    def __post_init__(self) -> None:
        n, r = len(self.distances), len(self.cosines)
        if n < MIN_CALIBRATION or 0 < r < MIN_CALIBRATION or r > n:
            raise InputError(
                f"Calibration needs at least {MIN_CALIBRATION} held-out maps, and reconstructions "
                f"of none or of as many of them, got {n} maps and {r} reconstructions."
            )

    def of_maps(self, distances: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Returns the p-values of maps with these distances."""
        return tail_p_values(distances, self.distances)

    def of_reconstructions(
        self, distances: Float[Tensor, " b"], cosines: Float[Tensor, " b"]
    ) -> Float[Tensor, " b"]:
        """Returns the p-values of maps with these distances and cosines of reconstructions.

        The two tails are combined by their product (Fisher 1925, §21.1). Its distribution is taken
        from the held-out maps, so that the two need not be independent.
        """
        r = len(self.cosines)
        if not r:
            raise InputError(
                "Cosines can be used only if reconstructions were calibrated, but there are none. "
                "Fit the statistics with reconstructions."
            )
        new = self.of_maps(distances) * tail_p_values(-cosines, -self.cosines)
        held = _leave_one_out(self.distances)[:r] * _leave_one_out(-self.cosines)
        return tail_p_values(-new, -held)


def tail_p_values(
    scores: Float[Tensor, " b"], reference: Float[Tensor, " n"]
) -> Float[Tensor, " b"]:
    """Returns (1 + #{reference ≥ score}) / (n + 1) of each score, in float64."""
    return _share_not_below(scores, reference, n_besides=1)


def _leave_one_out(scores: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Returns the p-value of each score among the others; the score itself is the 1 in it."""
    return _share_not_below(scores, scores, n_besides=0)


def _share_not_below(
    scores: Float[Tensor, " b"], reference: Float[Tensor, " n"], n_besides: int
) -> Float[Tensor, " b"]:
    ordered = reference.double().sort().values
    n_below = torch.searchsorted(ordered, scores.double().to(ordered.device))
    return (n_besides + len(ordered) - n_below).double() / (1 + len(ordered))


def _take(batches: Iterable[Float[Tensor, "_ c h w"]]) -> Features:
    """Takes the maps for the basis from the iterator, to the CPU."""
    taken: list[Features] = []
    n_maps = 0
    for batch in batches:
        taken.append(batch.detach().cpu())
        n_maps += len(batch)
        if n_maps >= min(N_BASIS, _MAX_BASIS_VALUES // batch[0].numel()):
            break
    if not taken:
        raise InputError("The distribution of natural maps needs images, got none.")
    return torch.cat(taken)


FORMAT = "featinv-scope/1"


@dataclass(frozen=True, eq=False)
class NaturalMaps:
    """Statistics of the maps that one backbone makes of images.

    Args:
        spec: the features of the backbone.
        backbone_sha256: digest of the backbone's weights.
        sampling: settings of the reconstructions for calibration; None if there were none.
        n_fitted: number of images that the density was fitted on.
        others: further settings, each with cosines `[r]` of reconstructions of the same maps.
    """

    spec: FeatureSpec
    backbone_sha256: str
    density: MapDensity
    calibration: Calibration
    sampling: dict[str, Any] | None
    n_fitted: int
    others: tuple[tuple[dict[str, Any], Tensor], ...] = ()

    def calibrated_for(self, sampling: Mapping[str, Any]) -> NaturalMaps | None:
        """Returns the statistics whose cosines are of such samples; None where none are."""
        own = [] if self.sampling is None else [(self.sampling, self.calibration.cosines)]
        for settings, cosines in (*own, *self.others):
            if settings == sampling:
                calibration = replace(self.calibration, cosines=cosines)
                return replace(self, sampling=settings, calibration=calibration)
        return None

    def p_values(self, features: Features, cosines: Sequence[float] | None = None) -> list[float]:
        """Returns how often a natural map scores as unnatural as each of these does.

        Args:
            features: maps, edited or not.
            cosines: mean cosine between each map and the features of its samples, which shows
                whether a map can be reconstructed. Calibration has one sample of each map, which
                varies more than the mean of several, so that the p-value is never too small.

        Raises:
            InputError: maps of another shape or not finite, or cosines that were not calibrated.
        """
        self.spec.check_features(features)
        distances = self.density.distance(features)
        if cosines is None:
            return self.calibration.of_maps(distances).tolist()
        if self.sampling is None:
            raise InputError(
                "Cosines can be used only if reconstructions were calibrated, but these statistics "
                "hold none. Fit them with featinv scope --n-reconstructions 256."
            )
        found = torch.tensor(list(cosines), dtype=torch.float64)
        return self.calibration.of_reconstructions(distances, found).tolist()

    def check(self, spec: FeatureSpec, backbone_sha256: str) -> None:
        """Raises `InputError` unless the statistics are of such features of these weights."""
        if (spec.layer, spec.channels, spec.grid) != (
            self.spec.layer,
            self.spec.channels,
            self.spec.grid,
        ):
            raise InputError(
                f"The statistics of natural maps are of a {self.spec}, but the pipeline inverts a "
                f"{spec}. Fit them again with featinv scope."
            )
        if backbone_sha256 != self.backbone_sha256:
            raise InputError(
                f"The statistics of natural maps are of other weights of {self.spec.backbone} than "
                "the pipeline has. Fit them again with featinv scope."
            )

    def save(self, path: Path) -> None:
        """Writes a file, whole or not at all.

        Raises:
            InputError: a place where nothing can be written.
        """
        parts = {"basis": self.density.basis, "density": self.density}
        tensors = {
            f"{part}.{name}": value
            for part, held in {**parts, "calibration": self.calibration}.items()
            for name, value in vars(held).items()
            if isinstance(value, Tensor)
        }
        tensors |= {f"others.{i}": cosines for i, (_, cosines) in enumerate(self.others)}
        header = {
            "spec": asdict(self.spec),
            "backbone_sha256": self.backbone_sha256,
            "sampling": self.sampling,
            "n_fitted": self.n_fitted,
            "others": [settings for settings, _ in self.others],
        }
        write_tensors(path, tensors, header, FORMAT)

    @classmethod
    def load(cls, path: Path) -> NaturalMaps:
        """Reads what `save` wrote.

        Raises:
            InputError: a damaged file, or one that holds something else.
        """
        tensors, header = read_tensors(path, FORMAT, "Fit it again with featinv scope.")
        try:
            return cls._from_parts(tensors, header)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{path} must hold all statistics of natural maps, but some are missing ({error}). "
                "Fit it again with featinv scope."
            ) from error

    @classmethod
    def _from_parts(cls, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> NaturalMaps:
        basis = CellBasis(**_part("basis", tensors))
        held: _Header = schema.convert(header, _Header, "its header")
        return cls(
            read_spec(held.spec),
            held.backbone_sha256,
            MapDensity(basis, **_part("density", tensors)),
            Calibration(**_part("calibration", tensors)),
            held.sampling,
            held.n_fitted,
            tuple((s, tensors[f"others.{i}"]) for i, s in enumerate(held.others)),
        )


@dataclass(frozen=True)
class _Header:
    spec: dict[str, Any]
    backbone_sha256: str
    sampling: dict[str, Any] | None
    n_fitted: int
    others: list[dict[str, Any]] = field(default_factory=list)


def _part(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = f"{part}."
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
