"""`featinv layers`: the layers of a backbone that hold a feature map, and the maps' shapes."""

from __future__ import annotations

from typing import Annotated

import typer

BackboneName = Annotated[
    str,
    typer.Argument(
        metavar="BACKBONE",
        help="Bundled (tiny/convnext, tiny/resnet, tiny/swin, tiny/vit …), a timm id, or "
        "hf/FOLDER_OR_REPOSITORY.",
    ),
]


def layers(backbone: BackboneName = "tiny/convnext") -> None:
    """List the layers of a backbone that hold a feature map, with channels×height×width.

    No weights are downloaded. Every command reads the layer `last`, the last map before pooling,
    unless another one is named.
    """
    import torch

    from featinv_diffusion.backbones import load_backbone

    with torch.device("meta"):
        model = load_backbone(backbone, pretrained=False)
    specs = model.layers()
    width = max(len(spec.layer) for spec in specs)
    typer.echo(f"{model.name} reads images of {'×'.join(map(str, model.input_size))} px.", err=True)
    for spec in specs:
        typer.echo(f"{spec.layer:<{width}}  {spec.channels}×{spec.grid[0]}×{spec.grid[1]}")
