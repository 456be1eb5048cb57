"""`featinv interpolate`: between two pictures' features, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featinv_diffusion.cli import options
from featinv_diffusion.errors import InputError

if TYPE_CHECKING:
    from featinv_diffusion.settings import SampleSettings
    from featinv_diffusion.studies.study import Study


# ---- What the commands of studies share ----

FigureName = Annotated[
    str, typer.Option("--figure", metavar="NAME", help="Its suffix decides: .png, .pdf or .svg.")
]
PictureA = Annotated[Path, typer.Argument(metavar="A", help="A picture; noise derives from it.")]
PictureB = Annotated[Path, typer.Argument(metavar="B", help="Another picture.")]


def run(study: Study, settings: SampleSettings, output: Path) -> dict[str, Any]:
    """Runs a study with a progress bar, prints what it found, and returns its manifest."""
    from featinv_diffusion.cli.run import progress_bar, quiet_libraries
    from featinv_diffusion.runs.scope import scope_line
    from featinv_diffusion.studies.study import run_study

    quiet_libraries()
    manifest, summary = run_study(study, settings, output, progress_bar)
    print(summary)
    print(scope_line(manifest["scope_p_value"], manifest["scope_basis"]))
    print(f"Wrote {output / study.figure}, {study.command}.json, .parquet and manifest.json.")
    return manifest


def to_numbers(option: str, text: str) -> list[float]:
    """Reads numbers with commas between them.

    Raises:
        InputError: something else.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(
            f"{option} must be numbers with commas between, such as 0,.25,1, but {text!r} came."
        ) from None


# ---- `featinv compose`: a region of one picture's features in another's --------------------------


@options.with_sampling(n_samples=4)
def compose(
    a: PictureA,
    b: PictureB,
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
    figure: FigureName = "figure.png",
    output: options.Output = Path("outputs/compose"),
) -> None:
    """Put a region of B's features into A's, and see what changes where.

    Writes the samples as PNGs, composed and unedited with the same noise, a figure (the region
    outlined, cosines and changes below), compose.json and .parquet (numbers of each sample) and
    manifest.json. The unedited ones are the samples that `featinv sample A` makes.
    """
    from featinv_diffusion.studies import SpatialComposition
    from featinv_diffusion.studies.study import seeds_of

    study = SpatialComposition(
        a=str(a.absolute()),
        b=str(b.absolute()),
        box=None if box is None else to_numbers("--box", box),
        mask=None if mask is None else str(mask.absolute()),
        seeds=seeds_of(a, settings.seed, settings.n_samples),
        figure=figure,
    )
    run(study, settings, output)


@options.with_settings(SampleSettings)
def interpolate(
    a: options.PictureA,
    b: options.PictureB,
    weights: Annotated[
        str,
        typer.Option(metavar="W,W,…", help="Weights of A's features; B's have 1 − W."),
    ] = "0,.25,.5,.75,1",
    *,
    settings: SampleSettings,
    figure: options.FigureName = "figure.png",
    output: options.Output = Path("outputs/interpolate"),
) -> None:
    """Mix the features of two pictures by several weights, and see each mixture.

    Writes the samples as PNGs, a figure (with the cosine of each sample to its mixed map),
    interpolate.json and .parquet (numbers of each sample) and manifest.json. At weight 1 they are
    the samples that `featinv sample A` makes.
    """
    from featinv_diffusion.cli.run import run_study
    from featinv_diffusion.studies.interpolation import check_weights
    from featinv_diffusion.studies.interpolation import interpolate as study

    values = check_weights(options.to_numbers("--weights", weights))
    run_study(study, settings, output, figure, a, b, weights=values)


# ---- `featinv variability`: what a picture's features fix, and what they leave open --------------


@options.with_sampling(n_samples=32)
def variability(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="A picture.")],
    *,
    settings: SampleSettings,
    figure: FigureName = "figure.png",
    output: options.Output = Path("outputs/variability"),
) -> None:
    """Sample one picture's features many times, and see where the samples differ.

    Writes mean.png, a figure (mean, standard deviation of pixels, cosines of cells),
    variability.json, variability.parquet (one row per pixel) and manifest.json. Memory does not
    grow with the number of samples, which are those that `featinv sample` makes.
    """
    from featinv_diffusion.studies import SampleVariability
    from featinv_diffusion.studies.study import seeds_of

    study = SampleVariability(
        image=str(image.absolute()),
        seeds=seeds_of(image, settings.seed, settings.n_samples),
        figure=figure,
    )
    run(study, settings, output)


# ---- `featinv viz`: where a picture changes when a concept is attenuated (FeatInv-Viz) -----------


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
    figure: FigureName = "figure.png",
    output: options.Output = Path("outputs/viz"),
) -> None:
    """Attenuate a concept of one picture's features, and see where the samples change.

    The map is the distance between samples of the same noise, median over samples, beside two
    nulls at the same scale: samples of other noise, and random directions of the same size.
    Writes the samples as PNGs, a figure, viz.json, viz.parquet (one row per pixel) and
    manifest.json. At factor 1 they are the samples that `featinv sample` makes.
    """
    from featinv_diffusion.studies import ConceptViz
    from featinv_diffusion.studies.featinv_viz import with_backbone_of
    from featinv_diffusion.studies.study import seeds_of

    study = ConceptViz(
        image=str(image.absolute()),
        concepts=str(concepts.absolute()),
        concept=concept,
        factor=factor,
        film=to_numbers("--film", film),
        n_directions=n_directions,
        seeds=seeds_of(image, settings.seed, settings.n_samples),
        figure=figure,
    )
    run(study, with_backbone_of(settings, concepts), output)
