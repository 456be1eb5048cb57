"""Joining the processes of a launch."""

from __future__ import annotations

import os
from datetime import timedelta

from accelerate import Accelerator, InitProcessGroupKwargs

from featinv_diffusion.errors import InputError


def make_accelerator() -> Accelerator:
    """Joins the processes; one of them may wait for the others as long as a shard takes.

    Raises:
        InputError: see `check_process_group`.
    """
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))])
    check_process_group(accelerator)
    return accelerator


def device_name(accelerator: Accelerator) -> str:
    """Returns `cpu`, which accelerate numbers where there are several processes, or the GPU."""
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
