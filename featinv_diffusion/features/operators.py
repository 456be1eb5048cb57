"""Operators on features: one matrix Q for all locations that does what was done to the pixels.

Row convention: f' = f Q on unit-norm location vectors, which are scaled to unit norm again after Q
and then to the norm that the location had. Only rotations are linear as they are applied;
eigenvalues speak of Q itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from featinv_diffusion.backbones.names import read_spec
from featinv_diffusion.errors import InputError, choices_hint
from featinv_diffusion.features.edits import FeatureEdit
from featinv_diffusion.files import read_tensors, write_tensors
from featinv_diffusion.types import Features, FeatureSpec

FORMAT = "featinv-operator/1"
MAX_POWER = 1000
"""Of operators; an operation that is done to pixels as often takes as many passes over them."""
_ADVICE = "Fit it again with featinv operator fit."


@dataclass(frozen=True)
class FitRecord:
    """How an operator came about.

    Args:
        method: see `operator_methods.METHODS`.
        operation: name of the operation on pixels.
        parameters: of the operation.
        n_locations: that were fitted on.
        rank: of what was solved; below c, some directions were not determined.
        condition_number: of the same; None where the rank is below c.
        residual: ‖X Q − Y‖² / ‖Y‖² of the fit.
        residual_of_identity: the same where nothing is done.
        ridge: of `linear`, see `operator_solvers.least_squares`; None otherwise.
        backbone_sha256: of the weights that made the features; None where not known.
        image_digests: of the images of the fit, so that others can be measured on.
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


@dataclass(frozen=True, eq=False)
class Operator:
    """A matrix that acts on the location vectors of maps of one spec.

    Args:
        matrix: Q, in float64 as it was fitted, or in float32.
        spec: of the maps.
        record: of the fit.

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
                f"float32, but one of shape {list(self.matrix.shape)} in {self.matrix.dtype} came."
            )

    def power(self, n: int) -> Float[Tensor, "c c"]:
        """Returns Qⁿ in float64; the identity for 0.

        Raises:
            InputError: n is no whole number in 0 … `MAX_POWER`, or Qⁿ overflows.
        """
        if isinstance(n, bool) or not isinstance(n, int) or not 0 <= n <= MAX_POWER:
            raise InputError(f"A power must be a whole number in 0 … {MAX_POWER}, but {n!r} came.")
        raised = torch.linalg.matrix_power(self.matrix.double(), n)
        check_finite(raised, n)
        return raised

    def edit(self, power: int = 1, *, spec: FeatureSpec | None = None) -> FeatureEdit:
        """Returns the edit of maps by Qⁿ, which keeps the norm of each location.

        Scaling to unit norm between the applications would change nothing.

        Args:
            power: n, from 0.
            spec: of the inverter that the edit is for; must be the operator's.

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
        """Raises `InputError` unless the operator is of features of this spec and these weights."""
        if replace(spec, backbone=self.spec.backbone) != self.spec:
            raise InputError(
                f"The operator {self.record.operation} acts on a {self.spec}, but the features are "
                f"a {spec}. {_ADVICE}"
            )
        if None not in (mine := self.record.backbone_sha256, backbone_sha256) and (
            mine != backbone_sha256
        ):
            raise InputError(
                f"The operator {self.record.operation} is of the weights of {self.spec.backbone} "
                f"that it was fitted on, but others, of {spec.backbone}, make the features. Use "
                "an inverter of its backbone, or fit it again with featinv operator fit."
            )

    def save(self, path: Path) -> None:
        """Writes a safetensors file, whole or not at all.

        Raises:
            InputError: the disk refuses.
        """
        header = {"spec": asdict(self.spec), "record": asdict(self.record)}
        write_tensors(path, {"matrix": self.matrix}, header, FORMAT)

    @classmethod
    def load(cls, path: Path) -> Operator:
        """Reads what `save` wrote.

        Raises:
            InputError: no such file, a damaged one, or one that holds something else.
        """
        if not path.is_file():
            raise InputError(f"An operator must be a file, but there is none at {path}. {_ADVICE}")
        tensors, header = read_tensors(path, FORMAT, _ADVICE)
        try:
            spec = read_spec(header["spec"])
            held = header["record"]
            record = FitRecord(**{**held, "image_digests": tuple(held["image_digests"])})
            return cls(tensors["matrix"], spec, record)
        except (KeyError, TypeError) as error:
            raise InputError(
                f"{path} must hold a whole operator, but lacks some of it ({error}). {_ADVICE}"
            ) from error


def check_finite(matrix: Float[Tensor, "c c"], n: int) -> None:
    """Raises `InputError` unless a power of an operator, and its norm, are finite."""
    if not bool(matrix.norm().isfinite()):
        raise InputError(
            f"The operator to the power {n} must be finite, but overflows, for Q has eigenvalues "
            "outside of the unit circle. Ask for smaller powers."
        )


def _to_unit_scale(matrix: Float[Tensor, "c c"]) -> Float[Tensor, "c c"]:
    """Divides by a power of two, which loses nothing, so that powers do not leave float32.

    What is applied is scaled to unit norm anyway.
    """
    exponent = torch.frexp(matrix.abs().max()).exponent
    return torch.ldexp(matrix, -exponent)


def apply_matrix(features: Features, matrix: Float[Tensor, "c c"]) -> Features:
    """Returns ‖f‖ · n(n(f) Q) at each location, where n scales to unit norm.

    A vector of zeros stays one, and one that Q sends to zero becomes one. Half precision is
    computed in float32.
    """
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    norms = wide.norm(dim=1, keepdim=True)
    turned = torch.einsum("bchw,cd->bdhw", _to_unit(wide), matrix.to(wide.dtype).to(wide.device))
    return (norms * _to_unit(turned)).to(features.dtype)


def _to_unit(features: Features) -> Features:
    return F.normalize(features, dim=1, eps=torch.finfo(features.dtype).tiny)


# ---- Operators by name: those that the package ships, and files ----------------------------------

ASSETS = Path(__file__).parents[1] / "assets"
SUFFIX, FOLDER = ".safetensors", "operators"
"""Bundled are `assets/tiny/NAME/operators/OPERATION.safetensors`."""


def list_operators() -> list[str]:
    """Returns the names of the bundled operators, such as `tiny/siglip/swap`."""
    found = ASSETS.glob(f"*/*/{FOLDER}/*{SUFFIX}")
    return sorted(f"{p.parents[1].relative_to(ASSETS).as_posix()}/{p.stem}" for p in found)


def open_operator(name: str) -> Operator:
    """Loads a bundled operator by its name, or one from a file.

    Raises:
        InputError: no such operator, or a file that holds none.
    """
    if name in list_operators():
        folder, _, operation = name.rpartition("/")
        return Operator.load(ASSETS / folder / FOLDER / f"{operation}{SUFFIX}")
    path = Path(name).expanduser()
    if not path.is_file():
        bundled = list_operators()
        hint = f"; {choices_hint(name, bundled)}" if bundled else "."
        raise InputError(
            f"An operator must be a file of featinv operator fit, but {name!r} is none{hint}"
        )
    return Operator.load(path)
