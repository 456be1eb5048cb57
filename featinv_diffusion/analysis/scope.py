"""Whether maps that are inverted are like natural ones: what applications ask, print and mark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes

from featinv_diffusion.analysis import figures
from featinv_diffusion.analysis.sampling import backbone_of
from featinv_diffusion.diffusion.hub import find_scope_file
from featinv_diffusion.diffusion.schedulers import scheduler_name
from featinv_diffusion.errors import InputError
from featinv_diffusion.evaluation.fingerprints import weights_sha256
from featinv_diffusion.features.density import LEVEL
from featinv_diffusion.features.natural_maps import NaturalMaps
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.inverters.diffusion import DiffusionInverter
from featinv_diffusion.sampling import DIFFUSION, SampleSettings
from featinv_diffusion.types import Features

MAP, RECONSTRUCTION = "map", "map and reconstruction"
MARK = " · out"
UNKNOWN = (
    "Scope: unknown (scope_p_value is null), for this pipeline holds no statistics of natural "
    "feature maps to compare with. Fit them with: featinv scope PIPELINE_FOLDER --data IMAGES."
)
UNKNOWN_DETERMINISTIC = (
    "Scope: unknown (scope_p_value is null), for only pipelines of the diffusion inverter hold "
    "statistics of natural feature maps to compare with."
)
_MAX_LISTED = 8


@dataclass(frozen=True, eq=False)
class Scope:
    """Scores maps against the natural ones that a pipeline knows.

    Args:
        natural: None where the pipeline holds no statistics; then nothing is scored.
        uses_cosines: whether cosines of reconstructions are comparable with those of calibration.
    """

    natural: NaturalMaps | None = None
    uses_cosines: bool = False

    @property
    def basis(self) -> str | None:
        """What p-values rest on: the map alone, or its reconstruction too; None without any."""
        if self.natural is None:
            return None
        return RECONSTRUCTION if self.uses_cosines else MAP

    @property
    def notes(self) -> list[str]:
        """A line for a figure's heading that explains the mark."""
        if self.natural is None:
            return []
        what = "out of scope, unlike the maps of images"
        return [f"Marked “out”: {what}, p < {LEVEL:g} ({self.basis})."]

    def p_value(self, features: Features, cosine: float) -> float | None:
        """Returns how often a natural map looks less natural than this one; None if not known.

        Args:
            features: `[1, c, h, w]`, as it was inverted.
            cosine: of its samples' features to it, the mean.
        """
        found = self.p_values(features, [cosine])
        return None if found is None else found[0]

    def p_values(self, features: Features, cosines: Sequence[float]) -> list[float] | None:
        """Returns `p_value` of each map.

        Raises:
            InputError: not one cosine for each, or maps of another shape or not finite.
        """
        if len(features) != len(cosines):
            raise InputError(
                f"Each map must come with its cosine, but {len(features)} maps and {len(cosines)} "
                "cosines came."
            )
        if self.natural is None:
            return None
        return self.natural.p_values(features, cosines if self.uses_cosines else None)


def open_scope(inverter: Inverter, settings: SampleSettings) -> Scope:
    """Reads the statistics of the pipeline that the resolved settings name.

    Raises:
        InputError: statistics that are damaged, or of other features or weights.
    """
    if settings.inverter != DIFFUSION or settings.pipeline is None:
        return Scope()
    if (path := find_scope_file(settings.pipeline)) is None:
        return Scope()
    natural = NaturalMaps.load(path)
    natural.check(inverter.spec, weights_sha256({"": backbone_of(inverter).model}))
    return Scope(natural, uses_cosines=natural.sampling == sampling_of(inverter))


def sampling_of(inverter: Inverter) -> dict[str, Any]:
    """Returns the settings that cosines of reconstructions depend on; none where it has none."""
    if not isinstance(inverter, DiffusionInverter):
        return {}
    return {
        "steps": inverter.num_inference_steps,
        "scheduler": scheduler_name(inverter.pipeline.scheduler),
        "guidance_scale": inverter.guidance_scale,
        "guidance": inverter.guidance,
        "strength": inverter.strength,
    }


def caption(axes: Axes, words: str, p_value: float | None) -> None:
    """Writes a line below a tile, and marks it where the map is out of scope."""
    if p_value is not None and p_value < LEVEL:
        figures.caption(axes, words + MARK, color=figures.ORANGE)
    else:
        figures.caption(axes, words)


def scope_line(
    p_values: float | Sequence[float] | None, basis: str | None, *, deterministic: bool = False
) -> str:
    """Returns what the terminal says of one map or of several.

    Args:
        deterministic: whether a deterministic inverter was used, which has no statistics.
    """
    if p_values is None:
        return UNKNOWN_DETERMINISTIC if deterministic else UNKNOWN
    if isinstance(p_values, int | float):
        verdict = "out of scope" if p_values < LEVEL else "like a natural map"
        return f"Scope: {verdict}, p = {p_values:.3f} ({basis})."
    n_out = sum(value < LEVEL for value in p_values)
    values = f"{min(p_values):.3f} … {max(p_values):.3f}"
    if len(p_values) <= _MAX_LISTED:
        values = ", ".join(f"{value:.3f}" for value in p_values)
    return (
        f"Scope: {n_out} of {len(p_values)} maps out of scope (p < {LEVEL:g}), "
        f"p = {values} ({basis})."
    )
