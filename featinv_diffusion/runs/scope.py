"""Scope: whether a feature map is unlike those of sharp photos, and the statistics that tell.

It judges the map alone. Where a backbone makes an ordinary map of an odd picture, or an edit leads
from one ordinary map to another, nothing is found; docs/scope.md has how often.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from featinv_diffusion.backbones.base import weights_sha256
from featinv_diffusion.data.crops import split_held_back
from featinv_diffusion.data.sets import ImageSet
from featinv_diffusion.diffusion.hub import find_scope_file
from featinv_diffusion.diffusion.objective import scheduler_name
from featinv_diffusion.errors import InputError
from featinv_diffusion.features.natural_maps import (
    LEVEL,
    MIN_CALIBRATION,
    Calibration,
    NaturalMaps,
    fit_density,
)
from featinv_diffusion.images import center_square, to_tensor
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.inverters.diffusion import DiffusionInverter
from featinv_diffusion.metrics import feature_cosine
from featinv_diffusion.runs.progress import Advance
from featinv_diffusion.runs.sampling import batched, sample_each
from featinv_diffusion.seeds import derive_seed
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
        **({"refine": inverter.refine} if inverter.refine else {}),
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


# ---- Fitting the statistics ----------------------------------------------------------------------

_CALIBRATION_SHARE = 5  # one image of five, if none are held back by class


@dataclass(frozen=True)
class ScopeSplit:
    """Indices of the images to fit on and of those for calibration, in random order."""

    fitted: list[int]
    held_out: list[int]


def split_images(
    images: ImageSet, held_back_per_class: int = 0, n_images: int | None = None
) -> ScopeSplit:
    """Draws the images of both parts with a fixed seed.

    Args:
        held_back_per_class: hold out the last k images of each class, as training does, so that
            calibration uses images that the backbone was not trained on; 0 holds out a fifth of
            all images.
        n_images: largest number of images to fit on.

    Raises:
        InputError: too few images, or `held_back_per_class` for images without classes.
    """
    if held_back_per_class < 0 or (n_images is not None and n_images < 1):
        raise InputError(
            "held_back_per_class must be at least 0 and n_images at least 1, "
            f"got {held_back_per_class} and {n_images}."
        )
    generator = torch.Generator().manual_seed(derive_seed("scope"))
    order = torch.randperm(len(images), generator=generator).tolist()
    if held_back_per_class:
        if images.labels is None:
            raise InputError(
                "Images must have classes to hold some of each back, but these have none. Leave "
                "--held-back-per-class out, or give a folder with a folder for each class."
            )
        held = set(split_held_back(images.labels, held_back_per_class)[1])
    else:
        held = set(order[: len(order) // _CALIBRATION_SHARE])
    fitted, held_out = ([i for i in order if (i in held) == side] for side in (False, True))
    if len(held_out) < MIN_CALIBRATION:
        raise InputError(
            f"At least {MIN_CALIBRATION} images must be held out to calibrate p-values, got "
            f"{len(held_out)} of {len(images)}. Give more images."
        )
    return ScopeSplit(fitted[:n_images], held_out)


def fit_scope(
    inverter: Inverter,
    images: ImageSet,
    split: ScopeSplit,
    n_reconstructions: int = 256,
    batch_size: int = 8,
    advance: Advance = lambda n: None,
    others: Sequence[Inverter] = (),
) -> NaturalMaps:
    """Fits the distribution of natural maps, and calibrates p-values on held-out images.

    Args:
        others: the inverter with other settings, for which cosines are calibrated too.
        n_reconstructions: number of held-out images to sample once each, with the inverter's
            settings, which shows how well natural maps come back; 0 leaves reconstructions out of
            the score.
        advance: called with the number of images that are done.

    Raises:
        InputError: too few images, one that cannot be read, or maps that are not finite.
    """
    if n_reconstructions < 0 or 0 < n_reconstructions < MIN_CALIBRATION:
        raise InputError(
            f"There must be no reconstructions or at least {MIN_CALIBRATION}, got "
            f"{n_reconstructions}."
        )
    looked = _look(inverter, images, split.fitted, batch_size, advance)
    density = fit_density(maps for _, maps in looked)
    distances = [
        density.distance(maps)
        for _, maps in _look(inverter, images, split.held_out, batch_size, advance)
    ]
    natural = NaturalMaps(
        inverter.spec,
        weights_sha256({"": inverter.require_backbone().model}),
        density,
        Calibration(torch.cat(distances), torch.zeros(0)),
        None,
        len(split.fitted),
    )
    if not n_reconstructions:
        return natural
    return recalibrate(natural, [inverter, *others], images, split, n_reconstructions, batch_size)


def recalibrate(
    natural: NaturalMaps,
    inverters: Sequence[Inverter],
    images: ImageSet,
    split: ScopeSplit,
    n_reconstructions: int = 256,
    batch_size: int = 8,
) -> NaturalMaps:
    """Takes the cosines of reconstructions anew, by each of the settings of an inverter.

    Raises:
        InputError: other held-out images than those of the statistics.
    """
    found: list[tuple[dict[str, Any], Tensor]] = []
    for inverter in inverters:
        cosines: list[Tensor] = []
        chosen = split.held_out[:n_reconstructions]
        for indices, maps in _look(inverter, images, chosen, batch_size, lambda n: None):
            done = sum(map(len, cosines))
            wanted = natural.calibration.distances[done : done + len(maps)]
            if not torch.allclose(natural.density.distance(maps), wanted, rtol=1e-2, atol=1e-2):
                raise InputError(
                    "Statistics are calibrated anew on the images that they were calibrated on, "
                    "but these are others. Give those, or fit the statistics again."
                )
            seeds = [derive_seed(0, images.ids[i], 0) for i in indices]
            cosines.append(_self_consistency(inverter, maps, seeds))
        found.append((sampling_of(inverter), torch.cat(cosines)))
    (sampling, first), *others = found
    calibration = replace(natural.calibration, cosines=first)
    return replace(natural, calibration=calibration, sampling=sampling, others=tuple(others))


@torch.no_grad()
def _look(
    inverter: Inverter, images: ImageSet, indices: Iterable[int], size: int, advance: Advance
) -> Iterator[tuple[list[int], Features]]:
    backbone = inverter.require_backbone()
    for chosen in batched(indices, size):
        squares = [center_square(images.read(i), max(backbone.input_size)) for i in chosen]
        maps = backbone.features(to_tensor(squares).to(backbone.device))
        backbone.spec.check_features(maps)
        yield chosen, maps
        advance(len(chosen))


def _self_consistency(inverter: Inverter, maps: Features, seeds: Sequence[int]) -> Tensor:
    """Returns the cosine between each map and the features of one sample of it."""
    backbone = inverter.require_backbone()
    images = sample_each(inverter, maps, seeds).to(backbone.device)
    return feature_cosine(maps, backbone.features(images)).cpu()
