"""The noise-prediction objective that the UNet and the ControlNet are trained with."""

from __future__ import annotations

from typing import Any, Literal

import diffusers
from diffusers import DDPMScheduler
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers import SchedulerMixin
from jaxtyping import Bool, Float, Int
from torch import Tensor

from featinv_diffusion.errors import InputError, choices_hint

PUBLISHED_PROMPT = "a high-quality, detailed, and professional image"
"""The one prompt of the paper's training and sampling (section 2, "Approach")."""


def make_noise_scheduler(scheduler: SchedulerMixin | ConfigMixin) -> DDPMScheduler:
    """Returns the training counterpart of a sampler: the same betas and prediction type."""
    return DDPMScheduler.from_config(scheduler.config)  # pyright: ignore


def prediction_target(
    scheduler: DDPMScheduler,
    latents: Float[Tensor, "b c h w"],
    noise: Float[Tensor, "b c h w"],
    timesteps: Int[Tensor, " b"],
) -> Float[Tensor, "b c h w"]:
    """Returns the UNet's target: ε (Ho et al. 2020, equation 14) or v (Salimans & Ho 2022)."""
    if scheduler.config["prediction_type"] == "epsilon":
        return noise
    if scheduler.config["prediction_type"] == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)  # pyright: ignore[reportArgumentType]
    raise ValueError(
        f"prediction_type must be epsilon or v_prediction, got "
        f"{scheduler.config['prediction_type']!r}."
    )


def draw_dropout(
    uniform: Float[Tensor, "b 2"], probability: float, kind: Literal["joint", "independent"]
) -> tuple[Bool[Tensor, " b"], Bool[Tensor, " b"]]:
    """Returns (keep features, keep prompt).

    `joint` drops both together, as published; `independent` drops each on its own, so that both
    guidance conventions meet conditions that training has seen.
    """
    keep = uniform >= probability
    return keep[:, 0], keep[:, 0 if kind == "joint" else 1]


def gaussian_floor(scheduler: DDPMScheduler) -> float:
    """Returns the mean over t of ᾱ_t: the ε-loss of the best guess for white unit-variance latents.

    A loss near this floor means that the network has learned nothing about the images.
    """
    return float(scheduler.alphas_cumprod.mean())


# ---- Samplers by name ----------------------------------------------------------------------------

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
