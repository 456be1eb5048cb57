"""What is kept of a shard: figures, vectors, and what could not be measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from featinv_diffusion.evaluation.observers import Columns, Pixels
from featinv_diffusion.evaluation.selection import Item


@dataclass
class ShardResult:
    """What is kept of a shard.

    Args:
        items: those that were measured; rows of everything below.
        digests: SHA-256 of the pixels of each original, at the resolution of the samples.
        columns: float64, NaN where a figure was not taken.
        failures: `id` and `error` of each image that could not be measured.
        partial_failures: `id`, `figure` and `error` of what could not be measured of others, e.g.
            because the sample of a null held NaN.
        reconstructed, original: feature vectors `[n, d]` by extractor, for distances.
    """

    items: list[Item]
    digests: list[str] = field(default_factory=list)
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    failures: list[dict[str, str]] = field(default_factory=list)
    partial_failures: list[dict[str, str]] = field(default_factory=list)
    pixels: Pixels | None = None
    reconstructed: dict[str, np.ndarray] = field(default_factory=dict)
    original: dict[str, np.ndarray] = field(default_factory=dict)

    def put(self, prefix: str, rows: Sequence[int], columns: Columns) -> None:
        """Sets figures of some rows under prefixed names; those that are NaN are reported."""
        for name, values in columns.items():
            column = np.full(len(self.items), np.nan)
            column[list(rows)] = values.double().numpy()
            self.columns[prefix + name] = column
        for place, row in enumerate(rows):
            if missing := [n for n, values in columns.items() if not values[place].isfinite()]:
                self.miss(row, prefix.rstrip("_") or "reconstruction", missing)

    def miss(self, row: int, figure: str, names: Sequence[str]) -> None:
        """Reports what could not be measured of an image."""
        name = self.items[row].id
        error = (
            f"{name} has no {', '.join(names)} of {figure}: a picture or what a network sees in it "
            "holds NaN or infinite values; use --dtype float32."
        )
        self.partial_failures.append({"id": name, "figure": figure, "error": error})
