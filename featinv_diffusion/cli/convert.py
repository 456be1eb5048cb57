"""`featinv convert`: checkpoints of the original code to pipeline folders, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from featinv_diffusion.cli.command_line import command_line


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="CKPT",
            help="Checkpoint of the original code: .ckpt, .pt, .pth or .safetensors. "
            "With --reverse a pipeline: folder, Hub repo or bundled name.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT",
            help="Pipeline folder to write; must be new. With --reverse a checkpoint file, beside "
            "which the YAML of the original code is written.",
        ),
    ],
    original_config: Annotated[
        Path | None,
        typer.Option(
            metavar="YAML",
            help="The YAML it was trained with. [default: Stable Diffusion 1.x at 256 pixels]",
        ),
    ] = None,
    reverse: Annotated[
        bool, typer.Option("--reverse", help="From a pipeline to the original layout.")
    ] = False,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER_OR_REPO",
            help="CLIP's tokenizer; no checkpoint holds it. "
            "[default: openai/clip-vit-large-patch14]",
        ),
    ] = None,
    no_tokenizer: Annotated[
        bool,
        typer.Option("--no-tokenizer", help="Leave it out: the pipeline takes prompt_embeds only."),
    ] = False,
    backbone: Annotated[
        str | None, typer.Option(help="Whose features the ControlNet reads. [default: convnext]")
    ] = None,
    layer: Annotated[
        str | None, typer.Option(help="Layer of the features. [default: last]")
    ] = None,
    pooled: Annotated[
        bool, typer.Option("--pooled", help="It was trained on average-pooled features.")
    ] = False,
    no_backbone: Annotated[
        bool,
        typer.Option("--no-backbone", help="Leave it out: the pipeline takes features only."),
    ] = False,
) -> None:
    """Convert a checkpoint of the original code to a pipeline folder, or back.

    Nothing is lost or rounded on either way. Only tensors are read from a checkpoint: pickled
    objects are refused. Tokenizer and backbone are not part of a checkpoint; they come from
    folders, from the cache or from the Hub.
    """
    from transformers.utils.logging import disable_progress_bar

    from featinv_diffusion.errors import InputError

    disable_progress_bar()  # over files that are written in seconds
    forward_only = {
        "--original-config": original_config,
        "--tokenizer": tokenizer,
        "--no-tokenizer": no_tokenizer,
        "--backbone": backbone,
        "--layer": layer,
        "--pooled": pooled,
        "--no-backbone": no_backbone,
    }
    given = [name for name, value in forward_only.items() if value]
    if reverse and given:
        raise InputError(f"With --reverse all is in the pipeline; leave {', '.join(given)} out.")
    if tokenizer and no_tokenizer:
        raise InputError("Give --tokenizer or --no-tokenizer, not both.")
    if reverse:
        _to_checkpoint(source, out)
        return
    from featinv_diffusion.diffusion.convert import read_original
    from featinv_diffusion.diffusion.convert_tokenizer import DEFAULT_TOKENIZER
    from featinv_diffusion.diffusion.hub import CardInfo, check_target, export_pipeline

    check_target(out)
    pipeline = read_original(
        source,
        original_config,
        tokenizer=None if no_tokenizer else tokenizer or DEFAULT_TOKENIZER,
        backbone=backbone,
        layer=layer,
        pooled=pooled or None,
        with_backbone=not no_backbone,
    )
    export_pipeline(pipeline, out, CardInfo(command_line()))
    absent = [name for name in ("tokenizer", "backbone") if getattr(pipeline, name) is None]
    without = f", without {' and '.join(absent)}" if absent else ""
    spec = pipeline.controlnet.config["feature_spec"]
    grid = "×".join(map(str, spec["grid"]))
    typer.echo(
        f"Wrote {out}{without}. It inverts layer {spec['layer']!r} of {spec['backbone']}, "
        f"{spec['channels']}×{grid}."
    )


def _to_checkpoint(source: str, out: Path) -> None:
    from featinv_diffusion.diffusion.convert import write_original
    from featinv_diffusion.diffusion.hub import load_pipeline

    config_path = write_original(load_pipeline(source), out)
    typer.echo(f"Wrote {out} and {config_path}.")
