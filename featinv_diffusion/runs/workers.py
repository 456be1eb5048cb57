"""Workers that never talk: each does its units in one folder, and `featinv merge` joins them.

OUTPUT/shards/call.json    the command that all workers run, which is run again to join
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

from msgspec import Meta

from featinv_diffusion import schema
from featinv_diffusion.config import load_flat
from featinv_diffusion.errors import InputError
from featinv_diffusion.files import write_text
from featinv_diffusion.processes import Joiner, Processes, Worker
from featinv_diffusion.runs.record import to_json
from featinv_diffusion.runs.units import (
    DONE,
    FAILURES,
    PARTIAL_FAILURES,
    RUN,
    UNITS,
    Unit,
    begin_run,
    make_units,
    open_units,
)
from featinv_diffusion.trust import is_code_trusted, refuse_code

T = TypeVar("T")

CALL = "call.json"


@dataclass(frozen=True)
class Call:
    """What the workers of a run do, so that it can be joined.

    Args:
        command: name of the command.
        n_workers: the N of `--worker i/N`.
        settings: of the command, by name, as they were given.
        images: the pictures that it was given; none for the built-in photo.
        shard_size: pictures of a unit, where the command lets it be chosen.
        line: the command as it was typed, without `--worker`.
        n_units: of all workers.
        own: arguments of the command that are none of its settings.
    """

    command: str
    n_workers: Annotated[int, Meta(ge=1)]
    settings: dict[str, Any]
    images: list[str] = field(default_factory=list)
    shard_size: Annotated[int, Meta(ge=1)] | None = None
    line: str = ""
    n_units: Annotated[int, Meta(ge=0)] = 0
    own: dict[str, Any] = field(default_factory=dict)

    def settings_as(self, kind: type[T], source: Path) -> T:
        """Returns the settings as a class of `featinv_diffusion.settings`.

        Raises:
            InputError: values that it refuses, or a backbone that is code.
        """
        names = [self.settings.get("backbone")]
        for key in ("evaluated_by", "scorers"):
            names += self.settings.get(key) or []
        for name in () if is_code_trusted() else names:
            if isinstance(name, str):
                refuse_code(name, str(source))
        return load_flat(kind, None, self.settings)


@dataclass(frozen=True)
class Rest:
    """What is left when a worker ends.

    Args:
        n_units: of all workers.
        n_open: those of all workers that were never done.
        failures: sentences about the items of this worker that failed.
    """

    n_units: int
    n_open: int
    failures: list[str]


def write_call(output: Path, call: Call) -> None:
    """Notes what the workers do; all of them write the same."""
    write_text(output / UNITS / CALL, to_json(asdict(call)))


def read_call(output: Path) -> Call:
    """Reads what the workers of a folder do.

    Raises:
        InputError: no worker has begun there.
    """
    path = output / UNITS / CALL
    if not path.is_file():
        raise InputError(
            f"{output} must be what workers write to, but none has begun there. Start them with "
            "the same --output and --worker 0/N, 1/N …"
        )
    return schema.read_json(path, Call)


def read_rest(output: Path, worker: Worker) -> Rest:
    """Counts what is open, and collects what failed for one worker."""
    n_units, n_open, failures = read_call(output).n_units, 0, []
    for number in range(n_units):
        path = output / UNITS / f"{number:05d}" / DONE
        n_open += not path.is_file()
        if number % worker.num_processes == worker.process_index and path.is_file():
            content = schema.read_json(path, dict[str, Any])
            found = [*content.get(FAILURES, []), *content.get(PARTIAL_FAILURES, [])]
            failures += [failure["error"] for failure in found]
    return Rest(n_units, n_open, failures)


def begin_units(
    items: Sequence[T],
    size: int,
    output: Path,
    identity: Mapping[str, Any],
    processes: Processes,
    call: Call | None,
) -> tuple[list[Unit[T]], list[Unit[T]]]:
    """Returns all units and the open ones, once it is sure that the folder holds no other run.

    Raises:
        InputError: it does, or units are open where they are joined.
    """
    identity = as_recorded(identity, output, processes)
    units = make_units(items, size, output, identity)
    begin_run(identity, output, processes)
    if isinstance(processes, Worker) and call is not None:
        write_call(output, replace(call, n_units=len(units)))
    return units, open_units(units, processes)


def as_recorded(
    identity: Mapping[str, Any], output: Path, processes: Processes
) -> Mapping[str, Any]:
    """Returns what decides the run; results may be joined where there is no such device."""
    if not isinstance(processes, Joiner):
        return identity
    recorded = json.loads((output / RUN).read_text("utf-8")) if (output / RUN).is_file() else {}
    return {**identity, **{k: recorded[k] for k in ("device",) if k in recorded}}
