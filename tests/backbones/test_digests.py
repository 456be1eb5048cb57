"""Digests of weights: every value, name, type and shape counts, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from featinv_diffusion.backbones.base import weights_sha256


class Weights(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.arange(6, dtype=dtype).view(2, 3))
        self.register_buffer("count", torch.tensor(3))


def test_equal_weights_have_equal_digests_whatever_the_order():
    a, b = Weights(), Weights()
    assert weights_sha256({"a": a, "b": b}) == weights_sha256({"b": Weights(), "a": Weights()})
    assert weights_sha256({"a": a}) != weights_sha256({"b": a})


@pytest.mark.parametrize("change", ["value", "buffer", "shape", "dtype"])
def test_any_change_changes_the_digest(change: str):
    model = Weights(torch.bfloat16 if change == "dtype" else torch.float32)
    if change == "value":
        model.weight.data[1, 2] += 1e-6
    if change == "buffer":
        model.count += 1  # pyright: ignore[reportOperatorIssue]
    if change == "shape":
        model.weight.data = model.weight.data.view(3, 2)
    assert weights_sha256({"": model}) != weights_sha256({"": Weights()})
