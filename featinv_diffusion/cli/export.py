"""`featinv export`: a pipeline folder that loads with diffusers alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from featinv_diffusion.cli.command_line import command_line


def export(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; must be new.")],
    pipeline: Annotated[
        str | None,
        typer.Option(metavar="FOLDER_OR_REPO", help="Copy this pipeline, or a bundled name."),
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option(
            help="Alone: the bundled pipeline of this backbone. [default: convnext] "
            "With --controlnet: the backbone, where it is not the one that the ControlNet names."
        ),
    ] = None,
    controlnet: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="A trained FeatureControlNet.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="SD_FOLDER_OR_REPO", help="The Stable Diffusion model it was trained on."
        ),
    ] = None,
) -> None:
    """Write a pipeline to a folder: weights as safetensors, the code they need, a model card.

    The folder loads where this package is not installed, with
    DiffusionPipeline.from_pretrained(OUT, trust_remote_code=True).
    """
    from featinv_diffusion.diffusion.hub import check_target, export_pipeline

    check_target(out)
    loaded, info, scope = _load(pipeline, backbone, controlnet, base)
    export_pipeline(loaded, out, info, scope)
    files = [path for path in out.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files) / 1e6
    typer.echo(f"Wrote {out}: {len(files)} files, {size:.1f} MB.")


def _load(
    pipeline: str | None, backbone: str | None, controlnet: Path | None, base: str | None
) -> tuple[Any, Any, Path | None]:
    """Returns the pipeline that the options mean, what its model card says of its origin, and the
    file of its statistics of natural maps."""
    from featinv_diffusion.diffusion.assemble import assemble
    from featinv_diffusion.diffusion.hub import find_scope_file, load_pipeline, origin_of
    from featinv_diffusion.errors import InputError

    command = command_line()
    if (controlnet is None) != (base is None):
        raise InputError(
            "--controlnet and --base go together: the ControlNet, and the model it was trained on."
        )
    if pipeline is not None and (controlnet is not None or backbone is not None):
        raise InputError(
            "--pipeline names a whole pipeline; leave --backbone, --controlnet and --base out."
        )
    if controlnet is not None and base is not None:
        loaded = assemble(controlnet, base, backbone)
        return loaded, replace(origin_of(base, command, loaded), notes=""), None
    bundled = backbone or "convnext"
    name = pipeline or (bundled if bundled.startswith("tiny/") else f"tiny/{bundled}")
    loaded = load_pipeline(name)
    return loaded, origin_of(name, command, loaded), find_scope_file(name)
