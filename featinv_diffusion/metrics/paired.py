"""Tests of whether one of two methods is better on the same images, and of many such pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import rankdata, wilcoxon
from torch import Tensor

from featinv_diffusion.errors import InputError

Values = Sequence[float] | np.ndarray | Tensor

_BLOCK = 2_000_000
"""Drawn indices held at a time: 16 MB, whatever the number of images and resamples."""


@dataclass(frozen=True)
class SignedRank:
    """Wilcoxon's test of a − b.

    Args:
        statistic: W⁺, the sum of the ranks of |a − b| where a > b.
        effect: the matched-pairs rank-biserial correlation (W⁺ − W⁻) / (W⁺ + W⁻), in [-1, 1]; 1
            where a is larger on every image that the two differ on (Kerby 2014).
        p_value: two-sided.
        n: images on which the two differ.
    """

    statistic: float
    effect: float
    p_value: float
    n: int


def wilcoxon_signed_rank(a: Values, b: Values) -> SignedRank:
    """Wilcoxon's signed-rank test, paired by image (Wilcoxon 1945).

    Images on which the two are equal are left out, and equal differences share their mean rank.
    Exact for few images, and else by the normal approximation with its correction for ties; p = 1
    where the two are equal on all images.

    Raises:
        InputError: no images, other images for a than for b, values that are NaN or infinite.
    """
    difference = _differences(a, b)
    difference = difference[difference != 0]
    if len(difference) == 0:
        return SignedRank(0.0, 0.0, 1.0, 0)
    ranks = rankdata(np.abs(difference))
    positive = float(ranks[difference > 0].sum())
    test: Any = wilcoxon(difference)
    effect = 2 * positive / float(ranks.sum()) - 1
    return SignedRank(positive, effect, float(test.pvalue), len(difference))


def bootstrap_p_value(a: Values, b: Values, *, n_resamples: int = 9999, seed: int = 0) -> float:
    """Two-sided p of a mean difference of 0, paired by image.

    The differences are moved to a mean of 0 and drawn anew (Efron and Tibshirani 1993, section
    16.4, of the mean itself). Never below 1 / (n_resamples + 1).

    Raises:
        InputError: as `wilcoxon_signed_rank`, or no resample.
    """
    if n_resamples < 1:
        raise InputError(f"A bootstrap needs at least one resample, but {n_resamples} came.")
    difference = _differences(a, b)
    observed = abs(difference.mean())
    centred = difference - difference.mean()
    generator = np.random.default_rng(seed)
    rows, n_extreme = max(1, _BLOCK // len(centred)), 0
    # A sum in another order rounds otherwise; such a resample is as extreme as what was observed.
    limit = observed - 1e-12 * np.abs(difference).max()
    for start in range(0, n_resamples, rows):
        shape = (min(rows, n_resamples - start), len(centred))
        means = centred[generator.integers(0, len(centred), size=shape)].mean(axis=1)
        n_extreme += int((np.abs(means) >= limit).sum())
    return (1 + n_extreme) / (1 + n_resamples)


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p adjusted for as many tests as there are, in their order (Holm 1979).

    Raises:
        InputError: a p outside of [0, 1].
    """
    if any(not 0 <= p <= 1 for p in p_values):
        raise InputError(f"Each p must lie in [0, 1], but {list(p_values)} came.")
    adjusted, least = [0.0] * len(p_values), 0.0
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    for place, i in enumerate(order):
        least = min(1.0, max(least, (len(p_values) - place) * p_values[i]))
        adjusted[i] = least
    return adjusted


def _differences(a: Values, b: Values) -> np.ndarray:
    rows = [_to_row(values) for values in (a, b)]
    if rows[0].shape != rows[1].shape or rows[0].ndim != 1 or len(rows[0]) == 0:
        raise InputError(
            "A paired test needs one value per image of both, and at least one image, but values "
            f"of shapes {rows[0].shape} and {rows[1].shape} came."
        )
    if not all(np.isfinite(row).all() for row in rows):
        raise InputError("Values of a paired test must be finite, but NaN or infinite ones came.")
    return rows[0] - rows[1]


def _to_row(values: Values) -> np.ndarray:
    array = values.detach().cpu() if isinstance(values, Tensor) else values
    return np.asarray(array, dtype=np.float64)
