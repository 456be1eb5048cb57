"""`featinv paper`: every figure, table and claim of the papers, listed or run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from featinv_diffusion.cli import options, terminal
from featinv_diffusion.cli.command_line import command_line
from featinv_diffusion.papers.settings import PaperSettings

LIST = "list"


@options.with_settings(PaperSettings)
def paper(
    name: Annotated[
        str,
        typer.Argument(
            metavar="list|NAME", help="`list`, or an item's name, such as featinv-table-1."
        ),
    ],
    *,
    settings: PaperSettings,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Folder to write to.", show_default="outputs/paper/NAME"
        ),
    ] = None,
) -> None:
    """List the figures, tables and claims of the papers, or run one of them on your model.

    A run writes figures, table.md (ours beside the published numbers), metrics.json and
    manifest.json. Without --data it takes crops of two photos, which show an item but measure
    nothing.
    """
    from featinv_diffusion.papers.items import find_item, list_items
    from featinv_diffusion.papers.page import to_lines

    if name == LIST:
        items = list_items()
        print(to_lines(items))
        terminal.finish({"n_items": len(items), "items": [item.to_dict() for item in items]})
        return
    item = find_item(name)
    folder = output or Path("outputs/paper") / item.name

    from featinv_diffusion.cli.run import quiet_libraries
    from featinv_diffusion.papers.run import find_study, run_item
    from featinv_diffusion.runs.record import MANIFEST, reserved

    quiet_libraries()
    find_study(item)
    with reserved(folder):
        found, _ = run_item(item, settings, folder, command_line())
    answer = found.answers[item.name]
    print(f"{item.title}.")
    print(f"Published: {item.published}")
    print(f"Here, {len(found.ids)} images: {answer.ours}.")
    print("It holds in these images." if answer.holds else "It does not hold in these images.")
    print(f"Wrote {folder / 'table.md'}, figures, metrics.json and manifest.json.")
    terminal.finish(folder / MANIFEST, folder)
