"""What tells one set of weights from another, whatever file they came from."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from featinv_diffusion.backbones import Backbone
from featinv_diffusion.inverters import DiffusionInverter, Inverter
from featinv_diffusion.inverters.registry import DeterministicInverter


def weights_sha256(modules: Mapping[str, nn.Module]) -> str:
    """Returns one digest of names, types, shapes and values of all parameters and buffers."""
    digest = hashlib.sha256()
    for part in sorted(modules):
        for name, value in sorted(modules[part].state_dict().items()):
            if not isinstance(value, Tensor):
                digest.update(f"{part}.{name} {value!r}\n".encode())
                continue
            digest.update(f"{part}.{name} {value.dtype} {list(value.shape)}\n".encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def describe_inverter(inverter: Inverter, own: Backbone) -> dict[str, Any]:
    """Returns what decides samples beside the settings: weights as loaded, prompt and schedule."""
    if isinstance(inverter, DeterministicInverter):
        return {"modules_sha256": weights_sha256({**inverter.networks, "backbone": own.model})}
    if not isinstance(inverter, DiffusionInverter):
        raise TypeError(f"No fingerprint is known of a {type(inverter).__name__}.")
    pipeline = inverter.pipeline
    parts = {n: part for n, part in pipeline.components.items() if isinstance(part, nn.Module)}
    schedule = {k: v for k, v in pipeline.scheduler.config.items() if not k.startswith("_")}
    return {
        "pipeline_sha256": weights_sha256({**parts, "backbone": own.model}),
        "prompt": pipeline.config["default_prompt"],
        "scheduler_config": {key: _to_json(value) for key, value in schedule.items()},
    }


def _to_json(value: Any) -> Any:
    """JSON has no infinity, which DPM-Solver's config holds."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
