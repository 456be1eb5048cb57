"""Intervals against exact enumeration and theory; moments against numpy on all vectors at once."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from dataclasses import asdict

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from featinv_diffusion.errors import InputError
from featinv_diffusion.metrics import (
    FeatureMoments,
    Interval,
    bootstrap_difference,
    bootstrap_mean,
    bootstrap_statistic,
    statistics,
)
from featinv_diffusion.metrics.statistics import few_images_note, share


def test_bootstrap_of_three_values_is_that_of_all_27_draws(monkeypatch):
    monkeypatch.setattr(statistics, "LEAST_BOOTSTRAP", 0)
    values = [0.0, 1.0, 5.0]
    means = [np.mean(draw) for draw in itertools.product(values, repeat=3)]
    got = bootstrap_mean(values, level=0.8, n_resamples=20_000)
    assert got.value == pytest.approx(2)
    # The quantiles lie inside plateaus of the 27 equally likely means: 1/3 and 11/3.
    assert [got.low, got.high] == pytest.approx(np.quantile(means, [0.1, 0.9]).tolist())
    assert got.n == 3


def test_few_images_have_the_interval_of_student():
    values = [1.0, 2.0, 4.0, 7.0]
    wanted = scipy.stats.t.interval(0.9, 3, np.mean(values), scipy.stats.sem(values))
    got = bootstrap_mean(values, level=0.9)
    assert (got.low, got.high) == pytest.approx(wanted)


def test_five_images_are_covered_as_often_as_is_said():
    draws = np.random.default_rng(0).normal(3.0, 2.0, size=(2000, 5))
    found = [bootstrap_mean(row) for row in draws]
    assert np.mean([i.low <= 3 <= i.high for i in found]) == pytest.approx(0.95, abs=0.02)
    pairs = np.random.default_rng(1).normal([[4.0], [2.0]], 0.3, size=(500, 2, 8))
    ratios = [bootstrap_statistic({"a": a, "b": b}, lambda m: m["a"] / m["b"]) for a, b in pairs]
    assert np.mean([i.low <= 2 <= i.high for i in ratios]) == pytest.approx(0.95, abs=0.04)


def test_what_is_said_of_few_images():
    assert few_images_note(10) is None
    assert "rest on 9 images, fewer than 10" in str(few_images_note(9))


def test_interval_of_many_values_is_the_normal_one():
    values = np.random.default_rng(3).normal(2.0, 4.0, size=2000)
    got = bootstrap_mean(values)
    half = 1.96 * values.std() / np.sqrt(2000)
    assert got.value == pytest.approx(values.mean())
    assert got.low == pytest.approx(values.mean() - half, abs=0.07 * half)
    assert got.high == pytest.approx(values.mean() + half, abs=0.07 * half)


def test_interval_covers_the_truth_as_often_as_it_says():
    draws = np.random.default_rng(0).binomial(1, 0.7, size=(200, 80))
    intervals = [bootstrap_mean(d, n_resamples=200, seed=i) for i, d in enumerate(draws)]
    covered = np.mean([i.low <= 0.7 <= i.high for i in intervals])
    assert 0.89 <= covered <= 0.99


def test_level_widens():
    values = np.random.default_rng(1).normal(size=100)
    narrow, wide = bootstrap_mean(values, level=0.5), bootstrap_mean(values, level=0.99)
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high


def test_a_seed_gives_one_interval_and_another_seed_another():
    values = np.random.default_rng(1).normal(size=50)
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1)
    assert bootstrap_mean(values, seed=1) != bootstrap_mean(values, seed=2)


@pytest.mark.parametrize("n_resamples", [999, 2000])
def test_blocks_do_not_change_the_draws(monkeypatch, n_resamples):
    values = np.random.default_rng(1).normal(size=70)
    whole = bootstrap_mean(values, n_resamples=n_resamples)
    monkeypatch.setattr("featinv_diffusion.metrics.statistics._BLOCK", 701)
    assert bootstrap_mean(values, n_resamples=n_resamples) == whole


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_matches_are_shares(kind):
    assert bootstrap_mean(kind([True, False, True, True])) == share(3, 4)
    all_of_40 = bootstrap_mean(kind([True] * 40))
    assert 0.9 < all_of_40.low < all_of_40.high == all_of_40.value == 1
    with pytest.raises(InputError, match="at least one image"):
        bootstrap_mean(kind([]))


def test_one_image_has_no_spread():
    assert bootstrap_mean([0.25]) == Interval(0.25, 0.25, 0.25, 1)


def test_interval_goes_into_json():
    got = bootstrap_mean(torch.tensor([0.5, 1.0], dtype=torch.float16))
    assert json.loads(json.dumps(asdict(got)))["value"] == 0.75


def test_difference_is_paired():
    # Images differ by 100, the two columns by 1 ± .1: unpaired, the interval would be 10 wide.
    generator = np.random.default_rng(0)
    b = generator.normal(0, 100, size=400)
    a = b + generator.normal(1, 0.1, size=400)
    got = bootstrap_difference(a, b)
    assert got.value == pytest.approx((a - b).mean())
    assert got.high - got.low == pytest.approx(2 * 1.96 * 0.1 / 20, rel=0.15)


def test_statistic_of_means_is_not_the_mean_of_statistics(monkeypatch):
    monkeypatch.setattr(statistics, "LEAST_BOOTSTRAP", 0)
    columns = {"x": [1.0, 3.0], "y": [1.0, 7.0]}
    got = bootstrap_statistic(columns, lambda mean: mean["x"] / mean["y"])
    assert got.value == pytest.approx(2 / 4)  # the mean of ratios would be (1 + 3/7) / 2
    assert [got.low, got.high] == pytest.approx([3 / 7, 1])


def test_normalised_agreement_by_the_delta_method():
    generator = np.random.default_rng(5)
    n = 3000
    cosine, other, ceiling = (generator.normal(m, 0.1, size=n) for m in (0.5, 0.1, 0.9))
    columns = {"cosine": cosine, "other": other, "ceiling": ceiling}
    got = bootstrap_statistic(
        columns, lambda m: (m["cosine"] - m["other"]) / (m["ceiling"] - m["other"])
    )
    ratio = (cosine.mean() - other.mean()) / (ceiling.mean() - other.mean())
    residual = (cosine - other) - ratio * (ceiling - other)
    half = 1.96 * residual.std() / np.sqrt(n) / (ceiling.mean() - other.mean())
    assert got.value == pytest.approx(ratio)
    assert [got.low, got.high] == pytest.approx([ratio - half, ratio + half], abs=0.1 * half)


def test_memory_stays_bounded_at_50_000_images():
    values = np.random.default_rng(0).normal(size=50_000)
    tracemalloc.start()
    bootstrap_mean(values, n_resamples=200)  # all draws at once would be 80 MB of indices
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6


@pytest.mark.parametrize("values", [[1.0, float("nan")], [float("inf"), 0.0]])
def test_values_must_be_finite(values):
    with pytest.raises(InputError, match="values holds NaN"):
        bootstrap_mean(values)


def test_no_image_and_ragged_columns():
    with pytest.raises(InputError, match="at least one image"):
        bootstrap_mean([])
    with pytest.raises(InputError, match="one value per image"):
        bootstrap_difference([1.0, 2.0], [1.0])
    with pytest.raises(InputError, match="one value per image"):
        bootstrap_mean(np.ones((2, 2)))


@pytest.mark.parametrize("options", [{"level": 1.0}, {"level": 0.0}, {"n_resamples": 0}])
def test_options_of_the_bootstrap(options):
    with pytest.raises(InputError, match="level"):
        bootstrap_mean([1.0, 2.0], **options)


def test_a_zero_denominator_is_said():
    with pytest.raises(InputError, match=r"finite on every resample.*'y': 0.0"):
        bootstrap_statistic({"x": [1.0, 2.0], "y": [0.0, 1.0]}, lambda m: m["x"] / m["y"])


def make_features(n: int, dim: int = 5, seed: int = 0, offset: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator)
    return torch.randn(n, dim, generator=generator) @ mixing + offset


@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_moments_of_batches_are_those_of_all_vectors(sizes, seed):
    features = make_features(sum(sizes) + 2, seed=seed)
    moments = FeatureMoments(5)
    for batch in features.split([*sizes, 2]):
        moments.update(batch)
    everything = features.double().numpy()
    assert moments.count == len(everything)
    np.testing.assert_allclose(moments.mean, everything.mean(axis=0), atol=1e-12)
    np.testing.assert_allclose(moments.covariance, np.cov(everything.T), atol=1e-11)


def test_covariance_survives_a_mean_far_from_zero():
    # E[x²] − mean² in float64 would leave an error near 1e-16 · 1e14 = .01 here.
    features = make_features(500).double()
    moments = FeatureMoments(5)
    for batch in (features + 1e7).split(50):
        moments.update(batch)
    np.testing.assert_allclose(moments.covariance, np.cov(features.numpy().T), rtol=1e-6)


def test_moments_refuse_what_is_no_feature():
    moments = FeatureMoments(5)
    with pytest.raises(InputError, match=r"\[n, 5\].*\[2, 4\]"):
        moments.update(torch.zeros(2, 4))
    with pytest.raises(InputError, match="finite"):
        moments.update(torch.full((2, 5), float("nan")))
    moments.update(torch.zeros(1, 5))
    with pytest.raises(InputError, match="at least 2 images, got 1"):
        _ = moments.covariance


def test_the_interval_of_a_share_is_that_of_wilson():
    found = share(3, 10)
    assert (found.value, found.n) == (0.3, 10)
    for end in (found.low, found.high):  # where |p − share| is z standard errors at p
        assert abs(end - 0.3) == pytest.approx(1.959964 * (end * (1 - end) / 10) ** 0.5)
    assert share(0, 10).low == 0 < share(0, 10).high < 0.31
    with pytest.raises(InputError, match="at least one"):
        share(0, 0)
