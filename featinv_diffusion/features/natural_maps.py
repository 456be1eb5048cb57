"""`scope.safetensors`: the natural maps of a backbone, which others are compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featinv_diffusion.errors import InputError
from featinv_diffusion.features.density import Calibration, MapDensity
from featinv_diffusion.features.summary import CellBasis
from featinv_diffusion.tensors import read_tensors, write_tensors
from featinv_diffusion.types import Features, FeatureSpec

FORMAT = "featinv-scope/1"


@dataclass(frozen=True, eq=False)
class NaturalMaps:
    """Statistics of the maps that one backbone makes of images.

    Args:
        spec: of the maps.
        backbone_sha256: of the backbone's weights.
        sampling: settings that the reconstructions of calibration were sampled with; None where
            there were none.
        n_fitted: images that the density was fitted on.
    """

    spec: FeatureSpec
    backbone_sha256: str
    density: MapDensity
    calibration: Calibration
    sampling: dict[str, Any] | None
    n_fitted: int

    def p_values(self, features: Features, cosines: Sequence[float] | None = None) -> list[float]:
        """Returns how often a natural map scores as unnatural as each of these does.

        Args:
            features: maps, edited or not.
            cosines: mean cosine of the samples of each map to it, to count in whether a map can be
                reconstructed. Calibration has one sample of each map, which varies more than the
                mean of several, so that more samples make the p-value no smaller than it should be.

        Raises:
            InputError: maps of another shape, or not finite; cosines where none were calibrated.
        """
        self.spec.check_features(features)
        distances = self.density.distance(features)
        if cosines is None:
            return self.calibration.of_maps(distances).tolist()
        if self.sampling is None:
            raise InputError(
                "Cosines of reconstructions must have been calibrated to be counted in, but these "
                "statistics hold none. Fit them with featinv scope --n-reconstructions 256."
            )
        found = torch.tensor(list(cosines), dtype=torch.float64)
        return self.calibration.of_reconstructions(distances, found).tolist()

    def check(self, spec: FeatureSpec, backbone_sha256: str) -> None:
        """Raises `InputError` unless the maps of this backbone can be compared with these."""
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
            InputError: the disk refuses.
        """
        parts = {"basis": self.density.basis, "density": self.density}
        tensors = {
            f"{part}.{name}": value
            for part, held in {**parts, "calibration": self.calibration}.items()
            for name, value in vars(held).items()
            if isinstance(value, Tensor)
        }
        header = {
            "spec": asdict(self.spec),
            "backbone_sha256": self.backbone_sha256,
            "sampling": self.sampling,
            "n_fitted": self.n_fitted,
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
                f"{path} must hold all statistics of natural maps, but lacks some ({error}). "
                "Fit it again with featinv scope."
            ) from error

    @classmethod
    def _from_parts(cls, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> NaturalMaps:
        basis = CellBasis(**_part("basis", tensors))
        spec = FeatureSpec(**{**header["spec"], "grid": tuple(header["spec"]["grid"])})
        return cls(
            spec,
            header["backbone_sha256"],
            MapDensity(basis, **_part("density", tensors)),
            Calibration(**_part("calibration", tensors)),
            header["sampling"],
            header["n_fitted"],
        )


def _part(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = f"{part}."
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
