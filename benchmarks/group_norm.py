"""The group norm of training against PyTorch's: channels_last, bf16, forward and backward.

    OMP_NUM_THREADS=1 python benchmarks/group_norm.py

Prints the fastest of ten passes of each in milliseconds, side by side, for a batch of 32.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from featinv_diffusion.training.group_norm import ChannelsLastGroupNorm

SIZES = ((16, 8, 64), (32, 8, 32), (64, 16, 16), (128, 16, 16), (128, 16, 4), (128, 8, 16))
"""(channels, groups, side)"""


def fastest(norm: Callable[[Tensor], Tensor], x: Tensor, upstream: Tensor) -> float:
    times = []
    for _ in range(11):  # the first pass warms up
        began = time.perf_counter()
        norm(x).backward(upstream)
        times.append(time.perf_counter() - began)
    return 1000 * min(times[1:])


def main() -> None:
    torch.manual_seed(0)
    print("| channels | groups | side | PyTorch, ms | here, ms |\n|---|---|---|---|---|")
    for channels, groups, side in SIZES:
        x, upstream = (
            torch.randn(32, channels, side, side)
            .bfloat16()
            .contiguous(memory_format=torch.channels_last)
            for _ in range(2)
        )
        x.requires_grad_()
        weight, bias = torch.rand(channels, requires_grad=True), torch.rand(channels)
        half = weight.detach().bfloat16(), bias.bfloat16()

        def theirs(x: Tensor, groups: int = groups, half: tuple[Tensor, Tensor] = half) -> Tensor:
            return F.group_norm(x, groups, *half, 1e-6)

        def ours(
            x: Tensor, groups: int = groups, scale: tuple[Tensor, Tensor] = (weight, bias)
        ) -> Tensor:
            result: Tensor = ChannelsLastGroupNorm.apply(x, *scale, groups, 1e-6)
            return result

        cells = [f"{fastest(norm, x, upstream):.2f}" for norm in (theirs, ours)]
        print(f"| {channels} | {groups} | {side} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
