"""What commands share: a quiet terminal, a study from its arguments to its folder, reports."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featinv_diffusion.cli import terminal
from featinv_diffusion.settings import SampleSettings
from featinv_diffusion.trust import refuse_code
from featinv_diffusion.types import FeatureSpec

if TYPE_CHECKING:
    from featinv_diffusion.data.sets import ImageSet
    from featinv_diffusion.processes import Worker
    from featinv_diffusion.runs.parts import Division
    from featinv_diffusion.runs.record import Result
    from featinv_diffusion.runs.samples import Manifest
    from featinv_diffusion.runs.workers import Call

logger = logging.getLogger(__name__)


def quiet_libraries() -> None:
    """Leaves the terminal to this package's own bar and notes, unless all notes are asked for."""
    if terminal.is_verbose():
        return
    terminal.set_libraries("error", bars=True)


def run_study(
    study: Callable[..., Result],
    settings: SampleSettings,
    output: Path,
    figure: str,
    *arguments: Any,
    **named: Any,
) -> Result:
    """Opens the inverter, runs a study with a progress bar, saves it and prints what it found.

    Args:
        study: a verb such as `interpolate`, which is given the inverter, the arguments, and the
            number of samples, the seed and the batch size of the settings.
    """
    from featinv_diffusion.figures.board import check_name
    from featinv_diffusion.inverters.diffusion import DiffusionInverter
    from featinv_diffusion.inverters.open import open_inverter
    from featinv_diffusion.runs.record import MANIFEST, reserved
    from featinv_diffusion.runs.scope import scope_line

    quiet_libraries()
    check_name(figure)
    with reserved(output):
        inverter = open_inverter(settings)
        result = study(
            inverter,
            *arguments,
            **named,
            n_samples=settings.n_samples,
            seed=settings.seed,
            batch_size=settings.batch_size,
            progress=True,
        )
        result.save(output, figure)
    print(result.summary())
    of_pipeline = isinstance(inverter, DiffusionInverter)
    print(scope_line(result.scope_p_value, result.scope_basis, of_pipeline=of_pipeline))
    print(f"Wrote {output / figure}, {result.command}.json, .parquet and manifest.json.")
    terminal.finish(output / MANIFEST, output)
    return result


def named_by(settings: SampleSettings, spec: FeatureSpec | None, source: Path) -> SampleSettings:
    """Returns settings with the backbone and layer that a file declares, where none are named.

    Raises:
        InputError: the file names code as its backbone.
    """
    named = (settings.pipeline, settings.backbone) != (None, None) or settings.is_deterministic
    if spec is None or named:
        return settings
    name = refuse_code(spec.backbone, str(source))
    return replace(settings, backbone=name, layer=settings.layer or spec.layer)


def say_notes(images: ImageSet) -> None:
    """Prints what a user may not expect of the images."""
    for note in images.notes:
        logger.warning("%s", note)


def work(
    worker: Worker,
    folder: Path,
    call: Call,
    study: Callable[[Division], object],
    named: Path | None = None,
    inputs: str = "",
) -> int:
    """Does a worker's share of a study in parts, and prints how far all are.

    Args:
        folder: where the units lie.
        named: what `featinv merge` is given, where it is not that folder.
        inputs: fingerprint of pictures that the study does not know of.

    Returns:
        The exit code.
    """
    from featinv_diffusion.runs.parts import JoinedElsewhere, Shared
    from featinv_diffusion.runs.record import reserved

    known = {"data_fingerprint": inputs} if inputs else {}
    with reserved(folder, worker=worker), suppress(JoinedElsewhere):
        study(Shared(worker, folder, call, known))
    return end_worker(worker, folder, named)


def end_worker(worker: Worker, output: Path, named: Path | None = None) -> int:
    """Prints what failed, how far all workers are and what to do next; returns the exit code.

    Args:
        named: what `featinv merge` is given, where it is not the folder of the run.
    """
    from featinv_diffusion.runs.workers import read_rest

    rest = read_rest(output, worker)
    for error in rest.failures:
        print(f"Failed: {error}", file=sys.stderr)
    print(f"Worker {worker} is done; of all {rest.n_units} units {rest.n_units - rest.n_open} are.")
    when = "When all workers are done" if rest.n_open else "All workers are done"
    print(f"{when}: featinv merge {shlex.quote(str(named or output))}")
    terminal.finish({"worker": str(worker), **asdict(rest)}, named or output)
    return 1 if rest.failures else 0


def report(manifest: Manifest, output: Path) -> None:
    """Prints what was written and how good it is; failures go to stderr."""
    from featinv_diffusion.runs.record import MANIFEST
    from featinv_diffusion.runs.samples import GRID
    from featinv_diffusion.runs.second_eye import second_eye_line

    for failure in manifest.failures:
        print(f"Failed: {failure['error']}", file=sys.stderr)
    if manifest.second_eye is not None:
        print(second_eye_line(manifest.second_eye))
    print(manifest.summary())
    print(manifest.scope_line())
    print(f"Wrote {output / GRID} and {output / MANIFEST}.")
    terminal.finish(output / MANIFEST, output)
