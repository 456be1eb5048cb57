"""`featinv scope`: fits the statistics that tell natural feature maps from others."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from featinv_diffusion.cli import options, terminal
from featinv_diffusion.cli.command_line import command_line
from featinv_diffusion.settings import to_flat
from featinv_diffusion.studies.settings import ScopeSettings

if TYPE_CHECKING:
    from featinv_diffusion.runs.parts import Division


@options.with_settings(ScopeSettings, data=options.REQUIRED, split="train")
def scope(
    pipeline: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Pipeline folder; gets scope.safetensors.")
    ],
    *,
    settings: ScopeSettings,
    worker: options.WorkerOption = None,
) -> None:
    """Learn what feature maps of sharp photos look like, to flag maps that are unlike them.

    Afterwards commands print and record scope_p_value: how often the map of a photo looks odder
    than the map that was inverted. Give images of the kind that the backbone was trained for, and
    calibrate on images that it was not trained on. A map that is not flagged need not be right:
    line drawings, adversarial images and steering towards another class mostly pass.

    The images can be shared among workers that never talk, with --worker; `featinv merge
    FOLDER/scope.safetensors` then writes it.
    """
    from featinv_diffusion.cli.run import quiet_libraries, work
    from featinv_diffusion.diffusion.folders import SCOPE_FILE, check_pipeline_folder
    from featinv_diffusion.processes import find_worker
    from featinv_diffusion.runs.parts import WHOLE, units_of
    from featinv_diffusion.runs.record import reserved
    from featinv_diffusion.runs.workers import Call

    quiet_libraries()
    check_pipeline_folder(pipeline)
    output = pipeline / SCOPE_FILE
    if (one := find_worker(worker)) is not None:
        call = Call("scope", one.num_processes, to_flat(settings), line=command_line())
        fitted = partial(fit, settings, pipeline)
        raise typer.Exit(work(one, units_of(output), call, fitted, output))
    with reserved(output, is_file=True):
        fit(settings, pipeline, WHOLE)


def fit(settings: ScopeSettings, pipeline: Path, division: Division) -> None:
    """Fits the statistics of natural maps, writes them and prints how many they are of."""
    from featinv_diffusion.data.sets import open_images
    from featinv_diffusion.diffusion.folders import SCOPE_FILE
    from featinv_diffusion.inverters.diffusion import DiffusionInverter
    from featinv_diffusion.inverters.open import load_inverter
    from featinv_diffusion.inverters.quality import other_qualities
    from featinv_diffusion.runs.progress import progress_bar
    from featinv_diffusion.runs.scope_fit import fit_scope, split_images

    choice, output = settings.images, pipeline / SCOPE_FILE
    images = open_images(choice.data, choice.split, choice.classes)
    parts = split_images(images, settings.held_back_per_class, settings.n_images)
    n_all = division.share(len(parts.fitted) + len(parts.held_out))
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
            division=division,
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
