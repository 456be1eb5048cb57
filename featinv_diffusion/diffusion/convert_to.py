"""The tensors of an original checkpoint from the models of a FeatInv pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from torch import Tensor

from featinv_diffusion.diffusion.convert_config import (
    PIPELINE_SETTINGS,
    TEXT_SETTINGS,
    OriginalConfig,
    parse_original_config,
)
from featinv_diffusion.diffusion.convert_keys import PREFIXES, original_names
from featinv_diffusion.diffusion.convert_yaml import to_original_config
from featinv_diffusion.errors import InputError

_SCHEDULE = ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps", "prediction_type")
# Settings that change no output.
_NEUTRAL = {"sample_size", "force_upcast", "conditioning_channels"}


def to_original(pipeline: Any) -> tuple[dict[str, Tensor], OriginalConfig]:
    """Returns the tensors of the original checkpoint and the sizes that its code is built from.

    Args:
        pipeline: a `FeatInvPipeline`, or anything with its models as attributes.

    Raises:
        InputError: a setting or a weight that the original code has no place for.
    """
    for component in PREFIXES:
        if getattr(pipeline, component) is None:
            raise InputError(f"The pipeline must hold a {component}, but has none.")
    config = original_config_of(pipeline)
    _check_expressible(pipeline, config)
    tensors = schedule_buffers(config.scheduler)
    for component in PREFIXES:
        model = getattr(pipeline, component)
        state = model.state_dict()
        for key, name in original_names(component, model).items():
            # The original autoencoder's attention has 1×1 convolutions for linear layers.
            pointwise = ".attn_1." in name and state[key].ndim == 2
            tensors[name] = state[key][:, :, None, None] if pointwise else state[key]
    return tensors, config


def original_config_of(pipeline: Any) -> OriginalConfig:
    """Reads the sizes off a pipeline's models, and what the original lacks into the extras."""
    control, text = pipeline.controlnet.config, pipeline.text_encoder.config
    settings = getattr(pipeline, "config", {})
    return OriginalConfig(
        unet=dict(pipeline.unet.config),
        vae=dict(pipeline.vae.config),
        text_encoder=text.to_dict(),
        scheduler=dict(pipeline.scheduler.config),
        hint_channels=control["feature_channels"],
        extras={
            "feature_spec": control["feature_spec"],
            "feature_pooled": control["feature_pooled"],
            "text_encoder": {key: getattr(text, key) for key in TEXT_SETTINGS},
            "pipeline": {name: settings[name] for name in settings if name in PIPELINE_SETTINGS},
        },
    )


def schedule_buffers(scheduler: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns the buffers of the noise schedule that an original checkpoint carries.

    √β is a linear ramp; ᾱ_t = Π (1 − β_s); the posterior is that of DDPM (Ho et al. 2020, equations
    6 and 7). Computed in float64 and stored in float32, as the original code does.
    """
    n_steps = scheduler["num_train_timesteps"]
    ends = (scheduler["beta_start"] ** 0.5, scheduler["beta_end"] ** 0.5)
    # torch's ramp, not numpy's: they differ in the last bit.
    beta = (torch.linspace(*ends, n_steps, dtype=torch.float64) ** 2).numpy()
    alpha_bar = np.cumprod(1 - beta)
    previous = np.append(1.0, alpha_bar[:-1])
    variance = beta * (1 - previous) / (1 - alpha_bar)
    buffers = {
        "betas": beta,
        "alphas_cumprod": alpha_bar,
        "alphas_cumprod_prev": previous,
        "sqrt_alphas_cumprod": np.sqrt(alpha_bar),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - alpha_bar),
        "log_one_minus_alphas_cumprod": np.log(1 - alpha_bar),
        "sqrt_recip_alphas_cumprod": np.sqrt(1 / alpha_bar),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / alpha_bar - 1),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
        "posterior_mean_coef1": beta * np.sqrt(previous) / (1 - alpha_bar),
        "posterior_mean_coef2": (1 - previous) * np.sqrt(1 - beta) / (1 - alpha_bar),
        "logvar": np.zeros(n_steps),
    }
    return {name: torch.tensor(value, dtype=torch.float32) for name, value in buffers.items()}


def _check_expressible(pipeline: Any, config: OriginalConfig) -> None:
    """Compares each setting with what a model built from the original YAML would have."""
    encoder = pipeline.controlnet.feature_encoder
    if bool(encoder.feature_mean.any()) or bool((encoder.feature_std != 1).any()):
        raise InputError(
            "The original layout has no standardisation of the features, but this ControlNet has "
            "feature_mean and feature_std. It cannot be written to the original layout."
        )
    there = parse_original_config(to_original_config(config))
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(there.unet)
        controlnet = ControlNetModel.from_unet(unet, load_weights_from_unet=False)  # pyright: ignore[reportArgumentType]
        vae = AutoencoderKL.from_config(there.vae)
    for name, built in (("unet", unet), ("controlnet", controlnet), ("vae", vae)):
        _check_equal(name, built.config, getattr(pipeline, name).config)  # pyright: ignore[reportAttributeAccessIssue]
    schedule = {key: there.scheduler[key] for key in _SCHEDULE}
    _check_equal("scheduler", schedule, pipeline.scheduler.config)


def _check_equal(component: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    for key, value in there.items():
        if not key.startswith("_") and key not in _NEUTRAL and _plain(here[key]) != _plain(value):
            raise InputError(
                f"The original layout has {key} = {value!r} in the {component}, but this pipeline "
                f"has {here[key]!r}. It cannot be written to the original layout."
            )


def _plain(value: Any) -> Any:
    """Lists for tuples, and one number for a list that repeats it."""
    if not isinstance(value, (list, tuple)):
        return value
    same = len(set(value)) == 1 and isinstance(value[0], int)
    return value[0] if same else list(value)
