"""Solves for operators by the name of a method, and says where data or conditioning are poor."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from featinv_diffusion.errors import InputError, choices_hint
from featinv_diffusion.features.operator_moments import PairMoments
from featinv_diffusion.features.operator_solvers import (
    Solution,
    least_squares,
    orthogonal,
    self_adjoint,
    self_adjoint_direct,
)
from featinv_diffusion.features.operators import FitRecord, Operator
from featinv_diffusion.types import FeatureSpec

LINEAR = "linear"
CONSTRAINED: dict[str, Callable[[Float[Tensor, "c c"]], Solution]] = {
    "orthogonal": orthogonal,
    "self-adjoint": self_adjoint,
    "self-adjoint-direct": self_adjoint_direct,
}
METHODS = (*CONSTRAINED, LINEAR)
DEFAULT_RIDGE = 1e-6
ILL_CONDITIONED = 1e8
"""From this condition number on, fewer than half of the digits of float64 are left."""

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
    """Solves for the operator that turns X into Y; a problem that is ill-conditioned is logged.

    Args:
        moments: of pairs of maps of `spec`.
        operation: what was done to the pixels.
        method: one of `METHODS`.
        ridge: of `linear`; 0 for none.

    Raises:
        InputError: unknown method, a bad ridge, fewer locations than channels, features of zeros
            alone, or a linear problem that is singular without a ridge.
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
    """Raises `InputError` unless there is such a method and the ridge is a finite number from 0."""
    if method not in METHODS:
        raise InputError(f"No method is named {method!r}; {choices_hint(method, list(METHODS))}")
    if not 0 <= ridge < float("inf"):
        raise InputError(f"A ridge must be a finite number from 0, but {ridge} came.")


def _check(moments: PairMoments, spec: FeatureSpec, method: str, ridge: float) -> None:
    check_method(method, ridge)
    if moments.channels != spec.channels:
        raise InputError(
            f"Moments must be of a {spec}, but are of maps of {moments.channels} channels."
        )
    if moments.n < spec.channels:
        raise InputError(
            f"An operator on {spec.channels} channels needs at least as many locations, else XᵀY "
            f"is rank-deficient, but {moments.n} came. Fit on more images."
        )
    if not (bool(moments.xx.any()) and bool(moments.yy.any())):
        raise InputError("Features to fit an operator on must not all be zero, but they are.")


def _warn(solution: Solution, c: int) -> None:
    if solution.rank < c:
        logger.warning(
            "The features determine %d of %d directions; the others are turned as little as can "
            "be, or left.",
            solution.rank,
            c,
        )
    elif (number := solution.condition_number) is not None and number > ILL_CONDITIONED:
        logger.warning(
            "The fit is ill-conditioned (condition number %.1e): directions in which features "
            "hardly vary are not to be trusted. Fit on more images, or with a larger ridge.",
            number,
        )
