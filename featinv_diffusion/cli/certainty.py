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
    from featinv_diffusion.cli.run import quiet_libraries, say_notes
    from featinv_diffusion.data.selection import select_items
    from featinv_diffusion.data.sets import open_images
    from featinv_diffusion.diffusion.folders import CERTAINTY_FILE, check_pipeline_folder
    from featinv_diffusion.inverters.open import load_inverter
    from featinv_diffusion.runs.certainty import CertaintyCalibration, fit_certainty
    from featinv_diffusion.runs.progress import progress_bar
    from featinv_diffusion.runs.record import reserved
    from featinv_diffusion.settings import Selection

    quiet_libraries()
    check_pipeline_folder(pipeline)
    choice = settings.images
    images = open_images(choice.data, choice.split, choice.classes)
    say_notes(images)
    selection = Selection(
        n_images=min(settings.n_images, len(images)),
        held_back_per_class=settings.held_back_per_class,
    )
    items = select_items(images, selection)
    output = pipeline / CERTAINTY_FILE
    with reserved(output, is_file=True):
        inverter = load_inverter(pipeline, quality=settings.quality, device=settings.device)
        with progress_bar(len(items), doing="sampling", noun="pictures") as advance:
            found = fit_certainty(
                inverter, images, items, settings.n_samples, settings.batch_size, advance
            )
        if output.is_file():
            before = CertaintyCalibration.load(output)
            if before.weights_sha256 == found.weights_sha256:
                found = found.with_models_of(before)
        found.save(output)
    counts = {
        "n_images": len(items),
        "n_samples": settings.n_samples,
    }
    print(
        f"Wrote {output}: certainty of samples of quality {settings.quality}, calibrated on "
        f"{len(items)} held-out pictures with up to {settings.n_samples} samples of each."
    )
    terminal.finish(counts, output)
