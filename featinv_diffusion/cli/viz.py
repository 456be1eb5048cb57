"""`featinv viz`: where a picture changes when a concept is attenuated (FeatInv-Viz)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from featinv_diffusion.cli import options, studies

if TYPE_CHECKING:
    from featinv_diffusion.sampling import SampleSettings


@options.with_sampling(n_samples=8)
def viz(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="A picture.")],
    concepts: Annotated[
        Path,
        typer.Option(metavar="FILE", help="Written by `featinv concepts`; names the backbone."),
    ],
    concept: Annotated[int, typer.Option(help="Its number in that file, from 0.")] = 0,
    factor: Annotated[
        float, typer.Option(help="Of the concept's part: 0 removes it, 1 leaves it, 2 doubles it.")
    ] = 0.25,
    film: Annotated[
        str, typer.Option(metavar="F,F,…", help="Further factors, for the film of doses.")
    ] = "0,.5,1,1.5,2",
    n_directions: Annotated[
        int, typer.Option(help="Random directions that the concept is compared with.")
    ] = 3,
    *,
    settings: SampleSettings,
    figure: studies.FigureName = "figure.png",
    output: options.Output = Path("outputs/viz"),
) -> None:
    """Attenuate a concept of one picture's features, and see where the samples change.

    The map is the distance between samples of the same noise, median over samples, beside two
    nulls at the same scale: samples of other noise, and random directions of the same size.
    Writes the samples as PNGs, a figure, viz.json, viz.parquet (one row per pixel) and
    manifest.json. At factor 1 they are the samples that `featinv sample` makes.
    """
    from featinv_diffusion.analysis.featinv_viz_study import with_backbone_of
    from featinv_diffusion.analysis.studies import ConceptViz
    from featinv_diffusion.analysis.study import seeds_of

    study = ConceptViz(
        image=str(image.absolute()),
        concepts=str(concepts.absolute()),
        concept=concept,
        factor=factor,
        film=studies.to_numbers("--film", film),
        n_directions=n_directions,
        seeds=seeds_of(image, settings.seed, settings.n_samples),
        figure=figure,
    )
    studies.run(study, with_backbone_of(settings, concepts), output)
