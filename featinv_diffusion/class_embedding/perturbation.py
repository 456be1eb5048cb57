"""The perturbation test: how accuracy falls as tokens go in the order of their relevance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from featinv_diffusion.class_embedding.anatomy import Anatomy
from featinv_diffusion.class_embedding.recording import keeping_tokens
from featinv_diffusion.errors import InputError
from featinv_diffusion.types import Images

Direction = Literal["negative", "positive"]


@dataclass(frozen=True, eq=False)
class RemovalCurve:
    """Whether each image is still classified right with so many image tokens left.

    Args:
        n_kept: increasing, the last is all tokens.
        correct: 0 or 1, or a mean of several orders.
    """

    n_kept: tuple[int, ...]
    correct: Float[Tensor, "b points"]

    def at_each_count(self) -> Float[Tensor, "b patches"]:
        """Returns the curve at 1 … n kept tokens, linear between the counts that were run."""
        counts = np.arange(1, self.n_kept[-1] + 1)
        rows = [np.interp(counts, self.n_kept, row) for row in self.correct.double().numpy()]
        return torch.from_numpy(np.stack(rows)).float()

    def area(self) -> Float[Tensor, " b"]:
        """Returns the area under the raw curve of each image: its mean over 1 … n kept tokens."""
        return self.at_each_count().mean(dim=1)

    def published_area(self) -> float | None:
        """Returns Σ_{k<n} accuracy_k / (n · max_k accuracy_k), the figure of Vilas et al. 2023.

        It leaves out the whole image and is 1 − 1/n at most; None where nothing is right.
        """
        accuracy = self.at_each_count().mean(dim=0)[:-1]
        peak = float(accuracy.max())
        return None if peak == 0 else float(accuracy.sum()) / (self.n_kept[-1] * peak)


def order_by(relevance: Float[Tensor, "b patches"]) -> Int[Tensor, "b patches"]:
    """Returns the numbers of the patches, the most relevant first; ties in raster order."""
    return relevance.argsort(dim=1, descending=True, stable=True)


@torch.no_grad()
def removal_curve(
    anatomy: Anatomy,
    images: Images,
    labels: Int[Tensor, " b"],
    order: Int[Tensor, "b patches"],
    direction: Direction,
    n_points: int | None = None,
) -> RemovalCurve:
    """Classifies images whose tokens go, after the position embeddings, in the order of relevance.

    Args:
        order: of `order_by`.
        direction: `negative` removes the least relevant tokens first, `positive` the most.
        n_points: how many counts of kept tokens are run, evenly spread over 1 … n; None is all.

    Raises:
        InputError: fewer than two points or more than tokens.
    """
    n = anatomy.n_patches
    counts = spread_counts(n, n if n_points is None else n_points)
    lasting = order if direction == "negative" else order.flip(dims=(1,))
    columns = []
    for count in counts:
        with keeping_tokens(anatomy, lasting[:, :count]):
            top = anatomy.backbone.classify(images).argmax(dim=1).cpu()
        columns.append((top == labels.cpu()).float())
    return RemovalCurve(counts, torch.stack(columns, dim=1))


def spread_counts(n: int, n_points: int) -> tuple[int, ...]:
    """Returns `n_points` whole numbers from 1 to n, evenly spread.

    Raises:
        InputError: fewer than two points or more than n.
    """
    if not 2 <= n_points <= n:
        raise InputError(f"There must be 2 to {n} points of a removal curve, but {n_points} came.")
    return tuple(round(float(x)) for x in np.linspace(1, n, n_points))


def join_curves(curves: list[RemovalCurve]) -> RemovalCurve:
    """Joins batches that were run at the same counts."""
    return RemovalCurve(curves[0].n_kept, torch.cat([curve.correct for curve in curves]))


def mean_curve(curves: list[RemovalCurve]) -> RemovalCurve:
    """Averages the curves of several orders of the same images."""
    return RemovalCurve(
        curves[0].n_kept, torch.stack([curve.correct for curve in curves]).mean(dim=0)
    )
