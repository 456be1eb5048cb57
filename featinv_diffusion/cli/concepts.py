"""`featinv concepts`: the concepts of a class, from a folder of its pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from featinv_diffusion.cli import options
from featinv_diffusion.errors import InputError

if TYPE_CHECKING:
    from featinv_diffusion.studies.concepts import ConceptFit, Fitted

DEFAULT_N_CONCEPTS = 3


def concepts(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Pictures of one class, also in folders below.")
    ],
    backbone: Annotated[
        str, typer.Option(help="Bundled (tiny/convnext), a timm id, or hf/FOLDER_OR_REPOSITORY.")
    ] = "tiny/convnext",
    layer: Annotated[str, typer.Option(help="Layer of the features.")] = "last",
    target: Annotated[
        str | None,
        typer.Option(
            "--class",
            metavar="NAME_OR_INDEX",
            help="That concepts are relevant to.",
            show_default="as most pictures are classified",
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(metavar="mcd|pca|nmf|kmeans|directions", show_default="mcd"),
    ] = None,
    n_concepts: Annotated[
        str | None,
        typer.Option(
            metavar="K|auto",
            help="auto: the fewest that are half complete, by mcd.",
            show_default=f"{DEFAULT_N_CONCEPTS}, or all directions of a file",
        ),
    ] = None,
    directions: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A matrix of one direction per row (CAVs, the decoder of an SAE): .npy, or "
            ".safetensors with `directions` and perhaps `offset`.",
        ),
    ] = None,
    encoding: Annotated[
        str,
        typer.Option(
            metavar="least_squares|projection|sparse", help="How features split over such a file."
        ),
    ] = "least_squares",
    max_cells: Annotated[
        int, typer.Option(help="Cells that mcd draws where there are more; 0 takes all.")
    ] = 20_000,
    seed: Annotated[int, typer.Option(help="Of whatever the method draws.")] = 42,
    batch_size: Annotated[int, typer.Option(help="Pictures per batch of the backbone.")] = 32,
    device: options.Device = "auto",
    figure: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Its suffix decides: .png, .pdf or .svg.",
            show_default="the output's name .png",
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="File of concepts to write.")
    ] = Path("concepts.safetensors"),
) -> None:
    """Find the concepts of a class in a backbone's features, most relevant first.

    Writes the concepts for `featinv viz`, and beside them a figure (pictures that activate each
    concept most, with activation maps), a JSON file, a parquet table (one row per picture and
    concept) and a manifest for `featinv replay`. Needs no pipeline.
    """
    from featinv_diffusion.backbones import resolve_backbone
    from featinv_diffusion.data.places import list_pictures
    from featinv_diffusion.studies.concepts import ConceptFit

    method = method or ("mcd" if directions is None else "directions")
    drawn = figure or f"{output.stem}.png"
    own = {(output.parent / inner / drawn).resolve() for inner in ("", "replay")}
    names = list_pictures(folder).names
    fit = ConceptFit(
        folder=str(folder.absolute()),
        backbone=resolve_backbone(backbone).name,
        images=[name for name in names if (folder / name).resolve() not in own],
        layer=layer,
        target=target,
        method=method,
        n_concepts=_to_number(n_concepts, method),
        directions=None if directions is None else str(directions.absolute()),
        encoding=encoding,
        max_cells=max_cells or None,
        seed=seed,
        batch_size=batch_size,
        device=device,
        output=output.name,
        figure=drawn,
    )
    run(fit, output.parent)


def run(fit: ConceptFit, folder: Path) -> Fitted:
    """Fits, writes, and prints what was found."""
    import sys

    from featinv_diffusion.cli.run import quiet_libraries
    from featinv_diffusion.studies.concepts import fit_concepts, to_table, write_fit

    quiet_libraries()
    fitted = fit_concepts(fit, progress=sys.stderr.isatty())
    names = write_fit(fit, fitted, folder)
    print(to_table(fitted))
    print(f"Wrote {folder / names[0]}; beside it {', '.join(names[1:])}.")
    return fitted


def _to_number(text: str | None, method: str) -> int | None:
    if text is None:
        return None if method == "directions" else DEFAULT_N_CONCEPTS
    if text == "auto":
        return None
    try:
        return int(text)
    except ValueError:
        raise InputError(f"--n-concepts must be a number or auto, but {text!r} came.") from None
