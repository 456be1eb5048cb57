"""What trainings share: data sets of crops, validation images, frozen components."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from featinv_diffusion.data.crops import (
    CropDataset,
    DataConfig,
    Records,
    split_held_back,
    to_images,
)
from featinv_diffusion.errors import InputError


def make_datasets(
    records: Records, config: DataConfig, seed: int
) -> tuple[CropDataset, CropDataset]:
    """Returns random crops for training and central crops of the held-back images."""
    train, held = split_held_back(records.labels, config.held_back_per_class)
    central = replace(config, crop="center")
    return CropDataset(records, train, config, seed), CropDataset(records, held, central, seed)


def stack_images(dataset: CropDataset, n: int | None = None) -> tuple[Tensor, Tensor]:
    """Returns images `[n, 3, s, s]` and labels of n items spread evenly over the data set."""
    n = min(n or len(dataset), len(dataset))
    positions = torch.linspace(0, len(dataset) - 1, n).round().long().tolist()
    items = [dataset[i] for i in positions]
    pixels = torch.stack([item["pixels"] for item in items])
    return to_images(pixels), torch.tensor([item["label"] for item in items])


def load_component(component_class: Any, path: str) -> Any:
    """Loads a diffusers or transformers component from a folder or Hub id, frozen."""
    try:
        component = component_class.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} must hold a {component_class.__name__} (config.json and safetensors), "
            f"but it could not be loaded: {str(error).splitlines()[0]}"
        ) from error
    return component.eval().requires_grad_(False)
