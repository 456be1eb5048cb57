"""Similarity of a reconstruction to its original as an encoder that made neither sees it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from featinv_diffusion.backbones import Backbone, load_backbone
from featinv_diffusion.backbones.timm import TimmBackbone
from featinv_diffusion.backbones.transformers import TransformersBackbone
from featinv_diffusion.errors import InputError
from featinv_diffusion.pixel_operations import to_grey
from featinv_diffusion.sampling import BUNDLED
from featinv_diffusion.types import Images

BUNDLED_SCORERS = ("tiny/convnext", "tiny/resnet", "tiny/swin", "tiny/vit")


@dataclass(frozen=True, eq=False)
class Scorer:
    """An encoder that compares.

    Args:
        grey: whether it sees images without colour, as in the code of "Image Reconstruction as a
            Tool for Feature Analysis"; the paper does not say so.
    """

    backbone: Backbone
    grey: bool = False

    @property
    def column(self) -> str:
        """The name of the figure."""
        return f"{'grey_' if self.grey else ''}similarity_{self.backbone.name}"

    @torch.no_grad()
    def embed(self, images: Images) -> Float[Tensor, "b c"]:
        """One unit vector per image."""
        if self.grey:
            size = self.backbone.input_size
            images = to_grey(resize(images, size))
        return F.normalize(pooled_embedding(self.backbone, images).float(), dim=1)


def pooled_embedding(backbone: Backbone, images: Images) -> Float[Tensor, "b c"]:
    """What the model pools its features to: before the head of a timm model, or pooler_output.

    For a tower of transformers that pools nothing, the mean of its patches. CLIP's is before its
    projection, which towers do not hold; SigLIP's is the embedding that is contrasted.
    """
    if isinstance(backbone, TimmBackbone):
        model: Any = backbone.model
        features = model.forward_features(backbone.preprocess(images))
        return model.forward_head(features, pre_logits=True).flatten(1)
    if not isinstance(backbone, TransformersBackbone):
        return backbone.features(images).mean(dim=(2, 3))
    outputs: list[Any] = []
    handle = backbone.tower.register_forward_hook(lambda _m, _i, output: outputs.append(output))
    try:
        features = backbone.features(images)
    finally:
        handle.remove()
    pooled = getattr(outputs[0], "pooler_output", None)
    return features.mean(dim=(2, 3)) if pooled is None else pooled


def resize(images: Images, size: tuple[int, int]) -> Float[Tensor, "b 3 _ _"]:
    """Bilinear with antialiasing; images of this size are returned as they are."""
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    return F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)


def open_scorers(names: Sequence[str], compared: Collection[str], grey: bool) -> list[Scorer]:
    """Loads the scorers, each in colour and, with `grey`, without it too.

    Args:
        names: none takes the first of the bundled classifiers that is not compared.
        compared: the backbones whose reconstructions are scored.

    Raises:
        InputError: a scorer that is compared itself, is named twice, or cannot be loaded.
    """
    taken = {_plain(name) for name in compared}
    free = [name for name in BUNDLED_SCORERS if _plain(name) not in taken]
    if not names and not free:
        raise InputError("All bundled classifiers are compared: name another one with --scorers.")
    names = names or free[:1]
    if len({_plain(name) for name in names}) < len(names):
        raise InputError(f"--scorers names a backbone twice: {', '.join(names)}")
    for name in names:
        if _plain(name) in taken:
            raise InputError(
                f"A scorer must be none of the compared encoders, but {name!r} is. Name another "
                "one, or leave --scorers out."
            )
    backbones = [load_backbone(name) for name in names]
    colours = (False, True) if grey else (False,)
    return [Scorer(backbone, colour) for colour in colours for backbone in backbones]


def _plain(name: str) -> str:
    return name.removeprefix(BUNDLED)
