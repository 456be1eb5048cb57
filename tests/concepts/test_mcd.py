"""MCD: its identities, planted subspaces recovered, and what it refuses."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from sklearn.metrics import adjusted_rand_score
from torch import nn

from featinv_diffusion.concepts import MCD, make_head, principal_angles
from featinv_diffusion.concepts import mcd as clustering
from featinv_diffusion.concepts.mcd import (
    _check_settings,
    find_inliers,
    make_affinity,
    spectral_embedding,
)
from featinv_diffusion.errors import InputError
from featinv_diffusion.types import FeatureSpec
from tests import tiny
from tests.concepts.planted import make_generator, make_union, to_cells, to_map

FEATURES, LABELS, BASES = make_union()
DIRECTION = BASES[1, 0] + 0.5 * BASES[0, 1] + 0.2 * torch.randn(32, generator=make_generator(9))


@tiny.seeded
def make_heads():
    norm = nn.LayerNorm(32)
    nn.init.normal_(norm.weight)
    return make_head(nn.Linear(32, 5)), make_head(nn.Linear(32, 5), norm)


@pytest.fixture(scope="module")
def fitted() -> MCD:
    before = FEATURES.clone()
    dictionary = MCD(3, fo_threshold=0.01).fit(FEATURES)
    assert torch.equal(FEATURES, before)
    return dictionary


@pytest.fixture(scope="module")
def intersecting() -> MCD:
    """Two planes that share a line, and their sum: five directions of rank three."""
    dictionary = MCD(2)
    eye = torch.eye(8)
    planes = torch.cat([eye[:2], eye[1:3], (eye[0] + eye[2])[None] / 2**0.5])
    dictionary._set(planes, [2, 2, 1])
    return dictionary


def test_a_planted_union_of_subspaces_is_recovered(fitted):
    assert fitted.labels is not None
    found = fitted.labels.flatten()
    kept = found >= 0
    assert 0.7 < kept.float().mean() < 0.8  # the published quarter of outliers is left out
    assert adjusted_rand_score(LABELS[kept], found[kept]) >= 0.95
    for concept in range(3):
        planted = LABELS[found == concept].mode().values
        assert principal_angles(fitted.basis(concept), BASES[planted]).max() < 0.05


def test_kmeans_on_cells_of_both_signs_is_the_weaker_baseline(fitted):
    found = MCD(3, clustering="kmeans").fit(FEATURES).labels
    assert found is not None
    assert (found >= 0).all()
    assert adjusted_rand_score(LABELS, found.flatten()) < 0.9


def test_labels_follow_a_new_order(fitted):
    before = fitted.labels.clone()
    found = deepcopy(fitted).reorder([2, 0])
    for old, new in ((2, 0), (0, 1), (1, -1), (-1, -1)):
        assert (found.labels[before == old] == new).all()
    torch.testing.assert_close(found.basis(0), fitted.basis(2))


@pytest.mark.parametrize("name", ["fitted", "intersecting"])
def test_parts_and_remainder_sum_to_the_features(name, request):
    dictionary = request.getfixturevalue(name)
    features = torch.randn(2, dictionary.channels, 4, 5, generator=make_generator(3)).double()
    total = dictionary.parts(features).sum(dim=1) + dictionary.remainder(features)
    torch.testing.assert_close(total, features, atol=1e-6, rtol=0)
    # Not by subtraction: the remainder is the projection on the complement subspace.
    rest = dictionary.complement().double()
    projected = to_map_like(to_cells(features) @ rest.T @ rest, features)
    torch.testing.assert_close(dictionary.remainder(features), projected, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        dictionary.decode(dictionary.encode(features)), features, atol=1e-6, rtol=0
    )


def to_map_like(cells: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    b, _, h, w = features.shape
    return cells.reshape(b, h, w, -1).permute(0, 3, 1, 2)


def test_parts_lie_in_their_concepts_and_solve_the_square_system(fitted):
    cells = to_cells(FEATURES)[:7].double()
    stacked = torch.cat([fitted.directions, fitted.complement()]).double()
    codes = torch.linalg.solve(stacked.T, cells.T)
    start = 0
    for concept, size in enumerate(fitted.sizes):
        expected = codes[start : start + size].T @ stacked[start : start + size]
        part = to_cells(fitted.part(FEATURES, concept))[:7].double()
        torch.testing.assert_close(part, expected, atol=1e-4, rtol=0)
        start += size


@pytest.mark.parametrize("which", [0, 1], ids=["linear", "norm"])
@pytest.mark.parametrize("class_index", [0, 4])
def test_a_logit_is_the_sum_of_local_relevances_and_the_bias(fitted, which, class_index):
    head = make_heads()[which]
    relevance = fitted.local_relevance(FEATURES, head, class_index)
    assert relevance.shape == (6, 4, 8, 8)
    logits = relevance.mean(dim=(2, 3)).sum(dim=1) + head.bias[class_index]
    torch.testing.assert_close(logits, head.logits(FEATURES)[:, class_index], atol=1e-5, rtol=1e-4)
    by_hand = torch.einsum(
        "bchw,c,b->bhw", fitted.part(FEATURES, 1), head.direction(class_index), head.scale(FEATURES)
    )
    torch.testing.assert_close(relevance[:, 1], by_hand, atol=1e-5, rtol=1e-4)


def test_completeness_and_global_relevance_agree_with_the_complement(fitted):
    unit = DIRECTION / DIRECTION.norm()
    relevance = fitted.global_relevance(DIRECTION)
    outside = float((fitted.complement() @ unit).norm())
    assert float(relevance[-1]) == pytest.approx(outside, abs=1e-5)
    assert fitted.completeness(DIRECTION) == pytest.approx((1 - outside**2) ** 0.5, abs=1e-5)
    as_cell = unit[None, :, None, None]
    for concept in range(3):
        part = float(fitted.part(as_cell, concept).norm())
        assert float(relevance[concept]) == pytest.approx(part, abs=1e-5)


def test_orthogonal_concepts_share_the_squared_length():
    dictionary = MCD(3, orthogonal=True, fo_threshold=0.01).fit(FEATURES, direction=DIRECTION)
    rows = dictionary.directions
    torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)), atol=1e-5, rtol=0)
    relevance = dictionary.global_relevance(DIRECTION)
    assert float(relevance.square().sum()) == pytest.approx(1, abs=1e-5)
    assert relevance[:-1].tolist() == sorted(relevance[:-1].tolist(), reverse=True)


def test_the_smallest_complete_number_of_concepts_is_chosen():
    only_first = BASES[0, 0] + BASES[0, 1]
    dictionary = MCD(min_completeness=0.9).fit(FEATURES, direction=only_first)
    assert dictionary.completeness(only_first) >= 0.9
    fewer = dictionary.n_concepts - 1
    if fewer:
        smaller = MCD(fewer).fit(FEATURES, direction=only_first)
        assert smaller.completeness(only_first) < 0.9


def test_a_completeness_out_of_reach_is_one_sentence():
    outside = torch.linalg.qr(BASES.flatten(0, 1).T, mode="complete")[0][:, -1]
    with pytest.raises(InputError, match="up to 3 concepts reach only"):
        MCD(max_concepts=3).fit(FEATURES, direction=outside)


def test_activation_maps_are_norms_of_parts(fitted):
    raw = fitted.activations(FEATURES, "none")
    torch.testing.assert_close(raw[:, 2], fitted.part(FEATURES, 2).norm(dim=1))
    lengths = FEATURES.norm(dim=1)
    by_cell = fitted.activations(FEATURES, "cell")
    torch.testing.assert_close(by_cell, raw / lengths[:, None])
    by_image = fitted.activations(FEATURES)
    torch.testing.assert_close(by_image[1], raw[1] / lengths[1].max())


def test_non_negative_features_take_the_basis_with_more_energy():
    generator = make_generator(4)
    means = 3 * torch.rand(2, 24, generator=generator)
    spread = 0.1 * torch.randn(2, 2, 24, generator=generator)
    labels = torch.randint(2, (192,), generator=generator)
    codes = torch.randn(192, 1, 2, generator=generator)
    cells = (means[labels] + torch.bmm(codes, spread[labels])[:, 0]).relu()
    features = to_map(cells)
    dictionary = MCD(2).fit(features)
    energy = dictionary.report["energy"]
    assert dictionary.report["basis"] == "uncentred"
    assert energy["uncentred"] > 0.9 > energy["centred"]
    units = cells / cells.norm(dim=1, keepdim=True)
    kept = units[dictionary.labels.flatten() >= 0]
    rows = dictionary.directions
    held = (torch.linalg.pinv(rows) @ rows @ kept.T).square().sum() / len(kept)
    assert energy["uncentred"] == pytest.approx(float(held), abs=1e-4)
    centred = MCD(2, basis="centred").fit(features)
    assert centred.report["basis"] == "centred"
    assert centred.report["energy"] == pytest.approx(energy)
    assert centred.sizes != dictionary.sizes


def test_noise_does_not_make_the_centred_basis_win_by_its_dimension():
    generator = make_generator(5)
    means = torch.eye(2, 24)
    labels = torch.randint(2, (192,), generator=generator)
    cells = means[labels] + 0.03 * torch.randn(192, 24, generator=generator)
    report = MCD(2).fit(to_map(cells)).report
    assert all(d > 15 for d in report["dimensions"]["centred"])
    assert report["dimensions"]["uncentred"] == [1, 1]
    assert report["energy"]["centred"] > report["energy"]["uncentred"] > 0.95
    assert report["basis"] == "uncentred"
    equal = report["energy_at_equal_dimensions"]
    assert equal["uncentred"] == pytest.approx(report["energy"]["uncentred"])
    assert equal["centred"] < 0.3


def test_zero_cells_and_cells_left_out_have_no_concept():
    cells = to_cells(FEATURES).clone()
    cells[:10] = 0
    dictionary = MCD(3, max_cells=200, outlier_quantile=1.0).fit(to_map(cells))
    labels = dictionary.labels.flatten()
    assert (labels[:10] == -1).all()
    assert int((labels >= 0).sum()) == 200
    assert dictionary.report["n_zero_cells"] == 10
    assert dictionary.report["n_outliers"] == 0
    again = MCD(3, max_cells=200, outlier_quantile=1.0).fit(to_map(cells))
    assert torch.equal(again.directions, dictionary.directions)


def test_codes_of_intersecting_subspaces_count_the_excess(intersecting):
    features = torch.randn(1, 8, 2, 2, generator=make_generator())
    assert intersecting.encode(features).shape[1] == 8 + 2
    assert len(intersecting.complement()) == 5
    assert intersecting.completeness(torch.eye(8)[1]) == pytest.approx(1)


def test_half_precision_goes_in_and_out(fitted):
    part = fitted.part(FEATURES.half(), 0)
    assert part.dtype == torch.float16
    torch.testing.assert_close(part.float(), fitted.part(FEATURES, 0), atol=2e-2, rtol=0)


def test_save_and_load(fitted, tmp_path):
    fitted.spec = FeatureSpec("tiny/convnext", "last", 32, (8, 8))
    fitted.save(tmp_path / "concepts.safetensors")
    loaded = MCD.load(tmp_path / "concepts.safetensors")
    assert isinstance(loaded, MCD)
    assert (loaded.spec, loaded.settings, loaded.report, loaded.sizes) == (
        fitted.spec,
        fitted.settings,
        fitted.report,
        fitted.sizes,
    )
    for verb in ("encode", "parts", "activations", "remainder"):
        assert torch.equal(getattr(loaded, verb)(FEATURES), getattr(fitted, verb)(FEATURES))


def test_order_can_change(fitted, tmp_path):
    fitted.save(tmp_path / "concepts.safetensors")
    other = MCD.load(tmp_path / "concepts.safetensors").sort_by_relevance(DIRECTION)
    order = fitted.global_relevance(DIRECTION)[:-1].argsort(descending=True).tolist()
    torch.testing.assert_close(
        other.part(FEATURES, 0), fitted.part(FEATURES, order[0]), atol=1e-5, rtol=0
    )
    with pytest.raises(InputError, match="each concept at most once"):
        other.reorder([0, 0])


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (FEATURES[:0], "must be maps"),
        (torch.zeros(1, 32, 8, 8), "at least 2 cells that are not zero, got 0"),
        (FEATURES[:1] * torch.inf, "must be finite"),
    ],
)
def test_bad_features(features, message):
    with pytest.raises(InputError, match=message):
        MCD(2).fit(features)


def test_a_width_other_than_the_spec_says():
    spec = FeatureSpec("tiny/convnext", "last", 16, (8, 8))
    with pytest.raises(InputError, match=r"\[batch, 16, height, width\]"):
        MCD(2, spec=spec).fit(FEATURES)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_concepts": 0}, "n_concepts must be at least 1"),
        ({"outlier_quantile": 0.0}, r"outlier_quantile must lie in \(0, 1\]"),
        ({"fo_threshold": 1.0}, "fo_threshold must lie in"),
        ({"gamma": 0.5}, "gamma must be above 1"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(InputError, match=message):
        MCD(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clustering": "spectral"}, "clustering must be one of sparse, kmeans"),
        ({"basis": "both"}, "basis must be one of auto, uncentred, centred, got 'both'"),
    ],
)
def test_unknown_names(settings, message):
    with pytest.raises(InputError, match=message):  # MCD's own annotations would refuse it here
        _check_settings(MCD(2).settings | settings)


def test_a_direction_must_come_where_it_decides():
    with pytest.raises(InputError, match="number of concepts by completeness"):
        MCD().fit(FEATURES)
    with pytest.raises(InputError, match="Orthogonal subspaces"):
        MCD(2, orthogonal=True).fit(FEATURES)
    with pytest.raises(InputError, match="one vector of 32 channels"):
        MCD().fit(FEATURES, direction=torch.ones(31))


def test_nothing_before_a_fit_and_no_such_concept(fitted):
    with pytest.raises(InputError, match="Call fit or load first"):
        MCD(2).encode(FEATURES)
    with pytest.raises(InputError, match="must lie in 0 … 2, got 3"):
        fitted.part(FEATURES, 3)
    with pytest.raises(InputError, match="Codes must have 32 channels"):
        fitted.decode(FEATURES[:, :5])


def test_affinity_and_outliers_by_hand():
    coefficients = csr_array(np.array([[0, 3.0, -4], [2, 0, 0], [0, 0, 0]]))
    expected = np.array([[0, 0.8, 0.4], [0.8, 0, 0], [0.4, 0, 0]])
    np.testing.assert_allclose(make_affinity(coefficients).toarray(), expected)
    assert find_inliers(coefficients, 0.5).tolist() == [False, True, True]
    assert find_inliers(coefficients, 1.0).all()


def test_sparse_and_dense_eigenvectors_agree(monkeypatch):
    rng = np.random.default_rng(0)
    blocks = np.kron(np.eye(3), np.ones((40, 40))) + 0.1
    affinity = blocks * (rng.random(blocks.shape) < 0.5)
    affinity = csr_array((affinity + affinity.T) / 2)
    dense = spectral_embedding(affinity, 3, seed=0)
    monkeypatch.setattr(clustering, "_DENSE", 0)
    sparse = spectral_embedding(affinity, 3, seed=0)
    np.testing.assert_allclose(np.abs(dense.T @ sparse), np.eye(3), atol=1e-6)
