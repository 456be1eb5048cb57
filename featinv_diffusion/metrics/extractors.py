"""From images to the vectors whose distributions are compared; the base and the classifiers."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from featinv_diffusion.backbones import Backbone
from featinv_diffusion.types import Images


class ImageFeatures(nn.Module, ABC):
    """A frozen network that gives one vector for each image.

    Images are rounded to 8 bits first, as they would be read from a file. Move it with `.to`; the
    images follow it to its device.

    Args:
        name: of the space.
        distance_name: what a Fréchet distance in this space is called in reports.
        dim: d, the length of a vector.
        conventions: everything about the vectors that changes a distance: model, weights, resize,
            rounding. State them beside each figure.
    """

    def __init__(self, *, name: str, distance_name: str, dim: int, conventions: dict[str, str]):
        super().__init__()
        self.name, self.distance_name, self.dim = name, distance_name, dim
        self.conventions = {"images": "rounded to 8 bits", **conventions}

    @abstractmethod
    def _describe(self, pixels: UInt8[Tensor, "b 3 h w"]) -> Tensor:
        """Returns a vector for each image."""

    @torch.no_grad()
    def forward(self, images: Images) -> Float[Tensor, "b d"]:
        """Returns the vectors in float32."""
        pixels = (images.float().clamp(0, 1) * 255).round().to(torch.uint8)
        return self._describe(pixels.to(self._device())).float()

    def train(self, mode: bool = True) -> ImageFeatures:
        """Does nothing but keep the network in evaluation mode."""
        return super().train(False)

    def _device(self) -> torch.device:
        return next(self.parameters()).device


class ClassifierFeatures(ImageFeatures):
    """The mean over cells of a backbone's feature map; needs no weights but the backbone's.

    A Fréchet distance in this space is not an FID and is named after the backbone.
    """

    def __init__(self, backbone: Backbone):
        spec, preprocessing = backbone.spec, backbone.preprocessing
        height, width = preprocessing.size
        super().__init__(
            name=backbone.name,
            distance_name=f"frechet_distance_{backbone.name}",
            dim=spec.channels,
            conventions={
                "features": f"mean over cells of the {spec}",
                "resize": f"to {height}×{width}, {preprocessing.interpolation} with antialiasing",
                "resize_rounding": "none",
            },
        )
        self.backbone = backbone

    def _describe(self, pixels: UInt8[Tensor, "b 3 h w"]) -> Tensor:
        return self.backbone.features(pixels.float() / 255).float().mean(dim=(2, 3))
