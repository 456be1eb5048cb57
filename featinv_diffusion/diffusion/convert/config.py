"""Sizes of an original cldm model: from its YAML to the configurations of diffusers' models."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from featinv_diffusion.errors import InputError
from featinv_diffusion.schema import parse_yaml, read_text

SD15_FILES = {
    "unet": "unet/config.json",
    "vae": "vae/config.json",
    "text_encoder": "text_encoder/config.json",
    "scheduler": "scheduler/scheduler_config.json",
}
EXTRAS = "featinv"
"""Top-level key of the YAML, beside `model`, for what the original code neither has nor reads."""
TEXT_SETTINGS = (
    "hidden_size",
    "num_attention_heads",
    "hidden_act",
    "layer_norm_eps",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
"""Settings of the text encoder that show in no tensor, and the width they belong to."""

PIPELINE_SETTINGS = (
    "default_prompt",
    "default_num_inference_steps",
    "default_guidance_scale",
    "default_guidance",
    "best_refine",
    "best_refine_at",
    "through",
)

# What the original constructors allow and diffusers' SD1.x models cannot express.
_UNET_FIXED = {
    "use_spatial_transformer": (True,),
    "num_classes": (None,),
    "use_scale_shift_norm": (False, None),
    "resblock_updown": (False, None),
    "disable_self_attentions": (None,),
    "num_attention_blocks": (None,),
    "disable_middle_self_attn": (False, None),
    "conv_resample": (True, None),
    "dims": (2, None),
    "n_embed": (None,),
}
_VAE_FIXED = {
    "double_z": (True,),
    "attn_resolutions": ([], None),
    "use_linear_attn": (False, None),
    "resamp_with_conv": (True, None),
    "attn_type": ("vanilla", None),
}
_MODEL_FIXED = {
    "beta_schedule": ("linear", None),
    "parameterization": ("eps", None),
    "only_mid_control": (False, None),
    "scale_by_std": (False, None),
}
_SHARED_BY_CONTROL = (
    "in_channels",
    "model_channels",
    "attention_resolutions",
    "num_res_blocks",
    "channel_mult",
    "num_heads",
    "num_head_channels",
    "transformer_depth",
    "context_dim",
    "use_linear_in_transformer",
)


@dataclass(frozen=True)
class OriginalConfig:
    """Configurations of a pipeline's parts, as their diffusers or transformers classes take them.

    Args:
        hint_channels: channels of the feature map; None where only the tensors say it.
        extras: what a YAML of ours keeps beside the original's keys: `text_encoder`,
            `feature_spec`, `feature_pooled`, `pipeline`.
    """

    unet: dict[str, Any]
    vae: dict[str, Any]
    text_encoder: dict[str, Any]
    scheduler: dict[str, Any]
    hint_channels: int | None = None
    extras: dict[str, Any] = field(default_factory=dict)


def sd15_config() -> OriginalConfig:
    """Returns Stable Diffusion 1.x at 256 pixels (latents of 32×32)."""
    root = resources.files("featinv_diffusion") / "assets" / "sd15"
    return OriginalConfig(
        **{name: json.loads((root / path).read_text()) for name, path in SD15_FILES.items()}
    )


def read_original_config(path: str | Path) -> OriginalConfig:
    """Reads the YAML that an original model was built from.

    Raises:
        InputError: no readable cldm YAML, or a setting that diffusers' SD1.x models do not have.
    """
    tree = _load_yaml(Path(path))
    try:
        return parse_original_config(tree)
    except KeyError as error:
        raise InputError(
            f"{path} must be the YAML of a cldm model (model.params with unet_config and "
            f"first_stage_config), but {error.args[0]!r} is missing in it."
        ) from error
    except (TypeError, ValueError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} holds a value of the wrong kind: {error}.") from error


def parse_original_config(tree: Mapping[str, Any]) -> OriginalConfig:
    """Derives the configurations from the parsed YAML; KeyError where a size is missing."""
    base, params = sd15_config(), tree["model"]["params"]
    extras = dict(tree.get(EXTRAS) or {})
    unet = params["unet_config"]["params"]
    first_stage = params["first_stage_config"]["params"]
    control = (params.get("control_stage_config") or {}).get("params") or {}
    _check_fixed("model.params", params, _MODEL_FIXED)
    _check_fixed("unet_config", unet, _UNET_FIXED)
    _check_fixed("ddconfig", first_stage["ddconfig"], _VAE_FIXED)
    _check_control(control, unet)
    _check_text(params.get("cond_stage_config") or {})
    vae = _vae_config(first_stage)
    n_halvings = len(first_stage["ddconfig"]["ch_mult"]) - 1
    return OriginalConfig(
        unet=base.unet | _unet_config(unet) | {"sample_size": vae["sample_size"] >> n_halvings},
        vae=base.vae | vae | {"scaling_factor": float(params.get("scale_factor", 1.0))},
        text_encoder=base.text_encoder | dict(extras.get("text_encoder") or {}),
        scheduler=base.scheduler
        | {
            # The defaults are those of the original constructor, not those of Stable Diffusion.
            "beta_start": float(params.get("linear_start", 1e-4)),
            "beta_end": float(params.get("linear_end", 2e-2)),
            "num_train_timesteps": int(params.get("timesteps", 1000)),
        },
        hint_channels=control.get("hint_channels"),
        extras=extras,
    )


def _unet_config(params: Mapping[str, Any]) -> dict[str, Any]:
    widths = [int(params["model_channels"]) * mult for mult in params["channel_mult"]]
    attends = [2**level in params["attention_resolutions"] for level in range(len(widths))]
    kinds = ["CrossAttn" if yes else "" for yes in attends]
    return {
        "in_channels": params["in_channels"],
        "out_channels": params["out_channels"],
        "block_out_channels": widths,
        "down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
        "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(kinds)],
        "layers_per_block": _constant("num_res_blocks", params["num_res_blocks"]),
        "cross_attention_dim": _constant("context_dim", params["context_dim"]),
        # diffusers' `attention_head_dim` is the number of heads in these models.
        "attention_head_dim": _n_heads(params, widths),
        "transformer_layers_per_block": int(params.get("transformer_depth", 1)),
        "use_linear_projection": bool(params.get("use_linear_in_transformer", False)),
    }


def _n_heads(params: Mapping[str, Any], widths: list[int]) -> int | list[int]:
    head_channels = params.get("num_head_channels", -1)
    if head_channels != -1:
        return [width // head_channels for width in widths]
    if params.get("num_heads", -1) == -1:
        raise KeyError("num_heads")
    return params["num_heads"]


def _vae_config(first_stage: Mapping[str, Any]) -> dict[str, Any]:
    dd = first_stage["ddconfig"]
    if first_stage["embed_dim"] != dd["z_channels"]:
        raise InputError(
            f"first_stage_config must have embed_dim equal to z_channels, but they are "
            f"{first_stage['embed_dim']} and {dd['z_channels']}."
        )
    widths = [int(dd["ch"]) * mult for mult in dd["ch_mult"]]
    return {
        "sample_size": dd["resolution"],
        "in_channels": dd["in_channels"],
        "out_channels": dd["out_ch"],
        "latent_channels": dd["z_channels"],
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "layers_per_block": dd["num_res_blocks"],
    }


def _constant(name: str, value: int | Iterable[int]) -> int:
    values = {value} if isinstance(value, int) else set(value)
    if len(values) != 1:
        raise InputError(f"{name} must be the same for all levels, but it is {value}.")
    return values.pop()


def _check_fixed(
    where: str, params: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]]
) -> None:
    for name, values in allowed.items():
        if name in params and params[name] not in values:
            raise InputError(
                f"{where}.{name} must be {values[0]!r}, as in Stable Diffusion 1.x, but the YAML "
                f"says {params[name]!r}. Such a model cannot be converted."
            )


def _check_control(control: Mapping[str, Any], unet: Mapping[str, Any]) -> None:
    for name in _SHARED_BY_CONTROL:
        if name in control and control[name] != unet.get(name, control[name]):
            raise InputError(
                f"ControlNet and UNet must have the same sizes, but {name} is {control[name]} in "
                f"control_stage_config and {unet[name]} in unet_config."
            )


def _check_text(cond_stage: Mapping[str, Any]) -> None:
    target = str(cond_stage.get("target", "FrozenCLIPEmbedder")).rpartition(".")[2]
    layer = (cond_stage.get("params") or {}).get("layer", "last")
    if target != "FrozenCLIPEmbedder" or layer != "last":
        raise InputError(
            "cond_stage_config must be FrozenCLIPEmbedder with its last layer, the text encoder of "
            f"Stable Diffusion 1.x, but the YAML says {target} with layer {layer!r}."
        )


def _load_yaml(path: Path) -> Mapping[str, Any]:
    tree = parse_yaml(read_text(path), str(path))
    if not isinstance(tree, Mapping):
        raise InputError(f"{path} must hold `key: value` lines at its top level.")
    return {str(key): value for key, value in tree.items()}


# ---- The YAML tree from which the original cldm code builds a given model ------------------------


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
