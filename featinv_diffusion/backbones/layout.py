"""Which axis of a layer's output is what, and the way from there to `[b, c, h, w]` and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from featinv_diffusion.types import Features

Axes = Literal["NCHW", "NHWC", "NLC"]


@dataclass(frozen=True)
class Layout:
    """The axes of a layer's output, as the model declares them.

    Args:
        axes: `NCHW`, `NHWC`, or `NLC` for tokens in raster order.
        n_prefix: `NLC` only: class and register tokens that come before the map.
        grid: `NLC` only: (h, w) of the map.
    """

    axes: Axes
    n_prefix: int = 0
    grid: tuple[int, int] = (0, 0)

    def fits(self, shape: tuple[int, ...], size: tuple[int, int]) -> bool:
        """Whether an output of this shape can be a map of an input of (h, w) = `size`.

        This only refuses: a map is as wide for its height as the input, up to rounding.
        """
        if self.axes == "NLC":
            return len(shape) == 3 and shape[1] == self.n_prefix + self.grid[0] * self.grid[1]
        if len(shape) != 4:
            return False
        height, width = shape[2:] if self.axes == "NCHW" else shape[1:3]
        return abs(height * size[1] - width * size[0]) < max(size)

    def to_map(self, output: Tensor) -> Features:
        """Returns the map `[b, c, h, w]` without its prefix tokens."""
        if self.axes == "NCHW":
            return output
        if self.axes == "NHWC":
            return output.permute(0, 3, 1, 2).contiguous()
        return output[:, self.n_prefix :].transpose(1, 2).unflatten(2, self.grid).contiguous()

    def from_map(self, features: Features) -> Tensor:
        """Returns the map in this layout; prefix tokens, which the map does not hold, are zero."""
        if self.axes == "NCHW":
            return features
        if self.axes == "NHWC":
            return features.permute(0, 2, 3, 1)
        tokens = features.flatten(2).transpose(1, 2)
        return nn.functional.pad(tokens, (0, 0, self.n_prefix, 0))


def leaf_layout(module: nn.Module) -> Layout | None:
    """Returns the 4-d layout that the class of a childless module implies, None where it does not.

    Classes named `…2d`, PyTorch's and timm's, work on NCHW; linear layers and layer norms on the
    last axis, but for those of transformers whose `data_format` says otherwise.
    """
    if getattr(module, "data_format", None) == "channels_first":
        return Layout("NCHW")
    if any(cls.__name__.endswith("2d") for cls in type(module).__mro__):
        return Layout("NCHW")
    if isinstance(module, nn.GroupNorm):
        return Layout("NCHW")
    if isinstance(module, nn.Linear | nn.LayerNorm | nn.RMSNorm):
        return Layout("NHWC")
    return None


def is_elementwise(module: nn.Module) -> bool:
    """Whether a module is a leaf without weights, such as an activation, dropout or identity.

    Where its output has the shape of its input, it also has the axes of its input.
    """
    leaf = next(module.children(), None) is None
    return leaf and not module._parameters and not module._buffers
