"""Whether a feature map is like those that a backbone makes of images, as a p-value.

A map is summed up in a few dozen figures (`summary.summarise`), whose Mahalanobis distance from
those of natural maps is its score: too little energy counts as too much does, and so does energy in
the wrong places. The share of held-out natural maps that score no lower is the p-value, which needs
no assumption about the figures' distribution (conformal prediction: Vovk, Gammerman and Shafer
2005, section 2.1).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from featinv_diffusion.errors import InputError
from featinv_diffusion.features.summary import CellBasis, fit_basis, summarise
from featinv_diffusion.metrics.statistics import FeatureMoments
from featinv_diffusion.types import Features

LEVEL = 0.05
"""A map whose p-value is below is called out of scope."""

MIN_CALIBRATION = 99
"""Held-out maps that must come, so that p-values go down to 0.01."""

N_BASIS = 2000
_MAX_BASIS_VALUES = 2**27  # 512 MiB
_MAPS_PER_FIGURE = 5
_RIDGE = 1e-3


@dataclass(frozen=True, eq=False)
class MapDensity:
    """The distribution of natural maps.

    Args:
        centre: mean of the figures of natural maps.
        whitening: of the figures; after it they have variance 1 and are not correlated.
    """

    basis: CellBasis
    centre: Float[Tensor, " m"]
    whitening: Float[Tensor, "m m"]

    def distance(self, features: Features) -> Float[Tensor, " b"]:
        """Returns the squared Mahalanobis distance of each map's figures from natural ones."""
        batches = features.split(64)
        figures = torch.cat([summarise(batch, self.basis) for batch in batches])
        return ((figures - self.centre) @ self.whitening).square().sum(dim=1)


def fit_density(batches: Iterable[Float[Tensor, "_ c h w"]]) -> MapDensity:
    """Fits the distribution of natural maps, which come in batches and are not kept.

    The basis is that of the first `N_BASIS` maps, or of fewer where maps are large.

    Args:
        batches: maps in random order.

    Raises:
        InputError: too few maps for a covariance of the figures.
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
            f"images, but {moments.count} came."
        )
    covariance = torch.from_numpy(moments.covariance)
    loaded = covariance + torch.diag(_RIDGE * covariance.diag() + 1e-9)
    whitening = torch.linalg.cholesky(torch.linalg.inv(loaded))
    return MapDensity(basis, torch.from_numpy(moments.mean).float(), whitening.float())


@dataclass(frozen=True, eq=False)
class Calibration:
    """Scores of held-out natural maps.

    Args:
        distances: of n maps.
        cosines: of the first r of them to the features of one reconstruction each; r may be 0.
    """

    distances: Float[Tensor, " n"]
    cosines: Float[Tensor, " r"]

    def __post_init__(self) -> None:
        n, r = len(self.distances), len(self.cosines)
        if n < MIN_CALIBRATION or 0 < r < MIN_CALIBRATION or r > n:
            raise InputError(
                f"Calibration needs at least {MIN_CALIBRATION} held-out maps, and reconstructions "
                f"of none or of as many of them, but {n} maps and {r} reconstructions came."
            )

    def of_maps(self, distances: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Returns the p-values of maps by their distances."""
        return tail_p_values(distances, self.distances)

    def of_reconstructions(
        self, distances: Float[Tensor, " b"], cosines: Float[Tensor, " b"]
    ) -> Float[Tensor, " b"]:
        """Returns the p-values of maps by their distances and the cosines of reconstructions.

        The two tails are joined by their product (Fisher 1925, §21.1), whose distribution is that
        among held-out maps, so that the two need not be independent.
        """
        r = len(self.cosines)
        if not r:
            raise InputError(
                "Cosines can be counted in only where reconstructions were calibrated, but there "
                "were none. Fit the statistics with reconstructions."
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
    """Returns the p-value of each score among the others; of itself it counts the 1."""
    return _share_not_below(scores, scores, n_besides=0)


def _share_not_below(
    scores: Float[Tensor, " b"], reference: Float[Tensor, " n"], n_besides: int
) -> Float[Tensor, " b"]:
    ordered = reference.double().sort().values
    n_below = torch.searchsorted(ordered, scores.double().to(ordered.device))
    return (n_besides + len(ordered) - n_below).double() / (1 + len(ordered))


def _take(batches: Iterable[Float[Tensor, "_ c h w"]]) -> Features:
    """Takes the maps of the basis off the iterator, on the CPU."""
    taken: list[Features] = []
    n_maps = 0
    for batch in batches:
        taken.append(batch.detach().cpu())
        n_maps += len(batch)
        if n_maps >= min(N_BASIS, _MAX_BASIS_VALUES // batch[0].numel()):
            break
    if not taken:
        raise InputError("The distribution of natural maps needs images, but none came.")
    return torch.cat(taken)
