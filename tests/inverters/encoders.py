"""A small SigLIP encoder in a folder, and a reconstructor of its features, with random weights."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from featinv_diffusion.inverters.reconstructor import Reconstructor
from featinv_diffusion.types import FeatureSpec
from tests.tiny import seeded

NAME, SIDE, PATCH, WIDTH = "small/siglip", 64, 8, 32
SPEC = FeatureSpec(NAME, "last", WIDTH, (8, 8))
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


@seeded
def save_encoder(folder: Path) -> Path:
    """32×8×8 features at 64 px, normalised by `MEAN` and `STD`."""
    config = SiglipVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
    )
    SiglipVisionModel(config).eval().save_pretrained(folder)
    processor = {
        "image_mean": MEAN,
        "image_std": STD,
        "size": {"height": SIDE, "width": SIDE},
        "resample": 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@seeded
def make_reconstructor(spec: FeatureSpec = SPEC, **overrides) -> Reconstructor:
    """Batch norms have statistics as after training."""
    settings = {"image_size": (SIDE, SIDE), "mean": MEAN, "std": STD, "depth": 2, "n_heads": 2}
    model = Reconstructor(asdict(spec), **(settings | overrides))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def save_member(folder: Path) -> Path:
    """A folder with `backbone` and `reconstructor`, as the bundled ones are."""
    save_encoder(folder / "backbone")
    make_reconstructor().save_pretrained(folder / "reconstructor")
    return folder


def make_features(n: int, spec: FeatureSpec = SPEC) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, spec.channels, *spec.grid, generator=generator)
