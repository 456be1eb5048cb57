"""What the documents name exists: functions beside their equations, commands, files."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMED = sorted(
    {
        name
        for name in re.findall(
            r"`([A-Za-z_][\w.]*)(?:\([^`]*\))?`", (ROOT / "docs/equations.md").read_text()
        )
        if "." in name
    }
)


def find(name: str) -> object:
    """Imports the longest module that the name begins with, and looks the rest up in it."""
    parts = name.split(".")
    for k in range(len(parts), 0, -1):
        try:
            found: object = import_module(".".join(parts[:k]))
        except ModuleNotFoundError:
            continue
        for part in parts[k:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(name)


@pytest.mark.parametrize("name", NAMED)
def test_a_function_beside_an_equation_exists(name: str) -> None:
    find(name if name.startswith("train.") else f"featinv_diffusion.{name}")


@pytest.mark.parametrize(
    "page",
    ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))],
)
def test_linked_files_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (ROOT / page).parent.joinpath(target).exists(), target
