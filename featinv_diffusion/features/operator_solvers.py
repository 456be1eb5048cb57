"""Matrices Q with X Q ≈ Y, from XᵀX and XᵀY alone, in float64.

Rows of X and Y are locations, so that Q acts from the right. What the data do not determine is left
as near to what it was as the method allows: of rotations and reflections, directions that no
feature has a part in are turned as little as can be, and an eigenvalue of zero counts as +1; of
least squares, they are left as they are, and a ridge pulls towards that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from featinv_diffusion.errors import InputError

Square = Float[Tensor, "c c"]

TOLERANCE = 1e-10
"""Singular values and eigenvalues below this share of the greatest count as zero: the square of
what features in float32 resolve."""


@dataclass(frozen=True, eq=False)
class Solution:
    """A solved matrix.

    Args:
        matrix: Q.
        rank: of what was solved, XᵀY or XᵀX; below c, some directions were not determined.
        condition_number: of the same; None where the rank is below c.
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

    S² = I. Not the best symmetric orthogonal fit in general, see `self_adjoint_direct`.
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

    Computed as I + W (Λ + λ)⁻¹ Wᵀ (XᵀY − XᵀX) over the eigenvectors W of XᵀX whose eigenvalues Λ
    are not zero. Rank and condition number are those of XᵀX.

    Raises:
        InputError: XᵀX is singular and there is no ridge.
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

    Eigenvalues that are rounding errors of the matrix are zeros: a quarter turn has only such.
    """
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    values = torch.where(values.abs() > TOLERANCE * matrix.norm(), values, 0.0)
    signed = (vectors * torch.where(values < 0, -1.0, 1.0).double()) @ vectors.T
    return (signed + signed.T) / 2, values


def _rank(values: Tensor) -> int:
    """Counts values, which come in descending order, that are not zero."""
    return int((values > TOLERANCE * values[0]).sum())


def _condition(values: Tensor, rank: int) -> float | None:
    return (values[0] / values[-1]).item() if rank == len(values) else None
