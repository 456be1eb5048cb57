"""Linear subspaces spanned by rows: bases, what lies outside them, and oblique decompositions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from featinv_diffusion.errors import InputError

RANK_TOLERANCE = 1e-4
"""Singular values below this share of the largest count as zero: subspaces at an angle of less
than about 0.01° intersect. The rounding of float32 features lies two orders below."""


@dataclass(frozen=True)
class Decomposition:
    """How any vector splits over rows `directions` `[k, c]` and what they do not span.

    For rows B of rank r: `v = Bᵀ (encoder v) + complementᵀ (complement v)` for every v. Where rows
    depend on each other (k > r) the coefficients are those of least norm, so the identity holds
    for intersecting subspaces too. In float64.

    Args:
        encoder: `[k, c]`, the pseudo-inverse of Bᵀ.
        span: `[r, c]`, orthonormal rows that span the same as B.
        complement: `[c - r, c]`, orthonormal rows that span the rest.
    """

    encoder: Float[Tensor, "k c"]
    span: Float[Tensor, "r c"]
    complement: Float[Tensor, "rest c"]

    @property
    def rank(self) -> int:
        return len(self.span)


def decompose(directions: Float[Tensor, "k c"]) -> Decomposition:
    """Inverts rows of any number and rank; see `Decomposition`."""
    rows = directions.double()
    values, vectors = torch.linalg.eigh(rows.T @ rows)
    kept = values > RANK_TOLERANCE**2 * values[-1].clamp(min=torch.finfo(values.dtype).tiny)
    span = vectors[:, kept].T
    encoder = (rows @ span.T / values[kept]) @ span
    return Decomposition(encoder, span, vectors[:, ~kept].T)


def orthonormal_rows(rows: Float[Tensor, "k c"]) -> Float[Tensor, "r c"]:
    """Returns orthonormal rows that span the same; directions shorter than 1e-4 are dropped."""
    _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
    return vectors[values > RANK_TOLERANCE]


def principal_basis(
    rows: Float[Tensor, "n c"], *, centred: bool, threshold: float = 0.05
) -> Float[Tensor, "r c"]:
    """Returns the leading principal directions of rows, most energy first, in float64.

    Kept are those whose eigenvalue exceeds `threshold` of the largest (the rule of Fukunaga and
    Olsen, 1971). `centred` subtracts the mean, as MCD was published; otherwise directions go
    through the origin and may hold the mean itself. Rows without any spread give no direction.
    """
    values, directions = principal_directions(rows, centred=centred)
    floor = torch.finfo(values.dtype).eps * rows.double().square().sum()
    return directions[(values > threshold * values[0]) & (values > floor)]


def principal_directions(
    rows: Float[Tensor, "n c"], *, centred: bool
) -> tuple[Float[Tensor, " m"], Float[Tensor, "m c"]]:
    """Returns squared singular values, largest first, and right singular vectors, m = min(n, c)."""
    rows = rows.double()
    if centred:
        rows = rows - rows.mean(dim=0)
    if len(rows) > rows.shape[1]:
        values, vectors = torch.linalg.eigh(rows.T @ rows)
        return values.flip(0).clamp(min=0), vectors.T.flip(0)
    _, values, directions = torch.linalg.svd(rows, full_matrices=False)
    return values.square(), directions


def energy_share(span: Float[Tensor, "r c"], rows: Float[Tensor, "n c"]) -> float:
    """Share in [0, 1] of the summed squared length of rows that lies in an orthonormal span."""
    total = rows.square().sum().clamp(min=torch.finfo(rows.dtype).tiny)
    return float((rows @ span.T.to(rows)).square().sum() / total)


def completeness(span: Float[Tensor, "r c"], direction: Float[Tensor, " c"]) -> float:
    """‖P w‖ / ‖w‖ in [0, 1], P the projection on an orthonormal span (MCD, not squared)."""
    check_direction(direction, span.shape[1])
    direction = direction.to(span)
    return float((span @ direction).norm() / direction.norm())


def check_direction(direction: Tensor, channels: int) -> None:
    """Raises `InputError` unless a class direction is a finite vector of this length, not zero."""
    if direction.shape != (channels,):
        raise InputError(
            f"The direction of a class must be one vector of {channels} channels, "
            f"but shape {list(direction.shape)} came."
        )
    if not bool(direction.isfinite().all()) or not bool(direction.any()):
        raise InputError("The direction of a class must be finite and not zero.")


def principal_angles(
    first: Float[Tensor, "k c"], second: Float[Tensor, "m c"]
) -> Float[Tensor, " r"]:
    """Angles in radians between the spans of two sets of rows, smallest first."""
    a, b = decompose(first).span, decompose(second).span
    if len(a) > len(b):
        a, b = b, a
    cosines = torch.linalg.svdvals(a @ b.T).clamp(max=1)
    # The cosine hardly tells small angles apart, the sine hardly those near 90°.
    sines = torch.linalg.svdvals(a - (a @ b.T) @ b).clamp(max=1).flip(0)
    return torch.where(cosines.square() < 0.5, cosines.acos(), sines.asin())


def orthogonalise(
    bases: Sequence[Float[Tensor, "_ c"]], direction: Float[Tensor, " c"]
) -> tuple[list[Float[Tensor, "_ c"]], list[int]]:
    """Makes subspaces orthogonal: one after the other, that which adds most completeness first.

    Each is projected on what the chosen ones leave; one that lies within them is left out.

    Returns:
        The bases and, for each, its position among the given.
    """
    chosen: list[Tensor] = []
    order: list[int] = []
    open_ = {i: basis.double() for i, basis in enumerate(bases)}
    while open_:
        taken = torch.cat(chosen) if chosen else bases[0].double()[:0]
        open_ = {i: orthonormal_rows(b - (b @ taken.T) @ taken) for i, b in open_.items()}
        open_ = {i: b for i, b in open_.items() if len(b)}
        if open_:
            best = max(open_, key=lambda i: float((open_[i] @ direction.to(taken)).norm()))
            order.append(best)
            chosen.append(open_.pop(best))
    return chosen, order
