"""`featinv sample`: pictures → features → pictures again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from featinv_diffusion.cli import options

if TYPE_CHECKING:
    from featinv_diffusion.inverters.open import SampleSettings


@options.with_sampling(n_samples=4)
def sample(
    images: options.Images = None,
    *,
    settings: SampleSettings,
    inverter: options.Inverter = "diffusion",
    stage: options.Stage = None,
    output: options.Output = Path("outputs/sample"),
) -> None:
    """Reconstruct pictures from the features a vision model sees in them.

    Writes the samples as PNGs, grid.png (original | samples, with the cosine between their
    features under each) and manifest.json (settings, seeds, metrics).

    The inverter rae is an AutoencoderRAE of diffusers, named by --pipeline: a folder, or
    nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08, RAE-siglip2-base-p16-i256-ViTXL-n08 or
    RAE-mae-base-p16-ViTXL-n08 there.
    """
    from featinv_diffusion.cli.run import report, run_jobs
    from featinv_diffusion.images import builtin_photo
    from featinv_diffusion.inverters.open import DIFFUSION, choose_inverter, pipeline_name
    from featinv_diffusion.runs.sampling import find_images, make_jobs

    settings = choose_inverter(settings, inverter, stage)
    found = find_images(images or [builtin_photo()], exclude=output)
    is_named = settings.pipeline is not None or inverter != DIFFUSION
    _say_defaults(None if is_named else pipeline_name(settings), photo=not images)
    manifest = run_jobs(settings, make_jobs(found, settings.seed, settings.n_samples), output)
    report(manifest, output)
    if manifest.failures:
        raise typer.Exit(1)


def _say_defaults(bundled: str | None, photo: bool) -> None:
    """Says in one line what was not given and is taken from the package."""
    used = ["the built-in photo"] if photo else []
    used += [f"the small bundled pipeline {bundled}"] if bundled else []
    missing = (["IMAGE"] if photo else []) + (["--pipeline"] if bundled else [])
    if used:
        print(f"Using {' and '.join(used)}; for your own give {' and '.join(missing)}.")
