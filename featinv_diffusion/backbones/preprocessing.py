"""Differentiable preprocessing of images by the statistics that a model was trained with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from featinv_diffusion.errors import InputError
from featinv_diffusion.types import Images

INTERPOLATIONS = ("bilinear", "bicubic")


@dataclass(frozen=True)
class Preprocessing:
    """Resizes to `size` and normalises to (images − mean) / std.

    The whole image is squashed to `size`, never cropped, so that the feature map covers all of it.

    Args:
        size: (h, w) in pixels.
        mean: per channel, of RGB in [0, 1].
        std: per channel, of RGB in [0, 1].
        interpolation: `bilinear` or `bicubic`, both with antialiasing, as Pillow computes them.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        if self.interpolation not in INTERPOLATIONS:
            raise InputError(
                f"Images are resized with one of {', '.join(INTERPOLATIONS)}, "
                f"but the model's configuration says {self.interpolation!r}."
            )

    def __call__(self, images: Images) -> Float[Tensor, "b 3 h w"]:
        """Returns the model's input in float32; gradients flow to `images`."""
        _check_images(images)
        resized = self._resize(images.float())
        mean = torch.tensor(self.mean, device=images.device)[:, None, None]
        std = torch.tensor(self.std, device=images.device)[:, None, None]
        return (resized - mean) / std

    def _resize(self, images: Tensor) -> Tensor:
        if tuple(images.shape[-2:]) == self.size:
            return images
        resized = F.interpolate(
            images, self.size, mode=self.interpolation, align_corners=False, antialias=True
        )
        return resized.clamp(0, 1)  # bicubic overshoots; Pillow clips to the range of its integers


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise InputError(
            "Images must be a float tensor [batch, 3, height, width] in [0, 1], "
            f"got {images.dtype} of shape {list(images.shape)}."
        )
