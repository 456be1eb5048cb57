"""Tiny backbones with random weights: the papers' models by their timm ids, and others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    IJepaConfig,
    IJepaForImageClassification,
    InternVLVisionConfig,
    InternVLVisionModel,
    SamVisionConfig,
    SamVisionModel,
    SiglipConfig,
    SiglipForImageClassification,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
)

from featinv_diffusion.backbones import Backbone, load_backbone, wrap_model
from featinv_diffusion.backbones.names import PUBLISHED
from tests import tiny

SIZE = 64
RESNET: dict[str, Any] = {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16), "stem_width": 8}
CONVNEXT: dict[str, Any] = {"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 24)}
SWIN: dict[str, Any] = {
    "depths": (1, 2),
    "embed_dim": 16,
    "num_heads": (2, 2),
    "window_size": 4,
    "img_size": SIZE,
}
VIT: dict[str, Any] = {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": SIZE}
PAPER: dict[str, dict[str, Any]] = {
    "resnet": RESNET,
    "convnext": CONVNEXT,
    "swin": SWIN,
    "vit": VIT,
}
TIMM: dict[str, dict[str, Any]] = {
    "vit_small_patch16_224": VIT | {"reg_tokens": 4, "class_token": True},
    "vit_base_patch16_siglip_224": VIT | {"num_classes": 5},
    "vit_base_patch16_clip_224": VIT | {"global_pool": "avg"},
    "deit_tiny_distilled_patch16_224": VIT,
    "beit_base_patch16_224": VIT,
    "eva02_base_patch16_clip_224": VIT,
    "samvit_base_patch16": VIT | {"window_size": 3, "global_attn_indexes": (1,)},
    "vit_intern300m_patch14_448": VIT | {"patch_size": 16},
    "test_efficientnet": {},
    "coat_lite_tiny": {"img_size": SIZE},
}
ViT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIZE,
    "patch_size": 16,
}
DINO = {k: v for k, v in ViT.items() if k != "intermediate_size"}
CLASSES: dict[str, Any] = {"num_labels": 5}
SAM: dict[str, Any] = DINO | {
    "mlp_dim": 48,
    "window_size": 3,  # does not divide the grid of 4
    "global_attn_indexes": [1],
    "output_channels": 24,
}
TOWERS: dict[str, tuple[Any, Any, int]] = {
    "clip": (CLIPVisionModel, CLIPVisionConfig(**ViT), 1),
    "clip-classes": (CLIPForImageClassification, CLIPConfig(vision_config=ViT, **CLASSES), 1),
    "deit-classes": (DeiTForImageClassification, DeiTConfig(**ViT, **CLASSES), 2),
    "dinov2": (Dinov2Model, Dinov2Config(**DINO), 1),
    "dinov2-classes": (Dinov2ForImageClassification, Dinov2Config(**DINO, **CLASSES), 1),
    "dinov2-registers": (
        Dinov2WithRegistersModel,
        Dinov2WithRegistersConfig(**DINO, num_register_tokens=3),
        4,
    ),
    "dinov2-registers-classes": (
        Dinov2WithRegistersForImageClassification,
        Dinov2WithRegistersConfig(**DINO, **CLASSES, num_register_tokens=3),
        4,
    ),
    "dinov3": (DINOv3ViTModel, DINOv3ViTConfig(**ViT, num_register_tokens=2), 3),
    "ijepa-classes": (IJepaForImageClassification, IJepaConfig(**ViT, **CLASSES), 0),
    "internvit": (InternVLVisionModel, InternVLVisionConfig(**ViT), 1),
    "sam": (SamVisionModel, SamVisionConfig(**SAM), 0),
    "siglip": (SiglipVisionModel, SiglipVisionConfig(**ViT), 0),
    "siglip-classes": (
        SiglipForImageClassification,
        SiglipConfig(vision_config=ViT, **CLASSES),
        0,
    ),
    "vit-classes": (ViTForImageClassification, ViTConfig(**ViT, **CLASSES), 1),
}
"""Class, configuration, and how many tokens come before the patches."""

TOKEN_TOWERS = [name for name in TOWERS if name != "sam"]
"""Those whose last hidden state is a sequence of tokens."""

NAMES = [*PAPER, *TIMM, *TOWERS, "wrapper"]


def randomise(model: nn.Module) -> nn.Module:
    """Replaces the weights, many of which start at 0 or 1, so that each one matters."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = parameter.data + 0.1 * noise
    return model.eval()


@tiny.seeded
def make_tower(name: str) -> Any:
    factory, config, _ = TOWERS[name]
    return randomise(factory(config))


@tiny.seeded
def make_timm(name: str, **overrides) -> Any:
    return randomise(timm.create_model(name, **(TIMM.get(name, {}) | overrides)))


@tiny.seeded
def make(name: str) -> Backbone:
    """A backbone that is the same at every call."""
    if name in TOWERS:
        return wrap_model(make_tower(name), name=name)
    if name == "wrapper":
        return wrap_model(tiny.make_backbone(), name=name)
    arguments = PAPER[name] if name in PAPER else TIMM[name]
    timm_id = PUBLISHED.get(name, name)
    backbone = load_backbone(timm_id, pretrained=False, input_size=SIZE, **arguments)
    randomise(backbone.model)
    return backbone


def at(backbone: Backbone, layer: str) -> Backbone:
    """The same model, seen at another layer."""
    size = backbone.input_size
    return wrap_model(backbone.model, name=backbone.name, layer=layer, input_size=size)


def make_images(n: int = 2, size: tuple[int, int] = (SIZE, SIZE)) -> Tensor:
    return torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(n))


def save_tower(name: str, folder: Path) -> Any:
    model = make_tower(name)
    model.save_pretrained(folder)
    return model
