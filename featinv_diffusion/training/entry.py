"""What the scripts in `train/` share: arguments, bad-input sentences, validation images."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.utils.data import default_collate

from featinv_diffusion.config import load_config, read_setting
from featinv_diffusion.data.crops import (
    CropDataset,
    DataConfig,
    split_held_back,
    to_images,
)
from featinv_diffusion.data.sets import ImageSet
from featinv_diffusion.errors import InputError, choices_hint

logger = logging.getLogger(__name__)

Config = TypeVar("Config")
Recipe: TypeAlias = tuple[type[Any], Callable[[Any], object]]
"""A config class and the function that trains what such a config describes."""


def run_script(
    config_class: type[Config], train: Callable[[Config], object], doc: str | None
) -> None:
    """Parses `--config FILE key=value ... [--dry-run]`, trains, and exits 2 on bad input."""
    _run(lambda _path, _overrides: (config_class, train), doc)


def run_family_script(families: Mapping[str, Recipe], doc: str | None) -> None:
    """As `run_script`, where `model.family` chooses the config and what trains it.

    Args:
        families: by the value of `model.family`; the first is that of a config without one.
    """

    def choose(path: str | None, overrides: Sequence[str]) -> Recipe:
        family = str(read_setting("model.family", path, overrides) or next(iter(families)))
        if family not in families:
            hint = choices_hint(family, list(families))
            raise InputError(f"No model.family is named {family!r}; {hint}")
        return families[family]

    _run(choose, doc)


def _run(choose: Callable[[str | None, Sequence[str]], Recipe], doc: str | None) -> None:
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--config", help="YAML file, e.g. configs/controlnet/convnext.yaml")
    parser.add_argument("--dry-run", action="store_true", help="print what would run, then stop")
    parser.add_argument("overrides", nargs="*", help="settings such as optim.lr=1e-4")
    arguments = parser.parse_intermixed_args()
    extra = ["run.dry_run=true"] if arguments.dry_run else []
    try:
        config_class, train = choose(arguments.config, arguments.overrides)
        train(load_config(config_class, arguments.config, [*arguments.overrides, *extra]))
    except InputError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)


def make_datasets(
    images: ImageSet, config: DataConfig, seed: int
) -> tuple[CropDataset, CropDataset]:
    """Returns random crops for training and central crops of the held-back images."""
    train, held = split_held_back(images.labels or [], config.held_back_per_class)
    central = replace(config, crop="center")
    return CropDataset(images, train, config, seed), CropDataset(images, held, central, seed)


def stack_items(dataset: CropDataset, n: int | None = None) -> dict[str, Tensor]:
    """Stacks n items, or all, that are spread evenly over a data set; notes those replaced.

    Raises:
        InputError: the data set is empty.
    """
    if not len(dataset):
        raise InputError("Validation images are needed: set data.held_back_per_class to 1 or more.")
    n = min(n or len(dataset), len(dataset))
    positions = torch.linspace(0, len(dataset) - 1, n).round().long().tolist()
    items = [dataset[i] for i in positions]
    replaced = [x for i in items for x in dataset.unreadable(i["index"], i["n_unreadable"])]
    for location in dict.fromkeys(replaced):
        logger.warning("%s cannot be read and is replaced.", location)
    return default_collate(items)


def stack_images(dataset: CropDataset, n: int | None = None) -> tuple[Tensor, Tensor]:
    """Returns images `[n, 3, s, s]` and labels of n items spread evenly over the data set."""
    items = stack_items(dataset, n)
    return to_images(items["pixels"]), items["label"]


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
