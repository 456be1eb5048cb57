"""Group normalisation for training on a CPU in channels_last, several times faster than PyTorch's.

PyTorch's backward pass of this layout takes 40 % of a training step of a small autoencoder, where
groups have few channels. Here the sums and the affine maps run over rows of whole pixels, which
the vector units like.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

ROW = 512
"""Elements in a row that a broadcast runs over; short rows, one pixel of 16 channels, are slow."""
FAST_GROUP = 16
"""From so many channels in a group on, PyTorch's own is quicker."""


class ChannelsLastGroupNorm(torch.autograd.Function):
    """`F.group_norm` of maps `[b, c, h, w]` in channels_last, computed in float32."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, n_groups: int, eps: float
    ) -> Tensor:
        b, c, h, w = x.shape
        n = h * w * c // n_groups
        rows = _rows(x).float()
        sums = _channel_sums(rows, c).view(b, n_groups, -1).sum(2)
        squares = _channel_sums(rows * rows, c).view(b, n_groups, -1).sum(2)
        mean = sums / n
        inverse_std = ((squares / n - mean.square()).clamp_min(0) + eps).rsqrt()
        scale = _per_channel(inverse_std, c) * weight.float()
        offset = bias.float() - _per_channel(mean, c) * scale
        ctx.save_for_backward(x, weight, mean, inverse_std)
        y = torch.addcmul(_tile(offset, rows), rows, _tile(scale, rows))
        return _as_map(y.to(x.dtype), x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, weight, mean, inverse_std = ctx.saved_tensors
        b, c, h, w = x.shape
        n_groups = mean.shape[1]
        n = h * w * c // n_groups
        rows, gradient = _rows(x).float(), _rows(gradients[0]).float()
        mean, inverse_std = _per_channel(mean, c), _per_channel(inverse_std, c)
        total = _channel_sums(gradient, c)
        projected = (_channel_sums(gradient * rows, c) - mean * total) * inverse_std
        # dx = (w g − mean(w g) − x̂ mean(w g x̂)) / std, with means over the group
        shift = _per_channel((total * weight.float()).view(b, n_groups, -1).sum(2) / n, c)
        slope = _per_channel((projected * weight.float()).view(b, n_groups, -1).sum(2) / n, c)
        of_x = -inverse_std.square() * slope
        constant = -inverse_std * shift - of_x * mean
        dx = torch.addcmul(_tile(constant, rows), rows, _tile(of_x, rows))
        dx = torch.addcmul(dx, gradient, _tile(inverse_std * weight.float(), rows))
        dtype = weight.dtype
        dx = _as_map(dx.to(x.dtype), x.shape)
        return dx, projected.sum(0).to(dtype), total.sum(0).to(dtype), None, None


def speed_up_group_norms(module: nn.Module) -> None:
    """Lets every `nn.GroupNorm` below `module` use the fast form where it trains on a CPU."""
    for norm in module.modules():
        if type(norm) is nn.GroupNorm:  # a subclass may do more than normalise
            norm.__class__ = _FastGroupNorm


class _FastGroupNorm(nn.GroupNorm):
    def forward(self, input: Tensor) -> Tensor:
        fits = (
            torch.is_grad_enabled()
            and input.device.type == "cpu"
            and self.affine
            and input.dim() == 4
            and self.num_channels // self.num_groups < FAST_GROUP
            and input.is_contiguous(memory_format=torch.channels_last)
        )
        if not fits:
            return super().forward(input)
        result: Any = ChannelsLastGroupNorm.apply(
            input, self.weight, self.bias, self.num_groups, self.eps
        )
        return result


def _rows(x: Tensor) -> Tensor:
    """`[b, c, h, w]` → `[b, rows, k·c]`, k whole pixels in a row."""
    b, c, h, w = x.shape
    k = next(k for k in range(max(1, min(ROW // c, h * w)), 0, -1) if h * w % k == 0)
    return x.permute(0, 2, 3, 1).reshape(b, h * w // k, k * c)


def _as_map(rows: Tensor, shape: torch.Size) -> Tensor:
    b, c, h, w = shape
    return rows.view(b, h, w, c).permute(0, 3, 1, 2)


def _channel_sums(rows: Tensor, c: int) -> Tensor:
    return rows.sum(1).view(len(rows), -1, c).sum(1)


def _per_channel(of_groups: Tensor, c: int) -> Tensor:
    return of_groups.repeat_interleave(c // of_groups.shape[1], dim=1)


def _tile(of_channels: Tensor, rows: Tensor) -> Tensor:
    """`[b, c]` → `[b, 1, k·c]`."""
    return of_channels.repeat(1, rows.shape[2] // of_channels.shape[1])[:, None]
