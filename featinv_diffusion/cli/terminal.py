"""What a command prints: a report, with `--quiet` where the result is, with `--json` all of it."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from typer.core import TyperGroup

from featinv_diffusion.figures.formats import write_also

PACKAGE = "featinv_diffusion"
LIBRARIES = ("transformers", "diffusers", "datasets", "huggingface_hub")
VERBOSITIES = tuple(
    f"{name}_VERBOSITY" for name in ("TRANSFORMERS", "DIFFUSERS", "DATASETS", "HF_HUB")
)
BARS = ("HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE")

SHARED = ("quiet", "verbose", "json", "figure_formats")
"""Options of every command."""

_asked: set[str] = set()
"""Which of the options `quiet`, `verbose` and `json` the running command was given."""
_out: TextIO | None = None
"""Where the result goes while `sys.stdout` is led elsewhere."""


@contextmanager
def open_terminal() -> Iterator[None]:
    """Prints the package's notes on stderr, and keeps the libraries' from it, while a command runs.

    Where stderr is no terminal, the libraries show no bars either.
    """
    global _out
    logger, root = logging.getLogger(PACKAGE), logging.getLogger()
    before = logger.level, root.level, sys.stdout, dict(os.environ)
    notes = _NoteHandler()
    logger.addHandler(notes)
    _asked.clear()
    _out = sys.stdout
    set_libraries("error", bars=_is_terminal())
    try:
        yield
    finally:
        logger.removeHandler(notes)
        root.removeHandler(_library_handler)
        logger.setLevel(before[0])
        root.setLevel(before[1])
        sys.stdout = before[2]
        write_also([])
        for name in (*VERBOSITIES, *BARS):
            os.environ.pop(name, None)
            os.environ.update({name: before[3][name]} if name in before[3] else {})
        _asked.clear()


def finish(content: Path | Mapping[str, Any], output: Path | None = None) -> None:
    """Prints the result of a command where `--json` or `--quiet` was given.

    Args:
        content: what was found, or the file of JSON that holds it.
        output: the folder or file that was written.
    """
    if not _asked & {"json", "quiet"} or os.environ.get("RANK", "0") != "0":
        return
    if "json" not in _asked:
        text = "" if output is None else str(output)
    else:
        found = json.loads(content.read_text("utf-8")) if isinstance(content, Path) else content
        written = {} if output is None else {"output": str(output)}
        text = json.dumps({**found, **written}, indent=2, allow_nan=False)
    if text:
        print(text, file=_out, flush=True)


def is_quiet() -> bool:
    """Whether nothing but errors and the result is to be printed."""
    return "quiet" in _asked


def is_verbose() -> bool:
    """Whether the libraries' notes are to be printed too."""
    return "verbose" in _asked


# ---- The options, before or after the name of a command ------------------------------------------


def _option(name: str, text: str) -> Any:
    """Returns an option that is applied where it is given, and no argument of the command."""

    def apply(asked: bool) -> bool:
        if asked:
            _asked.add(name)
            {"quiet": _be_quiet, "verbose": _be_verbose, "json": _be_json}[name]()
        return asked

    return typer.Option(
        f"--{name}", help=text, rich_help_panel="Terminal", callback=apply, expose_value=False
    )


Quiet = Annotated[bool, _option("quiet", "Print errors and where the result is, nothing else.")]
Verbose = Annotated[bool, _option("verbose", "Print what the package and its libraries note.")]
Json = Annotated[bool, _option("json", "Print the result as JSON; all else goes to stderr.")]


def _also_in(formats: str) -> str:
    if formats:
        write_also([each.strip() for each in formats.split(",")])
    return formats


FigureFormats = Annotated[
    str,
    typer.Option(
        "--figure-formats",
        metavar="png,pdf,svg",
        help="Write every figure in these formats too.",
        rich_help_panel="Terminal",
        callback=_also_in,
        expose_value=False,
    ),
]


class Commands(TyperGroup):
    """Commands that all take the shared options of their group."""

    def __init__(self, **given: Any):
        super().__init__(**given)
        shared = [p for p in self.params if p.name in SHARED]
        _add_to_commands(self, shared)


def _add_to_commands(group: Any, options: list[Any]) -> None:
    for command in getattr(group, "commands", {}).values():
        command.params.extend(options)
        _add_to_commands(command, options)


def _be_quiet() -> None:
    logging.getLogger(PACKAGE).setLevel(logging.ERROR)
    set_libraries("error", bars=False)
    if "json" not in _asked:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until the process ends


def _be_verbose() -> None:
    logging.getLogger(PACKAGE).setLevel(logging.INFO)
    logging.getLogger().setLevel(logging.INFO)
    logging.getLogger().addHandler(_library_handler)
    set_libraries("info", bars=_is_terminal())


def _be_json() -> None:
    sys.stdout = sys.stderr


# ---- The libraries -------------------------------------------------------------------------------


def _is_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def set_libraries(verbosity: str, bars: bool) -> None:
    """Tells those that are imported, and by the environment those that will be."""
    for name in VERBOSITIES:
        os.environ[name] = verbosity
    if not bars:
        os.environ.update(dict.fromkeys(BARS, "1"))
    for library in LIBRARIES:
        module = sys.modules.get(f"{library}.utils.logging")
        if module is not None:
            getattr(module, f"set_verbosity_{verbosity}")()
            if not bars and hasattr(module, "disable_progress_bar"):
                module.disable_progress_bar()
    hub = sys.modules.get("huggingface_hub.utils")
    if hub is not None and not bars:
        hub.disable_progress_bars()


class _NoteHandler(logging.Handler):
    """Prints the package's notes; looks stderr up each time, for a progress bar replaces it."""

    def emit(self, record: logging.LogRecord) -> None:
        word = "Note" if record.levelno >= logging.WARNING else "Info"
        print(f"{word}: {record.getMessage()}", file=sys.stderr)


class _LibraryHandler(logging.Handler):
    """Prints what others note, each with its name."""

    def emit(self, record: logging.LogRecord) -> None:
        if not record.name.startswith(PACKAGE):
            print(f"{record.name}: {record.getMessage()}", file=sys.stderr)


_library_handler = _LibraryHandler()
