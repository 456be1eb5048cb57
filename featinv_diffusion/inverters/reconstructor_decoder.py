"""The convolutional half of a reconstructor: from a map to normalised pixels."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from timm.layers.activations import QuickGELU
from torch import Tensor, nn
from torch.nn import functional as F

PUBLISHED_STAGES = 4
"""Stages of the published decoder, each of which doubles the sides of the map."""


class ResidualBlock(nn.Module):
    """QuickGELU(x + two convolutions with batch norm, and QuickGELU between them)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.activation = QuickGELU()

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        inner = self.activation(self.bn1(self.conv1(x)))
        return self.activation(self.bn2(self.conv2(inner)) + x)


class ResidualDecoder(nn.Module):
    """Stages that double the map, residual blocks at full size, and a convolution to RGB.

    A stage is a transposed convolution and a residual block. Where the stages do not lead to the
    size of the image, the picture is resized bilinearly at the end.

    Args:
        n_in: channels of the map.
        channels: after each stage; published are n_in / 2, / 4, / 8 and / 16.
        n_residual: residual blocks after the last stage; published are 2.
        image_size: (h, w) in pixels.
    """

    def __init__(
        self,
        n_in: int,
        channels: Sequence[int],
        n_residual: int,
        image_size: tuple[int, int],
    ):
        super().__init__()
        self.image_size = image_size
        layers: list[nn.Module] = []
        for n_out in channels:
            layers += [nn.ConvTranspose2d(n_in, n_out, 4, 2, 1), ResidualBlock(n_out)]
            n_in = n_out
        layers += [ResidualBlock(n_in) for _ in range(n_residual)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(n_in, 3, 3, padding=1))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 height width"]:
        pixels = self.layers(x)
        if tuple(pixels.shape[-2:]) == self.image_size:
            return pixels
        # On the CPU antialiasing knows no half precision.
        resized = F.interpolate(pixels.float(), self.image_size, mode="bilinear", antialias=True)
        return resized.to(pixels.dtype)


def count_doublings(grid: tuple[int, int], image_size: tuple[int, int]) -> int:
    """Returns how many stages lead from a map to an image.

    As many as double the map to the image where its sides are the map's times one power of two (4
    for patches of 16 pixels, 3 for 8), otherwise the 4 of the published decoder, whose output is
    resized: patches of 14 pixels are drawn with 16.
    """
    factor = image_size[0] // grid[0]
    is_power = factor > 0 and factor & (factor - 1) == 0
    if is_power and image_size == (grid[0] * factor, grid[1] * factor):
        return factor.bit_length() - 1
    return PUBLISHED_STAGES


def default_channels(n_in: int, n_stages: int) -> list[int]:
    """Returns channels that halve with each stage, as the published ones do."""
    return [max(1, n_in // 2 ** (i + 1)) for i in range(n_stages)]
