"""Options that the commands of `featinv operator` share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from featinv_diffusion.errors import InputError

OperatorName = Annotated[
    str,
    typer.Option("--operator", metavar="FILE_OR_NAME", help="That `fit` wrote, or a bundled one."),
]
InverterName = Annotated[
    str,
    typer.Option(
        metavar="NAME_OR_FOLDER",
        help="Of the operator's features: siglip, vit, a folder, or diffusion.",
    ),
]
Data = Annotated[
    str,
    typer.Option(metavar="PATH_OR_NAME", help="Images: a folder, parquet file or Hub name."),
]
Split = Annotated[str, typer.Option(help="Of the data, where they have any.")]
Classes = Annotated[
    str | None, typer.Option(metavar="FILE", help="Only these class folders, one a line.")
]
BatchSize = Annotated[int, typer.Option(help="Images per batch.")]


def to_powers(text: str) -> list[int]:
    """Reads whole numbers with commas between.

    Raises:
        InputError: something else.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(
            f"--power must be whole numbers with commas between, such as 1,2, but {text!r} came."
        ) from None


def check_file(output: Path) -> None:
    """Raises `InputError`, before the work, unless a file can be written there."""
    if output.is_dir():
        raise InputError(
            f"--output must be a file, but {output} is a folder. Name a file in it, such as "
            f"{output / 'operator.safetensors'}."
        )
    _check_above(output)


def check_folder(output: Path) -> None:
    """Raises `InputError`, before the work, unless this is a folder or one can be made there."""
    if output.exists() and not output.is_dir():
        raise InputError(f"--output must be a folder, but {output} is a file. Name another place.")
    _check_above(output)


def _check_above(output: Path) -> None:
    above = next((path for path in output.parents if path.exists()), None)
    if above is not None and not above.is_dir():
        raise InputError(
            f"--output must lie in a folder, but {output} is below {above}, which is a file. "
            "Name another place."
        )
