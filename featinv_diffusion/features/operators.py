"""Operators on features: one matrix Q for all locations that does what an operation does to pixels.

The convention is f' = f Q on rows of unit norm. The result is scaled to unit norm and then to the
norm that the location had before, so that only rotations are linear as they are applied.
Eigenvalues are those of Q itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Complex, Float
from torch import Tensor
from torch.nn import functional as F

from featinv_diffusion import schema
from featinv_diffusion.backbones.names import read_spec
from featinv_diffusion.errors import InputError, choices_hint, what_is_at
from featinv_diffusion.features.edits import FeatureEdit
from featinv_diffusion.files import read_tensors, write_tensors
from featinv_diffusion.types import Features, FeatureSpec

FORMAT = "featinv-operator/1"
MAX_POWER = 1000
"""Largest power of an operator; an operation on pixels is repeated as often."""
_ADVICE = "Fit it again with featinv operator fit."


@dataclass(frozen=True)
class FitRecord:
    """How an operator was fitted.

    Args:
        method: one of `operator_methods.METHODS`.
        operation: name of the operation on pixels.
        parameters: parameters of the operation.
        n_locations: number of locations in the fit.
        rank: rank of the matrix that was solved; below c, some directions are not determined.
        condition_number: condition number of that matrix; None if its rank is below c.
        residual: ‖X Q − Y‖² / ‖Y‖² of the fit.
        residual_of_identity: the residual of doing nothing.
        ridge: ridge of the method `linear`, see `operator_methods.least_squares`; None otherwise.
        backbone_sha256: digest of the weights that made the features; None if not known.
        image_digests: digests of the images in the fit, so that it can be measured on others.
    """

    method: str
    operation: str
    parameters: Mapping[str, Any]
    n_locations: int
    rank: int
    condition_number: float | None
    residual: float
    residual_of_identity: float
    ridge: float | None = None
    backbone_sha256: str | None = None
    image_digests: tuple[str, ...] = field(default=(), repr=False)

    @property
    def operation_name(self) -> str:
        """The operation with its parameters, such as `suppress (alpha 0.9, channel blue)`."""
        return with_parameters(self.operation, self.parameters)


def with_parameters(name: str, parameters: Mapping[str, Any]) -> str:
    """Returns a name followed by its parameters in brackets, if there are any."""
    values = ", ".join(f"{key} {value}" for key, value in parameters.items())
    return f"{name} ({values})" if values else name


@dataclass(frozen=True, eq=False, repr=False)
class Operator:
    """A matrix that acts on the location vectors of feature maps.

    Args:
        matrix: Q, in float64 as it was fitted, or in float32.
        spec: the features that it acts on.
        record: how it was fitted.

    Raises:
        InputError: a matrix of another size or type, or one that is not finite.
    """

    matrix: Float[Tensor, "c c"]
    spec: FeatureSpec
    record: FitRecord

    def __post_init__(self) -> None:
        c = self.spec.channels
        is_real = self.matrix.dtype in (torch.float64, torch.float32)
        fits = tuple(self.matrix.shape) == (c, c) and is_real
        if not (fits and bool(self.matrix.isfinite().all())):
            raise InputError(
                f"An operator on a {self.spec} must be a finite {c}×{c} matrix in float64 or "
                f"float32, got the shape {list(self.matrix.shape)} in {self.matrix.dtype}."
            )

    def summary(self) -> str:
        """Returns what was fitted and how well, in one sentence."""
        record = self.record
        condition = record.condition_number
        return (
            f"{record.operation_name} on {self.spec.backbone}, {record.method}: residual "
            f"{record.residual:.4f} (doing nothing: {record.residual_of_identity:.4f}) of "
            f"{record.n_locations} locations of {len(record.image_digests)} images; rank "
            f"{record.rank} of {self.spec.channels}, condition number "
            f"{'infinite' if condition is None else f'{condition:.1e}'}."
        )

    def __repr__(self) -> str:
        return f"Operator({self.spec}): {self.summary()}"

    def power(self, n: int) -> Float[Tensor, "c c"]:
        """Returns Qⁿ in float64; the identity for 0.

        Raises:
            InputError: n is no whole number in 0 … `MAX_POWER`, or Qⁿ overflows.
        """
        if isinstance(n, bool) or not isinstance(n, int) or not 0 <= n <= MAX_POWER:
            raise InputError(f"A power must be a whole number in 0 … {MAX_POWER}, got {n!r}.")
        raised = torch.linalg.matrix_power(self.matrix.double(), n)
        check_finite(raised, n)
        return raised

    def edit(self, power: int = 1, *, spec: FeatureSpec | None = None) -> FeatureEdit:
        """Returns the function that applies Qⁿ to maps and keeps the norm of each location.

        It equals n applications, since scaling to unit norm between them changes nothing.

        Args:
            power: n, at least 0.
            spec: features of the inverter that reads the result; must be the operator's.

        Raises:
            InputError: a bad power, or features of another spec, now or when the edit is used.
        """
        if spec is not None:
            self.check(spec)
        matrix = _to_unit_scale(self.power(power))

        def apply(features: Features) -> Features:
            self.spec.check_features(features)
            return apply_matrix(features, matrix)

        return apply

    def check(self, spec: FeatureSpec, backbone_sha256: str | None = None) -> None:
        """Raises `InputError` unless the operator was fitted on such features of these weights."""
        if replace(spec, backbone=self.spec.backbone) != self.spec:
            raise InputError(
                f"The operator {self.record.operation} acts on a {self.spec}, but the features are "
                f"a {spec}. {_ADVICE}"
            )
        if None not in (mine := self.record.backbone_sha256, backbone_sha256) and (
            mine != backbone_sha256
        ):
            raise InputError(
                f"The operator {self.record.operation} was fitted on the weights of "
                f"{self.spec.backbone}, but the features come from other weights, of "
                f"{spec.backbone}. Use an inverter of its backbone, or fit it again with featinv "
                "operator fit."
            )

    def save(self, path: Path) -> None:
        """Writes a safetensors file, whole or not at all.

        Raises:
            InputError: a place where nothing can be written.
        """
        header = {"spec": asdict(self.spec), "record": asdict(self.record)}
        write_tensors(path, {"matrix": self.matrix}, header, FORMAT)

    @classmethod
    def load(cls, path: Path) -> Operator:
        """Reads what `save` wrote.

        Raises:
            InputError: no such file, or one that is damaged or holds something else.
        """
        if not path.is_file():
            raise InputError(
                f"An operator must be a file, but there is {what_is_at(path)} at {path}. {_ADVICE}"
            )
        tensors, header = read_tensors(path, FORMAT, _ADVICE)
        try:
            spec = read_spec(header["spec"], f"{path} (its header)")
            record: FitRecord = schema.convert(header["record"], FitRecord, str(path), _ADVICE)
            return cls(tensors["matrix"], spec, record)
        except (KeyError, TypeError) as error:
            raise InputError(
                f"{path} must hold a whole operator, but a part is missing ({error}). {_ADVICE}"
            ) from error


def check_finite(matrix: Float[Tensor, "c c"], n: int) -> None:
    """Raises `InputError` unless a power of an operator, and its norm, are finite."""
    if not bool(matrix.norm().isfinite()):
        raise InputError(
            f"The operator to the power {n} must be finite, but overflows, since Q has eigenvalues "
            "outside of the unit circle. Ask for smaller powers."
        )


def _to_unit_scale(matrix: Float[Tensor, "c c"]) -> Float[Tensor, "c c"]:
    """Divides by a power of two, which is exact, so that powers stay within float32.

    The factor has no effect, since results are scaled to unit norm.
    """
    exponent = torch.frexp(matrix.abs().max()).exponent
    return torch.ldexp(matrix, -exponent)


def apply_matrix(features: Features, matrix: Float[Tensor, "c c"]) -> Features:
    """Returns ‖f‖ · n(n(f) Q) at each location, where n scales to unit norm.

    A vector of zeros, and one that Q maps to zero, give zeros. Half precision is computed in
    float32.
    """
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    norms = wide.norm(dim=1, keepdim=True)
    turned = torch.einsum("bchw,cd->bdhw", _to_unit(wide), matrix.to(wide.dtype).to(wide.device))
    return (norms * _to_unit(turned)).to(features.dtype)


def _to_unit(features: Features) -> Features:
    return F.normalize(features, dim=1, eps=torch.finfo(features.dtype).tiny)


# ---- The eigenvalues of an operator and of its powers --------------------------------------------

TOLERANCE = 0.1
"""Distance in the complex plane within which an eigenvalue counts as near +1 or −1."""


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The eigenvalues of Qⁿ, and distances between matrices that reveal rotations and involutions.

    A distance is ‖A − B‖_F / √c, the root mean square by which a random unit vector is moved: it is
    √2 between unrelated rotations and 2 between A and −A.

    Args:
        power: n.
        eigenvalues: eigenvalues of Qⁿ.
        from_identity: distance from Qⁿ to I.
        twice_from_identity: distance from Q²ⁿ to I.
        from_orthogonal: distance from Qⁿ(Qⁿ)ᵀ to I.
        from_symmetric: distance from Qⁿ to its transpose.
    """

    power: int
    eigenvalues: Complex[Tensor, " c"]
    from_identity: float
    twice_from_identity: float
    from_orthogonal: float
    from_symmetric: float

    def count_near(self, value: float, tolerance: float = TOLERANCE) -> int:
        """Returns the number of eigenvalues within the tolerance of a value."""
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
    """Returns the spectrum of Qⁿ, computed in float64 and without scaling to unit norm.

    Raises:
        InputError: a power that is no whole number in 0 … `MAX_POWER`, or Qⁿ or Q²ⁿ overflows.
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


# ---- Operators by name: those that the package ships, and files ----------------------------------

ASSETS = Path(__file__).parents[1] / "assets"
SUFFIX, FOLDER = ".safetensors", "operators"
"""A bundled operator is `assets/tiny/NAME/operators/OPERATION.safetensors`."""


def list_operators() -> list[str]:
    """Returns the names of the bundled operators, such as `tiny/siglip/swap`."""
    found = ASSETS.glob(f"*/*/{FOLDER}/*{SUFFIX}")
    return sorted(f"{p.parents[1].relative_to(ASSETS).as_posix()}/{p.stem}" for p in found)


def open_operator(name: str) -> Operator:
    """Loads a bundled operator by its name, or an operator from a file.

    Raises:
        InputError: no such operator, or a file that holds something else.
    """
    if name in list_operators():
        folder, _, operation = name.rpartition("/")
        return Operator.load(ASSETS / folder / FOLDER / f"{operation}{SUFFIX}")
    path = Path(name).expanduser()
    if not path.is_file():
        bundled = list_operators()
        hint = f"; {choices_hint(name, bundled)}" if bundled else "."
        raise InputError(f"An operator must be a file of featinv operator fit, got {name!r}{hint}")
    return Operator.load(path)
