"""`featinv interpolate`: between two pictures' features, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from featinv_diffusion.cli import options, studies


def interpolate(
    a: studies.PictureA,
    b: studies.PictureB,
    weights: Annotated[
        str, typer.Option(metavar="W,W,…", help="Of A's features; B's have 1 − W.")
    ] = "0,.25,.5,.75,1",
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
    figure: studies.FigureName = "figure.png",
    output: options.Output = Path("outputs/interpolate"),
) -> None:
    """Mix the features of two pictures by several weights, and see each mixture.

    Writes the samples as PNGs, a figure (with the cosine of each sample to its mixed map),
    interpolate.json and .parquet (numbers of each sample) and manifest.json. At weight 1 they are
    the samples that `featinv sample A` makes.
    """
    from featinv_diffusion.analysis.studies import Interpolation
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
    study = Interpolation(
        a=str(a.absolute()),
        b=str(b.absolute()),
        weights=studies.to_numbers("--weights", weights),
        seeds=seeds_of(a, seed, n_samples),
        figure=figure,
    )
    studies.run(study, settings, output)
