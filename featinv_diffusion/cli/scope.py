"""`featinv scope`: what tells natural feature maps from others, fitted for a pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from featinv_diffusion.cli import options


def scope(
    pipeline: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Pipeline folder; gets scope.safetensors.")
    ],
    data: Annotated[
        str,
        typer.Option(
            metavar="PATH_OR_NAME",
            help="Images such as the backbone was made for: a folder, parquet file or Hub name.",
        ),
    ],
    split: Annotated[str, typer.Option(help="Of the data, where they have any.")] = "train",
    classes: Annotated[
        str | None, typer.Option(metavar="FILE", help="Only these class folders, one a line.")
    ] = None,
    held_back_per_class: Annotated[
        int, typer.Option(help="Calibrate on the last k of each class; 0 is on a fifth of all.")
    ] = 0,
    n_images: Annotated[int, typer.Option(help="At most so many to fit on.")] = 10_000,
    n_reconstructions: Annotated[
        int, typer.Option(help="Held-out images to sample once each, to know how they come back.")
    ] = 256,
    batch_size: options.BatchSize = 8,
    device: options.Device = "auto",
) -> None:
    """Fit the natural maps of a pipeline's backbone, so that others are told from them.

    After this the applications print and record scope_p_value: how often the map of an image looks
    less natural than the map that was inverted. Calibrate on images that the backbone was not
    trained on.
    """
    from featinv_diffusion.cli.run import progress_bar, quiet_libraries
    from featinv_diffusion.data.sets import open_images
    from featinv_diffusion.diffusion.folders import SCOPE_FILE, check_pipeline_folder
    from featinv_diffusion.inverters.open import open_inverter
    from featinv_diffusion.runs.scope import fit_scope, split_images
    from featinv_diffusion.settings import SampleSettings

    quiet_libraries()
    check_pipeline_folder(pipeline)
    images = open_images(data, split, classes)
    parts = split_images(images, held_back_per_class, n_images)
    settings = SampleSettings(pipeline=str(pipeline), batch_size=batch_size, device=device)
    inverter, _ = open_inverter(settings)
    n_all = len(parts.fitted) + len(parts.held_out)
    with progress_bar(n_all, doing="fitting", noun="images") as advance:
        natural = fit_scope(inverter, images, parts, n_reconstructions, batch_size, advance)
    natural.save(pipeline / SCOPE_FILE)
    print(
        f"Wrote {pipeline / SCOPE_FILE}: natural maps of {natural.n_fitted} images, calibrated on "
        f"{len(natural.calibration.distances)} others, "
        f"{len(natural.calibration.cosines)} of them reconstructed."
    )
