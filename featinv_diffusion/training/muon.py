"""Muon that orthogonalises matrices of one shape together, in a number format that is quick."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import timm.optim
import torch
from timm.optim import muon
from torch import Tensor, nn


class Muon(timm.optim.Muon):
    """timm's Muon with the same state and update; only how it is computed differs.

    timm iterates in bfloat16, matrix by matrix. Processors without bfloat16 units emulate it, many
    times slower than float32; batches need fewer calls.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As `timm.optim.Muon.step`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        held: list[tuple[nn.Parameter, Tensor]] = []
        for group in self.param_groups:
            by_shape: dict[tuple[Any, ...], list[nn.Parameter]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None and self._is_matrix(p):
                    by_shape[p.shape[0], p[0].numel(), p.dtype, p.device].append(p)
                    held.append((p, p.grad))
            for matrices in by_shape.values():
                self._update(matrices, group)
        for p, _ in held:
            p.grad = None
        super().step()  # of all other parameters
        for p, gradient in held:
            p.grad = gradient
        return loss

    def _is_matrix(self, p: nn.Parameter) -> bool:
        state = self.state[p]
        if "use_muon" not in state:
            state["use_muon"] = muon._is_suitable_for_muon(p)
        return state["use_muon"]

    def _update(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        updates = []
        for p in parameters:
            state, gradient = self.state[p], p.grad
            assert gradient is not None
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p)
            average = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
            update = gradient.lerp(average, group["momentum"]) if group["nesterov"] else average
            updates.append(update.flatten(1))
        directions = muon.zeropower_via_newtonschulz(
            torch.stack(updates),
            group["ns_steps"],
            muon.resolve_ns_coefficients(group["ns_coefficients"], muon._COEFFICIENTS),
            eps=group["eps"],
            safety_factor=group["safety_factor"],
            dtype=quick_dtype(updates[0].device),
        )
        scale = muon.get_lr_scale(directions.shape, group["adjust_lr_fn"])
        for p, direction in zip(parameters, directions, strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(direction.reshape(p.shape).to(p.dtype), alpha=-group["lr"] * scale)


def quick_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies in it, else float32."""
    if device.type == "cpu":
        quick = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    elif device.type == "cuda":
        quick = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        quick = True
    return torch.bfloat16 if quick else torch.float32
