"""Tiny vision transformers of each kind that can be read, with random weights that all matter."""

from __future__ import annotations

import timm
import torch
from timm.layers import SwiGLU

from featinv_diffusion.backbones import wrap_model
from featinv_diffusion.class_embedding.anatomy import Anatomy, read_anatomy
from tests import tiny
from tests.backbones import zoo

SMALL = {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 32, "patch_size": 8}
SMALL |= {"num_classes": 7}
TIMM = {
    "token": ("vit_tiny_patch16_224", {}),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 3}),
    "layer-scale": ("vit_tiny_patch16_224", {"init_values": 0.3, "qk_norm": True}),
    "gap": ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False}),
    "gap-norm-first": ("vit_tiny_patch16_224", {"global_pool": "avg", "fc_norm": False}),
    "post-norm": ("vit_base_patch16_rpn_224", {"init_values": 0.5}),
    "gated": ("vit_tiny_patch16_224", {"mlp_layer": SwiGLU}),
}
TRANSFORMERS = ("vit-classes", "deit-classes", "ijepa-classes")
NAMES = [*TIMM, *TRANSFORMERS]
CLASS_TOKEN = ["token", "registers", "layer-scale", "gated", "vit-classes", "deit-classes"]


@tiny.seeded
def make_vit(name: str = "token", **overrides) -> Anatomy:
    """The same at every call; 7 classes and 4×4 patches for timm, 5 and 4×4 for transformers."""
    if name in TRANSFORMERS:
        return read_anatomy(zoo.make(name))
    architecture, arguments = TIMM[name]
    model = timm.create_model(architecture, **(SMALL | arguments | overrides))
    zoo.randomise(model)
    return read_anatomy(wrap_model(model, name=name, input_size=model.patch_embed.img_size[0]))


def make_images(anatomy: Anatomy, n: int = 3) -> torch.Tensor:
    return zoo.make_images(n, anatomy.backbone.input_size)


def weights_of(anatomy: Anatomy) -> list[torch.Tensor]:
    return [p.detach().clone() for p in anatomy.backbone.model.state_dict().values()]
