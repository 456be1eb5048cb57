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
from featinv_diffusion.features.map_summary import CellBasis, fit_basis, summarise
from featinv_diffusion.files import read_tensors, write_tensors
from featinv_diffusion.metrics.statistics import FeatureMoments
from featinv_diffusion.types import Features, FeatureSpec

LEVEL = 0.05
"""A map with a smaller p-value is called unlike feature maps of sharp photos."""

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


FORMAT = "featinv-scope/2"


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
