"""Studies of many images in parts, which are measured alone, anywhere, and joined at the end.

    OUTPUT/shards/00012/part.safetensors    what was measured in a unit

A study measures chunks of its images and joins the parts. In one process they follow each other and
are never written; workers write those of their units, and a merge reads all of them. The chunks
are the same in each case, so the result is too, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from featinv_diffusion.errors import InputError
from featinv_diffusion.files import read_tensors, write_tensors
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.processes import Joiner, Worker, joins
from featinv_diffusion.runs.units import FAILURES, Unit, describe_inverter, run_units
from featinv_diffusion.runs.workers import Call, begin_units
from featinv_diffusion.settings import to_flat

T = TypeVar("T")

PART, FORMAT = "part.safetensors", "featinv part 1"


@dataclass(frozen=True, eq=False)
class Part:
    """What was measured in one chunk.

    Args:
        tensors: on the CPU.
        content: JSON; `failures`, dicts with an `error`, are what could not be used.
    """

    tensors: Mapping[str, Tensor]
    content: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # As in a file: the layout of a tensor decides the last bits of sums over it.
        rows = {name: value.contiguous() for name, value in self.tensors.items()}
        object.__setattr__(self, "tensors", rows)


class JoinedElsewhere(Exception):
    """Ends the study of a worker, which has done its share and joins nothing."""


@runtime_checkable
class Division(Protocol):
    """How the chunks of a study are divided among processes."""

    def each(
        self,
        chunks: Sequence[T],
        measure: Callable[[T], Part],
        describe: Callable[[], Mapping[str, Any]],
    ) -> Iterable[Part]:
        """Returns the parts of all chunks, in their order.

        Args:
            chunks: what is measured at once; their `repr` tells them apart.
            describe: returns what decides all parts besides the chunks.

        Raises:
            InputError: what `measure` refuses, or parts that are not there where they are joined.
            JoinedElsewhere: this is a worker, and its share is done.
        """
        ...

    def share(self, n: int) -> int:
        """Returns how many of n images this process measures, about, for a progress bar."""
        ...


class Whole:
    """One process for all; each part is measured when it is asked for."""

    def each(
        self,
        chunks: Sequence[T],
        measure: Callable[[T], Part],
        describe: Callable[[], Mapping[str, Any]],
    ) -> Iterable[Part]:
        """See `Division`."""
        return map(measure, chunks)

    def share(self, n: int) -> int:
        """See `Division`."""
        return n


WHOLE = Whole()


@dataclass(frozen=True)
class Shared:
    """Workers that never talk, and the process that joins what they did.

    Args:
        folder: where the units lie.
        call: what the workers note.
        inputs: what decides the parts besides what the study knows of.
    """

    processes: Worker | Joiner
    folder: Path
    call: Call
    inputs: Mapping[str, Any] = field(default_factory=dict)

    def each(
        self,
        chunks: Sequence[T],
        measure: Callable[[T], Part],
        describe: Callable[[], Mapping[str, Any]],
    ) -> Iterable[Part]:
        """See `Division`."""
        identity = {"command": self.call.command, **self.inputs, **describe()}
        units, todo = begin_units(chunks, 1, self.folder, identity, self.processes, self.call)

        def work(unit: Unit[T]) -> Mapping[str, Any]:
            part = measure(unit.items[0])
            header = {"content": dict(part.content), "names": list(part.tensors)}
            write_tensors(unit.folder / PART, part.tensors, header, FORMAT)
            return {FAILURES: part.content.get(FAILURES, [])}

        run_units(todo, work, self.processes)
        if not joins(self.processes):
            raise JoinedElsewhere
        return _read(units)

    def share(self, n: int) -> int:
        """See `Division`."""
        if isinstance(self.processes, Joiner):
            return 0
        return -(-n // self.processes.num_processes)


def _read(units: Iterable[Unit[Any]]) -> Iterator[Part]:
    for unit in units:
        advice = f"Remove {unit.folder}, and start its worker again."
        tensors, header = read_tensors(unit.folder / PART, FORMAT, advice)
        if sorted(names := header.get("names", [])) != sorted(tensors):
            raise InputError(f"{unit.folder / PART} must hold what its header lists. {advice}")
        # Copied: sums over memory that is mapped, and not aligned, differ in their last bits.
        yield Part({name: tensors[name].clone() for name in names}, header.get("content", {}))


def describe_sampling(inverter: Inverter) -> dict[str, Any]:
    """Returns what decides the samples of an inverter besides maps and seeds."""
    settings = {} if inverter.settings is None else to_flat(inverter.settings)
    backbone = inverter.require_backbone()
    own = {**describe_inverter(inverter, backbone), "device": backbone.device.type}
    return {**settings, **own}


def units_of(file: Path) -> Path:
    """Returns the folder beside a file in which workers write their units."""
    return file.with_name(file.name + ".units")
