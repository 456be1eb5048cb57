"""`featinv interpolate`: between two pictures' features, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from featinv_diffusion.cli import options, studies

if TYPE_CHECKING:
    from featinv_diffusion.sampling import SampleSettings


@options.with_sampling(n_samples=4)
def interpolate(
    a: studies.PictureA,
    b: studies.PictureB,
    weights: Annotated[
        str, typer.Option(metavar="W,W,…", help="Of A's features; B's have 1 − W.")
    ] = "0,.25,.5,.75,1",
    *,
    settings: SampleSettings,
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

    study = Interpolation(
        a=str(a.absolute()),
        b=str(b.absolute()),
        weights=studies.to_numbers("--weights", weights),
        seeds=seeds_of(a, settings.seed, settings.n_samples),
        figure=figure,
    )
    studies.run(study, settings, output)
