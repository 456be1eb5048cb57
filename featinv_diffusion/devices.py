"""Devices by name."""

from __future__ import annotations

import torch

from featinv_diffusion.errors import InputError


def find_device(name: str) -> torch.device:
    """Returns the device; `auto` is the GPU where there is one.

    Raises:
        InputError: no such device on this machine.
    """
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # of the device meta nothing can be read
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"The device {name!r} cannot be used here: {reason}") from None
    return device
