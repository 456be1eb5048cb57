"""`featinv evaluate`: how well the features of a data set come back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featinv_diffusion.cli import options
from featinv_diffusion.cli.command_line import command_line

if TYPE_CHECKING:
    from featinv_diffusion.evaluation.settings import EvaluationSettings


def evaluate(
    data: Annotated[
        str | None,
        typer.Option(
            metavar="PATH_OR_NAME",
            help="Parquet file with `image` and `label`, a folder, or a Hub name.",
        ),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            metavar="NAME_OR_FILE",
            help="Settings: a YAML file or a config of the package such as evaluation/imagenet; "
            "options win.",
        ),
    ] = None,
    backbone: options.Backbone = None,
    pipeline: options.Pipeline = None,
    layer: options.Layer = None,
    inverter: options.InverterOrNone = None,
    stage: options.Stage = None,
    split: Annotated[
        str | None,
        typer.Option(help="Of the data, where they have any.", show_default="validation"),
    ] = None,
    n_images: Annotated[
        int | None, typer.Option(help="Drawn evenly over classes.", show_default="all")
    ] = None,
    per_class: Annotated[int | None, typer.Option(help="At most so many of each class.")] = None,
    selection: Annotated[
        str | None,
        typer.Option(
            metavar="random|first",
            help="Which of a class: drawn with a fixed seed, or the first when sorted.",
            show_default="random",
        ),
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Only these class folders, one a line, in this order."),
    ] = None,
    held_back_per_class: Annotated[
        int | None, typer.Option(help="Only the last k of each class, as training holds back.")
    ] = None,
    evaluated_by: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Other backbones that look at the reconstructions."),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Noise derives from it and the image's name.", show_default="0"),
    ] = None,
    steps: options.Steps = None,
    scheduler: options.Scheduler = None,
    guidance_scale: options.GuidanceScale = None,
    guidance: options.Guidance = None,
    strength: Annotated[
        float | None,
        typer.Option(help="Factor on the residuals of the ControlNet.", show_default="1.0"),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Samples per batch.", show_default="8")
    ] = None,
    attention: Annotated[
        str | None,
        typer.Option(metavar="native|xformers", help="Attention kernels.", show_default="native"),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="auto, cpu, cuda … of one process; several take accelerate's.",
            show_default="auto",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, float16 or bfloat16; backbones stay in float32.",
            show_default="float32",
        ),
    ] = None,
    n_null_images: Annotated[
        int | None,
        typer.Option(help="Images for the nulls that cost a sample each.", show_default="256"),
    ] = None,
    lpips: Annotated[
        str | None, typer.Option(metavar="alex|vgg|squeeze", help="Adds LPIPS.")
    ] = None,
    lpips_weights: Annotated[
        str | None, typer.Option(metavar="FILE", help="For --lpips, where they are not cached.")
    ] = None,
    fid: Annotated[
        str | None,
        typer.Option(
            metavar="torch-fidelity|clean|adm",
            help="Adds FID, KID and precision/recall by this convention.",
        ),
    ] = None,
    inception_weights: Annotated[
        str | None, typer.Option(metavar="FILE", help="For --fid, where they are not cached.")
    ] = None,
    fd_dinov2: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Adds the Fréchet distance of this DINOv2."),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER_OR_NPZ",
            help="What distances are to.",
            show_default="the evaluated originals",
        ),
    ] = None,
    shard_size: Annotated[
        int | None,
        typer.Option(help="Images that one process does at a time, 2–512.", show_default="64"),
    ] = None,
    save_images: Annotated[
        bool | None,
        typer.Option("--save-images", help="Keep the reconstructions as PNGs."),
    ] = None,
    output: options.Output = Path("outputs/evaluate"),
) -> None:
    """Reconstruct a data set and measure how well its features come back.

    Writes metrics.json (each figure with its interval, beside nulls and ceilings),
    per_image.parquet and metrics.md. Runs on any number of processes as
    `accelerate launch -m featinv_diffusion evaluate …`; the same command again finishes what was
    interrupted and tries again what failed.
    """
    given = {key: value for key, value in locals().items() if key not in ("config", "output")}
    settings = _read_settings(config, given)
    _run(settings, output)


def _read_settings(config: str | None, given: dict[str, Any]) -> EvaluationSettings:
    from dataclasses import replace

    from featinv_diffusion.config import load_config
    from featinv_diffusion.data.sets import EXAMPLE
    from featinv_diffusion.errors import InputError
    from featinv_diffusion.evaluation.settings import EvaluationSettings

    if (names := given.get("evaluated_by")) is not None:
        given["evaluated_by"] = tuple(name.strip() for name in names.split(",") if name.strip())
        if not given["evaluated_by"]:
            raise InputError("--evaluated-by must name a backbone, or several as A,B.")
    chosen = {key: value for key, value in given.items() if value is not None}
    settings = replace(load_config(EvaluationSettings, config), **chosen)
    if not settings.data:
        raise InputError(f"The images to evaluate on must be named, {EXAMPLE}.")
    return settings


def _run(settings: EvaluationSettings, output: Path) -> None:
    from functools import partial

    from featinv_diffusion.cli.run import progress_bar, quiet_libraries
    from featinv_diffusion.evaluation.run import evaluate as run_evaluation
    from featinv_diffusion.processes import make_accelerator

    quiet_libraries()
    accelerator = make_accelerator()
    bar = partial(progress_bar, enabled=accelerator.is_main_process)
    command = command_line()
    metrics = run_evaluation(settings, output, accelerator, bar, command)
    accelerator.end_training()
    if metrics is not None:
        _report(metrics, output)
        if metrics["failures"] or metrics["partial_failures"]:
            raise typer.Exit(1)


def _report(metrics: dict[str, Any], output: Path) -> None:
    """Prints the primary figures; failures go to stderr."""
    import sys

    from featinv_diffusion.evaluation.report import to_cell
    from featinv_diffusion.evaluation.run import METRICS, TABLE

    for failure in (*metrics["failures"], *metrics["partial_failures"]):
        print(f"Failed: {failure['error']}", file=sys.stderr)
    parts = [f"cosine {to_cell(metrics['cosine'])}"]
    if normalised := metrics["normalised_agreement"]:
        parts.append(f"normalised {to_cell(normalised)}")
    for name, title in (("top1_match", "top-1 match"), ("top5_match", "top-5 match")):
        if name in metrics:
            parts.append(f"{title} {to_cell(metrics[name], name)}")
    print(f"{metrics['n_images']} images: {', '.join(parts)}.")
    print(f"Wrote {output / TABLE}, {output / METRICS} and per_image.parquet.")
