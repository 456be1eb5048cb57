"""What the commands of studies share: run, write, print; and lists of numbers as options."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featinv_diffusion.errors import InputError

if TYPE_CHECKING:
    from featinv_diffusion.analysis.study import Study
    from featinv_diffusion.sampling import SampleSettings

FigureName = Annotated[
    str, typer.Option("--figure", metavar="NAME", help="Its suffix decides: .png, .pdf or .svg.")
]
PictureA = Annotated[Path, typer.Argument(metavar="A", help="A picture; noise derives from it.")]
PictureB = Annotated[Path, typer.Argument(metavar="B", help="Another picture.")]


def run(study: Study, settings: SampleSettings, output: Path) -> dict[str, Any]:
    """Runs a study with a progress bar, prints what it found, and returns its manifest."""
    from featinv_diffusion.analysis.scope import scope_line
    from featinv_diffusion.analysis.study import run_study
    from featinv_diffusion.cli.run import progress_bar, quiet_libraries

    quiet_libraries()
    manifest, summary = run_study(study, settings, output, progress_bar)
    print(summary)
    print(scope_line(manifest["scope_p_value"], manifest["scope_basis"]))
    print(f"Wrote {output / study.figure}, {study.command}.json, .parquet and manifest.json.")
    return manifest


def to_numbers(option: str, text: str) -> list[float]:
    """Reads numbers with commas between them.

    Raises:
        InputError: something else.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(
            f"{option} must be numbers with commas between, such as 0,.25,1, but {text!r} came."
        ) from None
