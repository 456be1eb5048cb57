"""Eigenvalues of an operator and of its powers, and how near twice of it is to nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from featinv_diffusion.features.operators import Operator, check_finite

TOLERANCE = 0.1
"""How far from +1 or −1 an eigenvalue may lie, in the complex plane, to count as near it."""


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The eigenvalues of Qⁿ, and distances of matrices that tell rotations and involutions.

    Distances are ‖A − B‖_F / √c, the root mean square of what a random unit vector is moved by:
    √2 between unrelated rotations, 2 between A and −A.

    Args:
        power: n.
        eigenvalues: of Qⁿ.
        from_identity: distance of Qⁿ from I.
        twice_from_identity: distance of Q²ⁿ from I.
        from_orthogonal: distance of Qⁿ(Qⁿ)ᵀ from I.
        from_symmetric: distance of Qⁿ from its transpose.
    """

    power: int
    eigenvalues: Complex[Tensor, " c"]
    from_identity: float
    twice_from_identity: float
    from_orthogonal: float
    from_symmetric: float

    def count_near(self, value: float, tolerance: float = TOLERANCE) -> int:
        """Returns how many eigenvalues lie within the tolerance of a number."""
        return int(((self.eigenvalues - value).abs() <= tolerance).sum())

    def figures(self) -> dict[str, Any]:
        """Returns counts, moduli and angles as plain numbers."""
        moduli, angles = self.eigenvalues.abs(), self.eigenvalues.angle().abs().rad2deg()
        return {
            "power": self.power,
            "tolerance": TOLERANCE,
            "n_eigenvalues": len(self.eigenvalues),
            "n_near_plus_one": self.count_near(1),
            "n_near_minus_one": self.count_near(-1),
            "n_negative_real": int((self.eigenvalues.real < 0).sum()),
            "modulus": _summary(moduli),
            "n_modulus_above_one": int((moduli > 1 + 1e-6).sum()),
            "absolute_angle_degrees": _summary(angles),
            "from_identity": self.from_identity,
            "twice_from_identity": self.twice_from_identity,
            "from_orthogonal": self.from_orthogonal,
            "from_symmetric": self.from_symmetric,
        }


def measure_spectrum(operator: Operator, power: int = 1) -> Spectrum:
    """Returns the spectrum of Qⁿ, in float64 and without the scaling to unit norm.

    Raises:
        InputError: a power that is no whole number in 0 … `MAX_POWER`, or one where Qⁿ or Q²ⁿ
            overflows.
    """
    matrix = operator.power(power)
    twice = matrix @ matrix
    for product in (twice, matrix @ matrix.T):
        check_finite(product, 2 * power)
    return Spectrum(
        power=power,
        eigenvalues=torch.linalg.eigvals(matrix),
        from_identity=_from_identity(matrix),
        twice_from_identity=_from_identity(twice),
        from_orthogonal=_from_identity(matrix @ matrix.T),
        from_symmetric=_size(matrix - matrix.T),
    )


def _size(matrix: Float[Tensor, "c c"]) -> float:
    return (matrix.norm() / len(matrix) ** 0.5).item()


def _from_identity(matrix: Float[Tensor, "c c"]) -> float:
    return _size(matrix - torch.eye(len(matrix), dtype=matrix.dtype))


def _summary(values: Float[Tensor, " c"]) -> dict[str, float]:
    return {
        "min": values.min().item(),
        "median": values.median().item(),
        "mean": values.mean().item(),
        "max": values.max().item(),
    }
