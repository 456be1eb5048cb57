"""Classification heads that read the mean of a map, in a form that can be split by concept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from featinv_diffusion.backbones.base import Backbone
from featinv_diffusion.errors import InputError
from featinv_diffusion.types import Features

_SHIFT = 0.5
"""Mean of the random maps that a head is tested on, so that centring and scaling show."""


@dataclass(frozen=True)
class PooledHead:
    """Class scores of a map f with mean p over its cells: `logit_k = s(p) u_k · p + b_k`.

    For a linear head (ResNet), u and b are the layer's own and s = 1. With a LayerNorm (γ, β, ε)
    between pooling and linear layer (ConvNeXt, w and b₀ the layer's own) the score is the same
    form, exactly:

        u_k = C (γ ⊙ w_k),   b_k = w_k · β + b₀_k,   s(p) = 1 / √(var(p) + ε)

    with C the centring over channels (C v = v − mean v, which is symmetric, so p need not
    be centred). s is one positive number per image: it scales all relevances of an image alike and
    is taken from the unedited image, so an edit that changes s changes more than its own share.

    Args:
        weight: u, `[k, c]`.
        bias: b, `[k]`.
        norm: the norm between pooling and the linear layer.
        eps: ε of the norm.
    """

    weight: Float[Tensor, "k c"]
    bias: Float[Tensor, " k"]
    norm: Literal["none", "layer_norm"] = "none"
    eps: float = 0.0

    @property
    def form(self) -> str:
        """The formula of a class score, for reports."""
        if self.norm == "none":
            return "logit = w · mean(f) + b"
        return "logit = C(γ ⊙ w) · mean(f) / √(var(mean(f)) + ε) + w · β + b"

    def logits(self, features: Features) -> Float[Tensor, "b k"]:
        """Returns all class scores of a map."""
        pooled = features.mean(dim=(2, 3))
        weight, bias = self.weight.to(pooled), self.bias.to(pooled)
        return self.scale(features)[:, None] * (pooled @ weight.T) + bias

    def scale(self, features: Features) -> Float[Tensor, " b"]:
        """Returns s of each image; ones for a linear head."""
        pooled = features.mean(dim=(2, 3))
        if self.norm == "none":
            return torch.ones_like(pooled[:, 0])
        return (pooled.var(dim=1, correction=0) + self.eps).rsqrt()

    def direction(self, class_index: int) -> Float[Tensor, " c"]:
        """Returns u of a class.

        Raises:
            InputError: no such class.
        """
        if not 0 <= class_index < len(self.weight):
            raise InputError(
                f"The class must lie in 0 … {len(self.weight) - 1}, got {class_index}."
            )
        return self.weight[class_index]


def make_head(linear: nn.Linear, norm: nn.LayerNorm | None = None) -> PooledHead:
    """Folds a LayerNorm that comes after pooling into the linear layer; see `PooledHead`."""
    weight = linear.weight.detach()
    bias = weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.detach()
    if norm is None:
        return PooledHead(weight.clone(), bias.clone())
    if norm.bias is not None:
        bias = bias + weight @ norm.bias.detach()
    if norm.weight is not None:
        weight = weight * norm.weight.detach()
    return PooledHead(weight - weight.mean(dim=1, keepdim=True), bias, "layer_norm", norm.eps)


@torch.no_grad()
def read_head(backbone: Backbone) -> PooledHead:
    """Finds the form of a backbone's head, checked against the backbone's own scores.

    Raises:
        InputError: no head that reads the map, or one of another form (maximum pooling, several
            layers).
    """
    spec = backbone.spec
    noise = torch.randn(4, spec.channels, *spec.grid, generator=torch.Generator().manual_seed(0))
    maps = (noise + _SHIFT).to(backbone.device, backbone.dtype)
    expected = backbone.logits(maps).float()
    tolerance = 1e-3 if backbone.dtype in (torch.float32, torch.float64) else 5e-2
    for head in _candidates(backbone.model, spec.channels, expected.shape[1]):
        error = (head.logits(maps).float() - expected).abs().max()
        if error <= tolerance * expected.abs().max().clamp(min=1e-6):
            return head
    raise InputError(
        f"The head of {backbone.name!r} must average the map and apply one linear layer, with at "
        "most a LayerNorm between, but its scores follow neither form. Relevance to a class is "
        "not defined for it; concepts can be found without a class."
    )


def _candidates(model: nn.Module, channels: int, n_classes: int) -> list[PooledHead]:
    """Returns the forms that the last matching linear layer could have, the plain one first."""
    modules = list(model.modules())
    linear = [
        m for m in modules if isinstance(m, nn.Linear) and m.weight.shape == (n_classes, channels)
    ][-1:]
    norms = [
        m for m in modules if isinstance(m, nn.LayerNorm) and m.normalized_shape == (channels,)
    ]
    return [make_head(layer, norm) for layer in linear for norm in [None, *norms[:-4:-1]]]
