"""Joining the processes of a launch."""

from __future__ import annotations

import os

from accelerate import Accelerator

from featinv_diffusion.errors import InputError


def check_process_group(accelerator: Accelerator) -> None:
    """Raises `InputError` where a launch of n processes quietly became n runs of one process."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise InputError(
            f"{launched} processes were launched, but accelerate formed a group of "
            f"{accelerator.num_processes}. On a machine without GPUs set ACCELERATE_USE_CPU=true."
        )
