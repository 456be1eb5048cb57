"""What the studies of one or two pictures share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from featinv_diffusion.errors import InputError
from featinv_diffusion.figures import board as figures
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.metrics.statistics import Interval
from featinv_diffusion.runs.record import RunFolder, to_png
from featinv_diffusion.runs.sampling import seeds_of, to_list
from featinv_diffusion.settings import BY_GRADIENT, SampleSettings
from featinv_diffusion.types import FeatureMaps, Source

# ---- What the studies of many images share ----

METRICS = "metrics.json"
N_DEFAULT = 250
"""Number of images, if the data have as many and no number is asked for."""


@dataclass(frozen=True, eq=False, repr=False)
class Analysis:
    """What a study of many images found. It shows its first figure in a notebook.

    Args:
        metrics: everything that was measured, as `metrics.json` holds it.
        figures: the figures by file name.
        lines: the main results, a sentence each.
        table: the measurements as rows.
    """

    metrics: dict[str, Any]
    figures: dict[str, Figure]
    lines: list[str] = field(default_factory=list)
    table: list[dict[str, Any]] = field(default_factory=list)

    def figure(self) -> Figure:
        """Returns the first figure; `figures` holds all of them by file name."""
        return next(iter(self.figures.values()))

    def rows(self) -> list[dict[str, Any]]:
        """Returns the measurements as a table, one dict per row."""
        return self.table

    def summary(self) -> str:
        """Returns the main results."""
        return "\n".join(self.lines)

    def save(self, folder: str | Path, **made_by: Any) -> Path:
        """Writes the figures and, last, `metrics.json`.

        Args:
            made_by: further entries, which `metrics.json` holds before the measurements.
        """
        run = RunFolder(folder, METRICS)
        self._write(run, made_by)
        for name, figure in self.figures.items():
            run.figure(name, figure)
        run.complete({**made_by, **self.metrics})
        return run.folder

    def _write(self, run: RunFolder, made_by: Mapping[str, Any]) -> None:
        """Writes what a study has besides."""

    def _repr_png_(self) -> bytes:
        return to_png(self.figure())

    def __repr__(self) -> str:
        return f"{type(self).__name__}: {self.summary()}"


def to_dicts(intervals: Mapping[str, Interval | None]) -> dict[str, Any]:
    """Returns intervals as JSON holds them."""
    return {name: None if value is None else asdict(value) for name, value in intervals.items()}


def to_rows(intervals: Mapping[str, Interval | None], **key: Any) -> list[dict[str, Any]]:
    """Returns intervals as rows of a table, after a key that they share; None is left out."""
    known = {name: value for name, value in intervals.items() if value is not None}
    return [{**key, "name": name, **asdict(value)} for name, value in known.items()]


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
    if settings.inverter in BY_GRADIENT:
        made = f"inverter {settings.inverter} · {settings.steps} steps · seed {settings.seed}"
        return f"{settings.backbone}, layer {settings.layer} · {made}"
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
