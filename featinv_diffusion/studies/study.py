"""What the studies of one or two pictures share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from matplotlib.axes import Axes
from torch import Tensor

from featinv_diffusion.errors import InputError
from featinv_diffusion.figures import board as figures
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.runs.sampling import seeds_of, to_list
from featinv_diffusion.settings import SampleSettings
from featinv_diffusion.types import FeatureMaps, Source


def choose_seeds(
    inverter: Inverter,
    features: FeatureMaps,
    seed: int,
    n_samples: int,
    given: Sequence[int] | None = None,
    least: int = 1,
) -> list[int]:
    """Returns the seed of each sample of one map; a deterministic inverter makes one sample.

    Args:
        given: seeds to take instead of those that derive from `seed` and the name of the picture.
        least: samples that a study needs of an inverter that is not deterministic.

    Raises:
        InputError: several maps, or too few samples.
    """
    derived = seeds_of(features, seed, n_samples)
    seeds = derived if given is None else list(given)
    least = 1 if inverter.is_deterministic else least
    if len(seeds) < least:
        raise InputError(
            f"n_samples must be at least {least} here, one seed each, got {len(seeds)}."
        )
    return seeds[:1] if inverter.is_deterministic else seeds


def settings_of(
    inverter: Inverter, n_samples: int, seed: int, batch_size: int
) -> SampleSettings | None:
    """Returns the inverter's settings with those of a study; None where it was built by hand."""
    if inverter.settings is None:
        return None
    return replace(inverter.settings, n_samples=n_samples, seed=seed, batch_size=batch_size)


def settings_line(settings: SampleSettings | None) -> str:
    """Returns what decides the pictures, for the head of a figure."""
    if settings is None:
        return ""
    if settings.is_deterministic:
        name = PurePosixPath(settings.inverter).name
        return f"{settings.backbone}, layer {settings.layer} · inverter {name}"
    pipeline = PurePosixPath(settings.pipeline or "")
    name = pipeline.name if pipeline.is_absolute() else str(pipeline)
    parts = [
        f"{settings.backbone}, layer {settings.layer}",
        *([name] if name != settings.backbone else []),
        f"{settings.steps} steps" + (f" of {settings.scheduler}" if settings.scheduler else ""),
        f"guidance {settings.guidance} {settings.guidance_scale:g}",
        f"seed {settings.seed}",
    ]
    return " · ".join(parts)


def draw_original(axes: Axes, source: Source, letter: str = "") -> None:
    """Draws the picture that a map comes from, where it is known, under its letter."""
    if source.square is not None:
        figures.show_picture(axes, source.square)
    if letter:
        figures.label(axes, f"{letter} (original)", weight="bold")
    else:
        figures.label(axes, "original")
    if source.name:
        figures.caption(axes, figures.short_name(source.name), color=figures.GREY)


def pixel_rows(**columns: Tensor | None) -> list[dict[str, Any]]:
    """Returns one dict per pixel: `y`, `x`, and the value of each map `[height, width]`."""
    size = next(values.shape for values in columns.values() if values is not None)
    places = ((y, x) for y in range(size[0]) for x in range(size[1]))
    lists = [
        [None] * (size[0] * size[1]) if values is None else to_list(values.flatten())
        for values in columns.values()
    ]
    return [
        {"y": y, "x": x, **dict(zip(columns, row, strict=True))}
        for (y, x), *row in zip(places, *lists, strict=True)
    ]
