"""What the site shows besides the pages of this folder.

Read by MkDocs (`mkdocs.yml`): the notebooks of `examples/`, the changelog, the rules of
contributing, the decisions, the help of every command, and the files that pages link to.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OUTSIDE = re.compile(r"\]\((?:\.\./)+((?:configs|examples|LICENSE)[^)#]*)\)")
"""A link from a page to a file of the repository that is no page."""
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def on_config(config: Any) -> None:
    """Shows the list of versions where `mike` builds one of several, and else asks for none."""
    if "MIKE_DOCS_VERSION" in os.environ:
        config.extra["version"] = {"provider": "mike"}


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages and files that are made of what lies elsewhere."""
    made = {
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(),
        "contributing.md": (ROOT / "CONTRIBUTING.md").read_text(),
        "adr/index.md": _decisions(),
        "reference/commands.md": "\n".join(_commands()),
    }
    linked = {
        name for page in (ROOT / "docs").rglob("*.md") for name in OUTSIDE.findall(page.read_text())
    }
    notebooks = sorted((ROOT / "examples").glob("*.ipynb"))
    for path in notebooks:
        text, pictures = to_page(path)
        made[f"notebooks/{path.stem}.md"] = text
        for name, data in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=data))
        linked.add(f"examples/{path.name}")
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    for name in sorted(linked):
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Adds the public names; links to files of the repository lead to their copies in the site."""
    name = page.file.src_uri
    up = "../" * name.count("/")
    is_notebook = name.startswith("notebooks/") and name != "notebooks/index.md"

    def lead(link: re.Match[str]) -> str:
        target = link[1]
        if target.endswith(".ipynb") and not is_notebook:
            target = f"notebooks/{Path(target).stem}.md"
        return f"]({up}{target})"

    if name == "reference/index.md":
        markdown = "\n".join([markdown, *_public_names()])
    return OUTSIDE.sub(lead, markdown)


def to_page(path: Path) -> tuple[str, dict[str, bytes]]:
    """Returns a notebook as Markdown, and its pictures by name."""
    parts, pictures = [], {}
    for i, cell in enumerate(json.loads(path.read_text())["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for j, output in enumerate(cell["outputs"]):
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{path.stem}-{i}-{j}.png"
                pictures[name] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![What the lines above draw]({name})")
            elif "text/markdown" in data:
                parts.append(re.sub("^#", "###", "".join(data["text/markdown"]), flags=re.M))
            else:
                text = "".join(output.get("text", data.get("text/plain", "")))
                parts.append(f"```text\n{text.rstrip()}\n```")
    parts.insert(1, f"[Download this notebook](../examples/{path.name})")
    return "\n\n".join(parts), pictures


def _decisions() -> str:
    """Returns the list of the decisions, by their headings."""
    lines = ["# Decisions", "", "What a reader would question, and why it is so.", ""]
    for path in sorted((ROOT / "docs/adr").glob("*.md")):
        heading = path.read_text().splitlines()[0].removeprefix("# ")
        lines.append(f"- [{heading}]({path.name})")
    return "\n".join(lines)


def _public_names() -> Iterator[str]:
    """Yields a table of the public names; those that no page describes are described below it."""
    package = griffe.load("featinv_diffusion", search_paths=[ROOT], resolve_aliases=True)
    pages = "".join(p.read_text() for p in sorted((ROOT / "docs/reference").glob("*.md")))
    names = [name for name in package.exports or () if not str(name).startswith("_")]
    yield "| name | what it is |\n| --- | --- |"
    for name in names:
        docstring = package[name].docstring
        first = docstring.value.split("\n\n")[0] if docstring else ""
        text = " ".join(first.split()).replace("|", "\\|")
        yield f"| [`{name}`][featinv_diffusion.{name}] | {text} |"
    for name in names:
        if f"::: featinv_diffusion.{name}\n" not in pages:
            yield f"\n::: featinv_diffusion.{name}"


def _commands() -> Iterator[str]:
    """Yields the help of `featinv` and of each command, as Markdown."""
    import typer

    from featinv_diffusion.cli import app

    yield "# Command line\n\nWhat `featinv COMMAND --help` says, of every command.\n"
    top = typer.main.get_command(app)
    yield from _command(top, "featinv")


def _command(command: Any, name: str) -> Iterator[str]:
    """Yields one command's text and options, then those of the commands below it."""
    below = getattr(command, "commands", {})
    if name != "featinv":
        yield f"## {name}\n"
    yield f"{_plain(command.help)}\n"
    rows = [row for parameter in command.params if (row := _row(parameter))]
    if rows:
        yield "| option | meaning |\n| --- | --- |"
        yield from rows
        yield ""
    for word in below:
        yield from _command(below[word], f"{name} {word}")


def _row(parameter: Any) -> str | None:
    """Returns an option or argument as a row of a table; None for a hidden one."""
    if getattr(parameter, "hidden", False):
        return None
    names = ", ".join(f"`{n}`" for n in (*parameter.opts, *parameter.secondary_opts))
    if parameter.param_type_name == "argument":
        names = f"`{(parameter.metavar or parameter.name).upper()}`"
    default = parameter.default
    shown = default is not None and not callable(default) and default not in ((), "", False, True)
    text = _plain(getattr(parameter, "help", None)).replace("\n", " ").replace("|", "\\|")
    return f"| {names} | {text}{f' Default: `{default}`.' if shown else ''} |"


def _plain(text: str | None) -> str:
    return COLOURS.sub("", text or "").replace("\b", "").replace("\f", "").strip()
