"""Where each parameter of diffusers' models lives in an original ldm/cldm checkpoint.

The original code numbers its blocks through (`input_blocks.0` … `output_blocks.11`), so the maps
are built by walking the levels in the order in which the original constructors do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isclose
from typing import Any, cast

import numpy as np
import torch
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from featinv_diffusion.diffusion.convert.config import (
    PIPELINE_SETTINGS,
    TEXT_SETTINGS,
    OriginalConfig,
    parse_original_config,
    to_original_config,
)
from featinv_diffusion.diffusion.featinv_controlnet import FeatureControlNet
from featinv_diffusion.errors import InputError
from featinv_diffusion.types import FeatureSpec

PREFIXES = {
    "controlnet": "control_model.",
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.transformer.text_model.",
}
HINT_CONVS = {1: 1, 2: 3, 3: 5}
"""Convolution of `FeatureEncoder` → its index in the original hint block."""

NOT_IN_ORIGINAL = ("feature_encoder.feature_mean", "feature_encoder.feature_std")

_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_RESNET = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "conv_shortcut": "nin_shortcut",
}
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def original_names(component: str, model: nn.Module) -> dict[str, str]:
    """Maps each key of `model.state_dict()` to its full name in the original checkpoint.

    Args:
        component: `unet`, `controlnet`, `vae` or `text_encoder`.

    Raises:
        InputError: the model has a parameter that the original layout has no place for.
    """
    keys = [key for key in model.state_dict() if key not in NOT_IN_ORIGINAL]
    if component == "text_encoder":
        # transformers saves these with or without "text_model.", by version and by origin.
        return {key: PREFIXES[component] + key.removeprefix("text_model.") for key in keys}
    make_modules = {"unet": unet_modules, "controlnet": controlnet_modules, "vae": vae_modules}
    modules = make_modules[component](cast("Mapping[str, Any]", model.config))
    return {key: PREFIXES[component] + _rename(key, modules, component) for key in keys}


def unet_modules(config: Mapping[str, Any]) -> dict[str, str]:
    """Maps module paths of `UNet2DConditionModel` to those of the original UNet."""
    modules = _encoder_modules(config) | {"conv_norm_out": "out.0", "conv_out": "out.2"}
    index, last = 0, len(config["up_block_types"]) - 1
    for level, kind in enumerate(config["up_block_types"]):
        attends = kind.startswith("CrossAttn")
        for layer in range(config["layers_per_block"] + 1):
            ours, theirs = f"up_blocks.{level}", f"output_blocks.{index}"
            modules |= _inside(f"{ours}.resnets.{layer}", f"{theirs}.0", _UNET_RESNET)
            if attends:
                modules[f"{ours}.attentions.{layer}"] = f"{theirs}.1"
            index += 1
        if level < last:  # the upsampler closes the level's last block
            place = f"output_blocks.{index - 1}.{2 if attends else 1}"
            modules[f"up_blocks.{level}.upsamplers.0.conv"] = f"{place}.conv"
    return modules


def controlnet_modules(config: Mapping[str, Any]) -> dict[str, str]:
    """Maps module paths of `FeatureControlNet` to those of the original ControlNet."""
    modules = _encoder_modules(config) | {"controlnet_mid_block": "middle_block_out.0"}
    levels = len(config["down_block_types"])
    n_outputs = levels * (config["layers_per_block"] + 1)  # every input block has one zero conv
    for index in range(n_outputs):
        modules[f"controlnet_down_blocks.{index}"] = f"zero_convs.{index}.0"
    for conv, index in HINT_CONVS.items():
        modules[f"feature_encoder.conv{conv}"] = f"input_hint_block.block.{index}"
    return modules


def vae_modules(config: Mapping[str, Any]) -> dict[str, str]:
    """Maps module paths of `AutoencoderKL` to those of the original autoencoder."""
    modules = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for part in ("encoder", "decoder"):
        modules |= {
            f"{part}.conv_in": f"{part}.conv_in",
            f"{part}.conv_norm_out": f"{part}.norm_out",
            f"{part}.conv_out": f"{part}.conv_out",
        }
        ours, theirs = f"{part}.mid_block", f"{part}.mid"
        modules |= _inside(f"{ours}.resnets.0", f"{theirs}.block_1", _VAE_RESNET)
        modules |= _inside(f"{ours}.attentions.0", f"{theirs}.attn_1", _VAE_ATTENTION)
        modules |= _inside(f"{ours}.resnets.1", f"{theirs}.block_2", _VAE_RESNET)
    levels, n = len(config["block_out_channels"]), config["layers_per_block"]
    for level in range(levels):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{level}"
        # The original decoder counts its levels from the highest resolution.
        down_there, up_there = f"encoder.down.{level}", f"decoder.up.{levels - 1 - level}"
        for layer in range(n):
            modules |= _inside(
                f"{down}.resnets.{layer}", f"{down_there}.block.{layer}", _VAE_RESNET
            )
        for layer in range(n + 1):
            modules |= _inside(f"{up}.resnets.{layer}", f"{up_there}.block.{layer}", _VAE_RESNET)
        modules[f"{down}.downsamplers.0.conv"] = f"{down_there}.downsample.conv"
        modules[f"{up}.upsamplers.0.conv"] = f"{up_there}.upsample.conv"
    return modules


def _encoder_modules(config: Mapping[str, Any]) -> dict[str, str]:
    """The half that UNet and ControlNet share: time embedding, input blocks, middle block."""
    modules = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
    }
    index, last = 1, len(config["down_block_types"]) - 1
    for level, kind in enumerate(config["down_block_types"]):
        ours = f"down_blocks.{level}"
        for layer in range(config["layers_per_block"]):
            theirs = f"input_blocks.{index}"
            modules |= _inside(f"{ours}.resnets.{layer}", f"{theirs}.0", _UNET_RESNET)
            if kind.startswith("CrossAttn"):
                modules[f"{ours}.attentions.{layer}"] = f"{theirs}.1"
            index += 1
        if level < last:
            modules[f"{ours}.downsamplers.0.conv"] = f"input_blocks.{index}.0.op"
            index += 1
    modules |= _inside("mid_block.resnets.0", "middle_block.0", _UNET_RESNET)
    modules["mid_block.attentions.0"] = "middle_block.1"
    return modules | _inside("mid_block.resnets.1", "middle_block.2", _UNET_RESNET)


def _inside(ours: str, theirs: str, table: Mapping[str, str]) -> dict[str, str]:
    return {f"{ours}.{a}": f"{theirs}.{b}" for a, b in table.items()}


def _rename(key: str, modules: Mapping[str, str], component: str) -> str:
    module = key
    while module not in modules:
        if "." not in module:
            raise InputError(
                f"Every parameter must have a place in the original layout, but {key!r} of the "
                f"{component} has none. Only models shaped like Stable Diffusion 1.x have."
            )
        module = module.rpartition(".")[0]
    return modules[module] + key[len(module) :]


# ---- The models of a FeatInv pipeline from the tensors of an original checkpoint -----------------

_ROOTS = {
    "control_model.": "the ControlNet",
    "model.diffusion_model.": "the UNet",
    "first_stage_model.": "the autoencoder",
    "cond_stage_model.": "the text encoder",
}
# Names under these roots that belong to no weight of the models.
_IGNORED = re.compile(r"\.position_ids$|^first_stage_model\.(loss|model_ema)\.")


@dataclass(frozen=True)
class Parts:
    """What an original checkpoint holds: the models and the scheduler of a pipeline."""

    unet: UNet2DConditionModel
    controlnet: FeatureControlNet
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    scheduler: DDIMScheduler


def from_original(
    tensors: Mapping[str, Tensor],
    config: OriginalConfig,
    feature_spec: FeatureSpec | None = None,
    *,
    pooled: bool = False,
) -> Parts:
    """Builds the models from an original checkpoint's tensors, whose memory they share.

    Channels of the feature map, width of the feature encoder and sizes of the text encoder are
    read off the tensors; all other sizes come from `config`.

    Args:
        feature_spec: where the features come from; recorded in the ControlNet.
        pooled: the ControlNet was trained on average-pooled maps.

    Raises:
        InputError: a part or a tensor is missing, has another shape or has no place; or the
            channels or the noise schedule contradict `feature_spec` or `config`.
    """
    tensors = _with_text_prefix(tensors)
    _check_roots(tensors)
    _check_schedule(tensors, config.scheduler)
    channels, hidden = _hint_sizes(tensors)
    _check_channels(channels, config.hint_channels, feature_spec)
    with torch.device("meta"):
        unet = _build(UNet2DConditionModel, config.unet)
        vae = _build(AutoencoderKL, config.vae)
        controlnet = FeatureControlNet.from_unet(
            unet,
            feature_channels=channels,
            feature_hidden_channels=hidden,
            feature_pooled=pooled,
            feature_spec=None if feature_spec is None else asdict(feature_spec),
            load_weights_from_unet=False,
        )
    text_encoder = CLIPTextModel(_text_config(tensors, config.text_encoder))
    scheduler = _build(DDIMScheduler, config.scheduler)
    parts = Parts(unet, controlnet, vae, text_encoder, scheduler)
    used = [name for component in PREFIXES for name in _load(component, parts, tensors)]
    _check_all_used(tensors, set(used))
    return parts


def _hint_sizes(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Returns (channels of the feature map, width of the feature encoder)."""
    weight = _take(tensors, "control_model.input_hint_block.block.1.weight", ndim=4)
    return weight.shape[1], weight.shape[0]


def _build(model_class: Any, config: dict[str, Any]) -> Any:
    try:
        return model_class.from_config(config)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise InputError(
            f"The sizes in the original config must make a {model_class.__name__}, but: {error}"
        ) from error


def _load(component: str, parts: Parts, tensors: Mapping[str, Tensor]) -> list[str]:
    """Fills one model in place and returns the names that it took."""
    model: nn.Module = getattr(parts, component)
    names, shapes = original_names(component, model), model.state_dict()
    missing = [name for name in names.values() if name not in tensors]
    if missing:
        raise InputError(
            f"The checkpoint must hold {len(names)} tensors of the {component}, but {len(missing)} "
            f"are missing, the first is {missing[0]!r}. It is incomplete, or of another size than "
            "assumed: then pass the YAML it was trained with as --original-config."
        )
    state = {key: _fitted(tensors[name], shapes[key].shape, name) for key, name in names.items()}
    dtypes = {tensor.dtype for tensor in state.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    if component == "controlnet":
        channels = parts.controlnet.config["feature_channels"]
        # The original encoder does not standardise.
        state["feature_encoder.feature_mean"] = torch.zeros(channels)
        state["feature_encoder.feature_std"] = torch.ones(channels)
    model.load_state_dict({key: t.to(dtype).contiguous() for key, t in state.items()}, assign=True)
    model.eval()
    return list(names.values())


def _fitted(tensor: Tensor, shape: torch.Size, name: str) -> Tensor:
    # The original autoencoder's attention has 1×1 convolutions where diffusers has linear layers.
    if ".attn_1." in name and tensor.shape == (*shape, 1, 1):
        tensor = tensor[:, :, 0, 0]
    if tensor.shape != shape:
        raise InputError(
            f"{name!r} must have shape {list(shape)}, but has {list(tensor.shape)} in the "
            "checkpoint. Pass the YAML it was trained with as --original-config."
        )
    if not tensor.is_floating_point():
        raise InputError(f"{name!r} must hold floating-point numbers, but holds {tensor.dtype}.")
    return tensor


def _text_config(tensors: Mapping[str, Tensor], base: Mapping[str, Any]) -> CLIPTextConfig:
    prefix = PREFIXES["text_encoder"]
    vocab_size, hidden = _take(tensors, f"{prefix}embeddings.token_embedding.weight", 2).shape
    n_positions = len(_take(tensors, f"{prefix}embeddings.position_embedding.weight", 2))
    intermediate = len(_take(tensors, f"{prefix}encoder.layers.0.mlp.fc1.weight", 2))
    layers = {name.split(".")[5] for name in tensors if name.startswith(f"{prefix}encoder.layers.")}
    same = hidden == base["hidden_size"]
    return CLIPTextConfig(
        **{
            **base,
            "vocab_size": vocab_size,
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "max_position_embeddings": n_positions,
            "num_hidden_layers": len(layers),
            # No tensor shows the heads; every published CLIP text encoder has 64 channels in each.
            "num_attention_heads": base["num_attention_heads"] if same else max(1, hidden // 64),
        }
    )


def _take(tensors: Mapping[str, Tensor], name: str, ndim: int) -> Tensor:
    if name not in tensors or tensors[name].ndim != ndim:
        found = f"it has shape {list(tensors[name].shape)}" if name in tensors else "it is missing"
        raise InputError(
            f"A FeatInv checkpoint must hold {name!r} with {ndim} dimensions, but {found}. "
            "The file is incomplete or of another method."
        )
    return tensors[name]


def _with_text_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # With transformers 5.6 or later the original code saves the text encoder without "text_model.".
    new, outer = PREFIXES["text_encoder"], "cond_stage_model.transformer."
    return {
        new + name.removeprefix(outer)
        if name.startswith(outer) and not name.startswith(new)
        else name: tensor
        for name, tensor in tensors.items()
    }


def _check_roots(tensors: Mapping[str, Tensor]) -> None:
    absent = [root for root in _ROOTS if not any(name.startswith(root) for name in tensors)]
    if not absent:
        return
    parts = ", ".join(f"{_ROOTS[root]} ({root}*)" for root in absent)
    if len(absent) == len(_ROOTS):
        hint = f"Its first tensor is {next(iter(tensors))!r}: the file is of another kind."
    elif absent == ["control_model."]:
        hint = "It is a plain Stable Diffusion checkpoint; train a ControlNet on it first."
    else:
        hint = "Published checkpoints hold all four parts; this file holds a selection of them."
    raise InputError(
        f"An original FeatInv checkpoint must hold {len(_ROOTS)} parts ({', '.join(_ROOTS)}), "
        f"but {parts} is missing. {hint}"
    )


def _check_schedule(tensors: Mapping[str, Tensor], scheduler: Mapping[str, Any]) -> None:
    betas = tensors.get("betas")
    if betas is None:
        return
    want = (len(betas), float(betas[0]), float(betas[-1]))
    have = tuple(scheduler[key] for key in ("num_train_timesteps", "beta_start", "beta_end"))
    if any(not isclose(a, b, rel_tol=1e-4) for a, b in zip(want, have, strict=True)):
        raise InputError(
            f"The checkpoint's noise schedule has {want[0]} steps from β = {want[1]:.6g} to "
            f"{want[2]:.6g}, but {have[0]} steps from {have[1]:.6g} to {have[2]:.6g} were assumed. "
            "Pass the YAML it was trained with as --original-config."
        )


def _check_channels(channels: int, in_config: int | None, feature_spec: FeatureSpec | None) -> None:
    if in_config is not None and in_config != channels:
        raise InputError(
            f"The checkpoint reads feature maps of {channels} channels, but the original config "
            f"says hint_channels {in_config}. Pass the YAML that belongs to the checkpoint."
        )
    if feature_spec is not None and feature_spec.channels != channels:
        raise InputError(
            f"The checkpoint reads feature maps of {channels} channels, but the features are a "
            f"{feature_spec}. Pass the backbone it was trained on as --backbone."
        )


def _check_all_used(tensors: Mapping[str, Tensor], used: set[str]) -> None:
    left = [
        name
        for name in tensors
        if name.startswith(tuple(_ROOTS)) and name not in used and not _IGNORED.search(name)
    ]
    if left:
        raise InputError(
            f"{len(left)} tensors of the checkpoint have no place in the model, the first is "
            f"{left[0]!r}. It is of another size than assumed: pass the YAML it was trained with "
            "as --original-config."
        )


# ---- The tensors of an original checkpoint from the models of a FeatInv pipeline -----------------

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
    if encoder.project is not None:
        raise InputError(
            "The original layout has no 1×1 convolution before the hint block, but this ControlNet "
            "has feature_projection_channels. It cannot be written to the original layout."
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
