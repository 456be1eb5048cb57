"""`featinv operator fit`: the matrix on features for an operation on pixels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from featinv_diffusion.cli import operator_options, options

if TYPE_CHECKING:
    from featinv_diffusion.features.operators import Operator
    from featinv_diffusion.pixel_operations import PixelOperation


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
    batch_size: operator_options.BatchSize = 32,
    device: options.Device = "auto",
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="File to write.")
    ] = Path("operator.safetensors"),
) -> None:
    """Fit the matrix that turns features of images into those of the same images changed.

    Encodes each image twice and streams; no inverter is involved. The file records which images it
    was fitted on, so that `analyze` measures on others.
    """
    from featinv_diffusion.analysis.operator_fit import check_batch_size, draw_images, fit_operator
    from featinv_diffusion.backbones import load_backbone
    from featinv_diffusion.cli.run import progress_bar, quiet_libraries
    from featinv_diffusion.diffusion.quiet import without_progress_bars
    from featinv_diffusion.evaluation.dataset import open_images
    from featinv_diffusion.features.operator_methods import check_method
    from featinv_diffusion.sampling import find_device

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
    _report(fitted, pixels, output)


def _report(fitted: Operator, operation: PixelOperation, output: Path) -> None:
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
    from featinv_diffusion.pixel_operations import make_operation

    given = {"alpha": alpha, "channel": channel}
    return make_operation(name, **{k: value for k, value in given.items() if value is not None})
