"""The models of a FeatInv pipeline from the tensors of an original checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isclose
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from featinv_diffusion.diffusion.convert_config import OriginalConfig
from featinv_diffusion.diffusion.convert_keys import PREFIXES, original_names
from featinv_diffusion.diffusion.featinv_controlnet import FeatureControlNet
from featinv_diffusion.errors import InputError
from featinv_diffusion.types import FeatureSpec

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
