"""Which part of a folder is the split that was asked for."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from featinv_diffusion.errors import InputError

SPLITS = ("train", "validation", "val", "test")
_SAME = ("validation", "val")


@dataclass(frozen=True)
class SplitPart:
    """Where the images of a split are.

    Args:
        split: by the name it has there; None where the folder has no splits.
        tables: parquet files; where there are none, the images are pictures in `folder`.
    """

    folder: Path
    split: str | None
    tables: tuple[Path, ...] = ()


def find_split(folder: Path, asked: str) -> SplitPart:
    """Finds the folder or the parquet files of a split; `val` and `validation` are the same.

    A folder without any name like `train`, `val`, `validation` or `test` has no splits and is
    taken whole.

    Raises:
        InputError: the folder has splits, but not the one asked for.
    """
    names = (asked, *(_SAME if asked in _SAME else ()))
    for name in names:
        if (folder / name).is_dir():
            return SplitPart(folder / name, name, tuple(sorted((folder / name).glob("*.parquet"))))
    tables = sorted(folder.glob("*.parquet"))
    of_table = {table: _split_of(table.stem, (*names, *SPLITS)) for table in tables}
    for name in names:
        if chosen := tuple(table for table in tables if of_table[table] == name):
            return SplitPart(folder, name, chosen)
    folders = [name for name in SPLITS if (folder / name).is_dir()]
    if found := folders + _unique(split for split in of_table.values() if split):
        raise InputError(
            f"{folder} must hold the split {asked!r}, but holds {', '.join(_unique(found))}. "
            "Choose one of them with --split, or name its folder or file with --data."
        )
    return SplitPart(folder, None, tuple(tables))


def _split_of(stem: str, names: Iterable[str]) -> str | None:
    """Returns the name that a file's begins with, as in `train-00000-of-00003`."""
    begins = (name for name in names if re.match(rf"{re.escape(name)}(?![a-zA-Z])", stem))
    return next(begins, None)


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
