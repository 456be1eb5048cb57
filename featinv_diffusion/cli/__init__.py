"""The command line: `featinv COMMAND`, one module per command.

The modules import torch and the like inside their functions, so that `featinv --help` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import Annotated

import typer

from featinv_diffusion import __version__
from featinv_diffusion.cli import exits, terminal

COMMANDS = {
    "sample": "sample",
    "app": "page",
    "encode": "maps",
    "decode": "maps",
    "interpolate": "studies",
    "compose": "studies",
    "compare": "compare",
    "edit": "edit",
    "patch": "edit",
    "variability": "studies",
    "concepts": "concepts",
    "viz": "studies",
    "steerability": "steerability",
    "replay": "replay",
    "evaluate": "evaluate",
    "merge": "merge",
    "classemb": "classemb",
    "analyze": "analyze",
    "layers": "layers",
    "paper": "paper",
    "new-backbone": "new_backbone",
    "scope": "scope",
    "certainty": "certainty",
    "export": "export",
    "push": "export",
    "convert": "export",
}
"""The module of this package that holds each command."""
GROUPS = ("operator", "train")
"""Commands that have commands of their own."""

app = typer.Typer(
    cls=terminal.Commands,
    help="Turn the feature maps of frozen vision models back into images.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _name, _module in COMMANDS.items():
    _command = getattr(import_module(f"featinv_diffusion.cli.{_module}"), _name.replace("-", "_"))
    app.command(_name)(_command)
for _name in GROUPS:
    app.add_typer(getattr(import_module(f"featinv_diffusion.cli.{_name}"), _name), name=_name)


def main() -> None:
    """Runs `featinv`; see `exits` for the exit codes."""
    exits.run(app)


def _print_version(asked: bool) -> bool:
    if asked:
        print(f"featinv {__version__}")
        raise typer.Exit
    return asked


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version and stop."
        ),
    ] = False,
    quiet: terminal.Quiet = False,
    verbose: terminal.Verbose = False,
    json: terminal.Json = False,
    figure_formats: terminal.FigureFormats = "",
) -> None:
    pass
