"""A study from its arguments to a folder: pictures, a figure, numbers, and a manifest to replay."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import pyarrow as pa
from matplotlib.figure import Figure
from PIL import Image
from pyarrow import parquet

from featinv_diffusion import __version__
from featinv_diffusion.errors import InputError
from featinv_diffusion.figures.board import write_figure
from featinv_diffusion.files import replacing, write_text
from featinv_diffusion.images import write_png
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.inverters.open import SampleSettings, open_inverter
from featinv_diffusion.runs.record import MANIFEST, read_environment
from featinv_diffusion.runs.sampling import find_images, make_jobs
from featinv_diffusion.runs.scope import Scope, open_scope

ProgressBar = Callable[[int], AbstractContextManager[Callable[[float], None]]]
"""From the number of samples to a bar that is advanced by samples."""


@dataclass(frozen=True)
class Outcome:
    """What a study found.

    Args:
        figures: what the manifest holds of it.
        numbers: everything that was measured, for a JSON file.
        rows: the same as a table, one dict per row.
        pictures: by file name.
        drawing: the study's figure.
        summary: one line for the terminal.
        scope_p_value: of the map that was inverted, or of each where there were several; None
            where the scope does not know.
    """

    figures: dict[str, Any]
    numbers: dict[str, Any]
    rows: Sequence[dict[str, Any]]
    pictures: dict[str, Image.Image]
    drawing: Figure
    summary: str
    scope_p_value: float | list[float] | None


@dataclass(frozen=True)
class Study(ABC):
    """Arguments of a study beside the settings of sampling; they are keys of its manifest.

    Args:
        seeds: of the samples; the same for every map that is inverted.
        figure: file name of the figure, whose suffix is its format.
    """

    command: ClassVar[str]

    seeds: list[int]
    figure: str

    @property
    @abstractmethod
    def n_samples(self) -> int:
        """How many samples it takes, of all maps together."""

    @abstractmethod
    def run(self, inverter: Inverter, settings: SampleSettings, scope: Scope) -> Outcome:
        """Samples, measures and scores the maps that it edits; writes nothing."""


def run_study(
    study: Study, settings: SampleSettings, output: Path, progress_bar: ProgressBar
) -> tuple[dict[str, Any], str]:
    """Runs a study and writes its folder; returns its manifest and a line that sums it up.

    Raises:
        InputError: settings or pictures that cannot be used.
    """
    with progress_bar(study.n_samples) as advance:
        inverter, resolved = open_inverter(settings, on_progress=advance)
        scope = open_scope(inverter, resolved)
        is_new = not output.exists()
        output.mkdir(parents=True, exist_ok=True)  # a place that refuses is found before sampling
        try:
            outcome = study.run(inverter, resolved, scope)
        except InputError:
            if is_new:
                output.rmdir()
            raise
    manifest = {
        "version": __version__,
        "command": study.command,
        **asdict(resolved),
        **asdict(study),
        **outcome.figures,
        "scope_p_value": outcome.scope_p_value,
        "scope_basis": scope.basis,
        "outputs": list(outcome.pictures),
        "environment": read_environment(resolved.device),
    }
    _write(study, outcome, manifest, output)
    return manifest, outcome.summary


def seeds_of(path: Path, seed: int, n_samples: int) -> list[int]:
    """Returns the seeds that `featinv sample` derives for a picture.

    Raises:
        InputError: nothing there, or a folder.
    """
    if path.is_dir():
        raise InputError(f"A picture must be a file, but there is a folder at {path}.")
    (job,) = make_jobs(find_images([path]), seed, n_samples)
    return list(job.seeds)


def settings_line(settings: SampleSettings) -> str:
    """Returns what decides the pictures, for the head of a figure."""
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


def _write(study: Study, outcome: Outcome, manifest: dict[str, Any], output: Path) -> None:
    """The manifest goes first and comes last: it completes the folder."""
    (output / MANIFEST).unlink(missing_ok=True)
    for name, picture in outcome.pictures.items():
        write_png(picture, output / name)
    write_figure(outcome.drawing, output / study.figure)
    write_text(output / f"{study.command}.json", _to_json(outcome.numbers))
    with replacing(output / f"{study.command}.parquet") as partial:
        parquet.write_table(pa.Table.from_pylist(list(outcome.rows)), partial)
    write_text(output / MANIFEST, _to_json(manifest))


def _to_json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, allow_nan=False) + "\n"
