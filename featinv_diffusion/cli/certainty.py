"""`featinv certainty`: calibrates what is determined of a picture and what is invented."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from featinv_diffusion.cli import options, terminal
from featinv_diffusion.studies.settings import CertaintySettings


@options.with_settings(CertaintySettings, data=options.REQUIRED)
def certainty(
    pipeline: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Pipeline folder; gets certainty.safetensors.")
    ],
    *,
    settings: CertaintySettings,
) -> None:
    """Learn how far samples lie from the true picture, to tell what the features determine.

    Afterwards `featinv variability` and `featinv sample --certainty` say how much of each pixel
    and of each cell is fixed by the features, and how far the truth may lie from the samples. Give
    images that neither the backbone nor the ControlNet was trained on.
    """
    from featinv_diffusion.cli.run import quiet_libraries
    from featinv_diffusion.diffusion.folders import CERTAINTY_FILE, check_pipeline_folder
    from featinv_diffusion.inverters.open import load_inverter
    from featinv_diffusion.runs.certainty import CertaintyCalibration, calibrate_certainty
    from featinv_diffusion.runs.record import reserved

    quiet_libraries()
    check_pipeline_folder(pipeline)
    choice, output = settings.images, pipeline / CERTAINTY_FILE
    assert choice.data is not None  # required
    with reserved(output, is_file=True):
        found = calibrate_certainty(
            load_inverter(pipeline, quality=settings.quality, device=settings.device),
            choice.data,
            split=choice.split,
            classes=choice.classes,
            held_back_per_class=settings.held_back_per_class,
            n_images=settings.n_images,
            n_samples=settings.n_samples,
            batch_size=settings.batch_size,
            progress=True,
        )
        counts = {"n_images": found.models[0][1].n_images, "n_samples": settings.n_samples}
        if output.is_file():
            before = CertaintyCalibration.load(output)
            if before.weights_sha256 == found.weights_sha256:
                found = found.with_models_of(before)
        found.save(output)
    print(
        f"Wrote {output}: certainty of samples of quality {settings.quality}, calibrated on "
        f"{counts['n_images']} held-out pictures with up to {counts['n_samples']} samples of each."
    )
    terminal.finish(counts, output)
