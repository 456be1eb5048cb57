"""`featinv layers`: which layers of a backbone can be inverted, and the shapes of their maps."""

from __future__ import annotations

from typing import Annotated

import typer

BackboneName = Annotated[
    str,
    typer.Argument(
        metavar="BACKBONE", help="convnext, resnet, swin, vit, any timm id, or hf/FOLDER_OR_REPO."
    ),
]


def layers(backbone: BackboneName = "convnext") -> None:
    """List the layers of a backbone that hold a feature map, with channels×height×width.

    Needs no weights. `last` is the default of every command: the last map before pooling.
    """
    import torch

    from featinv_diffusion.backbones import load_backbone

    with torch.device("meta"):
        model = load_backbone(backbone, pretrained=False)
    specs = model.layers()
    width = max(len(spec.layer) for spec in specs)
    typer.echo(f"{backbone} reads images of {'×'.join(map(str, model.input_size))} px.", err=True)
    for spec in specs:
        typer.echo(f"{spec.layer:<{width}}  {spec.channels}×{spec.grid[0]}×{spec.grid[1]}")
