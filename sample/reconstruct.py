"""Reconstruct a large set: as `featinv sample`, on any number of processes, resumable.

    accelerate launch --multi_gpu sample/reconstruct.py photos/ --output outputs/photos
    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 sample/reconstruct.py photos/

    python sample/reconstruct.py photos/ --worker 0/4     and so on; then featinv merge OUTPUT

The same command again finishes what was interrupted and tries again what failed.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from featinv_diffusion.cli import exits, options
from featinv_diffusion.cli.command_line import command_line
from featinv_diffusion.cli.run import end_worker, quiet_libraries, report, say_notes
from featinv_diffusion.data.sets import open_pictures
from featinv_diffusion.inverters.open import name_inverter
from featinv_diffusion.processes import device_name, find_worker, make_accelerator
from featinv_diffusion.runs.many import SHARDED_ROWS, in_shard, sample_units
from featinv_diffusion.runs.record import reserved
from featinv_diffusion.runs.workers import Call
from featinv_diffusion.settings import SampleSettings, to_flat


@options.with_settings(SampleSettings, without=["device"], n_samples=1)
def main(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE|FOLDER...")],
    *,
    settings: SampleSettings,
    output: options.Output = Path("outputs/reconstruct"),
    shard_size: Annotated[int, typer.Option(help="Pictures that one process does at a time.")] = 64,
    worker: options.WorkerOption = None,
) -> None:
    """Reconstruct all pictures, a shard of them at a time, on as many processes as were started."""
    quiet_libraries()
    found = open_pictures(images, exclude=output)
    one = find_worker(worker)
    if one is not None:
        say_notes(found)
        settings = name_inverter(settings)
        names, values = list(map(str, images)), to_flat(settings)
        call = Call("reconstruct", one.num_processes, values, names, shard_size, command_line())
        with reserved(output, worker=one):
            sample_units(one, settings, found, shard_size, output, place=in_shard, call=call)
        raise typer.Exit(end_worker(one, output))
    accelerator = make_accelerator()
    settings = replace(name_inverter(settings), device=device_name(accelerator))
    if accelerator.is_main_process:
        say_notes(found)
    with reserved(output) if accelerator.is_main_process else nullcontext():
        manifest = sample_units(
            accelerator,
            settings,
            found,
            shard_size,
            output,
            place=in_shard,
            n_rows=SHARDED_ROWS,
            say=accelerator.print,
        )
        if manifest is not None:
            report(manifest, output)
    accelerator.end_training()
    if manifest is not None and manifest.failures:
        raise typer.Exit(1)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    exits.run(app)
