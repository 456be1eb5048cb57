"""Fits operators: the sums that a fit needs, the methods, and warnings of poor conditioning."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from featinv_diffusion.errors import InputError, choices_hint
from featinv_diffusion.features.operators import FitRecord, Operator
from featinv_diffusion.types import Features, FeatureSpec

_BLOCK = 2048
"""Number of locations that are held in float64 at a time."""


class PairMoments:
    """Sums of products of the location vectors of pairs of maps X and Y, in float64 on the CPU.

    Maps are not kept, so the memory is that of three c×c matrices. Each location is scaled to unit
    L2 norm; a vector of zeros stays zero.

    Args:
        channels: c.

    Attributes:
        xx: XᵀX, `[c, c]`, where the rows of X are locations.
        xy: XᵀY.
        yy: YᵀY.
        n: number of locations so far.
    """

    def __init__(self, channels: int):
        self.channels = channels
        self.n = 0
        self.xx, self.xy, self.yy = torch.zeros(3, channels, channels, dtype=torch.float64)

    def update(self, features: Features, others: Float[Tensor, ...]) -> None:
        """Adds a batch of maps before and after the operation.

        Raises:
            InputError: batches of different shapes or without c channels, or NaN or infinite
                values.
        """
        if features.shape != others.shape or features.shape[1] != self.channels:
            raise InputError(
                f"Pairs of feature maps must have one shape and {self.channels} channels, got "
                f"{list(features.shape)} and {list(others.shape)}."
            )
        if not bool(features.isfinite().all() and others.isfinite().all()):
            raise InputError(
                "Features to fit an operator on must be finite, got NaN or infinite values. "
                "Look for overflow in half precision."
            )
        n_maps = max(1, _BLOCK // (features.shape[2] * features.shape[3]))
        for x, y in zip(features.split(n_maps), others.split(n_maps), strict=True):
            self._add(to_unit_rows(x), to_unit_rows(y))

    def add(self, others: PairMoments) -> None:
        """Adds what others have summed."""
        for name in ("xx", "xy", "yy"):
            getattr(self, name).add_(getattr(others, name))
        self.n += others.n

    def residual(self, matrix: Float[Tensor, "c c"]) -> float:
        """Returns ‖X Q − Y‖² / ‖Y‖², which is 0 for a perfect fit."""
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


# ---- Matrices Q with X Q ≈ Y, in float64, from XᵀX and XᵀY alone ---------------------------------

Square = Float[Tensor, "c c"]

TOLERANCE = 1e-10
"""Singular values and eigenvalues below this share of the largest count as zero. It is the square
of the precision of features in float32."""


@dataclass(frozen=True, eq=False)
class Solution:
    """A solved matrix.

    Args:
        matrix: Q.
        rank: rank of XᵀY or XᵀX, whichever was solved; below c, some directions are not determined.
        condition_number: condition number of that matrix; None if its rank is below c.
    """

    matrix: Square
    rank: int
    condition_number: float | None


def orthogonal(xy: Square) -> Solution:
    """The rotation that maximises tr(Qᵀ XᵀY): U Vᵀ of XᵀY = U S Vᵀ (Schönemann 1966)."""
    u, values, vh = torch.linalg.svd(xy)
    rank = _rank(values)
    matrix = u[:, :rank] @ vh[:rank]
    if rank < len(xy):
        spare_u, spare_v = u[:, rank:], vh[rank:].T
        left, _, right = torch.linalg.svd(spare_u.T @ spare_v)
        matrix = matrix + spare_u @ (left @ right) @ spare_v.T
    return Solution(matrix, rank, _condition(values, rank))


def self_adjoint(xy: Square) -> Solution:
    """The symmetric orthogonal matrix nearest to `orthogonal`'s Q: W sign(Λ) Wᵀ of (Q + Qᵀ) / 2.

    S² = I. In general it is not the best symmetric orthogonal fit, see `self_adjoint_direct`.
    """
    rotation = orthogonal(xy)
    matrix = _sign(rotation.matrix)[0]
    return Solution(matrix, rotation.rank, rotation.condition_number)


def self_adjoint_direct(xy: Square) -> Solution:
    """The symmetric orthogonal matrix that maximises tr(S XᵀY): the sign of (XᵀY + YᵀX) / 2."""
    matrix, values = _sign(xy)
    magnitudes = values.abs().sort(descending=True).values
    rank = _rank(magnitudes)
    return Solution(matrix, rank, _condition(magnitudes, rank))


def least_squares(xx: Square, xy: Square, ridge: float) -> Solution:
    """(XᵀX + λ I)⁻¹ (XᵀY + λ I), with λ = ridge · tr(XᵀX) / c: the ridge pulls Q towards I.

    It is computed as I + W (Λ + λ)⁻¹ Wᵀ (XᵀY − XᵀX), where W are the eigenvectors of XᵀX with
    eigenvalues Λ above zero. Rank and condition number are those of XᵀX.

    Raises:
        InputError: XᵀX is singular and the ridge is 0.
    """
    values, vectors = (part.flip(-1) for part in torch.linalg.eigh(xx))
    rank = _rank(values)
    if rank < len(xx) and ridge == 0:
        raise InputError(
            f"Features must span all {len(xx)} directions for a linear operator without a ridge, "
            f"but span {rank}. Set a ridge such as 1e-6, or fit on more images."
        )
    weight = ridge * xx.trace() / len(xx)
    kept = vectors[:, :rank]
    change = (kept / (values[:rank] + weight)) @ (kept.T @ (xy - xx))
    return Solution(torch.eye(len(xx), dtype=xx.dtype) + change, rank, _condition(values, rank))


def _sign(matrix: Square) -> tuple[Square, Tensor]:
    """Returns W sign(Λ) Wᵀ of the symmetric part W Λ Wᵀ, with sign(0) = +1, and Λ.

    Eigenvalues within rounding errors of the matrix count as zeros, as all do for a quarter turn.
    """
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    values = torch.where(values.abs() > TOLERANCE * matrix.norm(), values, 0.0)
    signed = (vectors * torch.where(values < 0, -1.0, 1.0).double()) @ vectors.T
    return (signed + signed.T) / 2, values


def _rank(values: Tensor) -> int:
    """Counts values above zero, given in descending order."""
    return int((values > TOLERANCE * values[0]).sum())


def _condition(values: Tensor, rank: int) -> float | None:
    return (values[0] / values[-1]).item() if rank == len(values) else None


LINEAR = "linear"
CONSTRAINED: dict[str, Callable[[Float[Tensor, "c c"]], Solution]] = {
    "orthogonal": orthogonal,
    "self-adjoint": self_adjoint,
    "self-adjoint-direct": self_adjoint_direct,
}
METHODS = (*CONSTRAINED, LINEAR)
DEFAULT_RIDGE = 1e-6
ILL_CONDITIONED = 1e8
"""Condition number above which fewer than half of the digits of float64 are left."""

logger = logging.getLogger(__name__)


def solve(
    moments: PairMoments,
    spec: FeatureSpec,
    operation: str,
    method: str = "orthogonal",
    *,
    ridge: float = DEFAULT_RIDGE,
    parameters: Mapping[str, Any] | None = None,
    backbone_sha256: str | None = None,
    image_digests: tuple[str, ...] = (),
) -> Operator:
    """Fits the operator that turns X into Y; an ill-conditioned fit is logged.

    Args:
        moments: sums over pairs of maps of `spec`.
        operation: name of the operation on pixels.
        method: one of `METHODS`.
        ridge: ridge of the method `linear`, at least 0.
        parameters, backbone_sha256, image_digests: see `FitRecord`.

    Raises:
        InputError: an unknown method, a bad ridge, fewer locations than channels, features that
            are all zero, or a linear fit that is singular without a ridge.
    """
    _check(moments, spec, method, ridge)
    if method == LINEAR:
        solution = least_squares(moments.xx, moments.xy, ridge)
    else:
        solution = CONSTRAINED[method](moments.xy)
    _warn(solution, len(moments.xx))
    record = FitRecord(
        method=method,
        operation=operation,
        parameters=dict(parameters or {}),
        n_locations=moments.n,
        rank=solution.rank,
        condition_number=solution.condition_number,
        residual=moments.residual(solution.matrix),
        residual_of_identity=moments.residual(torch.eye(len(moments.xx), dtype=torch.float64)),
        ridge=ridge if method == LINEAR else None,
        backbone_sha256=backbone_sha256,
        image_digests=image_digests,
    )
    return Operator(solution.matrix, spec, record)


def check_method(method: str, ridge: float) -> None:
    """Raises `InputError` for an unknown method, or a ridge below 0 or not finite."""
    if method not in METHODS:
        raise InputError(f"No method is named {method!r}; {choices_hint(method, list(METHODS))}")
    if not 0 <= ridge < float("inf"):
        raise InputError(f"The ridge must be a finite number, at least 0, got {ridge}.")


def _check(moments: PairMoments, spec: FeatureSpec, method: str, ridge: float) -> None:
    check_method(method, ridge)
    if moments.channels != spec.channels:
        raise InputError(f"The moments must be of a {spec}, got {moments.channels} channels.")
    if moments.n < spec.channels:
        raise InputError(
            f"An operator on {spec.channels} channels needs at least as many locations, got "
            f"{moments.n}. Fit on more images."
        )
    if not (bool(moments.xx.any()) and bool(moments.yy.any())):
        raise InputError("Features to fit an operator on must not all be zero.")


def _warn(solution: Solution, c: int) -> None:
    if solution.rank < c:
        logger.warning(
            "The features determine %d of %d directions; the others are changed as little as "
            "possible.",
            solution.rank,
            c,
        )
    elif (number := solution.condition_number) is not None and number > ILL_CONDITIONED:
        logger.warning(
            "The fit is ill-conditioned (condition number %.1e): do not trust directions in which "
            "features hardly vary. Fit on more images, or with a larger ridge.",
            number,
        )
