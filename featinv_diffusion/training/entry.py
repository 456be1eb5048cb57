"""What trainings share: data sets of crops, validation images, frozen components."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from featinv_diffusion.data.crops import CropDataset, DataConfig, split_held_back, to_images
from featinv_diffusion.data.sets import ImageSet
from featinv_diffusion.errors import InputError

logger = logging.getLogger(__name__)


def make_datasets(
    images: ImageSet, config: DataConfig, seed: int
) -> tuple[CropDataset, CropDataset]:
    """Returns random crops for training and central crops of the held-back images."""
    train, held = split_held_back(
        images.labels or [], config.held_back_per_class, config.train_per_class
    )
    central = replace(config, crop="center")
    return CropDataset(images, train, config, seed), CropDataset(images, held, central, seed)


def read_items(dataset: CropDataset, n: int) -> Iterator[dict[str, Any]]:
    """Yields n items, or all, that are spread evenly over a data set; notes those replaced.

    Raises:
        InputError: the data set is empty.
    """
    if not len(dataset):
        raise InputError("Validation images are needed: set data.held_back_per_class to 1 or more.")
    n = min(n, len(dataset))
    replaced = []
    for i in torch.linspace(0, len(dataset) - 1, n).round().long().tolist():
        item = dataset[i]
        replaced += dataset.unreadable(item["index"], item["n_unreadable"])
        yield item
    for location in dict.fromkeys(replaced):
        logger.warning("%s cannot be read and is replaced.", location)


def stack_items(dataset: CropDataset, n: int | None = None) -> dict[str, Tensor]:
    """Stacks n items, or all, that are spread evenly over a data set.

    Raises:
        InputError: the data set is empty.
    """
    return default_collate(list(read_items(dataset, n or len(dataset))))


def stack_images(dataset: CropDataset, n: int | None = None) -> tuple[Tensor, Tensor]:
    """Returns images `[n, 3, s, s]` and labels of n items spread evenly over the data set."""
    items = stack_items(dataset, n)
    return to_images(items["pixels"]), items["label"]


def load_component(component_class: Any, path: str) -> Any:
    """Loads a diffusers or transformers component from a folder or Hub id, frozen, in float32.

    Weights that are stored in half precision would meet float32 activations and gradients.
    """
    try:
        component = component_class.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} must hold a {component_class.__name__} (config.json and safetensors), "
            f"but it could not be loaded: {str(error).splitlines()[0]}"
        ) from error
    return component.float().eval().requires_grad_(False)
