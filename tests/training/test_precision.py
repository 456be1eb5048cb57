"""Frozen models whose weights are stored in half precision train as their float32 copies do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from featinv_diffusion.config import load_config
from featinv_diffusion.training.controlnet import (
    ControlNetConfig,
    load_frozen_parts,
    train_controlnet,
)
from featinv_diffusion.training.inverter import InverterConfig, load_training_path, train_inverter
from tests import tiny
from tests.inverters import small
from train.tiny_family.autoencoder import AutoencoderConfig, train_autoencoder
from train.tiny_family.classifier import ClassifierConfig, train_classifier
from train.tiny_family.detector import DetectorConfig, train_detector

BUNDLED = Path(__file__).parents[2] / "featinv_diffusion/assets/tiny"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of two classes with boxes, a base, and models in half precision and their copies."""
    folder = tmp_path_factory.mktemp("precision")
    random = np.random.default_rng(0)
    for label in ("class0", "class1"):
        images = folder / f"images/train/{label}/images"
        images.mkdir(parents=True)
        lines = []
        for i in range(5):
            name = f"{label}_{i}.png"
            pixels = random.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(images / name)
            lines.append(f"{name} 8 8 47 47\n")
        (images.parent / f"{label}_boxes.txt").write_text("".join(lines))
    for name in ("vae", "unet", "text_encoder", "tokenizer", "scheduler"):
        getattr(tiny, f"make_{name}")().save_pretrained(str(folder / name))
    for name, build in (("convnext", make_two_classes), ("resnet", small.make_resnet)):
        model: Any = build().half()
        model.save_pretrained(folder / "half" / name)
        model.float().save_pretrained(folder / "full" / name)
    return folder


def make_two_classes() -> Any:
    """The tiny ConvNeXt for the two classes of the pictures."""
    model: Any = tiny.make_backbone()
    names = {0: "class0", 1: "class1"}
    model.config.id2label, model.config.label2id = names, {v: k for k, v in names.items()}
    model.timm_model.reset_classifier(2)
    return model


def overrides(folder: Path, output: Path, **more: Any) -> list[str]:
    values = {
        "data.root": folder / "images",
        "data.size": 64,
        "data.held_back_per_class": 1,
        "data.num_workers": 0,
        "optim.batch_size": 4,
        "optim.lr": 3e-3,
        "optim.max_steps": 4,
        "run.output": output,
        "run.n_validation_images": 2,
        "run.tracker": "none",
        "run.cpu": True,
        **more,
    }
    return [f"{key}={value}" for key, value in values.items()]


def losses(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "losses.jsonl").read_text().splitlines()]


CONTROLNET = {
    "model.feature_hidden_channels": 16,
    "model.statistics_images": 8,
    "validation.num_inference_steps": 1,
}
RECIPES: list[tuple[str, str, type, Callable[[Any], Path], dict[str, Any]]] = [
    ("model.backbone", "convnext", ControlNetConfig, train_controlnet, CONTROLNET),
    (
        "model.teacher",
        "convnext",
        ClassifierConfig,
        train_classifier,
        {"model.arguments": "{depths: [1,1,1,1], dims: [8,8,8,8], output_stride: 8}"},
    ),
    (
        "model.perceptual_classifier",
        "convnext",
        AutoencoderConfig,
        train_autoencoder,
        {
            "model.block_out_channels": "[8,8]",
            "model.latent_channels": 4,
            "model.norm_num_groups": 4,
        },
    ),
    (
        "model.classifier",
        "resnet",
        DetectorConfig,
        train_detector,
        {
            "model.d_model": 16,
            "model.encoder_layers": 1,
            "model.decoder_layers": 1,
            "model.n_heads": 2,
            "model.feedforward": 16,
            "model.n_queries": 3,
            "model.max_boxes": 1,
        },
    ),
]


@pytest.mark.parametrize(("key", "model", "kind", "train", "more"), RECIPES)
def test_half_weights_train_as_their_float32_copy(
    folder: Path,
    tmp_path: Path,
    key: str,
    model: str,
    kind: type,
    train: Callable[[Any], Path],
    more: dict[str, Any],
) -> None:
    if kind is ControlNetConfig:
        more = {**more, "model.base": folder}
    for stored in ("half", "full"):
        values = overrides(folder, tmp_path / stored, **{key: folder / stored / model, **more})
        train(load_config(kind, None, values))
    half, full = tmp_path / "half", tmp_path / "full"
    assert losses(half) == losses(full)
    files = [path.relative_to(half) for path in half.glob("final/**/*.safetensors")]
    assert files
    assert all((half / name).read_bytes() == (full / name).read_bytes() for name in files)


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("convnext", "fp32"),
        ("convnext", "bf16"),
        pytest.param("resnet", "bf16", marks=pytest.mark.slow),
    ],
)
def test_a_controlnet_trains_on_a_bundled_backbone(
    folder: Path, tmp_path: Path, name: str, precision: str
) -> None:
    more = {
        "model.base": BUNDLED / "base",
        "model.backbone": BUNDLED / name / "backbone",
        "run.mixed_precision": precision,
        **CONTROLNET,
    }
    config = load_config(ControlNetConfig, None, overrides(folder, tmp_path, **more))
    train_controlnet(config)
    assert all(np.isfinite(line["loss"]) for line in losses(tmp_path))
    parts = load_frozen_parts(config.model)
    assert parts.backbone.dtype == parts.vae.dtype == torch.float32
    assert parts.prompt_embeds.dtype == torch.float32


def test_an_inverter_trains_on_a_bundled_vit(folder: Path, tmp_path: Path) -> None:
    more = {
        "model.family": "vit",
        "model.model": "small/vit",
        "model.weights": BUNDLED / "vit/backbone",
        "model.modules": "{patches: {channels: [8], kernels: [4, 4], strides: [4, 2]}}",
        "model.statistics_images": 8,
    }
    config = load_config(InverterConfig, None, overrides(folder, tmp_path, **more))
    train_inverter(config)
    assert all(np.isfinite(line["loss"]) for line in losses(tmp_path))
    path = load_training_path(config.model)
    assert {weight.dtype for weight in path.model.parameters()} == {torch.float32}
