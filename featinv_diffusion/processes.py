"""The processes of a launch, the one process of a notebook, or workers that never talk."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeAlias

from accelerate import Accelerator, InitProcessGroupKwargs

from featinv_diffusion.errors import InputError


class Alone:
    """A process without others; it answers what an `Accelerator` would."""

    process_index = 0
    num_processes = 1
    is_main_process = True

    def main_process_first(self) -> AbstractContextManager[None]:
        """Returns a context in which nothing waits."""
        return nullcontext()

    def wait_for_everyone(self) -> None:
        """Returns at once."""


@dataclass(frozen=True)
class Worker(Alone):
    """One of N processes that never talk, such as a task of a job array.

    It does the units whose number leaves the remainder `process_index`, and joins nothing.
    """

    process_index: int
    num_processes: int

    def __str__(self) -> str:
        return f"{self.process_index}/{self.num_processes}"


@dataclass(frozen=True)
class Joiner(Alone):
    """The process that joins what workers did, and does nothing that they have left open."""

    n_workers: int


Processes: TypeAlias = Accelerator | Alone


def make_accelerator() -> Accelerator:
    """Joins the processes; one of them may wait for the others as long as a unit of work takes.

    Raises:
        InputError: see `check_process_group`.
    """
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))])
    check_process_group(accelerator)
    return accelerator


def joins(processes: Processes) -> bool:
    """Whether this process joins what all have done."""
    return processes.is_main_process and not isinstance(processes, Worker)


WHOLE = "whole"
"""As `--worker`: one process for all, also in a job array."""
_ARRAY = "SLURM_ARRAY_TASK_"


def find_worker(text: str | None, environment: Mapping[str, str] = os.environ) -> Worker | None:
    """Returns what `--worker i/N` means; without it the task of a job array of Slurm, if it is one.

    Raises:
        InputError: something else, an array whose numbers have gaps, or a launch of several
            processes.
    """
    if text == WHOLE:
        return None
    worker = _of_array(environment) if text is None else _read_worker(text)
    if worker is not None and environment.get("WORLD_SIZE", "1") != "1":
        raise InputError(
            f"Worker {worker} must be one process, but {environment['WORLD_SIZE']} were launched "
            f"together. Start it without a launcher, or give --worker {WHOLE}."
        )
    return worker


def _read_worker(text: str) -> Worker:
    found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if found is None or int(found[1]) >= int(found[2]):
        raise InputError(
            "--worker must be i/N with i from 0 to N-1, such as 0/4, or "
            f"{WHOLE} for one process in a job array, got {text!r}."
        )
    return Worker(int(found[1]), int(found[2]))


def _of_array(environment: Mapping[str, str]) -> Worker | None:
    names = [_ARRAY + end for end in ("ID", "MIN", "COUNT")]
    if any(name not in environment for name in names):
        return None
    numbers = [environment[name] for name in names]
    last = environment.get(f"{_ARRAY}MAX")
    if all(re.fullmatch("[0-9]{1,9}", text) for text in numbers):
        number, least, count = map(int, numbers)
        has_gaps = last is not None and last != str(least + count - 1)
        if 0 <= number - least < count and not has_gaps:
            return Worker(number - least, count)
    shown = ", ".join(f"{name}={text}" for name, text in zip(names, numbers, strict=True))
    raise InputError(
        f"A job array must have numbers without gaps, such as --array=0-3, got {shown}. Use such "
        f"an array, or give --worker i/N, or --worker {WHOLE}."
    )


def device_name(accelerator: Accelerator) -> str:
    """Returns the GPU of this process, or `cpu`, which accelerate numbers in larger groups."""
    device = accelerator.device
    return device.type if device.type == "cpu" else str(device)


def check_process_group(accelerator: Accelerator) -> None:
    """Raises `InputError` where a launch of n processes quietly became n runs of one process."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise InputError(
            f"{launched} processes were launched, but accelerate formed a group of "
            f"{accelerator.num_processes}. On a machine without GPUs set ACCELERATE_USE_CPU=true."
        )
