"""`featinv classemb`: what the tokens of a vision transformer say, by its own class embedding."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from featinv_diffusion.cli import options


def classemb(
    data: Annotated[
        str | None,
        typer.Argument(
            metavar="IMAGE|FOLDER",
            help="A picture; a folder of pictures or of class folders; a parquet file or Hub name.",
            show_default="a photo",
        ),
    ] = None,
    backbone: Annotated[
        str, typer.Option(help="The bundled tiny/vit, any timm ViT, or hf/FOLDER_OR_REPOSITORY.")
    ] = "tiny/vit",
    pipeline: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FOLDER_OR_REPO",
            help="Diffusion inverter of one of its blocks; may be given several times.",
            show_default="the bundled one",
        ),
    ] = None,
    inverter: Annotated[
        str | None, typer.Option(metavar="NAME_OR_FOLDER", help="Modular inverter of its blocks.")
    ] = None,
    stage: Annotated[
        list[str] | None,
        typer.Option(help="Stage of the modular inverter; may be given several times."),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="CLASS",
            help="Read this class, a number or a name, in all; accuracy is then null.",
        ),
    ] = None,
    ablations: Annotated[
        bool, typer.Option("--ablations", help="Also with attention ablated, two more passes.")
    ] = False,
    null: Annotated[
        bool, typer.Option("--null", help="Also a model of random weights, one more pass.")
    ] = False,
    perturbation: Annotated[
        bool, typer.Option("--perturbation", help="Also the perturbation test, many more passes.")
    ] = False,
    n_points: Annotated[
        int | None,
        typer.Option(help="Counts of kept patches in it.", show_default="all, as published"),
    ] = None,
    masks: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Masks, PNGs with the paths of their images."),
    ] = None,
    split: Annotated[str, typer.Option(help="Of a data set with splits.")] = "validation",
    classes: Annotated[
        str | None, typer.Option(metavar="FILE", help="Class folders to take, one a line.")
    ] = None,
    per_class: Annotated[
        int | None, typer.Option(help="At most so many images of each class.", show_default="all")
    ] = None,
    n_images: Annotated[
        int | None, typer.Option(help="Drawn evenly over classes.", show_default="all")
    ] = None,
    n_figures: Annotated[int, typer.Option(help="Images that get a figure.")] = 4,
    interpolation: Annotated[
        str | None,
        typer.Option(
            metavar="bilinear|bicubic",
            help="How pictures are squashed; published: bilinear.",
            show_default="the backbone's",
        ),
    ] = None,
    batch_size: options.BatchSize = 16,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    output: options.Output = Path("outputs/classemb"),
) -> None:
    """Project the tokens of a vision transformer on its class embedding.

    Writes metrics.json, per_image.parquet, identifiability.png, and for the first images a figure
    of what each block says of the class. Images without classes are read for the predicted class
    (label_source in metrics.json). After Vilas et al. 2023.
    """
    from featinv_diffusion.class_embedding.command import TokenCommand, run_command
    from featinv_diffusion.class_embedding.study import TokenSettings
    from featinv_diffusion.cli.run import progress_bar, quiet_libraries

    quiet_libraries()
    settings = TokenSettings(
        batch_size=batch_size,
        ablations=ablations,
        null=null,
        perturbation=perturbation,
        n_points=n_points,
        seed=seed,
    )
    command = TokenCommand(
        data=data,
        backbone=backbone,
        pipelines=tuple(pipeline or ()),
        inverter=inverter,
        stages=tuple(stage or ()),
        target=target,
        masks=None if masks is None else str(masks),
        split=split,
        classes=classes,
        per_class=per_class,
        n_images=n_images,
        n_figures=n_figures,
        interpolation=interpolation,
        device=device,
    )
    bar = partial(progress_bar, doing="reading", noun="images")
    for line in run_command(command, settings, output, bar):
        print(line)
