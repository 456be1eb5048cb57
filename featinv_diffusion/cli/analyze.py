"""`featinv analyze`: what the stages of a model keep, seen through its modular inverter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from featinv_diffusion.cli import options

NAMES = ("stages", "layers", "colour", "tradeoff")


def analyze(
    name: Annotated[
        str,
        typer.Argument(
            metavar="|".join(NAMES),
            help="MSE by stage; states within stages; recoloured objects; MSE against detection.",
        ),
    ],
    *,
    inverter: Annotated[
        str,
        typer.Option(
            metavar="NAME_OR_FOLDER",
            help="detr, vit, or the folder of a trained one; for tradeoff several as A,B.",
        ),
    ],
    data: Annotated[
        str,
        typer.Option(
            metavar="PATH_OR_NAME",
            help="COCO or Tiny-ImageNet-200 (with boxes), else a folder, parquet file or Hub name.",
        ),
    ],
    split: Annotated[
        str, typer.Option(help="Of the data; train for Tiny-ImageNet's boxes.")
    ] = "validation",
    n_images: Annotated[int, typer.Option(help="Spread evenly over the data.")] = 250,
    classes: Annotated[
        str | None, typer.Option(metavar="FILE", help="Only these class folders, one a line.")
    ] = None,
    held_back_per_class: Annotated[
        int, typer.Option(help="Of images with boxes, only the last k of each class.")
    ] = 0,
    output: options.Output = Path("outputs/analyze"),
) -> None:
    """Analyse the stages of a DETR or a ViT through its modular inverter.

    Writes figures and metrics.json (each figure with its interval).
    """
    import json
    import shlex
    import sys

    from featinv_diffusion.analysis.modular_studies import STUDIES
    from featinv_diffusion.analysis.picture_set import PictureChoice, load_pictures
    from featinv_diffusion.cli.run import quiet_libraries
    from featinv_diffusion.errors import InputError, choices_hint
    from featinv_diffusion.files import write_text
    from featinv_diffusion.inverters.modular import load_modular

    quiet_libraries()
    if name not in STUDIES:
        raise InputError(f"No analysis is named {name!r}; {choices_hint(name, list(STUDIES))}")
    names = [part.strip() for part in inverter.split(",") if part.strip()]
    if not names:
        raise InputError("--inverter must name an inverter, or several as A,B.")
    choice = PictureChoice(data, split, n_images, classes, held_back_per_class)
    pictures = load_pictures(choice, load_modular(names[0]).path.input_size)
    output.mkdir(parents=True, exist_ok=True)
    metrics = STUDIES[name](names, pictures, output)
    command = shlex.join(["featinv", *sys.argv[1:]])
    content = {"analysis": name, "command": command, "n_images": len(pictures), **metrics}
    write_text(output / "metrics.json", json.dumps(content, indent=2) + "\n")
    print(f"Wrote {output / 'metrics.json'} and figures.")
