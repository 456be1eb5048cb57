"""Linear probes, one per token position: what could be read, beside what the class embedding reads.

Ridge regression on ±1 targets, as in Vilas et al. 2023, solved exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from featinv_diffusion.class_embedding.reading import rank_of
from featinv_diffusion.errors import InputError


@dataclass(frozen=True, eq=False)
class Probes:
    """One linear classifier per token position.

    Args:
        weight: float64.
        bias: float64.
    """

    weight: Float[Tensor, "n d k"]
    bias: Float[Tensor, "n k"]

    def predict(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n k"]:
        """Returns class scores, about −1 and 1."""
        return torch.einsum("bnd,ndk->bnk", tokens.double(), self.weight) + self.bias

    def rank(self, tokens: Float[Tensor, "b n d"], labels: Int[Tensor, " b"]) -> Tensor:
        """Returns the 0-based rank `[b, n]` of the label at each token, ties half."""
        scores = self.predict(tokens)
        index = labels[:, None, None].expand(-1, scores.shape[1], 1)
        return rank_of(scores, scores.gather(2, index))


def fit_probes(
    tokens: Float[Tensor, "b n d"], labels: Int[Tensor, " b"], n_classes: int, alpha: float = 1.0
) -> Probes:
    """Fits min ‖y − w·x − b‖² + α‖w‖² for every position and class; y is 1 for the label, else −1.

    Raises:
        InputError: fewer than two images, or α that is not positive.
    """
    if len(tokens) < 2 or alpha <= 0:
        raise InputError(
            f"Probes need at least 2 images and a positive alpha, got {len(tokens)} images and "
            f"alpha {alpha}."
        )
    x = tokens.double().transpose(0, 1)
    y = torch.full((len(labels), n_classes), -1.0, dtype=torch.float64)
    y[torch.arange(len(labels)), labels] = 1
    x_mean, y_mean = x.mean(dim=1, keepdim=True), y.mean(dim=0)
    x = x - x_mean
    ridge = alpha * torch.eye(x.shape[2], dtype=torch.float64)
    weight = torch.linalg.solve(x.mT @ x + ridge, x.mT @ (y - y_mean))
    return Probes(weight, y_mean - (x_mean @ weight)[:, 0])
