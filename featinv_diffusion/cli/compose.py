"""`featinv compose`: a region of one picture's features in another's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from featinv_diffusion.cli import options, studies

if TYPE_CHECKING:
    from featinv_diffusion.sampling import SampleSettings


@options.with_sampling(n_samples=4)
def compose(
    a: studies.PictureA,
    b: studies.PictureB,
    box: Annotated[
        str | None,
        typer.Option(
            metavar="Y0,X0,Y1,X1",
            help="Region in fractions of the centre square, rounded out to cells of the map.",
        ),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(metavar="IMAGE", help="Region by a picture instead: where it is light."),
    ] = None,
    *,
    settings: SampleSettings,
    figure: studies.FigureName = "figure.png",
    output: options.Output = Path("outputs/compose"),
) -> None:
    """Put a region of B's features into A's, and see what changes where.

    Writes the samples as PNGs, composed and unedited with the same noise, a figure (the region
    outlined, cosines and changes below), compose.json and .parquet (numbers of each sample) and
    manifest.json. The unedited ones are the samples that `featinv sample A` makes.
    """
    from featinv_diffusion.analysis.studies import SpatialComposition
    from featinv_diffusion.analysis.study import seeds_of

    study = SpatialComposition(
        a=str(a.absolute()),
        b=str(b.absolute()),
        box=None if box is None else studies.to_numbers("--box", box),
        mask=None if mask is None else str(mask.absolute()),
        seeds=seeds_of(a, settings.seed, settings.n_samples),
        figure=figure,
    )
    studies.run(study, settings, output)
