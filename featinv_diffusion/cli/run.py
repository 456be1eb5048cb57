"""What `sample` and `replay` share: jobs → PNGs, grid and manifest in a folder."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from diffusers.utils import logging as diffusers_logging
from PIL.Image import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from transformers.utils import logging as transformers_logging

from featinv_diffusion.errors import InputError
from featinv_diffusion.figures.grid import GridRow, make_grid
from featinv_diffusion.images import write_png
from featinv_diffusion.inverters.open import DIFFUSION, SampleSettings, open_chosen
from featinv_diffusion.runs.record import MANIFEST, Manifest, read_environment
from featinv_diffusion.runs.sampling import Job, Reconstruction, reconstruct, write_samples
from featinv_diffusion.runs.scope import open_scope, scope_line

GRID = "grid.png"
MAX_GRID_ROWS = 100


def run_jobs(settings: SampleSettings, jobs: Sequence[Job], output: Path) -> Manifest:
    """Samples the jobs and writes everything; the manifest comes last and completes the folder.

    Raises:
        InputError: bad settings, or no image that could be reconstructed.
    """
    quiet_libraries()
    n_samples = sum(len(job.seeds) for job in jobs)
    with progress_bar(n_samples) as advance:
        inverter, resolved = open_chosen(settings, on_progress=advance)
        scope = open_scope(inverter, resolved)
        output.mkdir(parents=True, exist_ok=True)
        environment = read_environment(resolved.device)
        manifest = Manifest(resolved, environment=environment, scope_basis=scope.basis)
        rows: list[GridRow] = []
        fail, score = manifest.fail, scope.p_value
        for done in reconstruct(inverter, jobs, settings.batch_size, fail, score):
            (output / MANIFEST).unlink(missing_ok=True)  # it tells of what is now replaced
            write_samples(done, output)
            manifest.add(done)
            if len(rows) < MAX_GRID_ROWS:
                rows.append(to_row(done))
    if not rows:
        reasons = "\n".join(failure["error"] for failure in manifest.failures)
        raise InputError(reasons if len(jobs) == 1 else f"No picture could be used.\n{reasons}")
    write_png(draw_grid(rows, manifest), output / GRID)
    manifest.write(output)
    return manifest


def report(manifest: Manifest, output: Path) -> None:
    """Prints what was written and how good it is; failures go to stderr."""
    for failure in manifest.failures:
        print(f"Failed: {failure['error']}", file=sys.stderr)
    n_samples = sum(len(entry["outputs"]) for entry in manifest.images)
    match = manifest.mean("top5_match")
    matched = "" if match is None else f", top-5 match {match:.0%}"
    print(
        f"{_count(n_samples, 'sample')} of {_count(len(manifest.images), 'picture')}: "
        f"mean cosine {manifest.mean('cosine'):.2f} "
        f"(cells shuffled: {manifest.mean('cosine_shuffled'):.2f}){matched}."
    )
    p_values = [p for entry in manifest.images if (p := entry.get("scope_p_value")) is not None]
    is_deterministic = manifest.settings.inverter != DIFFUSION
    print(scope_line(p_values or None, manifest.scope_basis, deterministic=is_deterministic))
    print(f"Wrote {output / GRID} and {output / MANIFEST}.")


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def to_row(done: Reconstruction) -> GridRow:
    return GridRow(done.original, done.job.input.name, done.samples, to_captions(done.cosine))


def to_captions(cosines: Sequence[float]) -> list[str]:
    return [f"cosine {round(value, 2) + 0.0:.2f}" for value in cosines]  # and never -0.00


def draw_grid(rows: Sequence[GridRow], manifest: Manifest) -> Image:
    """Draws the rows under a heading that tells the settings and the shuffled null."""
    s = manifest.settings
    parts = _setting_parts(s)
    if len(rows) < len(manifest.images):
        parts.append(f"first {len(rows)} of {len(manifest.images)} pictures")
    null = manifest.mean("cosine_shuffled")
    return make_grid(
        rows,
        title=f"From {s.backbone} features back to pictures",
        subtitle=f"{' · '.join(parts)}\nUnder each sample: cosine of its features to the "
        f"original's, mean over cells. With the original's cells shuffled: {null:.2f} on average.",
    )


def _setting_parts(s: SampleSettings) -> list[str]:
    if s.inverter != DIFFUSION:
        weights = [_short(s.pipeline)] if s.pipeline else []
        return [f"inverter {_short(s.inverter)}", *weights, f"stage {s.stage}"]
    return [
        _short(s.pipeline or ""),
        f"layer {s.layer}",
        f"{s.steps} steps" + (f" of {s.scheduler}" if s.scheduler else ""),
        f"guidance {s.guidance} {s.guidance_scale:g}",
        f"strength {s.strength:g}",
        f"seed {s.seed}",
    ]


def _short(name: str) -> str:
    return Path(name).name if Path(name).is_absolute() else name


def quiet_libraries() -> None:
    """Leaves the terminal to this package's own bar and notes."""
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()


@contextmanager
def progress_bar(
    n_samples: int, enabled: bool = True, doing: str = "sampling", noun: str = "samples"
) -> Iterator[Callable[[float], None]]:
    """Yields a function that advances a bar on stderr by samples; there is none in a pipe."""
    console = Console(stderr=True)
    columns = (
        TextColumn(doing),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("of {task.total:.0f} " + noun),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not (enabled and console.is_terminal)) as bar:
        task = bar.add_task(doing, total=n_samples)
        yield lambda share: bar.advance(task, share)
