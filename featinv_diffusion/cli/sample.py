"""`featinv sample`: pictures → features → pictures again."""

from __future__ import annotations

from pathlib import Path

import typer

from featinv_diffusion.cli import options


def sample(
    images: options.Images = None,
    backbone: options.Backbone = None,
    pipeline: options.Pipeline = None,
    layer: options.Layer = None,
    n_samples: options.NSamples = 4,
    seed: options.Seed = 0,
    steps: options.Steps = None,
    scheduler: options.Scheduler = None,
    guidance_scale: options.GuidanceScale = None,
    guidance: options.Guidance = None,
    strength: options.Strength = 1.0,
    batch_size: options.BatchSize = 8,
    attention: options.Attention = "native",
    device: options.Device = "auto",
    dtype: options.Dtype = "float32",
    output: options.Output = Path("outputs/sample"),
) -> None:
    """Reconstruct pictures from the features a vision model sees in them.

    Writes the samples as PNGs, grid.png (original | samples, with the cosine between their
    features under each) and manifest.json (settings, seeds, metrics).
    """
    from featinv_diffusion.cli.run import report, run_jobs
    from featinv_diffusion.images import builtin_photo
    from featinv_diffusion.reconstruction import find_images, make_jobs
    from featinv_diffusion.sampling import SampleSettings, pipeline_name

    settings = SampleSettings(
        pipeline=pipeline,
        backbone=backbone,
        layer=layer,
        n_samples=n_samples,
        seed=seed,
        steps=steps,
        scheduler=scheduler,
        guidance_scale=guidance_scale,
        guidance=guidance,
        strength=strength,
        batch_size=batch_size,
        attention=attention,
        device=device,
        dtype=dtype,
    )
    found = find_images(images or [builtin_photo()], exclude=output)
    _say_defaults(None if pipeline else pipeline_name(settings), photo=not images)
    manifest = run_jobs(settings, make_jobs(found, seed, n_samples), output)
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
