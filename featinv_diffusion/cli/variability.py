"""`featinv variability`: what a picture's features fix, and what they leave open."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from featinv_diffusion.cli import options, studies


def variability(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="A picture.")],
    backbone: options.Backbone = None,
    pipeline: options.Pipeline = None,
    layer: options.Layer = None,
    n_samples: options.NSamples = 32,
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
    figure: studies.FigureName = "figure.png",
    output: options.Output = Path("outputs/variability"),
) -> None:
    """Sample one picture's features many times, and see where the samples differ.

    Writes mean.png, a figure (mean, standard deviation of pixels, cosines of cells),
    variability.json, variability.parquet (one row per pixel) and manifest.json. Memory does not
    grow with the number of samples, which are those that `featinv sample` makes.
    """
    from featinv_diffusion.analysis.studies import SampleVariability
    from featinv_diffusion.analysis.study import seeds_of
    from featinv_diffusion.sampling import SampleSettings

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
    study = SampleVariability(
        image=str(image.absolute()),
        seeds=seeds_of(image, seed, n_samples),
        figure=figure,
    )
    studies.run(study, settings, output)
