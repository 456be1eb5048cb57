"""Reconstruct a large set: as `featinv sample`, on any number of processes, resumable.

    accelerate launch --multi_gpu sample/reconstruct.py photos/ --output outputs/photos
    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 sample/reconstruct.py photos/

The same command again finishes what was interrupted and tries again what failed.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from accelerate import Accelerator

from featinv_diffusion.cli import exits, options
from featinv_diffusion.cli.run import quiet_libraries, report, say_notes
from featinv_diffusion.data.selection import digest
from featinv_diffusion.data.sets import ImageSet, open_pictures, read_location
from featinv_diffusion.errors import InputError
from featinv_diffusion.figures.grid import GridRow
from featinv_diffusion.images import center_square, read_image, write_png
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.inverters.open import name_inverter, open_inverter
from featinv_diffusion.processes import device_name, make_accelerator
from featinv_diffusion.runs.progress import advancing
from featinv_diffusion.runs.record import read_environment, reserved
from featinv_diffusion.runs.samples import Manifest, SampleFolder, to_captions, to_jobs
from featinv_diffusion.runs.sampling import Job, make_jobs, reconstruct
from featinv_diffusion.runs.scope import open_scope
from featinv_diffusion.runs.units import (
    FAILURES,
    Unit,
    begin_run,
    describe_inverter,
    discard_run,
    make_units,
    merge_units,
    open_units,
    run_units,
    share,
)
from featinv_diffusion.settings import SampleSettings

N_GRID_ROWS = 24
IMAGES = "images"


@options.with_settings(SampleSettings, without=["device"], n_samples=1)
def main(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE|FOLDER...")],
    *,
    settings: SampleSettings,
    output: options.Output = Path("outputs/reconstruct"),
    shard_size: Annotated[int, typer.Option(help="Pictures that one process does at a time.")] = 64,
) -> None:
    """Reconstruct all pictures, a shard of them at a time, on as many processes as were started."""
    quiet_libraries()
    accelerator = make_accelerator()
    settings = replace(name_inverter(settings), device=device_name(accelerator))
    found = open_pictures(images, exclude=output)
    if accelerator.is_main_process:
        say_notes(found)
    with reserved(output) if accelerator.is_main_process else nullcontext():
        manifest = reconstruct_all(accelerator, settings, found, shard_size, output)
    accelerator.end_training()
    if manifest is not None and manifest.failures:
        raise typer.Exit(1)


def reconstruct_all(
    accelerator: Accelerator,
    settings: SampleSettings,
    images: ImageSet,
    shard_size: int,
    output: Path,
) -> Manifest | None:
    """Does this process's share; returns the manifest of all on the main process, else None."""
    with accelerator.main_process_first():  # one downloads, the others find it there
        inverter = open_inverter(settings)
        scope = open_scope(inverter)
    resolved, backbone = inverter.settings, inverter.require_backbone()
    assert resolved is not None
    jobs = make_jobs(images, resolved.seed, resolved.n_samples)
    identity = {
        **asdict(replace(resolved, device=resolved.device.partition(":")[0])),
        **describe_inverter(inverter, backbone),
        "shard_size": shard_size,
        "n_images": len(jobs),
        "images_sha256": digest(str(job) for job in jobs),
        "data_fingerprint": images.fingerprint,
    }
    units = make_units(jobs, shard_size, output, identity)
    begin_run(identity, output, accelerator)
    todo = open_units(units, accelerator)
    accelerator.print(
        f"Shards: {len(units)}, done before: {len(units) - len(todo)}. "
        f"Processes: {accelerator.num_processes}."
    )

    def work(unit: Unit[Job]) -> Mapping[str, Any]:
        part = Manifest(resolved)
        jobs = [_into(unit.folder.relative_to(output).as_posix(), job) for job in unit.items]
        for done in reconstruct(inverter, jobs, resolved.batch_size, part.fail, scope.p_value):
            for name, picture in zip(done.job.outputs, done.samples, strict=True):
                write_png(picture, output / name)
            part.add(done)
        return {IMAGES: part.images, FAILURES: part.failures}

    n_samples = sum(len(job.seeds) for unit in share(todo, accelerator) for job in unit.items)
    with advancing(inverter, n_samples, accelerator.is_main_process):
        run_units(todo, work, accelerator)
    if not accelerator.is_main_process:
        return None
    manifest = Manifest(
        resolved,
        images=merge_units(units, IMAGES),
        failures=merge_units(units, FAILURES),
        environment=read_environment(resolved.device),
        scope_basis=scope.basis,
    )
    finish(manifest, inverter, output)
    return manifest


def _into(folder: str, job: Job) -> Job:
    """Moves the outputs of a job into the folder of its unit."""
    return replace(job, outputs=tuple(f"{folder}/{name}" for name in job.outputs))


def finish(manifest: Manifest, inverter: Inverter, output: Path) -> None:
    """Writes the grid of the first pictures, then the manifest."""
    if not manifest.images:
        discard_run(output)
        raise InputError("\n".join(failure["error"] for failure in manifest.failures))
    folder = SampleFolder(output, manifest)
    size = max(inverter.require_backbone().input_size)
    for job, entry in list(zip(to_jobs(manifest), manifest.images, strict=True))[:N_GRID_ROWS]:
        original = center_square(read_location(job.input), size)
        samples = [read_image(output / name) for name in job.outputs]
        folder.shown.append(GridRow(original, job.name, samples, to_captions(entry["cosine"])))
    folder.complete()
    report(manifest, output)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    exits.run(app)
