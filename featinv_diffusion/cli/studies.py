"""The studies of pictures: `featinv interpolate`, `compose`, `variability` and `viz`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from featinv_diffusion.cli import options
from featinv_diffusion.errors import InputError
from featinv_diffusion.settings import SampleSettings

Picture = Annotated[
    Path,
    typer.Argument(metavar="IMAGE", help="A picture; the noise depends on its file name."),
]


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


@options.with_settings(SampleSettings)
def compose(
    a: options.PictureA,
    b: options.PictureB,
    box: Annotated[
        str | None,
        typer.Option(
            metavar="Y0,X0,Y1,X1",
            help="Region in fractions of the centre square, rounded out to cells of the map.",
        ),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(metavar="IMAGE", help="Picture of the region instead: where it is light."),
    ] = None,
    *,
    settings: SampleSettings,
    figure: options.FigureName = "figure.png",
    output: options.Output = Path("outputs/compose"),
) -> None:
    """Put a region of B's features into A's, and see what changes where.

    Writes the samples as PNGs, composed and unedited with the same noise, a figure (the region
    outlined, cosines and changes below), compose.json and .parquet (numbers of each sample) and
    manifest.json. The unedited ones are the samples that `featinv sample A` makes.
    """
    from featinv_diffusion.cli.run import run_study
    from featinv_diffusion.studies.composition import check_region
    from featinv_diffusion.studies.composition import compose as study

    region = None if box is None else options.to_numbers("--box", box)
    check_region(region, mask)
    run_study(study, settings, output, figure, a, b, box=region, mask=mask)


@options.with_settings(SampleSettings, n_samples=32)
def variability(
    image: Picture,
    *,
    settings: SampleSettings,
    figure: options.FigureName = "figure.png",
    output: options.Output = Path("outputs/variability"),
) -> None:
    """Sample one picture's features many times, and see where the samples differ.

    Writes mean.png, a figure (mean, standard deviation of pixels, cosines of cells),
    variability.json, variability.parquet (one row per pixel) and manifest.json. Memory does not
    grow with the number of samples, which are those that `featinv sample` makes.
    """
    from featinv_diffusion.cli.run import run_study
    from featinv_diffusion.studies.variability import variability as study

    run_study(study, settings, output, figure, image)


@options.with_settings(SampleSettings, n_samples=4)
def viz(
    image: Picture,
    concepts: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="File that `featinv concepts` wrote for the backbone, or a sparse autoencoder: of "
            "overcomplete, saev or ViT-Prisma, or tiny/convnext-sae.",
        ),
    ],
    concept: Annotated[
        int | None,
        typer.Option(
            help="Index of the concept in that file, from 0.",
            show_default="the one with the most energy in the picture",
        ),
    ] = None,
    factor: Annotated[
        float,
        typer.Option(help="Factor on the concept's part: 0 removes it, 1 leaves it, 2 doubles it."),
    ] = 0.25,
    film: Annotated[
        str, typer.Option(metavar="F,F,…", help="Further factors, for the film of doses.")
    ] = "0,.5,1,1.5,2",
    n_directions: Annotated[
        int,
        typer.Option(
            help="Random subspaces of natural maps that the concept is compared with: an edit "
            "without meaning is above all of them in one case of N + 1."
        ),
    ] = 19,
    *,
    sae_format: options.SAEFormat = "auto",
    settings: SampleSettings,
    figure: options.FigureName = "figure.png",
    output: options.Output = Path("outputs/viz"),
) -> None:
    """Attenuate a concept of one picture's features, and see what the samples show of it.

    Says whether the concept is weaker in the samples' own features, how much of the asked change
    arrives there, what becomes of the class probability, and which pixels move: each beside
    the removal of equally long parts in random subspaces of natural maps, with the same noise.
    Writes the samples as PNGs, a figure, viz.json, viz.parquet (one row per pixel) and
    manifest.json. At factor 1 they are the samples that `featinv sample` makes.
    """
    from featinv_diffusion.cli.run import run_study
    from featinv_diffusion.studies.featinv_viz import check_factors, show_concept

    factors = options.to_numbers("--film", film)
    check_factors(factor, factors)
    settings = with_backbone_of(settings, concepts, sae_format)
    run_study(
        show_concept,
        settings,
        output,
        figure,
        image,
        concepts,
        concept=concept,
        factor=factor,
        film=factors,
        sae_format=sae_format,
        n_directions=n_directions,
    )


def with_backbone_of(
    settings: SampleSettings, concepts: Path, sae_format: str = "auto"
) -> SampleSettings:
    """Returns settings that name the backbone and layer of a file of concepts, where free.

    Raises:
        InputError: no such file, not one of concepts, or an SAE of another library where no
            backbone is named.
    """
    from featinv_diffusion.cli.run import named_by
    from featinv_diffusion.concepts import ConceptDictionary, load_concepts
    from featinv_diffusion.concepts.sae_files import find_concepts_file, is_own_file

    path = find_concepts_file(concepts)
    named = (settings.pipeline, settings.backbone) != (None, None) or settings.is_deterministic
    is_foreign = sae_format != "auto" or not is_own_file(path)
    if is_foreign:
        load_concepts(path, sae_format=sae_format)
        if not named:
            raise InputError(
                f"The SAE in {concepts} does not say which features it is of. Name the model that "
                "it was trained on with --backbone and --layer, or --pipeline."
            )
    spec = None if is_foreign else ConceptDictionary.load(path).spec
    return named_by(settings, spec, concepts)
