"""The published checkpoints of reconstructors: their weights under the names that are used here.

The repository FusionBrainLab/feature_analysis links to such files in its README, one per encoder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from featinv_diffusion.errors import InputError

_N_STAGES, _N_RESIDUAL = 4, 2
_BLOCK = "transformer.encoder.layers."
_PARTS = {
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "self_attn.out_proj": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def from_original(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a published state dict as one that a `Reconstructor` of published sizes loads.

    Query, key and value become one matrix. The norm after the blocks, whose output the original
    does not use, is left out.

    Raises:
        InputError: weights of another network.
    """
    try:
        return _rename(weights)
    except KeyError as error:
        raise InputError(
            f"The weights must be those of a published reconstructor, but {error} does not fit."
        ) from error


def _rename(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {"token": weights["transformer.embeddings.class_embedding"]}
    for kind in ("weight", "bias"):
        found[f"norm.{kind}"] = weights[f"transformer.pre_layrnorm.{kind}"]
    numbers = {int(key[len(_BLOCK) :].split(".")[0]) for key in weights if key.startswith(_BLOCK)}
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
    """Stages of `upconvN` and `resblockN` are layers in a row, then come the other blocks."""
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
