"""Scope: whether a feature map is unlike those of sharp photos, and the statistics that tell.

It judges the map alone. Where a backbone makes an ordinary map of an odd picture, or an edit leads
from one ordinary map to another, nothing is found; docs/scope.md has how often.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from featinv_diffusion.backbones.base import weights_sha256
from featinv_diffusion.diffusion.hub import find_scope_file
from featinv_diffusion.diffusion.objective import scheduler_name
from featinv_diffusion.errors import InputError
from featinv_diffusion.features.natural_maps import (
    LEVEL,
    NaturalMaps,
)
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.inverters.diffusion import DiffusionInverter
from featinv_diffusion.settings import DIFFUSION
from featinv_diffusion.types import Features

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAP, RECONSTRUCTION = "map", "map and reconstruction"
MARK = " · outside"
UNLIKE = "unlike feature maps of sharp photos"
UNKNOWN = (
    "Scope: unknown (scope_p_value is null), since this pipeline holds no statistics of natural "
    "feature maps to compare with. Fit them with: featinv scope PIPELINE_FOLDER --data IMAGES."
)
UNKNOWN_OTHERS = (
    "Scope: unknown (scope_p_value is null), since only pipelines of the diffusion inverter hold "
    "statistics of natural feature maps to compare with."
)
_MAX_LISTED = 8


@dataclass(frozen=True, eq=False)
class Scope:
    """Scores feature maps by the statistics of natural maps in a pipeline.

    Args:
        natural: the statistics; None without any, and then nothing is scored.
        uses_cosines: whether cosines of reconstructions can be compared with those of calibration.
    """

    natural: NaturalMaps | None = None
    uses_cosines: bool = False

    @property
    def basis(self) -> str | None:
        """What p-values rest on: the map, or the map and its reconstruction; None without any."""
        if self.natural is None:
            return None
        return RECONSTRUCTION if self.uses_cosines else MAP

    def p_value(self, features: Features, cosine: float) -> float | None:
        """Returns how often the map of a photo looks odder than this one; None if not known.

        Args:
            features: the map that was inverted, `[1, c, h, w]`.
            cosine: mean cosine between the features of its samples and the map.
        """
        found = self.p_values(features, [cosine])
        return None if found is None else found[0]

    def p_values(self, features: Features, cosines: Sequence[float]) -> list[float] | None:
        """Returns `p_value` of each map.

        Raises:
            InputError: another number of cosines than maps, or maps of another shape or not finite.
        """
        if len(features) != len(cosines):
            raise InputError(
                f"Each map must have one cosine, got {len(features)} maps and {len(cosines)} "
                "cosines."
            )
        if self.natural is None:
            return None
        return self.natural.p_values(features, cosines if self.uses_cosines else None)


def open_scope(inverter: Inverter) -> Scope:
    """Reads the statistics in the inverter's pipeline.

    Raises:
        InputError: statistics that are damaged, or of other features or weights.
    """
    settings = inverter.settings
    if settings is None or settings.inverter != DIFFUSION or settings.pipeline is None:
        return Scope()
    if (path := find_scope_file(settings.pipeline)) is None:
        return Scope()
    natural = NaturalMaps.load(path)
    natural.check(inverter.spec, weights_sha256({"": inverter.require_backbone().model}))
    fitting = natural.calibrated_for(sampling_of(inverter))
    return Scope(fitting or natural, uses_cosines=fitting is not None)


def sampling_of(inverter: Inverter) -> dict[str, Any]:
    """Returns the settings on which cosines of reconstructions depend."""
    if not isinstance(inverter, DiffusionInverter):
        return {}
    return {
        "steps": inverter.num_inference_steps,
        "scheduler": scheduler_name(inverter.pipeline.scheduler),
        "guidance_scale": inverter.guidance_scale,
        "guidance": inverter.guidance,
        "strength": inverter.strength,
        **({"refine": inverter.refine, "refine_at": inverter.refine_at} if inverter.refine else {}),
    }


def scope_notes(basis: str | None) -> list[str]:
    """Returns the line of a figure's heading that explains the mark; nothing without statistics."""
    if basis is None:
        return []
    return [f"Marked “outside”: {UNLIKE}, scope p < {LEVEL:g} ({basis})."]


def caption(axes: Axes, words: str, p_value: float | None) -> None:
    """Writes a line below a tile, and marks a map that is unlike those of sharp photos."""
    from featinv_diffusion.figures import board as figures

    if p_value is not None and p_value < LEVEL:
        figures.caption(axes, words + MARK, color=figures.ORANGE)
    else:
        figures.caption(axes, words)


def scope_line(
    p_values: float | Sequence[float] | None, basis: str | None, *, of_pipeline: bool = True
) -> str:
    """Returns the line of the terminal about the scope of one map or several.

    Args:
        of_pipeline: whether the inverter is a diffusion pipeline, which may hold statistics.
    """
    if p_values is None:
        return UNKNOWN if of_pipeline else UNKNOWN_OTHERS
    if isinstance(p_values, int | float):
        verdict = UNLIKE if p_values < LEVEL else f"no sign that the map is {UNLIKE}"
        return f"Scope: {verdict}, scope p = {p_values:.3f} ({basis})."
    n_out = sum(value < LEVEL for value in p_values)
    values = f"{min(p_values):.3f} … {max(p_values):.3f}"
    if len(p_values) <= _MAX_LISTED:
        values = ", ".join(f"{value:.3f}" for value in p_values)
    return (
        f"Scope: {n_out} of {len(p_values)} maps {UNLIKE} (scope p < {LEVEL:g}), "
        f"scope p = {values} ({basis})."
    )
