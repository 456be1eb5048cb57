"""The formats that every figure is written in, besides that of its name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from featinv_diffusion.errors import InputError

FORMATS = ("png", "pdf", "svg")

_also: set[str] = set()


def write_also(formats: Sequence[str]) -> None:
    """Lets every figure from now on be written in these formats too; none ends it.

    Raises:
        InputError: another format.
    """
    if wrong := [each for each in formats if each not in FORMATS]:
        raise InputError(
            f"Formats of figures are {', '.join(FORMATS)}, with commas between, got {wrong[0]!r}."
        )
    _also.clear()
    _also.update(formats)


@contextmanager
def figure_formats(*formats: str) -> Iterator[None]:
    """Lets every figure that is written in the block be written in these formats too."""
    before = sorted(_also)
    write_also(formats)
    try:
        yield
    finally:
        write_also(before)


def paths_of(path: Path) -> list[Path]:
    """Returns the files that a figure is written to, first the one that it is named."""
    others = (path.with_suffix(f".{each}") for each in FORMATS if each in _also)
    return [path, *(other for other in others if other.suffix != path.suffix.lower())]
