"""A sample of bounded size of the feature vectors of a stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from featinv_diffusion.errors import InputError
from featinv_diffusion.seeds import derive_seed


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
            raise InputError(f"A sample must hold at least one vector, but size {size} came.")
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
                f"but shape {list(features.shape)} with {len(ids)} ids came."
            )
        ranks = np.array([derive_seed(self.seed, name) for name in ids], dtype=np.int64)
        self._keep(np.array(features.detach().float().cpu()), ranks)

    def merge(self, other: FeatureSample) -> None:
        """Adds what `other` has seen, e.g. in another process.

        Raises:
            InputError: a sample of other vectors, size or seed.
        """
        mine, its = (self.dim, self.size, self.seed), (other.dim, other.size, other.seed)
        if mine != its:
            raise InputError(
                "Samples must agree in length of vectors, size and seed, "
                f"but {mine} and {its} came."
            )
        self._keep(*other._choose())

    def state_dict(self) -> dict[str, np.ndarray]:
        """Returns arrays for `np.savez`; `from_state` reads them back with nothing lost."""
        features, ranks = self._choose()
        return {
            "sample_features": features.copy(),
            "sample_ranks": ranks.copy(),
            "sample_settings": np.array([self.size, self.seed], dtype=np.int64),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> FeatureSample:
        """Builds what `state_dict` described; a loaded npz file serves as `state`."""
        features = np.array(state["sample_features"], dtype=np.float32)
        size, seed = np.asarray(state["sample_settings"]).tolist()
        sample = cls(features.shape[1], size, seed)
        sample._parts = [(features, np.array(state["sample_ranks"], dtype=np.int64))]
        return sample

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
