"""`featinv sample`: pictures → features → pictures again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from featinv_diffusion.cli import options
from featinv_diffusion.cli.command_line import command_line
from featinv_diffusion.errors import InputError
from featinv_diffusion.settings import DIFFUSION, SampleSettings, to_flat

if TYPE_CHECKING:
    from featinv_diffusion.data.sets import ImageSet
    from featinv_diffusion.processes import Worker


@options.with_settings(SampleSettings)
def sample(
    images: options.Images = None,
    *,
    settings: SampleSettings,
    certainty: Annotated[
        bool,
        typer.Option(
            "--certainty", help="Also draw how much of each picture the features determine."
        ),
    ] = False,
    output: options.Output = Path("outputs/sample"),
    worker: options.WorkerOption = None,
) -> None:
    """Reconstruct pictures from the features that a vision model sees in them.

    Writes the samples as PNGs, grid.png (original | samples, with the cosine between their
    features under each) and manifest.json (settings, seeds, metrics). Many pictures can be shared
    among workers that never talk, with --worker; `featinv merge` then writes grid and manifest.

    With --certainty, grid.png also has maps of the share of light and of colour that is determined
    by the features, and manifest.json has the numbers. The bundled pipelines are calibrated for it;
    `featinv certainty` calibrates others.

    The inverter rae is an AutoencoderRAE of diffusers, named by --pipeline: a folder, or
    nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08, RAE-siglip2-base-p16-i256-ViTXL-n08 or
    RAE-mae-base-p16-ViTXL-n08 there.
    """
    from featinv_diffusion.cli.maps import decode_maps
    from featinv_diffusion.cli.run import quiet_libraries, report, say_notes
    from featinv_diffusion.data.sets import open_pictures
    from featinv_diffusion.features.maps import is_maps_file
    from featinv_diffusion.images import builtin_photo
    from featinv_diffusion.inverters.open import name_inverter
    from featinv_diffusion.processes import find_worker
    from featinv_diffusion.runs.samples import run_jobs
    from featinv_diffusion.runs.sampling import make_jobs

    quiet_libraries()
    one = find_worker(worker)
    if certainty and one is not None:
        raise InputError(
            "Certainty is drawn by one process, but --worker shares the pictures among several. "
            "Leave --certainty out, and judge some of the pictures afterwards."
        )
    if any(is_maps_file(name) for name in images or ()):
        assert images is not None
        if len(images) > 1:
            raise InputError(
                f"One file of feature maps, or pictures, can be sampled at a time, got "
                f"{len(images)} names. Sample them one after the other."
            )
        if one is not None:
            raise InputError(
                f"Workers share pictures, but {images[0]} holds feature maps. Give the pictures, "
                "or leave --worker out."
            )
        return decode_maps(settings, Path(images[0]), output, certainty=certainty)
    found = open_pictures(images or [builtin_photo()], exclude=output)
    is_named = settings.pipeline is not None or settings.inverter != DIFFUSION
    settings = name_inverter(settings)
    _say_defaults(None if is_named else settings.pipeline, photo=not images)
    say_notes(found)
    if one is not None:
        raise typer.Exit(_work(one, settings, found, list(map(str, images or [])), output))
    jobs = make_jobs(found, settings.seed, settings.n_samples)
    manifest = run_jobs(settings, jobs, output, certainty=certainty)
    report(manifest, output)
    if manifest.failures:
        raise typer.Exit(1)


def _work(
    worker: Worker, settings: SampleSettings, found: ImageSet, images: list[str], output: Path
) -> int:
    """Does a worker's share of the pictures; returns the exit code."""
    from featinv_diffusion.cli.run import end_worker
    from featinv_diffusion.runs.many import sample_units, unit_size
    from featinv_diffusion.runs.record import reserved
    from featinv_diffusion.runs.workers import Call

    n_workers, line = worker.num_processes, command_line()
    call = Call("sample", n_workers, to_flat(settings), images, line=line)
    with reserved(output, worker=worker):
        sample_units(worker, settings, found, unit_size(settings), output, call=call)
    return end_worker(worker, output)


def _say_defaults(bundled: str | None, photo: bool) -> None:
    """Says in one line what was not given and is taken from the package."""
    used = ["the built-in photo"] if photo else []
    used += [f"the small bundled pipeline {bundled}"] if bundled else []
    missing = (["IMAGE"] if photo else []) + (["--pipeline"] if bundled else [])
    if used:
        print(f"Using {' and '.join(used)}; for your own give {' and '.join(missing)}.")
