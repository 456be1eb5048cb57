"""Converts the published checkpoints of reconstructors.

The README of the repository FusionBrainLab/feature_analysis links to them, one per encoder: state
dicts such as `models--google--siglip-base-patch16-512.pt`.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featinv_diffusion.backbones.base import LAST
from featinv_diffusion.errors import InputError
from featinv_diffusion.files import expand_path, new_folder
from featinv_diffusion.inverters.folders import first_line
from featinv_diffusion.inverters.reconstructor import (
    FOLDER,
    PUBLISHED_STAGES,
    Reconstructor,
    default_channels,
    load_encoder,
)

_N_STAGES, _N_RESIDUAL = PUBLISHED_STAGES, 2
_BLOCK = "transformer.encoder.layers."
_PARTS = {
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "self_attn.out_proj": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def save_original(
    path: str | Path,
    backbone: str,
    folder: str | Path,
    *,
    layer: str = LAST,
    weights: str | Path | None = None,
) -> Path:
    """Converts a published checkpoint file to a folder that `load_inverter` opens; returns it.

    For instance

        save_original("models--google--siglip-base-patch16-512.pt",
                      "hf/google/siglip-base-patch16-512", "siglip-512", layer="encoder.layers.10")

    Args:
        path: state dict that `torch.save` wrote.
        backbone: name of the encoder for `load_backbone`.
        folder: folder to write `reconstructor/` in; that must not exist yet.
        layer: layer that the reconstructor reads. The published code takes `hidden_states[-2]`, the
            output of the second-last block: `encoder.layers.10` of a base model.
        weights: folder of the encoder, for a name that `load_backbone` cannot find.

    Raises:
        InputError: no such file or encoder, or weights of another network or encoder.
    """
    found = from_original(_read_checkpoint(expand_path(path)))
    encoder = load_encoder(backbone, layer, weights=weights)
    spec, preprocessing = encoder.spec, encoder.preprocessing
    reconstructor = Reconstructor(
        asdict(spec),
        encoder.input_size,
        preprocessing.mean,
        preprocessing.std,
        depth=len({key.split(".")[1] for key in found if key.startswith("blocks.")}),
        channels=default_channels(spec.channels, _N_STAGES),
        n_residual=_N_RESIDUAL,
    )
    try:
        reconstructor.load_state_dict(found)
    except RuntimeError as error:
        raise InputError(
            f"{path} must hold the published reconstructor of {spec}, but its weights do not fit: "
            f"{str(error).splitlines()[-1].strip()}"
        ) from error
    target = expand_path(folder) / FOLDER
    with new_folder(target) as staging:
        reconstructor.save_pretrained(staging)
    return target


def from_original(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames a published state dict for a `Reconstructor` of the published sizes.

    Query, key and value become one matrix. The norm after the blocks is left out, since the
    original does not use its output.

    Raises:
        InputError: weights of another network.
    """
    try:
        found = _rename(weights)
    except KeyError as error:
        raise InputError(
            f"The weights must be those of a published reconstructor, but {error} does not belong "
            "to one."
        ) from error
    if not any(key.startswith("decoder.") for key in found):
        raise InputError(
            "The weights must be those of a published reconstructor, but have no decoder."
        )
    return found


def _read_checkpoint(path: Path) -> Mapping[str, Tensor]:
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(
            f"{path} must be a state dict that torch.save wrote, but cannot be read: "
            f"{first_line(error)}"
        ) from error
    is_state = isinstance(content, Mapping) and all(isinstance(v, Tensor) for v in content.values())
    if not is_state:
        raise InputError(f"{path} must hold a state dict, got a {type(content).__name__}.")
    return content


def _rename(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {"token": weights["transformer.embeddings.class_embedding"]}
    for kind in ("weight", "bias"):
        found[f"norm.{kind}"] = weights[f"transformer.pre_layrnorm.{kind}"]
    numbers = {key[len(_BLOCK) :].split(".")[0] for key in weights if key.startswith(_BLOCK)}
    for i in sorted(numbers):
        for kind in ("weight", "bias"):
            parts = [weights[f"{_BLOCK}{i}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            found[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
            for theirs, ours in _PARTS.items():
                found[f"blocks.{i}.{ours}.{kind}"] = weights[f"{_BLOCK}{i}.{theirs}.{kind}"]
    for key, value in weights.items():
        if key.startswith("decoder."):
            found[f"decoder.layers.{_decoder_key(key.removeprefix('decoder.'))}"] = value
    return found


def _decoder_key(key: str) -> str:
    """Returns the key in a row of layers: `upconvN` and `resblockN` by turns, then the others."""
    module, _, rest = key.partition(".")
    match = re.fullmatch(r"(upconv|resblock|final_conv)(\d*)", module)
    if match is None:
        raise KeyError(key)
    name, number = match[1], int(match[2] or 0)
    if name == "upconv":
        position = 2 * number - 2
    elif name == "final_conv":
        position = 2 * _N_STAGES + _N_RESIDUAL
    elif number <= _N_STAGES:
        position = 2 * number - 1
    else:
        position = 2 * _N_STAGES + number - _N_STAGES - 1
    return f"{position}.{rest}"
