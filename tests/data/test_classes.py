"""Class lists, and which class a name or an index means."""

from __future__ import annotations

from pathlib import Path

import pytest

from featinv_diffusion.data.classes import find_class, read_classes
from featinv_diffusion.errors import InputError

NAMES = ["goldfish, Carassius auratus", "crane", "crane"]


@pytest.mark.parametrize("given", ["GOLDFISH", "carassius auratus", "0", NAMES[0]])
def test_a_class_by_any_of_its_names(given: str) -> None:
    assert find_class(given, NAMES, 3, "vit") == 0


@pytest.mark.parametrize(
    ("given", "names", "words"),
    [
        ("3", NAMES, "The classes of vit have the indices 0 to 2, got 3"),
        ("crane", NAMES, "The classes 1, 2 of vit are all named 'crane'"),
        ("goldfsh", NAMES, "No class is named 'goldfsh' in vit; did you mean 'goldfish'"),
        ("crane", None, "no names, got 'crane'. Give the index"),
    ],
)
def test_a_class_that_there_is_not(given: str, names: list[str] | None, words: str) -> None:
    with pytest.raises(InputError, match=words):
        find_class(given, names, 3, "vit")


def test_a_list_of_classes(tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_text("# folder, name\nn3 zebra  fish\n\nn1\n")
    assert read_classes(path) == {"n3": "zebra  fish", "n1": ""}
    path.write_text("# nothing\n")
    with pytest.raises(InputError, match="lists none"):
        read_classes(path)
    with pytest.raises(InputError, match="readable text file"):
        read_classes(tmp_path / "none.txt")
