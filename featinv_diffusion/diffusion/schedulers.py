"""Samplers by name: diffusers schedulers that solve the ODE or SDE of one noise schedule."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers.schedulers import SchedulerMixin

from featinv_diffusion.errors import InputError, choices_hint

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "sde-dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
"""Name → diffusers class and the arguments that the name fixes."""


def make_scheduler(name: str, config: Any) -> SchedulerMixin:
    """Builds the named scheduler with the noise schedule of another one's `config`.

    Raises:
        InputError: unknown name.
    """
    if name not in SCHEDULERS:
        raise InputError(f"No scheduler is named {name!r}; {choices_hint(name, list(SCHEDULERS))}")
    class_name, fixed = SCHEDULERS[name]
    scheduler_class = getattr(diffusers, class_name)
    return scheduler_class.from_config(config, **fixed)


def scheduler_name(scheduler: SchedulerMixin) -> str | None:
    """Returns the name by which `make_scheduler` builds this scheduler, or None."""
    for name, (class_name, fixed) in SCHEDULERS.items():
        if type(scheduler).__name__ == class_name:
            config = scheduler.config  # pyright: ignore[reportAttributeAccessIssue]
            if all(config[key] == value for key, value in fixed.items()):
                return name
    return None
