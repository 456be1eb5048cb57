"""Large inputs in units of work: slices that are done whole or not at all, by any processes.

    OUTPUT/run.json                 what decides the run; guards one that is taken up again
    OUTPUT/shards/00012/…           the results of a unit
    OUTPUT/shards/00012/unit.json   its id and what failed; written last: the unit is done

Units depend on the list of items alone and batches never cross them, so a picture is the same bit
for bit on any number of processes with equally many threads each, interrupted or not.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from featinv_diffusion.backbones import Backbone
from featinv_diffusion.backbones.base import weights_sha256
from featinv_diffusion.errors import InputError
from featinv_diffusion.files import write_text
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.inverters.diffusion import DiffusionInverter
from featinv_diffusion.processes import Processes
from featinv_diffusion.runs.record import to_json

T = TypeVar("T")

RUN, UNITS, DONE = "run.json", "shards", "unit.json"
FAILURES, PARTIAL_FAILURES = "failures", "partial_failures"


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
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return content if content.get("id") == self.id else None

    @property
    def is_done(self) -> bool:
        """Whether it was done and nothing failed."""
        content = self.read()
        failed = content and (content[FAILURES] or content.get(PARTIAL_FAILURES))
        return content is not None and not failed


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
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [f"{k}: {before.get(k)} → {now[k]}" for k in now if before.get(k) != now[k]]
        if changed:
            raise InputError(
                f"{output} holds a run with other settings, weights or images "
                f"({', '.join(changed)}). Resume it with the same ones, or use another output "
                "folder."
            )
    elif processes.is_main_process:
        write_text(path, json.dumps(now, indent=2) + "\n")


def open_units(units: Sequence[Unit[T]], processes: Processes) -> list[Unit[T]]:
    """Returns the units that are not done, once all processes have looked."""
    found = [unit for unit in units if not unit.is_done]
    processes.wait_for_everyone()
    return found


def share(units: Sequence[Unit[T]], processes: Processes) -> list[Unit[T]]:
    """Returns the units of this process: every n-th."""
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
            with a list of `failures`, and perhaps `partial_failures`, each with an `error`.
    """
    for unit in share(units, processes):
        (unit.folder / DONE).unlink(missing_ok=True)
        for partial in unit.folder.rglob(".*.part"):
            partial.unlink()
        content = {"id": unit.id, **work(unit)}
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
