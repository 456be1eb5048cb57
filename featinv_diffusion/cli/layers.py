"""`featinv layers`: the layers of a backbone that hold a feature map, and the maps' shapes."""

from __future__ import annotations

from typing import Annotated

import typer

from featinv_diffusion.cli import terminal
from featinv_diffusion.errors import InputError

BackboneName = Annotated[
    str,
    typer.Argument(
        metavar="BACKBONE",
        help="Bundled (tiny/convnext, tiny/resnet, tiny/swin, tiny/vit …), a timm id, or "
        "hf/FOLDER_OR_REPOSITORY.",
    ),
]


def layers(
    backbone: BackboneName = "tiny/convnext",
    *,
    text: Annotated[
        str | None,
        typer.Option(
            "--filter", metavar="TEXT", help="List only layers whose names hold this text."
        ),
    ] = None,
) -> None:
    """List the layers of a backbone that hold a feature map, with channels×height×width.

    No weights are downloaded. Every command reads the layer `last`, the last map before pooling,
    unless another one is named.
    """
    import torch

    from featinv_diffusion.backbones import load_backbone

    with torch.device("meta"):
        model = load_backbone(backbone, pretrained=False)
    specs = [spec for spec in model.layers() if text is None or text in spec.layer]
    if not specs:
        raise InputError(
            f"--filter must be part of a layer's name, but {model.name} has none with {text!r}. "
            "Leave it out to see all."
        )
    width = max(len(spec.layer) for spec in specs)
    if not terminal.is_quiet():
        size = "×".join(map(str, model.input_size))
        typer.echo(f"{model.name} reads images of {size} px.", err=True)
    for spec in specs:
        typer.echo(f"{spec.layer:<{width}}  {spec.channels}×{spec.grid[0]}×{spec.grid[1]}")
    found = [{"layer": s.layer, "channels": s.channels, "grid": list(s.grid)} for s in specs]
    terminal.finish({"backbone": model.name, "input_size": model.input_size, "layers": found})
