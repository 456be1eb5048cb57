"""Where each parameter of diffusers' models lives in an original ldm/cldm checkpoint.

The original code numbers its blocks through (`input_blocks.0` … `output_blocks.11`), so the maps
are built by walking the levels in the order in which the original constructors do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import nn

from featinv_diffusion.errors import InputError

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
