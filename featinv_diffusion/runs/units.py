"""Large inputs in units of work: slices that are done whole or not at all, by any processes.

    OUTPUT/run.json                 what decides the run; guards one that is taken up again
    OUTPUT/shards/00012/…           the results of a unit
    OUTPUT/shards/00012/unit.json   its id, files and failures; written last: the unit is done

Units depend on the list of items alone and batches never cross them, so a picture is the same bit
for bit on any number of processes with equally many threads each, interrupted or not.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

from msgspec import Meta

from featinv_diffusion import schema
from featinv_diffusion.backbones import Backbone
from featinv_diffusion.backbones.base import weights_sha256
from featinv_diffusion.errors import InputError
from featinv_diffusion.files import write_text
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.inverters.diffusion import DiffusionInverter
from featinv_diffusion.processes import Joiner, Processes, Worker
from featinv_diffusion.runs.record import to_json
from featinv_diffusion.runs.samples import Entry

logger = logging.getLogger(__name__)

T = TypeVar("T")

RUN, UNITS, DONE = "run.json", "shards", "unit.json"
FAILURES, PARTIAL_FAILURES, FILES = "failures", "partial_failures", "files"


@dataclass(frozen=True)
class _Failure:
    error: str


@dataclass(frozen=True)
class _Done:
    """The schema of a completing file; `files` are relative to the folder of the run."""

    id: str
    files: dict[str, Annotated[int, Meta(ge=0)]]
    failures: list[_Failure]
    partial_failures: list[_Failure] = field(default_factory=list)
    images: list[Entry] = field(default_factory=list)


@dataclass(frozen=True)
class Unit(Generic[T]):
    """A slice of the input.

    Args:
        folder: where its results lie.
        items: what is to be done; their `repr` tells them apart.
        id: digest of everything that decides the results.
    """

    folder: Path
    items: tuple[T, ...]
    id: str

    def read(self) -> dict[str, Any] | None:
        """Returns what its completing file holds; None where there is none of this id."""
        path = self.folder / DONE
        try:
            content = schema.read_json(path, dict[str, Any])
            done = schema.convert(content, _Done, str(path))
        except InputError:
            return None
        return content if done.id == self.id else None

    @property
    def number(self) -> int:
        """Its place among the units of the run."""
        return int(self.folder.name)

    @property
    def is_done(self) -> bool:
        """Whether it was done, nothing failed, and its files are still there."""
        content = self.read()
        if content is None or content[FAILURES] or content.get(PARTIAL_FAILURES):
            return False
        return self._lost(content) is None

    @property
    def is_whole(self) -> bool:
        """Whether its results can be joined; some of its items may have failed."""
        content = self.read()
        return content is not None and self._lost(content) is None

    def damage(self) -> str | None:
        """Says why it must be done again though it was done once; None where nothing is broken."""
        path = self.folder / DONE
        if not path.exists():
            return None
        content = self.read()
        if content is not None:
            return self._lost(content)
        try:
            schema.read_json(path, _Done)
        except InputError as error:
            return str(error)
        return None  # of other settings or images

    def _lost(self, content: Mapping[str, Any]) -> str | None:
        for name, size in content[FILES].items():
            path = self.folder.parents[1] / name
            if not path.is_file() or path.stat().st_size != size:
                return f"{path} is missing, or not what was written"
        return None


def make_units(
    items: Sequence[T], size: int, output: Path, identity: Mapping[str, Any], *, least: int = 1
) -> list[Unit[T]]:
    """Cuts the items into units of `size`.

    Args:
        identity: what decides the results of all units besides their items.
        least: a last unit of fewer items than this joins the one before it.

    Raises:
        InputError: a size below 1.
    """
    if size < 1:
        raise InputError(f"A shard must hold at least 1 image, got {size}.")
    firsts = list(range(0, len(items), size))
    if len(firsts) > 1 and len(items) - firsts[-1] < least:
        firsts.pop()
    units = []
    for number, first in enumerate(firsts):
        members = tuple(items[first : firsts[number + 1] if first != firsts[-1] else None])
        content = json.dumps([identity, list(map(repr, members))])
        folder = output / UNITS / f"{number:05d}"
        units.append(Unit(folder, members, hashlib.sha256(content.encode()).hexdigest()))
    return units


def begin_run(identity: Mapping[str, Any], output: Path, processes: Processes) -> None:
    """Compares with the run that `output` holds; where there is none, begins one.

    Args:
        identity: what decides the results.

    Raises:
        InputError: `output` holds a run with other settings, weights or images.
    """
    now = json.loads(json.dumps(identity))  # as it is read back: lists for tuples
    path = output / RUN
    if (before := _read_run(path)) is not None:
        changed = [f"{k}: {before.get(k)} → {now[k]}" for k in now if before.get(k) != now[k]]
        if changed:
            raise InputError(
                f"{output} holds a run with other settings, weights or images "
                f"({', '.join(changed)}). Resume it with the same ones, or use another output "
                "folder."
            )
    elif processes.is_main_process:
        write_text(path, json.dumps(now, indent=2) + "\n")


def _read_run(path: Path) -> dict[str, Any] | None:
    """Returns what decides the run in a folder; None without one that can be read.

    Nothing is lost with a damaged file: each unit has an id of its own.
    """
    if not path.exists():
        return None
    try:
        return schema.read_json(path, dict[str, Any])
    except InputError as error:
        logger.warning("%s It is written again; finished units are kept.", error)
        return None


def open_units(units: Sequence[Unit[T]], processes: Processes) -> list[Unit[T]]:
    """Returns the units that are not done, once all processes have looked.

    Says which ones are done again because something of them is broken.

    Raises:
        InputError: a `Joiner` finds units that no worker has done.
    """
    if isinstance(processes, Joiner):
        _refuse_open(units, processes.n_workers)
        return []
    found = [unit for unit in _within_reach(units, processes) if not unit.is_done]
    for unit in found:
        if processes.is_main_process and (reason := unit.damage()) is not None:
            logger.warning("%s is done again: %s", unit.folder, reason.rstrip(".") + ".")
    processes.wait_for_everyone()
    return found


def _refuse_open(units: Sequence[Unit[Any]], n_workers: int) -> None:
    found = [unit.number for unit in units if not unit.is_whole]
    if found:
        workers = sorted({number % n_workers for number in found})
        named = ", ".join(f"{i}/{n_workers}" for i in workers[:8])
        more = f" and {len(workers) - 8} more" if len(workers) > 8 else ""
        raise InputError(
            f"{len(found)} of {len(units)} units are not done yet, those of worker {named}{more}. "
            "Start these again, or wait for them, and then merge."
        )


def _within_reach(units: Sequence[Unit[T]], processes: Processes) -> list[Unit[T]]:
    """Returns the units that a process may do.

    Processes that talk look at the open ones and divide those. Workers look at different times,
    so that only a unit's own number tells whose it is.
    """
    if not isinstance(processes, Worker):
        return list(units)
    n = processes.num_processes
    return [unit for unit in units if unit.number % n == processes.process_index]


def share(units: Sequence[Unit[T]], processes: Processes) -> list[Unit[T]]:
    """Returns the units of this process: every n-th of the open ones, or those of a worker."""
    if isinstance(processes, Worker):
        return _within_reach(units, processes)
    return list(units[processes.process_index :: processes.num_processes])


def run_units(
    units: Sequence[Unit[T]],
    work: Callable[[Unit[T]], Mapping[str, Any]],
    processes: Processes,
) -> None:
    """Does this process's share of the units, and waits until the others have done theirs.

    A process that is killed leaves its unit open; it is done again from its beginning.

    Args:
        units: the open ones.
        work: writes the results of a unit and returns what its completing file is to hold: JSON,
            with a list of `failures`, and perhaps `partial_failures`, each with an `error`, and
            perhaps with paths of `files` that it wrote elsewhere in the folder of the run.
    """
    for unit in share(units, processes):
        (unit.folder / DONE).unlink(missing_ok=True)
        for partial in unit.folder.rglob(".*.part"):
            partial.unlink()
        content = {"id": unit.id, **work(unit)}
        output = unit.folder.parents[1]
        files = sorted({*content.pop(FILES, []), *filter(Path.is_file, unit.folder.rglob("*"))})
        content[FILES] = {
            path.relative_to(output).as_posix(): path.stat().st_size for path in files
        }
        write_text(unit.folder / DONE, to_json(content))
    processes.wait_for_everyone()


def merge_units(units: Iterable[Unit[Any]], key: str) -> list[Any]:
    """Joins a list that the completing files hold, in the order of the units.

    Raises:
        InputError: a unit that no process has done.
    """
    merged: list[Any] = []
    for unit in units:
        content = unit.read()
        if content is None:
            raise InputError(
                f"{unit.folder} must hold the results of another process, but does not. All "
                "processes must write to one folder that they share."
            )
        merged += content.get(key, [])
    return merged


def discard_run(output: Path) -> None:
    """Removes what a run left that gave nothing, and the folder where nothing else is in it."""
    shutil.rmtree(output / UNITS, ignore_errors=True)
    (output / RUN).unlink(missing_ok=True)
    if output.is_dir() and not any(output.iterdir()):
        output.rmdir()


# ---- What decides the results of a run besides its settings --------------------------------------


def describe_inverter(inverter: Inverter, own: Backbone) -> dict[str, Any]:
    """Returns what tells inverters apart, whatever they were loaded from.

    Digests of the weights as loaded, the backbone's among them; of a pipeline also the prompt and
    the schedule.
    """
    weights = {**inverter.networks, "backbone": own.model}
    if not isinstance(inverter, DiffusionInverter):
        return {"modules_sha256": weights_sha256(weights)}
    pipeline = inverter.pipeline
    schedule = {k: v for k, v in pipeline.scheduler.config.items() if not k.startswith("_")}
    return {
        "pipeline_sha256": weights_sha256(weights),
        "prompt": pipeline.config["default_prompt"],
        "scheduler_config": {key: _to_json(value) for key, value in schedule.items()},
    }


def _to_json(value: Any) -> Any:
    """JSON has no infinity, which DPM-Solver's config holds."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
