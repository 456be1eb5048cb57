"""`featinv variability`: what a picture's features fix, and what they leave open."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from featinv_diffusion.cli import options, studies

if TYPE_CHECKING:
    from featinv_diffusion.sampling import SampleSettings


@options.with_sampling(n_samples=32)
def variability(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="A picture.")],
    *,
    settings: SampleSettings,
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

    study = SampleVariability(
        image=str(image.absolute()),
        seeds=seeds_of(image, settings.seed, settings.n_samples),
        figure=figure,
    )
    studies.run(study, settings, output)
