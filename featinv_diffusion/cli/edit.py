"""`featinv edit` and `featinv patch`: what an edit of features does to the decoded picture."""

from __future__ import annotations

from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any

import typer

from featinv_diffusion.cli import options
from featinv_diffusion.errors import InputError
from featinv_diffusion.settings import SampleSettings

_GIVEN = "featinv edits"
_meta: ContextVar[dict[str, Any]] = ContextVar("meta")
"""What click keeps of the running command."""


def _collect(context: Any, param: Any, values: list[str] | None) -> list[str] | None:
    """Notes the edits of an option; click calls this in the order of the command line."""
    kind = str(param.name).replace("_", "-")
    _meta.set(context.meta)
    context.meta.setdefault(_GIVEN, []).extend(f"{kind} {value}" for value in values or ())
    return values


def _edit_option(metavar: str, help: str) -> Any:
    return typer.Option(metavar=metavar, help=help, callback=_collect)


@options.with_settings(SampleSettings)
def edit(
    image: Annotated[
        str,
        typer.Argument(metavar="IMAGE|MAPS", help="A picture, or a file of one feature map."),
    ],
    steer: Annotated[
        list[str] | None,
        _edit_option("FILE:F", "Add F times the vector in a .safetensors or .npy file."),
    ] = None,
    ablate_channels: Annotated[
        list[str] | None, _edit_option("N,N,…", "Set these channels to zero.")
    ] = None,
    ablate_box: Annotated[
        list[str] | None, _edit_option("Y0,X0,Y1,X1", "Set the cells of this region to zero.")
    ] = None,
    replace_from: Annotated[
        list[str] | None, _edit_option("IMAGE", "Take the features of another picture.")
    ] = None,
    scale: Annotated[list[str] | None, _edit_option("F", "Multiply the features.")] = None,
    noise: Annotated[
        list[str] | None, _edit_option("F", "Add noise of F standard deviations per channel.")
    ] = None,
    function: Annotated[
        list[str] | None,
        _edit_option("FILE.py:NAME", "Call a function of yours; its code is run."),
    ] = None,
    at: Annotated[
        str | None,
        typer.Option(
            metavar="LAYER",
            help="Edit this earlier layer, and let the model compute the map that is inverted.",
        ),
    ] = None,
    box: Annotated[
        str | None,
        typer.Option(metavar="Y0,X0,Y1,X1", help="Region outside of which nothing is edited."),
    ] = None,
    n_null: Annotated[int, typer.Option(help="Random edits of the same size to compare with.")] = 9,
    *,
    settings: SampleSettings,
    figure: options.FigureName = "figure.png",
    output: options.Output = Path("outputs/edit"),
) -> None:
    """Edit a picture's features, and see what changes beyond what a random edit changes.

    Edits are applied one after the other, kinds in the order in which they are first named.
    Writes the samples before and after as PNGs, a figure (before | after | difference | a random
    edit of the same size), edit.json and .parquet (numbers of each sample) and manifest.json.
    """
    from featinv_diffusion.cli.run import run_study
    from featinv_diffusion.studies.edit import edit as study

    edits = _meta.get().get(_GIVEN, [])
    if not edits:
        raise InputError(
            "At least one edit must be given: --steer, --ablate-channels, --ablate-box, "
            "--replace-from, --scale, --noise or --function."
        )
    region = None if box is None else options.to_numbers("--box", box)
    run_study(study, settings, output, figure, image, edits, at=at, box=region, n_null=n_null)


@options.with_settings(SampleSettings, without=("n_samples",), n_samples=1)
def patch(
    a: options.PictureA,
    b: options.PictureB,
    at: Annotated[str, typer.Option(metavar="LAYER", help="Layer whose cells come from B.")],
    *,
    settings: SampleSettings,
    figure: options.FigureName = "figure.png",
    output: options.Output = Path("outputs/patch"),
) -> None:
    """Take single cells of an earlier layer from B, and see which of them matter.

    For each cell the model computes the rest from A, and the map that arrives is decoded with the
    same noise. Writes the samples, a figure (effect on the picture and on the class, beside a
    random change of each cell), patch.json and .parquet (numbers of each cell) and manifest.json.
    """
    from featinv_diffusion.cli.run import run_study
    from featinv_diffusion.studies.patching import patch_tokens

    run_study(patch_tokens, settings, output, figure, a, b, at=at)
