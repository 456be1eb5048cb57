"""What a run writes: one folder, whole files only, and last of all the file that completes it."""

from __future__ import annotations

import io
import json
import os
import platform
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar

import torch
from msgspec import Meta
from PIL import Image

from featinv_diffusion import __version__, schema
from featinv_diffusion.errors import InputError
from featinv_diffusion.figures.formats import paths_of
from featinv_diffusion.figures.grid import Grid
from featinv_diffusion.files import holding, replacing, write_text
from featinv_diffusion.images import write_png
from featinv_diffusion.processes import Worker
from featinv_diffusion.settings import MAX_SAMPLES, SampleSettings, to_flat
from featinv_diffusion.trust import is_code_trusted, refuse_code

if TYPE_CHECKING:  # slow to import, and a run of `sample` needs neither
    import pyarrow as pa
    from matplotlib.figure import Figure

T = TypeVar("T")

MANIFEST = "manifest.json"


class RunFolder:
    """The folder that a run writes.

    The completing file is removed before anything else is written, and written last, so that its
    presence says that all the others are of the same run.

    Args:
        completing: name of the file that completes the run.
    """

    def __init__(self, folder: str | Path, completing: str = MANIFEST):
        self.folder, self.completing = Path(folder), completing
        self.pictures: list[str] = []
        self._begun = False

    def begin(self) -> None:
        """Makes the folder, so that a place that refuses is found before the work.

        Raises:
            OSError: a place where nothing can be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)

    def _path(self, name: str) -> Path:
        if not self._begun:
            self.begin()
            (self.folder / self.completing).unlink(missing_ok=True)
            self._begun = True
        return self.folder / name

    def picture(self, name: str, image: Image.Image) -> None:
        """Writes a PNG."""
        write_png(image, self._path(name))
        self.pictures.append(name)

    def figure(self, name: str, figure: Figure | Grid) -> None:
        """Writes a figure in the format of the name's suffix, and in `figures.formats`."""
        for path in paths_of(self._path(name)):
            if isinstance(figure, Grid):
                figure.write(path)
            else:
                from featinv_diffusion.figures.board import write_figure

                write_figure(figure, path)

    def numbers(self, name: str, content: Mapping[str, Any]) -> None:
        """Writes JSON, which holds no NaN."""
        write_text(self._path(name), to_json(content))

    def text(self, name: str, content: str) -> None:
        """Writes a text file."""
        write_text(self._path(name), content)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]] | pa.Table) -> None:
        """Writes a parquet file of rows."""
        import pyarrow as pa
        from pyarrow import parquet

        table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist([*map(dict, rows)])
        with replacing(self._path(name)) as partial:
            parquet.write_table(table, partial)

    def complete(self, content: Mapping[str, Any]) -> None:
        """Writes the completing file."""
        self.numbers(self.completing, content)


@dataclass(frozen=True, eq=False, repr=False)
class Result(ABC):
    """What a study found. It shows itself in a notebook, and `save` keeps it in a folder.

    Args:
        settings: those of the inverter; None where it was built by hand, and then a manifest
            cannot be replayed.
        arguments: what the study was asked, as its manifest keeps it.
        scope_p_value: of the map that was inverted, or of each; None where the scope is not known.
        scope_basis: what the p-values rest on.
    """

    settings: SampleSettings | None
    arguments: Mapping[str, Any]
    scope_p_value: Any  # float, list[float] or None, as each study says
    scope_basis: str | None

    command: ClassVar[str]
    """The command that makes such a result; files are named after it."""

    @abstractmethod
    def figure(self) -> Figure:
        """Draws the result."""

    @abstractmethod
    def numbers(self) -> dict[str, Any]:
        """Returns everything that was measured, as `COMMAND.json` keeps it."""

    @abstractmethod
    def rows(self) -> list[dict[str, Any]]:
        """Returns the measurements as a table, one dict per row."""

    @abstractmethod
    def pictures(self) -> dict[str, Image.Image]:
        """Returns the pictures that were made, by file name."""

    @abstractmethod
    def summary(self) -> str:
        """Returns what was found in one or a few sentences."""

    @abstractmethod
    def main_figures(self) -> dict[str, Any]:
        """Returns the few numbers that the manifest repeats."""

    def save(self, folder: str | Path, figure: str = "figure.png") -> Path:
        """Writes pictures, figure, `COMMAND.json`, `COMMAND.parquet` and `manifest.json`.

        Args:
            figure: file name of the figure; its suffix decides the format: .png, .pdf or .svg.

        Raises:
            InputError: a figure of another format.
        """
        from featinv_diffusion.figures.board import check_name

        check_name(figure)
        run = RunFolder(folder)
        for name, picture in self.pictures().items():
            run.picture(name, picture)
        run.figure(figure, self.figure())
        run.numbers(f"{self.command}.json", self.numbers())
        run.table(f"{self.command}.parquet", self.rows())
        device = "cpu" if self.settings is None else self.settings.device
        run.complete(
            {
                "version": __version__,
                "command": self.command,
                **({} if self.settings is None else to_flat(self.settings)),
                **self.arguments,
                "figure": figure,
                **self.main_figures(),
                "scope_p_value": self.scope_p_value,
                "scope_basis": self.scope_basis,
                "outputs": run.pictures,
                "environment": read_environment(device),
            }
        )
        return run.folder

    def _repr_png_(self) -> bytes:
        return to_png(self.figure())

    def __repr__(self) -> str:
        return f"{type(self).__name__}: {self.summary()}"


@contextmanager
def reserved(
    output: Path, *, is_file: bool = False, worker: Worker | None = None
) -> Iterator[None]:
    """Makes the folder to write to, or that of a file, and holds what is to be written.

    So a place that refuses is found before the work, and no other process writes there meanwhile.
    Where the block fails or is stopped, folders that are new and empty are removed again.

    Args:
        worker: that writes its units beside the other workers of a run.

    Raises:
        InputError: another process is writing there.
        OSError: a place where nothing can be written.
    """
    folder = output.parent if is_file else output
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part = None if worker is None else (worker.process_index, worker.num_processes)
        with holding(output, part):
            yield
    except BaseException:
        with suppress(OSError):
            for path in new:
                path.rmdir()
        raise


def to_png(figure: Figure | Image.Image) -> bytes:
    """Returns a figure as the bytes of a PNG, for a notebook."""
    buffer = io.BytesIO()
    if isinstance(figure, Image.Image):
        figure.save(buffer, format="PNG")
    else:
        figure.savefig(buffer, format="png", dpi=110, facecolor="white")
    return buffer.getvalue()


def to_json(content: Mapping[str, Any]) -> str:
    """Returns JSON text as all runs write it."""
    return json.dumps(content, indent=2, allow_nan=False, default=_to_plain) + "\n"


def _to_plain(value: Any) -> Any:
    """Returns numbers of NumPy and torch as those of Python."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is no JSON")


def count(n: int, noun: str) -> str:
    """Returns `1 sample`, `2 samples`."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def path_of(path: Path) -> Path:
    """Returns the manifest's own path, of it or of the folder that holds it."""
    return path / MANIFEST if path.is_dir() else path


def read_content(path: Path) -> dict[str, Any]:
    """Returns what a manifest's JSON holds.

    Raises:
        InputError: no such file, or no JSON object.
    """
    return schema.read_json(path, dict[str, Any], "Name the manifest of a run, or its folder.")


def from_values(kind: type[T], values: dict[str, Any], path: Path) -> T:
    """Builds a dataclass of what a manifest holds.

    Raises:
        InputError: a value of a wrong type, or one that the class refuses.
    """
    found = schema.convert(values, kind, str(path))
    if isinstance(name := getattr(found, "backbone", None), str) and not is_code_trusted():
        refuse_code(name, str(path))
    return found


# ---- What somebody else's manifest may ask for ---------------------------------------------------

Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Seeds = Annotated[list[Seed], Meta(min_length=1, max_length=MAX_SAMPLES)]


@dataclass(frozen=True)
class Environment:
    """What a manifest tells of the machine, as far as a replay takes it over."""

    n_threads: Annotated[int, Meta(ge=1, le=512)] | None = None  # more can crash OpenMP


def check_output_name(name: str, suffixes: Collection[str]) -> None:
    """Raises `InputError` unless a name stays in its folder, is not hidden and has such a suffix.

    Names may lie in folders below, with forward slashes.
    """
    parts = name.split("/")
    has_drive = re.match(r"[A-Za-z]:(?!\d)", name)  # rows of a table are called `table:0`
    if has_drive or any(p.strip() in ("", "..") or p.startswith(".") or "\\" in p for p in parts):
        raise InputError(
            f"An output must lie inside of the output folder and not be hidden, got {name!r}."
        )
    if not name.isprintable() or PurePosixPath(name).suffix.lower() not in suffixes:
        raise InputError(
            f"An output must be a printable name that ends in {', '.join(suffixes)}, got {name!r}."
        )


@dataclass(frozen=True)
class _Listed:
    """The files that a manifest says its run has made."""

    @dataclass(frozen=True)
    class Entry:
        outputs: list[str]

    images: list[Entry | str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    output: str | None = None
    figure: str | None = None


def check_targets(
    folder: Path, names: Sequence[str], beside: Sequence[str] = (), manifest: str = MANIFEST
) -> None:
    """Finds out whether a run of somebody else's manifest may write into a folder.

    Args:
        names: of the outputs.
        beside: files that every such run writes, besides the manifest.

    Raises:
        InputError: a name that is given twice, one that leads out of the folder by a link, or a
            file that no run of this folder has made.
    """
    folded = Counter(name.casefold() for name in [*names, *beside, manifest])
    if twice := [name for name, n in folded.items() if n > 1]:
        raise InputError(f"Outputs must have names of their own, but {twice[0]!r} is named twice.")
    own: set[str] = set()
    if (folder / manifest).is_file():
        listed = schema.read_json(folder / manifest, _Listed)
        own = {*beside, manifest, *listed.outputs, listed.output or "", listed.figure or ""}
        own |= {name for e in listed.images if not isinstance(e, str) for name in e.outputs}
    root = folder.resolve()
    for name in [*names, *beside, manifest]:
        path = folder / name
        if not path.parent.resolve().is_relative_to(root):
            raise InputError(
                f"{path} must lie inside of {folder}, but a link leads to {path.parent.resolve()}. "
                "Use another output folder."
            )
        if name not in own and os.path.lexists(path):
            raise InputError(
                f"{path} is there already, and no run of this folder made it. Remove it, or use "
                "another output folder."
            )


def read_environment(device: str) -> dict[str, Any]:
    """Returns the versions, the device and the CPU threads that pictures are made with."""
    is_cuda = device.startswith("cuda")
    libraries = ("torch", "diffusers", "transformers", "timm", "pillow")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in libraries},
        "device_name": torch.cuda.get_device_name(device) if is_cuda else platform.machine(),
        "n_threads": torch.get_num_threads(),
    }
