"""What the scripts in `train/` share: arguments, bad-input sentences, validation images."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from featinv_diffusion.config import load_config
from featinv_diffusion.data import CropDataset, DataConfig, Records, split_held_back, to_images
from featinv_diffusion.errors import InputError

Config = TypeVar("Config")


def run_script(
    config_class: type[Config], train: Callable[[Config], object], doc: str | None
) -> None:
    """Parses `--config FILE key=value ... [--dry-run]`, trains, and exits 2 on bad input."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--config", help="YAML file, e.g. configs/controlnet/convnext.yaml")
    parser.add_argument("--dry-run", action="store_true", help="print what would run, then stop")
    parser.add_argument("overrides", nargs="*", help="settings such as optim.lr=1e-4")
    arguments = parser.parse_intermixed_args()
    extra = ["run.dry_run=true"] if arguments.dry_run else []
    try:
        train(load_config(config_class, arguments.config, [*arguments.overrides, *extra]))
    except InputError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)


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
