"""`featinv operator analyze`: what an operator is, and what it does to other images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featinv_diffusion.cli import operator_options, options
from featinv_diffusion.cli.command_line import command_line
from featinv_diffusion.errors import InputError

if TYPE_CHECKING:
    from featinv_diffusion.backbones import Backbone
    from featinv_diffusion.features.operators import Operator
    from featinv_diffusion.inverters.base import Inverter
    from featinv_diffusion.sampling import SampleSettings


def analyze(
    *,
    operator: operator_options.OperatorName,
    data: operator_options.Data,
    inverter: Annotated[
        str | None,
        typer.Option(
            metavar="NAME_OR_FOLDER",
            help="Of the operator's features: siglip, vit, a folder, or diffusion.",
            show_default="none: features alone",
        ),
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option(help="Without an inverter: of the features.", show_default="the operator's"),
    ] = None,
    pipeline: options.Pipeline = None,
    stage: options.Stage = None,
    steps: options.Steps = None,
    split: operator_options.Split = "validation",
    classes: operator_options.Classes = None,
    n_images: Annotated[
        int, typer.Option(help="Drawn from those not in the fit; at least 2.")
    ] = 256,
    power: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,…",
            help="How often the operation and the operator are applied; the first is drawn.",
            show_default="1,4,8,12 of suppress, 1,2 of swap, else 1",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draw, and of noise.")] = 0,
    batch_size: operator_options.BatchSize = 8,
    device: options.Device = "auto",
    output: options.Output = Path("outputs/operator"),
) -> None:
    """Measure an operator: its eigenvalues, and what it does to images it was not fitted on.

    Images whose pixels were in the fit are left out, whatever they are called. Writes metrics.json
    (each figure with its interval), eigenvalues.png, measures.png and, with an inverter,
    pictures.png and powers.png. The floor is the inverter's picture of the true features, the
    ceiling that of the features as they were.
    """
    from dataclasses import asdict

    from featinv_diffusion.analysis.operator_fit import draw_images
    from featinv_diffusion.analysis.operator_study import (
        default_powers,
        operation_of,
        study_operator,
    )
    from featinv_diffusion.cli.run import progress_bar, quiet_libraries
    from featinv_diffusion.evaluation.dataset import open_images
    from featinv_diffusion.features.operator_files import open_operator
    from featinv_diffusion.sampling import SampleSettings

    quiet_libraries()
    _check_options(inverter, backbone, {"pipeline": pipeline, "stage": stage, "steps": steps})
    if n_images < 2:
        raise InputError(f"--n-images must be at least 2 for intervals, but {n_images} came.")
    operator_options.check_folder(output)
    opened = open_operator(operator)
    pixels = operation_of(opened)
    powers = default_powers(pixels) if power is None else operator_options.to_powers(power)
    images = open_images(data, split, classes, exclude=output)
    settings = None
    if inverter is not None:
        settings = SampleSettings(
            inverter=inverter,
            pipeline=pipeline,
            stage=stage,
            steps=steps,
            n_samples=1,
            seed=seed,
            batch_size=batch_size,
            device=device,
        )
    chosen, model, resolved = _open_features(settings, backbone, opened, device)
    digests = opened.record.image_digests
    drawn = draw_images(images, n_images, seed, max(model.input_size), digests)
    with progress_bar(n_images, doing="measuring", noun="images") as advance:
        metrics = study_operator(
            opened,
            pixels,
            model,
            drawn,
            output,
            inverter=chosen,
            powers=powers,
            batch_size=batch_size,
            seed=seed,
            advance=advance,
        )
    made_by = {
        "operator": operator,
        "backbone": model.spec.backbone,
        "layer": model.spec.layer,
        "device": str(model.device),
        "inverter": None,
        **({} if resolved is None else asdict(resolved)),
        "data": data,
        "split": split,
        "classes": classes,
        "n_images": n_images,
        "powers": list(powers),
        "seed": seed,
        "batch_size": batch_size,
    }
    _report(metrics, made_by, output)


def _check_options(
    inverter: str | None, backbone: str | None, of_inverter: dict[str, str | int | None]
) -> None:
    """Raises `InputError` for options that would do nothing."""
    if inverter is not None:
        if backbone is not None:
            raise InputError("--backbone is for features alone; with --inverter leave it out.")
        return
    if given := [f"--{name}" for name, value in of_inverter.items() if value is not None]:
        raise InputError(
            f"{' and '.join(given)} must come with --inverter, but none came; without one, "
            "features alone are measured."
        )


def _open_features(
    settings: SampleSettings | None, backbone: str | None, opened: Operator, device: str
) -> tuple[Inverter | None, Backbone, SampleSettings | None]:
    """Opens the inverter with its backbone, or the backbone alone."""
    from featinv_diffusion.analysis.sampling import backbone_of
    from featinv_diffusion.backbones import load_backbone
    from featinv_diffusion.diffusion.quiet import without_progress_bars
    from featinv_diffusion.sampling import find_device, open_chosen

    if settings is None:
        name = backbone or opened.spec.backbone
        with without_progress_bars():
            return None, load_backbone(name, opened.spec.layer).to(find_device(device)), None
    inverter, resolved = open_chosen(settings)
    return inverter, backbone_of(inverter), resolved


def _report(metrics: dict[str, Any], settings: dict[str, Any], output: Path) -> None:
    """Writes the numbers with what made them, and prints the first ones."""
    import json

    from featinv_diffusion.analysis.operator_study import to_lines
    from featinv_diffusion.files import write_text

    content = {
        "analysis": "operator",
        "command": command_line(),
        "settings": settings,
        **metrics,
    }
    write_text(output / "metrics.json", json.dumps(content, indent=2, allow_nan=False) + "\n")
    print("\n".join(to_lines(metrics)))
    print(f"Wrote {output / 'metrics.json'} and figures.")
