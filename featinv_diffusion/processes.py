"""The processes of a launch, or the one process of a script or notebook."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
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


Processes: TypeAlias = Accelerator | Alone


def make_accelerator() -> Accelerator:
    """Joins the processes; one of them may wait for the others as long as a unit of work takes.

    Raises:
        InputError: see `check_process_group`.
    """
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))])
    check_process_group(accelerator)
    return accelerator


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
