"""`featinv concepts`: the concepts of a class, from a folder of its pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from featinv_diffusion.cli import options, terminal
from featinv_diffusion.errors import InputError
from featinv_diffusion.settings import ConceptSettings

if TYPE_CHECKING:
    from featinv_diffusion.studies.concepts import FoundConcepts


@options.with_settings(ConceptSettings)
def concepts(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Pictures of one class, also in folders below.")
    ],
    *,
    settings: ConceptSettings,
    figure: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="File name of the figure: a .png, .pdf or .svg.",
            show_default="the output's name with .png",
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="File of concepts to write.")
    ] = Path("concepts.safetensors"),
) -> None:
    """Find the concepts of a class in a backbone's features, those that hold most of it first.

    Writes the concepts for `featinv viz`, and beside them a figure (pictures that activate each
    concept most, with activation maps), a JSON file, a parquet table (one row per picture and
    concept) and a manifest for `featinv replay`. Needs no pipeline. With --sae the concepts are the
    latents of a sparse autoencoder that matter most in the pictures.
    """
    from dataclasses import replace

    from featinv_diffusion.backbones import resolve_backbone
    from featinv_diffusion.data.places import list_pictures

    drawn = figure or f"{output.stem}.png"
    own = (output.parent / drawn).resolve()
    found = list_pictures(folder).names
    names = [name for name in found if (folder / name).resolve() != own]
    settings = replace(settings, backbone=resolve_backbone(settings.backbone).name)
    run(settings, folder, names, output, drawn)


def run(
    settings: ConceptSettings, folder: Path, images: Sequence[str], output: Path, figure: str
) -> FoundConcepts:
    """Finds the concepts of images below a folder, writes them, and prints what was found."""
    import sys

    from featinv_diffusion.backbones import load_backbone
    from featinv_diffusion.backbones.base import without_progress_bars
    from featinv_diffusion.cli.run import quiet_libraries
    from featinv_diffusion.devices import find_device
    from featinv_diffusion.figures.board import check_name
    from featinv_diffusion.runs.record import reserved
    from featinv_diffusion.studies.concepts import MANIFEST_SUFFIX, SUFFIX, find_concepts

    quiet_libraries()
    check_name(figure)
    if output.suffix != SUFFIX:
        raise InputError(f"Concepts must go to a file that ends in {SUFFIX}, got {output.name!r}.")
    device = find_device(settings.device)
    with reserved(output, is_file=True):
        with without_progress_bars():
            backbone = load_backbone(settings.backbone, settings.layer).to(device)
        found = find_concepts(
            backbone,
            images,
            folder=folder,
            target=settings.target,
            method=settings.method,
            n_concepts=settings.n_concepts,
            directions=settings.directions,
            basis=settings.basis,
            order=settings.order,
            encoding=settings.encoding,
            sae=settings.sae,
            sae_format=settings.sae_format,
            max_cells=settings.max_cells,
            seed=settings.seed,
            batch_size=settings.batch_size,
            progress=sys.stderr.isatty() and not terminal.is_quiet(),
        )
        found.save(output, figure)
    print(found.summary())
    beside = [figure, *(output.stem + end for end in (".json", ".parquet", ".manifest.json"))]
    print(f"Wrote {output}; beside it {', '.join(beside)}.")
    terminal.finish(output.with_name(f"{output.stem}{MANIFEST_SUFFIX}"), output)
    return found
