"""`featinv operator`: operations on pixels as matrices on features; fit, apply, analyze."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featinv_diffusion.cli import options
from featinv_diffusion.cli import options as operator_options
from featinv_diffusion.cli.command_line import command_line
from featinv_diffusion.errors import InputError

if TYPE_CHECKING:
    from featinv_diffusion.backbones import Backbone
    from featinv_diffusion.features.operators import Operator
    from featinv_diffusion.features.pixel_operations import PixelOperation
    from featinv_diffusion.inverters.base import Inverter
    from featinv_diffusion.settings import SampleSettings


# ---- `featinv operator analyze`: what an operator is, and what it does to other images -----------


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
    batch_size: operator_options.ImageBatchSize = 8,
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

    from featinv_diffusion.cli.run import progress_bar, quiet_libraries
    from featinv_diffusion.data.sets import open_images
    from featinv_diffusion.features.operators import open_operator
    from featinv_diffusion.settings import SampleSettings
    from featinv_diffusion.studies.operator_measures import draw_images
    from featinv_diffusion.studies.operators import default_powers, operation_of, study_operator

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
    from featinv_diffusion.backbones import load_backbone
    from featinv_diffusion.diffusion.folders import without_progress_bars
    from featinv_diffusion.inverters.open import find_device, open_chosen
    from featinv_diffusion.runs.sampling import backbone_of

    if settings is None:
        name = backbone or opened.spec.backbone
        with without_progress_bars():
            return None, load_backbone(name, opened.spec.layer).to(find_device(device)), None
    inverter, resolved = open_chosen(settings)
    return inverter, backbone_of(inverter), resolved


def _report(metrics: dict[str, Any], settings: dict[str, Any], output: Path) -> None:
    """Writes the numbers with what made them, and prints the first ones."""
    import json

    from featinv_diffusion.files import write_text
    from featinv_diffusion.studies.operators import to_lines

    content = {
        "analysis": "operator",
        "command": command_line(),
        "settings": settings,
        **metrics,
    }
    write_text(output / "metrics.json", json.dumps(content, indent=2, allow_nan=False) + "\n")
    print("\n".join(to_lines(metrics)))
    print(f"Wrote {output / 'metrics.json'} and figures.")


# ---- `featinv operator apply`: pictures through an operator and an inverter ----------------------


def apply(
    images: options.Images = None,
    *,
    operator: operator_options.OperatorName,
    inverter: operator_options.InverterName,
    power: Annotated[
        str, typer.Option(metavar="N,N,…", help="How often to apply it; 0 is not at all.")
    ] = "0,1",
    pipeline: options.Pipeline = None,
    stage: options.Stage = None,
    steps: options.Steps = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    output: options.Output = Path("outputs/operator"),
) -> None:
    """Apply an operator to the features of pictures, and see them through an inverter.

    Writes a PNG per picture and power, grid.png (with the cosine of each picture's features to the
    map it was made from) and manifest.json (settings, seeds, cosines; it has no replay). Of an
    operation that does not start from the picture itself, such as colourise, which starts from
    grey, that is made of the picture first and shown as what was given.
    """
    import sys

    from featinv_diffusion.cli.run import progress_bar, quiet_libraries
    from featinv_diffusion.features.operators import open_operator
    from featinv_diffusion.images import builtin_photo
    from featinv_diffusion.inverters.open import open_chosen
    from featinv_diffusion.runs.record import MANIFEST
    from featinv_diffusion.runs.sampling import Job, find_images, make_jobs
    from featinv_diffusion.runs.scope import open_scope, scope_line
    from featinv_diffusion.settings import DIFFUSION, SampleSettings
    from featinv_diffusion.studies.operators import (
        GRID,
        apply_operator,
        make_apply_jobs,
        write_applied,
    )

    quiet_libraries()
    operator_options.check_folder(output)
    powers = operator_options.to_powers(power)
    opened = open_operator(operator)
    found = find_images(images or [builtin_photo()], exclude=output)
    jobs = make_apply_jobs(make_jobs(found, seed, 1), powers)
    settings = SampleSettings(
        inverter=inverter,
        pipeline=pipeline,
        stage=stage,
        steps=steps,
        n_samples=1,
        seed=seed,
        batch_size=1,
        device=device,
    )
    failures: list[dict[str, str]] = []

    def fail(job: Job, error: str) -> None:
        failures.append({"input": str(job.input.absolute()), "error": error})

    with progress_bar(len(jobs) * len(powers)) as advance:
        chosen, resolved = open_chosen(settings, on_progress=advance)
        scope = open_scope(chosen, resolved)
        applied = list(apply_operator(opened, chosen, jobs, powers, fail, scope))
    if not applied:
        raise InputError("\n".join(failure["error"] for failure in failures))
    write_applied(applied, failures, opened, operator, powers, resolved, scope, output)
    for failure in failures:
        print(f"Failed: {failure['error']}", file=sys.stderr)
    p_values = [p for done in applied for p in done.scope_p_value or []]
    is_deterministic = resolved.inverter != DIFFUSION
    print(scope_line(p_values or None, scope.basis, deterministic=is_deterministic))
    print(f"Wrote {output / GRID} and {output / MANIFEST}.")
    if failures:
        raise typer.Exit(1)


# ---- `featinv operator fit`: the matrix on features for an operation on pixels -------------------


def fit(
    backbone: Annotated[
        str, typer.Option(help="A bundled one such as tiny/vit, a timm id, or hf/FOLDER_OR_REPO.")
    ],
    operation: Annotated[
        str, typer.Option(metavar="swap|suppress|grey|colourise", help="What is done to pixels.")
    ],
    data: operator_options.Data,
    *,
    layer: Annotated[str, typer.Option(help="Layer of the features.")] = "last",
    alpha: Annotated[
        float | None,
        typer.Option(help="Of suppress: factor on the channel.", show_default="0.9"),
    ] = None,
    channel: Annotated[
        str | None,
        typer.Option(metavar="red|green|blue", help="Of suppress.", show_default="blue"),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            metavar="orthogonal|self-adjoint|self-adjoint-direct|linear",
            help="What the matrix may be.",
        ),
    ] = "orthogonal",
    ridge: Annotated[
        float,
        typer.Option(
            help="Of linear: pull towards the identity, as a share of the mean eigenvalue of XᵀX."
        ),
    ] = 1e-6,
    split: operator_options.Split = "train",
    classes: operator_options.Classes = None,
    n_images: Annotated[int, typer.Option(help="Drawn at random from the data.")] = 1024,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    batch_size: operator_options.ImageBatchSize = 32,
    device: options.Device = "auto",
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="File to write.")
    ] = Path("operator.safetensors"),
) -> None:
    """Fit the matrix that turns features of images into those of the same images changed.

    Encodes each image twice and streams; no inverter is involved. The file records which images it
    was fitted on, so that `analyze` measures on others.
    """
    from featinv_diffusion.backbones import load_backbone
    from featinv_diffusion.cli.run import progress_bar, quiet_libraries
    from featinv_diffusion.data.sets import open_images
    from featinv_diffusion.diffusion.folders import without_progress_bars
    from featinv_diffusion.features.operator_methods import check_method
    from featinv_diffusion.inverters.open import find_device
    from featinv_diffusion.studies.operator_measures import (
        check_batch_size,
        draw_images,
        fit_operator,
    )

    quiet_libraries()
    check_method(method, ridge)
    check_batch_size(batch_size)
    operator_options.check_file(output)
    pixels = _make_operation(operation, alpha, channel)
    images = open_images(data, split, classes)
    with without_progress_bars():
        model = load_backbone(backbone, layer).to(find_device(device))
    drawn = draw_images(images, n_images, seed, max(model.input_size))
    with progress_bar(n_images, doing="encoding", noun="images") as advance:
        fitted = fit_operator(
            model, drawn, pixels, method, ridge=ridge, batch_size=batch_size, advance=advance
        )
    fitted.save(output)
    _report_fit(fitted, pixels, output)


def _report_fit(fitted: Operator, operation: PixelOperation, output: Path) -> None:
    record = fitted.record
    condition = record.condition_number
    print(
        f"{operation} on {fitted.spec.backbone}, {record.method}: residual {record.residual:.4f} "
        f"(doing nothing: {record.residual_of_identity:.4f}) of {record.n_locations} locations of "
        f"{len(record.image_digests)} images; rank {record.rank} of {fitted.spec.channels}, "
        f"condition number {'infinite' if condition is None else f'{condition:.1e}'}."
    )
    print(f"Wrote {output}.")


def _make_operation(name: str, alpha: float | None, channel: str | None) -> PixelOperation:
    from featinv_diffusion.features.pixel_operations import make_operation

    given = {"alpha": alpha, "channel": channel}
    return make_operation(name, **{k: value for k, value in given.items() if value is not None})


operator = typer.Typer(
    help="Do to features, by one matrix, what an operation does to pixels.", no_args_is_help=True
)
for _command in (fit, apply, analyze):
    operator.command()(_command)
