"""What the studies of one or two pictures share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import PurePosixPath

from matplotlib.axes import Axes

from featinv_diffusion.errors import InputError
from featinv_diffusion.figures import board as figures
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.settings import SampleSettings
from featinv_diffusion.types import Source


def to_n_samples(inverter: Inverter, n_samples: int, least: int = 1) -> int:
    """Returns how many samples a study makes of one map; of a deterministic inverter it is one.

    Raises:
        InputError: fewer than `least`.
    """
    if n_samples < least:
        raise InputError(f"n_samples must be at least {least} here, got {n_samples}.")
    return 1 if inverter.is_deterministic else n_samples


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


def draw_original(axes: Axes, source: Source, letter: str) -> None:
    """Draws the picture that a map comes from, where it is known, under its letter."""
    if source.square is not None:
        figures.show_picture(axes, source.square)
    figures.label(axes, f"{letter} (original)", weight="bold")
    if source.name:
        figures.caption(axes, figures.short_name(source.name), color=figures.GREY)
