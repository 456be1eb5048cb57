"""Operators by name: those that the package ships, and files."""

from __future__ import annotations

from pathlib import Path

from featinv_diffusion.errors import InputError, choices_hint
from featinv_diffusion.features.operators import Operator

ASSETS = Path(__file__).parents[1] / "assets"
SUFFIX, FOLDER = ".safetensors", "operators"
"""Bundled are `assets/tiny/NAME/operators/OPERATION.safetensors`."""


def list_operators() -> list[str]:
    """Returns the names of the bundled operators, such as `tiny/siglip/swap`."""
    found = ASSETS.glob(f"*/*/{FOLDER}/*{SUFFIX}")
    return sorted(f"{p.parents[1].relative_to(ASSETS).as_posix()}/{p.stem}" for p in found)


def open_operator(name: str) -> Operator:
    """Loads a bundled operator by its name, or one from a file.

    Raises:
        InputError: no such operator, or a file that holds none.
    """
    if name in list_operators():
        folder, _, operation = name.rpartition("/")
        return Operator.load(ASSETS / folder / FOLDER / f"{operation}{SUFFIX}")
    path = Path(name).expanduser()
    if not path.is_file():
        bundled = list_operators()
        hint = f"; {choices_hint(name, bundled)}" if bundled else "."
        raise InputError(
            f"An operator must be a file of featinv operator fit, but {name!r} is none{hint}"
        )
    return Operator.load(path)
