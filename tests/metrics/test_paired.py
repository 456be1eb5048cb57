"""Paired tests against published values, full enumeration and identities."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from featinv_diffusion.errors import InputError
from featinv_diffusion.metrics.statistics import bootstrap_p_value, holm, wilcoxon_signed_rank

# Darwin's cross- and self-fertilised maize, in eighths of an inch (Fisher 1935, section 17).
MAIZE = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]
# Hamilton depression scale of nine patients at two visits (Hollander and Wolfe 1973, page 29).
FIRST = [1.83, 0.50, 1.62, 2.48, 1.68, 1.88, 1.55, 3.06, 1.30]
SECOND = [0.878, 0.647, 0.598, 2.05, 1.06, 1.29, 1.06, 3.14, 1.29]


def test_published_examples() -> None:
    maize = wilcoxon_signed_rank(MAIZE, [0.0] * 15)
    assert (maize.statistic, maize.n) == (96, 15)  # W⁻ = 24 of 120
    assert maize.p_value == pytest.approx(0.041260, abs=1e-6)
    assert maize.effect == pytest.approx((96 - 24) / 120)
    depression = wilcoxon_signed_rank(FIRST, SECOND)
    assert depression.statistic == 40
    assert depression.p_value == pytest.approx(2 * 0.01953, abs=2e-5)


def enumerate_p(differences: list[float]) -> float:
    """Two-sided p over all signs, of mid-ranks that are counted here by pairs."""
    sizes = [abs(d) for d in differences]
    ranks = [sum(s < t for s in sizes) + (sum(s == t for s in sizes) + 1) / 2 for t in sizes]
    total = sum(ranks)
    observed = sum(r for r, d in zip(ranks, differences, strict=True) if d > 0)
    sums = [
        sum(r for r, keep in zip(ranks, signs, strict=True) if keep)
        for signs in itertools.product([False, True], repeat=len(ranks))
    ]
    extreme = abs(observed - total / 2)
    return sum(abs(s - total / 2) >= extreme - 1e-9 for s in sums) / len(sums)


def test_small_samples_are_exact() -> None:
    for values in ([1.0, 2.0, 3.0, -4.0, 5.0], [0.5, -0.1, 0.7, 0.9, 1.4, -0.2, 2.0]):
        test = wilcoxon_signed_rank(values, [0.0] * len(values))
        assert test.p_value == pytest.approx(enumerate_p(values))


def test_equal_differences_share_a_rank_and_zeros_are_left_out() -> None:
    a, b = [3.0, 1.0, 5.0, 2.0, 2.0, 9.0], [1.0, 3.0, 1.0, 2.0, 2.0, 3.0]
    test = wilcoxon_signed_rank(a, b)  # differences 2, -2, 4, 0, 0, 6: ranks 1.5, 1.5, 3, 4
    assert (test.statistic, test.n) == (8.5, 4)
    assert test.effect == pytest.approx((8.5 - 1.5) / 10)


def test_large_samples_follow_the_normal_law_with_ties() -> None:
    random = np.random.default_rng(0)
    differences = random.integers(-4, 6, 400).astype(float)
    test = wilcoxon_signed_rank(differences, np.zeros(400))
    kept = differences[differences != 0]
    n, (_, counts) = len(kept), np.unique(np.abs(kept), return_counts=True)
    mean = n * (n + 1) / 4
    variance = n * (n + 1) * (2 * n + 1) / 24 - (counts**3 - counts).sum() / 48
    z = abs(test.statistic - mean) / variance**0.5
    wanted = 2 * (1 - torch.distributions.Normal(0.0, 1.0).cdf(torch.tensor(z).double()))
    assert test.p_value == pytest.approx(float(wanted), rel=1e-4)


def test_equal_methods_do_not_differ() -> None:
    test = wilcoxon_signed_rank(FIRST, FIRST)
    assert (test.p_value, test.n, test.effect) == (1.0, 0, 0.0)
    assert bootstrap_p_value(FIRST, FIRST) == 1.0


def test_bootstrap_p_is_that_of_the_normal_law_for_many_images() -> None:
    random = np.random.default_rng(1)
    differences = random.normal(0.1, 1.0, 400)
    z = abs(differences.mean()) / (differences.std() / 20)
    wanted = 2 * (1 - float(torch.distributions.Normal(0.0, 1.0).cdf(torch.tensor(z))))
    found = bootstrap_p_value(differences, np.zeros(400))
    assert found == pytest.approx(wanted, abs=0.012)
    assert found == bootstrap_p_value(-differences, np.zeros(400))
    assert bootstrap_p_value(differences + 9, np.zeros(400), n_resamples=99) == 0.01


def test_holm_of_a_worked_case() -> None:
    """Multiplied by 4, 3, 2 and 1 from the smallest on, and never below the one before."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_lies_between_the_raw_and_bonferroni_and_keeps_the_order(values: list[float]) -> None:
    adjusted = holm(values)
    for p, q in zip(values, adjusted, strict=True):
        assert p <= q <= min(1, len(values) * p) + 1e-12
    order = np.argsort(values, kind="stable")
    assert (np.diff(np.array(adjusted)[order]) >= 0).all()


def test_refusals() -> None:
    with pytest.raises(InputError, match="one value per image of both"):
        wilcoxon_signed_rank([1.0, 2.0], [1.0])
    with pytest.raises(InputError, match="at least one image"):
        bootstrap_p_value([], [])
    with pytest.raises(InputError, match="must be finite"):
        wilcoxon_signed_rank([float("nan")], [1.0])
    with pytest.raises(InputError, match="at least one resample"):
        bootstrap_p_value([1.0], [0.0], n_resamples=0)
    with pytest.raises(InputError, match="Each p must lie"):
        holm([1.1])
