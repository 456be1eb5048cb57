"""`featinv export`, `push` and `convert`: pipeline folders, the Hub, original checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from featinv_diffusion.cli import options, terminal
from featinv_diffusion.cli.command_line import command_line

# ---- `featinv convert`: checkpoints of the original code to pipeline folders, and back -----------


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="CKPT",
            help="Checkpoint of the original code: .ckpt, .pt, .pth or .safetensors. "
            "With --reverse, a pipeline: a folder, a Hub repository or a bundled name.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT",
            help="New folder to write the pipeline to. With --reverse, a new checkpoint file; the "
            "YAML of the original code is written beside it.",
        ),
    ],
    original_config: Annotated[
        Path | None,
        typer.Option(
            metavar="YAML",
            help="YAML that the checkpoint was trained with. "
            "[default: Stable Diffusion 1.x at 256 pixels]",
        ),
    ] = None,
    reverse: Annotated[
        bool, typer.Option("--reverse", help="Convert a pipeline to the original layout.")
    ] = False,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER_OR_REPO",
            help="CLIP tokenizer, which no checkpoint holds. "
            "[default: openai/clip-vit-large-patch14]",
        ),
    ] = None,
    no_tokenizer: Annotated[
        bool,
        typer.Option(
            "--no-tokenizer",
            help="Leave the tokenizer out; the pipeline then takes prompt_embeds only.",
        ),
    ] = False,
    backbone: Annotated[
        str | None,
        typer.Option(help="Backbone whose features it reads. [default: the paper's ConvNeXt]"),
    ] = None,
    layer: Annotated[
        str | None, typer.Option(help="Layer that the features come from. [default: last]")
    ] = None,
    pooled: Annotated[
        bool,
        typer.Option("--pooled", help="The ControlNet was trained on average-pooled features."),
    ] = False,
    no_backbone: Annotated[
        bool,
        typer.Option(
            "--no-backbone", help="Leave the backbone out; the pipeline then takes features only."
        ),
    ] = False,
) -> None:
    """Convert a checkpoint of the original code to a pipeline folder, or back.

    Neither direction loses or rounds anything. Only tensors are read from a checkpoint; pickled
    objects are refused. The tokenizer and the backbone are not part of a checkpoint: they come
    from folders, from the cache or from the Hub.
    """
    from transformers.utils.logging import disable_progress_bar

    from featinv_diffusion.errors import InputError

    disable_progress_bar()  # the files are written in seconds
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
        raise InputError(f"With --reverse the pipeline decides; leave {', '.join(given)} out.")
    if tokenizer and no_tokenizer:
        raise InputError("Give --tokenizer or --no-tokenizer, not both.")
    if reverse:
        _to_checkpoint(source, out)
        return
    from featinv_diffusion.diffusion.convert.folder import DEFAULT_TOKENIZER, read_original
    from featinv_diffusion.diffusion.folders import CardInfo
    from featinv_diffusion.diffusion.hub import check_target, export_pipeline

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
    terminal.finish({"feature_spec": dict(spec), "absent": absent}, out)


def _to_checkpoint(source: str, out: Path) -> None:
    from featinv_diffusion.diffusion.convert.folder import write_original
    from featinv_diffusion.diffusion.hub import load_pipeline
    from featinv_diffusion.runs.record import reserved

    options.check_file(out)
    with reserved(out, is_file=True):
        config_path = write_original(load_pipeline(source), out)
    typer.echo(f"Wrote {out} and {config_path}.")
    terminal.finish({"config": str(config_path)}, out)


def export(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder to write to.")],
    pipeline: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER_OR_REPO",
            help="Pipeline to export: a folder, a Hub repository or a bundled name.",
        ),
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option(
            help="Backbone whose bundled pipeline to export. [default: tiny/convnext] "
            "With --controlnet, the backbone to use instead of the one that the ControlNet names."
        ),
    ] = None,
    controlnet: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Trained FeatureControlNet, or a checkpoint of its training, to build a pipeline "
            "from.",
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="SD_FOLDER_OR_REPO",
            help="Stable Diffusion model that the ControlNet was trained on.",
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="raw|average",
            help="Weights of a checkpoint: those of its last step, or their moving average. "
            "[default: the average, where the training keeps one]",
        ),
    ] = None,
) -> None:
    """Write a pipeline to a folder: safetensors weights, the code that they need, a model card.

    The folder loads where this package is not installed, with
    DiffusionPipeline.from_pretrained(OUT, trust_remote_code=True).
    """
    from featinv_diffusion.diffusion.hub import check_target, export_pipeline

    check_target(out)
    loaded, info, scope = _load(pipeline, backbone, controlnet, base, weights)
    export_pipeline(loaded, out, info, scope)
    sizes = {
        path.relative_to(out).as_posix(): path.stat().st_size
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }
    typer.echo(f"Wrote {out}: {len(sizes)} files, {sum(sizes.values()) / 1e6:.1f} MB.")
    terminal.finish({"files": sizes}, out)


def _load(
    pipeline: str | None,
    backbone: str | None,
    controlnet: Path | None,
    base: str | None,
    weights: str | None,
) -> tuple[Any, Any, Path | None]:
    """Returns the pipeline that the options mean, its origin for the model card, and the file of
    its statistics of natural maps."""
    from featinv_diffusion.diffusion.folders import assemble
    from featinv_diffusion.diffusion.hub import find_scope_file, load_pipeline, origin_of
    from featinv_diffusion.errors import InputError
    from featinv_diffusion.inverters.open import SampleSettings, pipeline_name

    command = command_line()
    if (controlnet is None) != (base is None):
        raise InputError(
            "--controlnet and --base go together: the ControlNet, and the model it was trained on."
        )
    if pipeline is not None and (controlnet is not None or backbone is not None):
        raise InputError(
            "--pipeline names a whole pipeline; leave --backbone, --controlnet and --base out."
        )
    if weights is not None and controlnet is None:
        raise InputError("--weights chooses weights of a checkpoint: name it with --controlnet.")
    if controlnet is not None and base is not None:
        loaded = assemble(controlnet, base, backbone)
        choose_weights(loaded.controlnet, controlnet, weights)
        return loaded, replace(origin_of(base, command, loaded), notes=""), None
    name = pipeline or pipeline_name(SampleSettings(backbone=backbone))
    loaded = load_pipeline(name)
    return loaded, origin_of(name, command, loaded), find_scope_file(name)


def choose_weights(model: Any, folder: Path, weights: str | None) -> None:
    """Gives a ControlNet the average that its training checkpoint holds, unless `raw` is asked."""
    import torch

    from featinv_diffusion.errors import InputError, choices_hint
    from featinv_diffusion.training.checkpoint import read_average

    if weights not in (None, "raw", "average"):
        hint = choices_hint(weights, ["raw", "average"])
        raise InputError(f"No --weights are named {weights!r}; {hint}")
    average = read_average(folder) or read_average(folder.parent)
    if average is None:
        if weights == "average":
            raise InputError(
                f"{folder} must be a checkpoint of a training that keeps an average "
                "(optim.ema_decay), but none is there. Leave --weights out."
            )
        return
    if weights == "raw":
        return
    parameters = list(model.parameters())
    if [p.shape for p in parameters] != [a.shape for a in average]:
        raise InputError(f"The average in {folder} is of another network. Use --weights raw.")
    with torch.no_grad():
        for parameter, averaged in zip(parameters, average, strict=True):
            parameter.copy_(averaged)
    typer.echo("The weights are the average that the training keeps; --weights raw takes the last.")


# ---- `featinv push`: a pipeline folder to the Hugging Face Hub -----------------------------------


def push(
    folder: Annotated[Path, typer.Argument(help="Pipeline folder that `featinv export` wrote.")],
    repo: Annotated[
        str, typer.Argument(metavar="REPO", help="Hub repository, user/name; a new one is created.")
    ],
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the folder and list its files; upload nothing.")
    ] = False,
) -> None:
    """Upload a pipeline folder to the Hub, after checking that it loads.

    Log in first with `hf auth login`, or set HF_TOKEN.
    """
    from featinv_diffusion.diffusion.hub import push_folder

    files = push_folder(folder, repo, private=private, dry_run=dry_run)
    for name, size in files:
        typer.echo(f"{size / 1e6:10.3f} MB  {name}")
    total = sum(size for _, size in files) / 1e6
    verb = "Would upload" if dry_run else "Uploaded"
    typer.echo(f"{verb} {len(files)} files, {total:.1f} MB, to {repo}.")
    terminal.finish({"repository": repo, "uploaded": not dry_run, "files": dict(files)})
