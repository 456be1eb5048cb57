"""Reconstruct a large set: as `featinv sample`, on any number of processes, resumable.

    accelerate launch --multi_gpu sample/reconstruct.py photos/ --output outputs/photos
    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 sample/reconstruct.py photos/

The same command again finishes what was interrupted: shards that are done are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from accelerate import Accelerator

from featinv_diffusion.cli import exits, options
from featinv_diffusion.cli.run import (
    GRID,
    draw_grid,
    progress_bar,
    quiet_libraries,
    report,
    to_captions,
)
from featinv_diffusion.errors import InputError
from featinv_diffusion.figures.grid import GridRow
from featinv_diffusion.images import center_square, read_image, write_png
from featinv_diffusion.inverters.open import choose_inverter, open_chosen
from featinv_diffusion.processes import device_name, make_accelerator
from featinv_diffusion.runs.record import Manifest, to_jobs
from featinv_diffusion.runs.sampling import find_images, make_jobs
from featinv_diffusion.runs.scope import open_scope
from featinv_diffusion.runs.shards import Shard, begin_run, make_shards, merge_shards, run_shard
from featinv_diffusion.settings import SampleSettings

N_GRID_ROWS = 24


@options.with_sampling(n_samples=1, without=["device"])
def main(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE|FOLDER...")],
    *,
    settings: SampleSettings,
    inverter: options.Inverter = "diffusion",
    stage: options.Stage = None,
    output: options.Output = Path("outputs/reconstruct"),
    shard_size: Annotated[
        int, typer.Option(help="Pictures that one process does, and keeps, at a time.")
    ] = 64,
) -> None:
    """Reconstruct all pictures, a shard of them at a time, on as many processes as were started."""
    accelerator = make_accelerator()
    settings = choose_inverter(settings, inverter, stage)
    settings = replace(settings, device=device_name(accelerator))
    jobs = make_jobs(find_images(images, exclude=output), settings.seed, settings.n_samples)
    manifest = reconstruct_shards(accelerator, settings, make_shards(jobs, shard_size), output)
    accelerator.end_training()
    if manifest is not None and manifest.failures:
        raise typer.Exit(1)


def reconstruct_shards(
    accelerator: Accelerator, settings: SampleSettings, shards: Sequence[Shard], output: Path
) -> Manifest | None:
    """Does this process's share; returns the manifest of all on the main process, else None."""
    quiet_libraries()
    rank, n_processes = accelerator.process_index, accelerator.num_processes
    todo = [shard for shard in shards if not shard.is_done(output)]
    mine = todo[rank::n_processes]
    accelerator.print(
        f"Shards: {len(shards)}, done before: {len(shards) - len(todo)}. Processes: {n_processes}."
    )
    n_mine = sum(len(job.seeds) for shard in mine for job in shard.jobs)
    with progress_bar(n_mine, enabled=accelerator.is_main_process) as advance:
        with accelerator.main_process_first():  # one downloads, the others find it there
            inverter, resolved = open_chosen(settings, on_progress=advance)
            scope = open_scope(inverter, resolved)
        begin_run(resolved, shards, output, write=accelerator.is_main_process)
        accelerator.wait_for_everyone()  # all have counted what is done before any does more
        for shard in mine:
            run_shard(inverter, shard, settings.batch_size, output, scope.p_value)
        accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return None
    manifest = merge_shards(resolved, shards, output)
    manifest.scope_basis = scope.basis
    assert inverter.backbone is not None
    finish(manifest, output, max(inverter.backbone.input_size))
    return manifest


def finish(manifest: Manifest, output: Path, input_size: int) -> None:
    """Writes the grid of the first pictures, then the manifest."""
    if not manifest.images:
        raise InputError("\n".join(failure["error"] for failure in manifest.failures))
    rows = []
    for job, entry in list(zip(to_jobs(manifest), manifest.images, strict=True))[:N_GRID_ROWS]:
        original = center_square(read_image(job.input), input_size)
        samples = [read_image(output / name) for name in job.outputs]
        rows.append(GridRow(original, job.input.name, samples, to_captions(entry["cosine"])))
    write_png(draw_grid(rows, manifest), output / GRID)
    manifest.write(output)
    report(manifest, output)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    exits.run(app)
