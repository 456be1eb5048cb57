"""Classes: the file that lists them, and the one that a name or an index means."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from featinv_diffusion.errors import InputError


def read_classes(path: str | Path) -> dict[str, str]:
    """Reads lines `FOLDER readable name` to a mapping, in their order.

    A line may hold a folder alone, whose name is then empty; lines that begin with # are comments.

    Raises:
        InputError: no text file that can be read, or no class in it.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The classes must be listed in a readable text file: {error}.") from error
    parts = [line.split(maxsplit=1) for line in lines if line.strip() and line[0] != "#"]
    if not parts:
        raise InputError(f"{path} must list class folders, one a line, but lists none.")
    return {part[0]: part[1].strip() if len(part) == 2 else "" for part in parts}


def find_class(given: str, names: Sequence[str] | None, n_classes: int, owner: str) -> int:
    """Returns the index of the class that a name or an index means.

    Args:
        given: an index, a whole name, or one of the names that commas separate; in any case.
        names: of all classes; None where they have none.
        owner: what has these classes, for messages.

    Raises:
        InputError: no such class, or a name that several have.
    """
    if given.isdecimal():
        if int(given) < n_classes:
            return int(given)
        raise InputError(
            f"The classes of {owner} have the indices 0 to {n_classes - 1}, got {given}."
        )
    if names is None:
        raise InputError(f"The classes of {owner} have no names, got {given!r}. Give the index.")
    wanted = given.strip().casefold()
    spellings = [[part.strip() for part in [name, *name.split(",")]] for name in names]
    found = [i for i, parts in enumerate(spellings) if wanted in map(str.casefold, parts)]
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(
            f"The classes {', '.join(map(str, found))} of {owner} are all named {given!r}. "
            "Give the index."
        )
    near = get_close_matches(given, [part for parts in spellings for part in parts[1:]], n=3)
    hint = f"did you mean {', '.join(map(repr, near))}?" if near else "give its index."
    raise InputError(f"No class is named {given!r} in {owner}; {hint}")
