"""Coefficients against scikit-learn and scipy, row by row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from sklearn.linear_model import ElasticNet as Reference

from featinv_diffusion.concepts import ElasticNet, self_representation, sparse_codes
from featinv_diffusion.concepts import elastic_net as module
from featinv_diffusion.errors import InputError
from tests.concepts.planted import make_generator


def make_rows(n: int = 60, channels: int = 12) -> torch.Tensor:
    """Non-negative and much alike, as unit-norm cells after ReLU are."""
    rows = torch.rand(n, channels, generator=make_generator()) + 0.3
    return rows / rows.norm(dim=1, keepdim=True)


def solve_row(rows: np.ndarray, j: int, problem: ElasticNet) -> np.ndarray:
    atoms = np.delete(rows, j, axis=0).T.astype(np.float64)
    alpha = np.abs(atoms.T @ rows[j]).max() / problem.tau / problem.gamma
    model = Reference(
        alpha=alpha / len(atoms),
        l1_ratio=problem.tau,
        fit_intercept=False,
        positive=problem.positive,
        tol=1e-12,
        max_iter=200_000,
    )
    return np.insert(model.fit(atoms, rows[j]).coef_, j, 0)


@pytest.mark.parametrize(
    "problem",
    [
        ElasticNet(),
        ElasticNet(gamma=50, support=5),
        ElasticNet(gamma=20, tau=0.7, support=8),
        ElasticNet(positive=True),
    ],
)
def test_rows_are_those_of_scikit_learn(problem):
    rows = make_rows()
    before = rows.clone()
    found = self_representation(rows, problem).toarray()
    assert torch.equal(rows, before)
    assert not found.diagonal().any()
    for j in range(0, 60, 12):
        expected = solve_row(rows.numpy(), j, problem)
        np.testing.assert_allclose(found[j], expected, atol=2e-3)
        assert objective(rows, found[j], j, problem) <= objective(rows, expected, j, problem) + 1e-6


def objective(rows: torch.Tensor, c: np.ndarray, j: int, problem: ElasticNet) -> float:
    x = rows.double().numpy()
    others = np.abs(np.delete(x @ x[j], j)).max()
    alpha = others / problem.tau / problem.gamma
    penalty = problem.tau * np.abs(c).sum() + (1 - problem.tau) / 2 * (c**2).sum()
    return alpha * penalty + 0.5 * ((x[j] - c @ x) ** 2).sum()


def test_batches_change_nothing(monkeypatch):
    rows = make_rows()
    whole = self_representation(rows, ElasticNet()).toarray()
    monkeypatch.setattr(module, "_BATCH_FLOATS", {"cpu": 100_000})
    np.testing.assert_allclose(self_representation(rows, ElasticNet()).toarray(), whole, atol=1e-4)


def test_equal_rows_represent_each_other():
    rows = make_rows(10).repeat(2, 1)
    found = self_representation(rows, ElasticNet())
    assert np.isfinite(found.data).all()
    twin = found.toarray()[np.arange(20), (np.arange(20) + 10) % 20]
    assert (twin > 0.5).all()


def test_only_the_largest_are_kept():
    rows = make_rows()
    dense = self_representation(rows, ElasticNet()).toarray()
    kept = self_representation(rows, ElasticNet(n_nonzero=2)).toarray()
    assert ((kept != 0).sum(axis=1) == 2).all()
    for full, few in zip(dense, kept, strict=True):
        largest = np.argsort(-np.abs(full))[:2]
        np.testing.assert_allclose(few[largest], full[largest])


def test_without_penalty_it_is_non_negative_least_squares():
    atoms = make_rows(5).double()
    targets = torch.randn(4, 12, generator=make_generator(2)).double()
    zero = torch.zeros(4, 1).double()
    gram = (atoms @ atoms.T).expand(4, -1, -1)
    start = torch.zeros(4, 5).double()
    found = module.minimise(gram, targets @ atoms.T, zero, zero, start, positive=True)
    for row, target in zip(found, targets, strict=True):
        expected = nnls(atoms.numpy().T, target.numpy())[0]
        np.testing.assert_allclose(row.numpy(), expected, atol=1e-4)


def test_codes_over_more_atoms_than_channels_find_the_planted_ones():
    atoms = torch.randn(40, 24, generator=make_generator(3))
    atoms = atoms / atoms.norm(dim=1, keepdim=True)
    targets = 2 * atoms[[3, 8]] + atoms[[30, 31]]
    codes = sparse_codes(targets, atoms, ElasticNet(gamma=1000, positive=True)).toarray()
    np.testing.assert_allclose(codes[0, [3, 30]], [2, 1], atol=0.05)
    np.testing.assert_allclose(codes[1, [8, 31]], [2, 1], atol=0.05)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gamma": 1.0}, "gamma must be above 1"),
        ({"tau": 0.0}, "tau must lie in"),
        ({"n_nonzero": 0}, "n_nonzero must be at least 1"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(InputError, match=message):
        ElasticNet(**settings)


def test_one_row_has_no_others():
    with pytest.raises(InputError, match="at least 2 cells"):
        self_representation(make_rows(1), ElasticNet())
