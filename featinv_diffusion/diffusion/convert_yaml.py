"""The YAML tree from which the original cldm code builds a given model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from featinv_diffusion.diffusion.convert_config import EXTRAS, OriginalConfig
from featinv_diffusion.errors import InputError


def to_original_config(config: OriginalConfig) -> dict[str, Any]:
    """Returns the YAML tree from which the original code builds this model."""
    sizes = _unet_params(config.unet)
    return {
        "model": {
            "target": "cldm.cldm.ControlLDM",
            "params": {
                "linear_start": config.scheduler["beta_start"],
                "linear_end": config.scheduler["beta_end"],
                "num_timesteps_cond": 1,
                "log_every_t": 200,
                "timesteps": config.scheduler["num_train_timesteps"],
                "first_stage_key": "jpg",
                "cond_stage_key": "txt",
                "control_key": "hint",
                "image_size": config.unet["sample_size"],
                "channels": config.unet["in_channels"],
                "cond_stage_trainable": False,
                "conditioning_key": "crossattn",
                "monitor": "val/loss_simple_ema",
                "scale_factor": config.vae["scaling_factor"],
                "use_ema": False,
                "only_mid_control": False,
                "control_stage_config": {
                    "target": "cldm.cldm.ControlNet",
                    "params": {"hint_channels": config.hint_channels, **sizes},
                },
                "unet_config": {
                    "target": "cldm.cldm.ControlledUnetModel",
                    "params": {"out_channels": config.unet["out_channels"], **sizes},
                },
                "first_stage_config": _first_stage(config.vae, config.unet["sample_size"]),
                "cond_stage_config": {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"},
            },
        },
        EXTRAS: config.extras,
    }


def _unet_params(unet: Mapping[str, Any]) -> dict[str, Any]:
    widths = list(unet["block_out_channels"])
    kinds = enumerate(unet["down_block_types"])
    return {
        "image_size": unet["sample_size"],
        "in_channels": unet["in_channels"],
        "model_channels": widths[0],
        "attention_resolutions": [2**level for level, kind in kinds if "CrossAttn" in kind],
        "num_res_blocks": unet["layers_per_block"],
        "channel_mult": [_ratio(width, widths[0]) for width in widths],
        **_head_params(unet["attention_head_dim"], widths),
        "use_spatial_transformer": True,
        "transformer_depth": unet["transformer_layers_per_block"],
        "context_dim": unet["cross_attention_dim"],
        "use_linear_in_transformer": unet["use_linear_projection"],
        "use_checkpoint": True,
        "legacy": False,
    }


def _head_params(heads: int | Sequence[int], widths: list[int]) -> dict[str, int]:
    per_level = [heads] * len(widths) if isinstance(heads, int) else list(heads)
    if len(set(per_level)) == 1:
        return {"num_heads": per_level[0]}
    head_channels = {_ratio(w, h) for w, h in zip(widths, per_level, strict=True)}
    if len(head_channels) > 1:
        raise InputError(
            "The original layout has one number of heads, or one of channels per head, for all "
            f"levels, but this UNet has {per_level} heads at widths {widths}."
        )
    return {"num_head_channels": head_channels.pop()}


def _first_stage(vae: Mapping[str, Any], latent_size: int) -> dict[str, Any]:
    widths = list(vae["block_out_channels"])
    return {
        "target": "ldm.models.autoencoder.AutoencoderKL",
        "params": {
            "embed_dim": vae["latent_channels"],
            "monitor": "val/rec_loss",
            "ddconfig": {
                "double_z": True,
                "z_channels": vae["latent_channels"],
                "resolution": latent_size << (len(widths) - 1),
                "in_channels": vae["in_channels"],
                "out_ch": vae["out_channels"],
                "ch": widths[0],
                "ch_mult": [_ratio(width, widths[0]) for width in widths],
                "num_res_blocks": vae["layers_per_block"],
                "attn_resolutions": [],
                "dropout": 0.0,
            },
            "lossconfig": {"target": "torch.nn.Identity"},
        },
    }


def _ratio(value: int, unit: int) -> int:
    if value % unit:
        raise InputError(
            f"The original layout gives widths as whole multiples of the first, but {value} is no "
            f"multiple of {unit}."
        )
    return value // unit
