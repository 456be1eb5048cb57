"""Distances against closed forms, double loops, and torch-fidelity's own functions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from featinv_diffusion.errors import InputError
from featinv_diffusion.metrics import (
    FeatureMoments,
    PublishedMoments,
    frechet_distance,
    kernel_distance,
    precision_recall,
)


def make_features(n: int, dim: int = 6, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator)
    return torch.randn(n, dim, generator=generator) @ mixing + shift


def moments_of(features: torch.Tensor) -> FeatureMoments:
    moments = FeatureMoments(features.shape[1])
    moments.update(features)
    return moments


def test_frechet_of_diagonal_gaussians_by_hand():
    a = PublishedMoments(np.array([0.0, 1.0]), np.diag([4.0, 9.0]), 100)
    b = PublishedMoments(np.array([3.0, 1.0]), np.diag([1.0, 25.0]), None)
    got = frechet_distance(a, b)
    assert got.value == pytest.approx(3**2 + (2 - 1) ** 2 + (3 - 5) ** 2)
    assert (got.n, got.n_reference, got.dim, got.rank_deficient) == (100, None, 2, False)


def test_frechet_of_covariances_that_do_not_commute_is_torch_fidelity_s():
    a, b = moments_of(make_features(50)), moments_of(make_features(40, seed=1, shift=0.3))
    expected = fid_statistics_to_metric(
        {"mu": a.mean, "sigma": a.covariance}, {"mu": b.mean, "sigma": b.covariance}, False
    )["frechet_inception_distance"]
    assert frechet_distance(a, b).value == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a).value == pytest.approx(expected, rel=1e-9)
    assert not frechet_distance(a, b).rank_deficient


def test_frechet_with_itself_is_zero_and_never_below():
    moments = moments_of(make_features(30))
    assert 0 <= frechet_distance(moments, moments).value < 1e-6


def test_frechet_of_singular_covariances_is_told():
    few = moments_of(make_features(4, dim=6))
    many = moments_of(make_features(60, dim=6, seed=2))
    got = frechet_distance(few, many)
    assert np.isfinite(got.value)
    assert got.rank_deficient
    assert frechet_distance(many, few).value == pytest.approx(got.value)
    # Both in one line: the distance is that of the standard deviations along it.
    line = np.outer([0.6, 0.8], [0.6, 0.8])
    a, b = (PublishedMoments(np.zeros(2), s**2 * line) for s in (1.0, 3.5))
    assert frechet_distance(a, b).value == pytest.approx(2.5**2)


def test_frechet_needs_one_space_and_two_images():
    with pytest.raises(InputError, match="6 and 5"):
        frechet_distance(moments_of(make_features(9)), moments_of(make_features(9, dim=5)))
    with pytest.raises(InputError, match="at least 2 images"):
        frechet_distance(moments_of(make_features(1)), moments_of(make_features(9)))


def test_kernel_distance_by_a_double_loop():
    x, y = make_features(7).double(), make_features(7, seed=1).double()

    def kernel(a, b):
        return (float(a @ b) / 6 + 1) ** 3

    xx = np.mean([kernel(x[i], x[j]) for i in range(7) for j in range(7) if i != j])
    yy = np.mean([kernel(y[i], y[j]) for i in range(7) for j in range(7) if i != j])
    xy = np.mean([kernel(a, b) for a in x for b in y])
    got = kernel_distance(x, y, subset_size=7, n_subsets=2)
    assert got.mean == pytest.approx(xx + yy - 2 * xy)
    assert got.std == pytest.approx(0, abs=1e-9 * abs(got.mean))


def test_kernel_distance_is_torch_fidelity_s():
    x, y = make_features(300), make_features(400, seed=1, shift=0.2)
    options = {"kid_subsets": 100, "kid_subset_size": 50, "verbose": False}
    expected = kid_features_to_metric(x, y, **options)
    got = kernel_distance(x, y, subset_size=50, n_subsets=100)
    spread = expected["kernel_inception_distance_std"]
    assert got.mean == pytest.approx(
        expected["kernel_inception_distance_mean"], abs=5 * spread / 10
    )
    assert got.std == pytest.approx(spread, rel=0.4)


def test_kernel_distance_of_one_distribution_is_about_zero():
    x, y = make_features(2000), make_features(2000)[torch.randperm(2000)]
    got = kernel_distance(x[:1000], y[1000:], subset_size=200, n_subsets=50)
    apart = kernel_distance(x[:1000], y[1000:] + 1, subset_size=200, n_subsets=50)
    assert abs(got.mean) < 0.1 * apart.mean
    assert kernel_distance(x, y, subset_size=50, n_subsets=3, seed=1) == kernel_distance(
        x, y, subset_size=50, n_subsets=3, seed=1
    )


def brute_share(points: np.ndarray, centres: np.ndarray, k: int) -> float:
    inside = 0
    for point in points:
        for i, centre in enumerate(centres):
            others = np.delete(centres, i, axis=0)
            radius = np.sort(np.linalg.norm(others - centre, axis=1))[k - 1]
            if np.linalg.norm(point - centre) <= radius:
                inside += 1
                break
    return inside / len(points)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("block", [17, 10_000])
def test_precision_and_recall_by_a_double_loop(monkeypatch, k, block):
    monkeypatch.setattr("featinv_diffusion.metrics.distribution._BLOCK", block)
    x, y = make_features(40), make_features(30, seed=1, shift=0.5)
    got = precision_recall(x, y, k=k)
    assert got.precision == pytest.approx(brute_share(x.numpy(), y.numpy(), k))
    assert got.recall == pytest.approx(brute_share(y.numpy(), x.numpy(), k))
    assert 0 < got.precision < 1


def test_precision_and_recall_are_torch_fidelity_s():
    x, y = make_features(200), make_features(150, seed=1, shift=0.4)
    expected = prc_features_to_metric(x, y, save_cpu_ram=False, verbose=False)
    got = precision_recall(x, y)
    assert got.precision == pytest.approx(expected["precision"])
    assert got.recall == pytest.approx(expected["recall"])


def test_one_mode_of_two_is_precise_and_does_not_recall():
    both = torch.cat([make_features(100), make_features(100, seed=1, shift=100)])
    got = precision_recall(make_features(100, seed=2).mul(0.2), both)
    assert got.precision > 0.95
    assert got.recall <= 0.5


def test_a_vector_that_comes_twice_is_its_own_neighbour():
    # Each reference vector is there twice, so the first neighbour is at distance 0.
    reference = make_features(10).repeat(2, 1)
    assert precision_recall(reference, reference, k=1).precision == 1
    assert precision_recall(reference + 1e-3, reference, k=1).precision == 0


def test_sets_too_small_or_of_two_spaces():
    x, y = make_features(5), make_features(9, seed=1)
    with pytest.raises(InputError, match="2 to 5 images"):
        kernel_distance(x, y, subset_size=6)
    with pytest.raises(InputError, match="1 … 4"):
        precision_recall(x, y, k=5)
    with pytest.raises(InputError, match="one length"):
        kernel_distance(x, make_features(5, dim=4), subset_size=3)
    with pytest.raises(InputError, match="one length"):
        precision_recall(x, make_features(5, dim=4))
