"""What the documents name exists: functions beside their equations, commands, files."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import typer

from featinv_diffusion.cli import app

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
LAUNCHED = "accelerate launch .*?-m featinv_diffusion"
PAGES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))


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


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *PAGES])
def test_linked_files_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (ROOT / page).parent.joinpath(target).exists(), target


SHOWN = [page for page in PAGES if len(Path(page).parts) == 2]
"""Pages of the site but for decisions, the generated reference and the notebooks' list."""


@pytest.mark.parametrize("page", ["README.md", *SHOWN])
def test_a_page_begins_with_a_picture(page: str) -> None:
    head = (ROOT / page).read_text().splitlines()[:10]
    assert any(line.startswith("![") for line in head), "no picture in the first ten lines"


def commands(text: str) -> Iterator[list[str]]:
    """Yields the words of each `featinv …` in the blocks of a page, without comments."""
    for block in re.findall(r"```(?:sh|console)\n(.*?)```", text, re.DOTALL):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            if found := re.match(rf"(?:\$ )?(?:{LAUNCHED}|featinv) (.*)", line):
                yield shlex.split(found[1], comments=True)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *PAGES])
def test_commands_and_their_options_exist(page: str) -> None:
    for words in commands((ROOT / page).read_text()):
        command = typer.main.get_command(app)
        while words and hasattr(command, "commands"):
            names = command.commands
            assert words[0] in names, f"featinv {words[0]}"
            command, words = names[words[0]], words[1:]
        options = {name for p in command.params for name in (*p.opts, *p.secondary_opts)}
        for word in words:
            if word.startswith("-") and not re.match(r"-?[\d.]", word):
                assert word.split("=")[0] in options, f"{command.name} {word}"
