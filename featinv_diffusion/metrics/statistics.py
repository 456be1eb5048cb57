"""Means with bootstrap intervals, paired tests, and moments of features that stream in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from featinv_diffusion.errors import InputError

# ---- Tests of whether one of two methods is better on the same images ----------------------------

Values = Sequence[float] | np.ndarray | Tensor


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
    from scipy.stats import rankdata, wilcoxon  # slow to import, and few commands test anything

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
        raise InputError(f"A bootstrap needs at least one resample, got {n_resamples}.")
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
        raise InputError(f"Each p must lie in [0, 1], got {list(p_values)}.")
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
            "A paired test needs one value per image of both, and at least one image, got values "
            f"of shapes {rows[0].shape} and {rows[1].shape}."
        )
    if not all(np.isfinite(row).all() for row in rows):
        raise InputError("Values of a paired test must be finite, got NaN or infinite ones.")
    return rows[0] - rows[1]


# ---- Means with intervals, and moments of a stream -----------------------------------------------

_BLOCK = 2_000_000
"""Drawn indices held at a time: 16 MB, whatever the number of images and resamples."""
LEAST_BOOTSTRAP = 30
"""With fewer images an interval is Student's: a bootstrap of 5 covers 81 % where it says 95 %."""
FEW = 10
"""With fewer images an interval rests on the assumption that they are about normal."""


def few_images_note(n: int, what: str = "images") -> str | None:
    """Returns what must be said of figures of so few; None where there are enough."""
    if n >= FEW:
        return None
    return (
        f"The figures rest on {n} {what}, fewer than {FEW}. Their intervals hold if values are "
        "about normal, which so few cannot show, and of one alone there is none."
    )


@dataclass(frozen=True)
class Interval:
    """A figure with its interval.

    Args:
        value: of all images.
        low: the lower end.
        high: the upper end.
        n: the images it rests on.
    """

    value: float
    low: float
    high: float
    n: int


def share(n_true: int, n: int, level: float = 0.95) -> Interval:
    """Returns a share with its interval of Wilson (1927), which holds at 0 and 1 too."""
    if not 0 <= n_true <= n or n < 1:
        raise InputError(f"A share must be of at least one, got {n_true} of {n}.")
    z, p = NormalDist().inv_cdf((1 + level) / 2), n_true / n
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return Interval(p, low if n_true else 0.0, high if n_true < n else 1.0, n)


def bootstrap_mean(
    values: Sequence[float] | np.ndarray | Tensor,
    *,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Returns the mean with its percentile bootstrap interval (Efron and Tibshirani 1993, §13.3).

    Of fewer than `LEAST_BOOTSTRAP` images the interval is Student's, see `bootstrap_statistic`. Of
    booleans it is Wilson's, see `share`: where all are equal, the others have no width. Images are
    what is resampled: one value per image. One seed draws the same images in each call, so that
    figures of one run are comparable.

    Raises:
        InputError: no value, or one that is NaN or infinite.
    """
    given = values.detach().cpu() if isinstance(values, Tensor) else values
    if (row := np.asarray(given)).dtype == bool and len(row):
        return share(int(row.sum()), len(row), level)
    columns = {"values": values}
    return bootstrap_statistic(
        columns, lambda means: means["values"], level=level, n_resamples=n_resamples, seed=seed
    )


def bootstrap_difference(
    a: Sequence[float] | np.ndarray | Tensor,
    b: Sequence[float] | np.ndarray | Tensor,
    *,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Returns the mean of a − b, paired: value i of both belongs to image i.

    Raises:
        InputError: as `bootstrap_statistic`.
    """
    return bootstrap_statistic(
        {"a": a, "b": b},
        lambda means: means["a"] - means["b"],
        level=level,
        n_resamples=n_resamples,
        seed=seed,
    )


def bootstrap_statistic(
    columns: Mapping[str, Sequence[float] | np.ndarray | Tensor],
    statistic: Callable[[dict[str, float]], float],
    *,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Returns a function of the means of several columns, with its percentile bootstrap interval.

    Row i of every column belongs to image i, and a resample draws the same images for all columns.
    Of fewer than `LEAST_BOOTSTRAP` images, whose resamples vary too little, the interval is the
    value ± Student's quantile with n − 1 degrees of freedom times the standard error of the
    jackknife (Tukey 1958), which for a mean is the usual t interval.

    Args:
        columns: one value per image each.
        statistic: from the mean of each column to the figure, e.g. a ratio.
        level: of the interval, 0.95 for 95 %.
        n_resamples: how often the images are drawn anew.
        seed: of the draws.

    Raises:
        InputError: no image, columns of different lengths, values that are NaN or infinite, or a
            statistic that is so for all images, on a resample or without one of the images (a
            denominator at zero).
    """
    table = _to_table(columns)
    if not 0 < level < 1 or n_resamples < 1:
        raise InputError(
            "A bootstrap needs a level between 0 and 1 and at least one resample, "
            f"got level {level} and {n_resamples} resamples."
        )
    value = _evaluate(statistic, list(columns), table.mean(axis=1))
    if table.shape[1] == 1:
        return Interval(value, value, value, 1)
    if table.shape[1] < LEAST_BOOTSTRAP:
        n = table.shape[1]
        left_out = (table.sum(axis=1, keepdims=True) - table) / (n - 1)
        return jackknife(
            value, [_evaluate(statistic, list(columns), means) for means in left_out.T], n, level
        )
    resampled = [
        _evaluate(statistic, list(columns), means)
        for means in _resample_means(table, n_resamples, seed)
    ]
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high), table.shape[1])


def jackknife(value: float, left_out: Values, n: int, level: float = 0.95) -> Interval:
    """Returns a value with Student's interval from what it is without each part of the images.

    Args:
        value: of all images.
        left_out: of all but one part each, of parts of about one size; at least two.
        n: images.

    Source: Tukey 1958; Efron and Tibshirani 1993, equation 11.5.
    """
    from scipy.stats import t as student  # slow to import

    without = _to_row(left_out)
    k = len(without)
    error = ((k - 1) / k * np.square(without - without.mean()).sum()) ** 0.5
    half = float(student.ppf((1 + level) / 2, k - 1)) * float(error)
    return Interval(value, value - half, value + half, n)


class FeatureMoments:
    """The mean and covariance of feature vectors that come in batches, in float64.

    Memory is that of one covariance matrix, whatever the number of vectors. Batches are joined by
    the pairwise update of Chan, Golub and LeVeque (1983), which does not cancel where the mean is
    far from zero.

    Args:
        dim: d, the length of a vector.

    Attributes:
        count: vectors so far.
        mean: `[d]`.
    """

    def __init__(self, dim: int):
        self.dim = dim
        self.count = 0
        self.mean: np.ndarray = np.zeros(dim)
        self._scatter: np.ndarray = np.zeros((dim, dim))

    @property
    def covariance(self) -> np.ndarray:
        """`[d, d]`, divided by count − 1.

        Raises:
            InputError: fewer than two vectors.
        """
        if self.count < 2:
            raise InputError(f"A covariance needs at least 2 images, got {self.count}.")
        return self._scatter / (self.count - 1)

    def update(self, features: Float[Tensor, "n d"]) -> None:
        """Adds a batch of vectors.

        Raises:
            InputError: vectors of another length, or NaN or infinite values.
        """
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise InputError(f"Features must be [n, {self.dim}], got shape {list(features.shape)}.")
        batch = features.detach().cpu().to(torch.float64).numpy()
        if not np.isfinite(batch).all():
            raise InputError("Features must be finite, got NaN or infinite values.")
        if not (count := len(batch)):
            return
        mean = batch.mean(axis=0)
        centred = batch - mean
        total, shift = self.count + count, mean - self.mean
        spread = np.outer(shift, shift) * (self.count * count / total)
        self._scatter += centred.T @ centred + spread
        self.mean = self.mean + shift * (count / total)
        self.count = total


def _to_row(values: Any) -> np.ndarray:
    array = values.detach().cpu() if isinstance(values, Tensor) else values
    return np.asarray(array, dtype=np.float64)


def _to_table(columns: Mapping[str, Any]) -> np.ndarray:
    rows = {name: _to_row(values) for name, values in columns.items()}
    shapes = {name: row.shape for name, row in rows.items()}
    lengths = {row.shape for row in rows.values()}
    if len(lengths) != 1 or len(next(iter(lengths))) != 1:
        raise InputError(f"Columns must hold one value per image each, but have shapes {shapes}.")
    table = np.stack(list(rows.values()))
    if table.shape[1] == 0:
        raise InputError("An interval needs at least one image, got none.")
    broken = [name for name, row in rows.items() if not np.isfinite(row).all()]
    if broken:
        raise InputError(
            f"Values must be finite, but {', '.join(broken)} holds NaN or infinite ones. "
            "Leave out the images that were not measured."
        )
    return table


def _resample_means(table: np.ndarray, n_resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yields the mean of each column over n images drawn with replacement, n_resamples times."""
    generator = np.random.default_rng(seed)
    n_images = table.shape[1]
    rows = max(1, _BLOCK // n_images)
    for start in range(0, n_resamples, rows):
        shape = (min(rows, n_resamples - start), n_images)
        drawn = generator.integers(0, n_images, size=shape)
        yield from np.stack([column[drawn].mean(axis=1) for column in table], axis=1)


def _evaluate(
    statistic: Callable[[dict[str, float]], float], names: list[str], means: np.ndarray
) -> float:
    named = dict(zip(names, means.tolist(), strict=True))
    try:
        value = float(statistic(named))
    except ZeroDivisionError:
        value = float("nan")
    if not np.isfinite(value):
        raise InputError(
            f"A statistic must be finite on every resample, but is not where the means are {named}."
        )
    return value
