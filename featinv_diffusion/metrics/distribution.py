"""Distances between two sets of feature vectors, whatever an extractor made them of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from featinv_diffusion.errors import InputError
from featinv_diffusion.metrics.statistics import FeatureMoments
from featinv_diffusion.seeds import derive_seed

_BLOCK = 20_000_000
"""Distances held at a time, in float64: 160 MB."""


@dataclass(frozen=True)
class PublishedMoments:
    """A mean and a covariance that were published without their vectors.

    Args:
        mean: `[d]`.
        covariance: `[d, d]`.
        count: images behind them, where it is known.
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int | None = None


Moments: TypeAlias = FeatureMoments | PublishedMoments
"""What a Fréchet distance reads."""


@dataclass(frozen=True)
class FrechetDistance:
    """A Fréchet distance and what it rests on.

    Args:
        value: the distance, at least 0; in squared units of the features.
        n: images.
        n_reference: images of the reference; None where it does not say.
        dim: d of the features.
        rank_deficient: whether a set has no more images than d, so that its covariance has no full
            rank and the distance is biased upwards beyond what n alone does. Compare such figures
            only at equal n.
    """

    value: float
    n: int | None
    n_reference: int | None
    dim: int
    rank_deficient: bool


class KernelDistance(NamedTuple):
    """Mean and standard deviation over subsets."""

    mean: float
    std: float


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]."""

    precision: float
    recall: float


def frechet_distance(moments: Moments, reference: Moments) -> FrechetDistance:
    """Returns ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½), as Heusel et al. 2017, equation 6.

    The trace of the root is taken as that of (Σ₁^½ Σ₂ Σ₁^½)^½, which is symmetric: no imaginary
    parts, and singular covariances need no offset.

    Raises:
        InputError: features of different lengths, or fewer than two images.
    """
    if moments.mean.shape != reference.mean.shape:
        raise InputError(
            "Moments must be of features of one length, got "
            f"{len(moments.mean)} and {len(reference.mean)}. Use one extractor for both."
        )
    cov, cov_reference = moments.covariance, reference.covariance
    root = _symmetric_root(cov)
    eigenvalues = np.linalg.eigvalsh(root @ cov_reference @ root)
    trace_of_root = np.sqrt(eigenvalues.clip(min=0)).sum()
    shift = moments.mean - reference.mean
    value = shift @ shift + np.trace(cov) + np.trace(cov_reference) - 2 * trace_of_root
    counts, dim = (moments.count, reference.count), len(shift)
    return FrechetDistance(
        value=max(0.0, float(value)),
        n=counts[0],
        n_reference=counts[1],
        dim=dim,
        rank_deficient=any(count is not None and count <= dim for count in counts),
    )


def kernel_distance(
    features: Float[Tensor, "n d"],
    reference: Float[Tensor, "m _"],
    *,
    degree: int = 3,
    subset_size: int = 1000,
    n_subsets: int = 100,
    seed: int = 0,
) -> KernelDistance:
    """Returns the unbiased squared MMD under (x·y/d + 1)^degree (Bińkowski et al. 2018; KID).

    It is averaged over random subsets without replacement within each; it may be a little below 0
    where the sets are alike.

    Raises:
        InputError: fewer images than a subset, or features of different lengths.
    """
    _check_lengths(features, reference)
    n_least = min(len(features), len(reference))
    if not 2 <= subset_size <= n_least or n_subsets < 1:
        raise InputError(
            f"Subsets must be at least one, of 2 to {n_least} images (the smaller set), "
            f"got {n_subsets} of {subset_size}. Choose smaller subsets or more images."
        )
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(n_subsets):
        x, y = (
            vectors[generator.choice(len(vectors), subset_size, replace=False)].double()
            for vectors in (features, reference)
        )
        values.append(_unbiased_mmd(x, y, degree))
    return KernelDistance(float(np.mean(values)), float(np.std(values)))


def precision_recall(
    features: Float[Tensor, "n d"], reference: Float[Tensor, "m _"], *, k: int = 3
) -> PrecisionRecall:
    """Returns the improved precision and recall of Kynkäänniemi et al. 2019, equations 1 and 2.

    Precision is the share of `features` that lie in a ball around a vector of the reference which
    reaches its k-th nearest neighbour; recall the same with the two exchanged. Both rise and fall
    with the number of images: compare at equal n and m, customarily 10,000.

    Raises:
        InputError: no more images than k, or features of different lengths.
    """
    _check_lengths(features, reference)
    n_least = min(len(features), len(reference))
    if not 1 <= k < n_least:
        raise InputError(f"k must lie in 1 … {n_least - 1} (the images less one), got {k}.")
    x, y = features.double(), reference.double()
    return PrecisionRecall(
        precision=_share_inside(x, y, _radii(y, k)), recall=_share_inside(y, x, _radii(x, k))
    )


def _symmetric_root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def _unbiased_mmd(x: Tensor, y: Tensor, degree: int) -> float:
    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** degree

    def mean_off_diagonal(matrix: Tensor) -> Tensor:
        n = len(matrix)
        return (matrix.sum() - matrix.diagonal().sum()) / (n * (n - 1))

    within = mean_off_diagonal(kernel(x, x)) + mean_off_diagonal(kernel(y, y))
    return float(within - 2 * kernel(x, y).mean())


def _radii(vectors: Tensor, k: int) -> Tensor:
    # The nearest of all is the vector itself, so its k-th neighbour is the (k + 1)-th smallest.
    blocks = vectors.split(_rows(vectors))
    return torch.cat([torch.cdist(block, vectors).kthvalue(k + 1).values for block in blocks])


def _share_inside(vectors: Tensor, centres: Tensor, radii: Tensor) -> float:
    blocks = vectors.split(_rows(centres))
    inside = [(torch.cdist(block, centres) <= radii).any(dim=1) for block in blocks]
    return float(torch.cat(inside).double().mean())


def _rows(columns: Tensor) -> int:
    return max(1, _BLOCK // len(columns))


def _check_lengths(features: Tensor, reference: Tensor) -> None:
    if features.shape[1] != reference.shape[1]:
        raise InputError(
            f"Features must be of one length, got {features.shape[1]} and {reference.shape[1]}. "
            "Use one extractor for both."
        )


# ---- A sample of bounded size of the feature vectors of a stream ---------------------------------


class FeatureSample:
    """At most `size` of the vectors that come in batches, drawn without replacement.

    Which ones is decided by a hash of each image's id and the seed: the sample is the same in
    whatever order, batches and processes the images come. For the kernel distance and for
    precision and recall, which need vectors where a Fréchet distance needs moments only.

    Args:
        dim: d, the length of a vector.
        size: vectors kept, as float32.
        seed: of the draw.
    """

    def __init__(self, dim: int, size: int = 10_000, seed: int = 0):
        if size < 1:
            raise InputError(f"A sample must hold at least one vector, got size {size}.")
        self.dim, self.size, self.seed = dim, size, seed
        empty = np.zeros((0, dim), dtype=np.float32), np.zeros(0, dtype=np.int64)
        self._parts: list[tuple[np.ndarray, np.ndarray]] = [empty]

    def __len__(self) -> int:
        return min(self.size, self._held)

    @property
    def features(self) -> Float[Tensor, "n d"]:
        """The vectors kept, in the order of their hashes."""
        return torch.from_numpy(self._choose()[0].copy())

    def update(self, features: Float[Tensor, "n d"], ids: Sequence[str]) -> None:
        """Adds a batch; `ids` name its images and must differ over the whole stream.

        Raises:
            InputError: vectors of another length, or not one id for each.
        """
        if features.ndim != 2 or features.shape[1] != self.dim or len(ids) != len(features):
            raise InputError(
                f"A batch must be [n, {self.dim}] with n ids, "
                f"got shape {list(features.shape)} with {len(ids)} ids."
            )
        ranks = np.array([derive_seed(self.seed, name) for name in ids], dtype=np.int64)
        self._keep(np.array(features.detach().float().cpu()), ranks)

    @property
    def _held(self) -> int:
        return sum(len(ranks) for _, ranks in self._parts)

    def _keep(self, features: np.ndarray, ranks: np.ndarray) -> None:
        self._parts.append((features, ranks))
        if self._held > 2 * self.size:  # not at every batch: each time copies the whole sample
            self._choose()

    def _choose(self) -> tuple[np.ndarray, np.ndarray]:
        features, ranks = (np.concatenate(arrays) for arrays in zip(*self._parts, strict=True))
        kept = np.argsort(ranks, kind="stable")[: self.size]
        self._parts = [(features[kept], ranks[kept])]
        return self._parts[0]
