"""`featinv scope`: fits the statistics that tell natural feature maps from others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from featinv_diffusion.cli import options, terminal
from featinv_diffusion.studies.settings import ScopeSettings


@options.with_settings(ScopeSettings, data=options.REQUIRED, split="train")
def scope(
    pipeline: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Pipeline folder; gets scope.safetensors.")
    ],
    *,
    settings: ScopeSettings,
) -> None:
    """Learn what feature maps of sharp photos look like, to flag maps that are unlike them.

    Afterwards commands print and record scope_p_value: how often the map of a photo looks odder
    than the map that was inverted. Give images of the kind that the backbone was trained for, and
    calibrate on images that it was not trained on. A map that is not flagged need not be right:
    line drawings, adversarial images and steering towards another class mostly pass.
    """
    from featinv_diffusion.cli.run import quiet_libraries
    from featinv_diffusion.data.sets import open_images
    from featinv_diffusion.diffusion.folders import SCOPE_FILE, check_pipeline_folder
    from featinv_diffusion.inverters.diffusion import DiffusionInverter
    from featinv_diffusion.inverters.open import load_inverter
    from featinv_diffusion.inverters.quality import other_qualities
    from featinv_diffusion.runs.progress import progress_bar
    from featinv_diffusion.runs.record import reserved
    from featinv_diffusion.runs.scope import fit_scope, split_images

    quiet_libraries()
    check_pipeline_folder(pipeline)
    choice = settings.images
    images = open_images(choice.data, choice.split, choice.classes)
    parts = split_images(images, settings.held_back_per_class, settings.n_images)
    output = pipeline / SCOPE_FILE
    n_all = len(parts.fitted) + len(parts.held_out)
    with reserved(output, is_file=True):
        inverter = load_inverter(pipeline, device=settings.device)
        assert isinstance(inverter, DiffusionInverter)
        with progress_bar(n_all, doing="fitting", noun="images") as advance:
            natural = fit_scope(
                inverter,
                images,
                parts,
                settings.n_reconstructions,
                settings.batch_size,
                advance,
                others=other_qualities(inverter),
            )
        natural.save(output)
    counts = {
        "n_fitted": natural.n_fitted,
        "n_calibrated": len(natural.calibration.distances),
        "n_reconstructed": len(natural.calibration.cosines),
    }
    print(
        f"Wrote {output}: natural maps of {counts['n_fitted']} images, calibrated on "
        f"{counts['n_calibrated']} others, {counts['n_reconstructed']} of them reconstructed."
    )
    terminal.finish(counts, output)
