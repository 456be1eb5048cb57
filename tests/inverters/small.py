"""Small forward paths with random weights, and inverses that fit them."""

from __future__ import annotations

from dataclasses import asdict

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

from featinv_diffusion.backbones.base import Preprocessing
from featinv_diffusion.inverters.blocks import ConvInverse
from featinv_diffusion.inverters.detr import (
    DecoderInverse,
    DetrPath,
    EncoderInverse,
    HeadInverse,
    make_detr,
)
from featinv_diffusion.inverters.modular import InverseSet, PathInfo
from featinv_diffusion.inverters.path import ForwardPath
from featinv_diffusion.inverters.swin import SwinInverse, SwinPath
from featinv_diffusion.inverters.vit import BlocksInverse, VitPath
from tests.tiny import seeded

SIDE, CLASSES = 64, 6


@seeded
def make_resnet() -> TimmWrapperForImageClassification:
    """A ResNet whose last map is 16×8×8."""
    config = TimmWrapperConfig(
        architecture="resnet18",
        num_labels=CLASSES,
        model_args={
            "layers": (1, 1, 1, 1),
            "channels": (8, 8, 16, 16),
            "stem_width": 4,
            "stem_type": "deep",
            "output_stride": 8,
        },
    )
    wrapper = TimmWrapperForImageClassification(config)
    for module in wrapper.modules():  # as after training
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return wrapper.eval()


@seeded
def make_detr_path(**sizes) -> DetrPath:
    """Maps of 16×8×8, 5 queries, 2 encoder and 3 decoder layers."""
    names = [f"class {i}" for i in range(CLASSES)]
    defaults = {
        "d_model": 16,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24,
        "num_queries": 5,
        "init_std": 0.3,
    }
    model = make_detr(make_resnet(), names, **(defaults | sizes))
    nn.init.normal_(model.model.query_position_embeddings.weight)
    return DetrPath(model, name="small/detr", input_size=(SIDE, SIDE))


@seeded
def make_vit_path(**arguments) -> VitPath:
    """Patches of 8 pixels and 192 channels (as many as a patch has values), 3 blocks."""
    defaults = {
        "img_size": SIDE,
        "patch_size": 8,
        "embed_dim": 192,
        "depth": 3,
        "num_heads": 3,
        "num_classes": CLASSES,
    }
    model = timm.create_model("vit_tiny_patch16_224", **(defaults | arguments)).eval()
    preprocessing = Preprocessing((SIDE, SIDE), IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    return VitPath(model, name="small/vit", preprocessing=preprocessing)


@seeded
def make_deit_path() -> VitPath:
    """A DeiT with a class and a distillation token, patches of 8 pixels and 2 blocks."""
    sizes = {"img_size": SIDE, "patch_size": 8, "depth": 2, "num_classes": CLASSES}
    model = timm.create_model("deit_tiny_distilled_patch16_224", **sizes).eval()
    nn.init.normal_(model.dist_token)
    nn.init.normal_(model.head_dist.weight)
    preprocessing = Preprocessing((SIDE, SIDE), IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    return VitPath(model, name="small/deit", preprocessing=preprocessing)


@seeded
def make_swin_path(architecture: str = "swin_tiny_patch4_window7_224") -> SwinPath:
    """Maps of 16×16×16, 16×16×16, 32×8×8 and 64×4×4, in windows of 4 cells."""
    model = timm.create_model(
        architecture,
        img_size=SIDE,
        window_size=4,
        embed_dim=16,
        depths=(2, 2, 1),
        num_heads=(2, 2, 4),
        num_classes=CLASSES,
    ).eval()
    preprocessing = Preprocessing((SIDE, SIDE), IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    return SwinPath(model, name="small/swin", preprocessing=preprocessing)


def ends(path: ForwardPath, reads: str, writes: str) -> dict[str, dict]:
    return {"reads_spec": asdict(path.spec(reads)), "writes_spec": asdict(path.spec(writes))}


@seeded
def make_detr_inverses(path: DetrPath) -> InverseSet:
    sizes = {"depth": 1, "n_heads": 2, "feedforward": 24}
    conv = {"channels": [8, 8, 8], "kernels": [1, 3, 3, 2], "strides": [1, 2, 2, 2]}
    modules = {
        "backbone": ConvInverse(**ends(path, "backbone", "image"), **conv),
        "encoder": EncoderInverse(**ends(path, "encoder", "backbone"), **sizes),
        "decoder": DecoderInverse(**ends(path, "decoder", "encoder"), **sizes),
        "prediction": HeadInverse(**ends(path, "prediction", "decoder"), hidden=(12, 12)),
        "detection": HeadInverse(**ends(path, "detection", "decoder"), hidden=(12, 12)),
    }
    return InverseSet(modules, PathInfo("detr", path.name, path.input_size))


@seeded
def make_vit_inverses(path: VitPath) -> InverseSet:
    conv = {"channels": [16], "kernels": [2, 4], "strides": [2, 4], "n_prefix": 1, "grid": [8, 8]}
    sizes = {"depth": 1, "n_heads": 3}
    modules = {
        "patches": ConvInverse(**ends(path, "patches", "image"), **conv),
        "blocks.1": BlocksInverse(**ends(path, "blocks.1", "patches"), **sizes),
        "encoder": BlocksInverse(**ends(path, "encoder", "patches"), **sizes),
        "last": BlocksInverse(**ends(path, "last", "patches"), **sizes),
    }
    return InverseSet(modules, PathInfo("vit", path.name))


@seeded
def make_swin_inverses(path: SwinPath) -> InverseSet:
    conv = {"channels": [8], "kernels": [2, 2], "strides": [2, 2]}
    sizes = {"depth": 2, "n_heads": 2, "window": 4}
    modules = {
        "patches": ConvInverse(**ends(path, "patches", "image"), **conv),
        "layers.0": SwinInverse(**ends(path, "layers.0", "patches"), **sizes),
        "layers.1": SwinInverse(**ends(path, "layers.1", "layers.0"), **sizes),
        "encoder": SwinInverse(**ends(path, "encoder", "layers.0"), **sizes),
        "last": SwinInverse(**ends(path, "last", "layers.1"), **sizes),
    }
    return InverseSet(modules, PathInfo("swin", path.name))


def state_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}
