"""`featinv steerability`: which latents of a dictionary the decoded pictures follow."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from featinv_diffusion.cli import options
from featinv_diffusion.cli.command_line import command_line
from featinv_diffusion.studies.settings import SteerabilitySettings


@options.with_settings(SteerabilitySettings, data=options.REQUIRED, without=["n_samples"])
def steerability(
    concepts: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="File that `featinv concepts` wrote, or a sparse autoencoder: of overcomplete, "
            "saev or ViT-Prisma, or tiny/convnext-sae.",
        ),
    ],
    *,
    sae_format: options.SAEFormat = "auto",
    settings: SteerabilitySettings,
    output: options.Output = Path("outputs/steerability"),
) -> None:
    """Set each latent in pictures' features, and see which of them the decoded pictures follow.

    A latent is seen where the picture moves more than along random directions of the same length,
    and steerable where the encoded new picture has it. Writes a figure, steerability.json and
    .parquet (one row per latent, with the pictures that activate it most) and metrics.json (the
    shares with their intervals).
    """
    from dataclasses import asdict

    from featinv_diffusion.cli.run import quiet_libraries, say_notes
    from featinv_diffusion.cli.studies import with_backbone_of
    from featinv_diffusion.data.selection import select_items
    from featinv_diffusion.data.sets import open_images
    from featinv_diffusion.inverters.open import open_inverter
    from featinv_diffusion.runs.record import reserved
    from featinv_diffusion.settings import Selection
    from featinv_diffusion.studies.steerability import FIGURE, TABLE
    from featinv_diffusion.studies.steerability import steerability as study

    quiet_libraries()
    options.check_folder(output)
    sampling = with_backbone_of(settings.sampling, concepts, sae_format)
    choice = settings.images
    images = open_images(choice.data, choice.split, choice.classes, output)
    say_notes(images)
    selection = Selection(
        n_images=min(settings.n_images, len(images)),
        held_back_per_class=settings.held_back_per_class,
    )
    images = images.pick([item.index for item in select_items(images, selection)])
    with reserved(output):
        inverter = open_inverter(sampling)
        result = study(
            inverter,
            concepts,
            images,
            n_latents=settings.n_latents,
            n_pictures=settings.n_pictures,
            n_directions=settings.n_directions,
            dose=settings.dose,
            seed=sampling.seed,
            sae_format=sae_format,
            batch_size=sampling.batch_size,
            progress=True,
        )
    result.save(
        output,
        command_line=command_line(),
        concepts=str(concepts),
        sae_format=sae_format,
        sampling=asdict(inverter.settings or sampling),
    )
    print(result.summary())
    print(f"Wrote {output / FIGURE}, steerability.json, {TABLE} and metrics.json.")
