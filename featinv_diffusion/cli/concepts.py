"""`featinv concepts`: the concepts of a class, from a folder of its pictures."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from featinv_diffusion.cli import options, terminal
from featinv_diffusion.cli.command_line import command_line
from featinv_diffusion.errors import InputError
from featinv_diffusion.settings import ConceptSettings, to_flat

if TYPE_CHECKING:
    from featinv_diffusion.runs.parts import Division
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
    worker: options.WorkerOption = None,
) -> None:
    """Find the concepts of a class in a backbone's features, those that hold most of it first.

    Writes the concepts for `featinv viz`, and beside them a figure (pictures that activate each
    concept most, with activation maps), a JSON file, a parquet table (one row per picture and
    concept) and a manifest for `featinv replay`. Needs no pipeline. With --sae the concepts are the
    latents of a sparse autoencoder that matter most in the pictures. Encoding the pictures can be
    shared among workers that never talk, with --worker; `featinv merge FILE` then finds the
    concepts.
    """
    from dataclasses import replace

    from featinv_diffusion.backbones import resolve_backbone
    from featinv_diffusion.cli.run import quiet_libraries, work
    from featinv_diffusion.data.places import list_pictures
    from featinv_diffusion.processes import find_worker
    from featinv_diffusion.runs.parts import units_of
    from featinv_diffusion.runs.workers import Call

    drawn = figure or f"{output.stem}.png"
    own = (output.parent / drawn).resolve()
    found = list_pictures(folder).names
    names = [name for name in found if (folder / name).resolve() != own]
    settings = replace(settings, backbone=resolve_backbone(settings.backbone).name)
    if (one := find_worker(worker)) is None:
        run(settings, folder, names, output, drawn)
        return
    quiet_libraries()
    _check(output, drawn)
    own = {"folder": str(folder), "figure": drawn}
    n, line = one.num_processes, command_line()
    call = Call("concepts", n, to_flat(settings), names, own=own, line=line)
    found = partial(find, settings, folder, names)
    raise typer.Exit(work(one, units_of(output), call, found, output))


def run(
    settings: ConceptSettings,
    folder: Path,
    images: Sequence[str],
    output: Path,
    figure: str,
    division: Division | None = None,
) -> FoundConcepts:
    """Finds the concepts of images below a folder, writes them, and prints what was found."""
    from featinv_diffusion.cli.run import quiet_libraries
    from featinv_diffusion.runs.parts import WHOLE
    from featinv_diffusion.runs.record import reserved
    from featinv_diffusion.studies.concepts import MANIFEST_SUFFIX

    quiet_libraries()
    _check(output, figure)
    with reserved(output, is_file=True):
        found = find(settings, folder, images, division or WHOLE)
        found.save(output, figure)
    print(found.summary())
    beside = [figure, *(output.stem + end for end in (".json", ".parquet", ".manifest.json"))]
    print(f"Wrote {output}; beside it {', '.join(beside)}.")
    terminal.finish(output.with_name(f"{output.stem}{MANIFEST_SUFFIX}"), output)
    return found


def _check(output: Path, figure: str) -> None:
    from featinv_diffusion.figures.board import check_name
    from featinv_diffusion.studies.concepts import SUFFIX

    check_name(figure)
    if output.suffix != SUFFIX:
        raise InputError(f"Concepts must go to a file that ends in {SUFFIX}, got {output.name!r}.")


def find(
    settings: ConceptSettings, folder: Path, images: Sequence[str], division: Division
) -> FoundConcepts:
    """Finds the concepts of images below a folder."""
    import sys

    from featinv_diffusion.backbones import load_backbone
    from featinv_diffusion.backbones.base import without_progress_bars
    from featinv_diffusion.devices import find_device
    from featinv_diffusion.studies.concepts import find_concepts

    device = find_device(settings.device)
    with without_progress_bars():
        backbone = load_backbone(settings.backbone, settings.layer).to(device)
    return find_concepts(
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
        division=division,
    )
