"""PCA, NMF, k-means and given directions, by the verbs that all dictionaries share."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from sklearn.decomposition import PCA

from featinv_diffusion.concepts import (
    ConceptDictionary,
    DirectionConcepts,
    KMeansConcepts,
    NMFConcepts,
    PCAConcepts,
    make_head,
)
from featinv_diffusion.concepts.base import write_concepts
from featinv_diffusion.errors import InputError
from tests.concepts.planted import make_generator, to_cells, to_map

FEATURES = to_map(torch.rand(128, 10, generator=make_generator()) + 0.2)
DIRECTIONS = torch.randn(4, 10, generator=make_generator(1))
BUILDERS = {
    "pca": lambda: PCAConcepts(4),
    "pca centred": lambda: PCAConcepts(4, basis="centred"),
    "nmf": lambda: NMFConcepts(3, max_iter=200),
    "kmeans": lambda: KMeansConcepts(3),
    "least squares": lambda: DirectionConcepts(DIRECTIONS, offset=torch.ones(10)),
    "projection": lambda: DirectionConcepts(DIRECTIONS, encoding="projection"),
    "sparse": lambda: DirectionConcepts(DIRECTIONS, encoding="sparse", positive=True),
    "groups": lambda: DirectionConcepts(DIRECTIONS, sizes=[3, 1]),
}


@pytest.fixture(params=BUILDERS, scope="module")
def dictionary(request) -> ConceptDictionary:
    before = FEATURES.clone()
    fitted = BUILDERS[request.param]().fit(FEATURES)
    assert torch.equal(FEATURES, before)
    return fitted


def test_parts_and_remainder_sum_to_the_features(dictionary):
    parts = dictionary.parts(FEATURES)
    assert parts.shape == (2, dictionary.n_concepts, 10, 8, 8)
    total = parts.sum(dim=1) + dictionary.remainder(FEATURES)
    torch.testing.assert_close(total, FEATURES, atol=1e-5, rtol=1e-4)


def test_decoding_is_the_offset_and_all_parts(dictionary):
    decoded = dictionary.decode(dictionary.encode(FEATURES))
    offset = dictionary._offset if dictionary._offset is not None else torch.zeros(10)
    expected = dictionary.parts(FEATURES).sum(dim=1) + offset[:, None, None]
    torch.testing.assert_close(decoded, expected, atol=1e-5, rtol=1e-4)


def test_a_logit_is_the_sum_of_local_relevances_and_the_bias(dictionary):
    torch.manual_seed(0)
    head = make_head(torch.nn.Linear(10, 3), torch.nn.LayerNorm(10))
    relevance = dictionary.local_relevance(FEATURES, head, 2)
    logits = relevance.mean(dim=(2, 3)).sum(dim=1) + head.bias[2]
    torch.testing.assert_close(logits, head.logits(FEATURES)[:, 2], atol=1e-4, rtol=1e-4)


def test_save_and_load(dictionary, tmp_path):
    path = tmp_path / "folder" / "concepts.safetensors"
    dictionary.save(path)
    loaded = ConceptDictionary.load(path)
    assert type(loaded) is type(dictionary)
    assert (loaded.settings, loaded.report) == (dictionary.settings, dictionary.report)
    assert torch.equal(loaded.encode(FEATURES), dictionary.encode(FEATURES))
    assert torch.equal(loaded.parts(FEATURES), dictionary.parts(FEATURES))


def test_centred_pca_is_that_of_scikit_learn():
    fitted = PCAConcepts(4, basis="centred").fit(FEATURES)
    cells = to_cells(FEATURES).numpy()
    expected = PCA(4).fit(cells)
    codes = to_cells(fitted.encode(FEATURES)).numpy()
    np.testing.assert_allclose(np.abs(codes), np.abs(expected.transform(cells)), atol=1e-4)


def test_uncentred_pca_holds_the_most_energy_and_both_figures_are_there():
    fitted = PCAConcepts(2).fit(FEATURES)
    cells = to_cells(FEATURES).double()
    values = torch.linalg.svdvals(cells).square()
    energy = fitted.report["energy"]
    assert fitted.report["basis"] == "uncentred"
    assert energy["uncentred"] == pytest.approx(float(values[:2].sum() / values.sum()), abs=1e-5)
    assert energy["centred"] < energy["uncentred"]


def test_codes_of_nmf_are_non_negative_least_squares():
    fitted = NMFConcepts(3, max_iter=200).fit(FEATURES)
    assert (fitted.directions >= 0).all()
    codes = to_cells(fitted.encode(FEATURES))
    directions = fitted.directions.double().numpy()
    for cell, code in zip(to_cells(FEATURES)[:8], codes, strict=False):
        expected = nnls(directions.T, cell.double().numpy())[0]
        np.testing.assert_allclose(code.numpy(), expected, atol=1e-3)


def test_nmf_refuses_features_below_zero():
    with pytest.raises(InputError, match="nowhere below zero, got -"):
        NMFConcepts(2).fit(FEATURES - 1)


def test_a_cell_belongs_to_the_nearest_centre_alone():
    features = torch.tensor([[3.0, 0], [5, 0.1], [0, 2], [0.1, 7]]).T.reshape(1, 2, 2, 2)
    fitted = KMeansConcepts(2).fit(features)
    codes = to_cells(fitted.encode(features))
    assert ((codes != 0).sum(dim=1) == 1).all()
    owner = codes.abs().argmax(dim=1)
    assert owner[0] == owner[1] != owner[2] == owner[3]
    error = to_cells(features - fitted.decode(fitted.encode(features))).norm(dim=1)
    assert (error < 0.1).all()


def test_least_squares_and_projection_differ_where_directions_are_oblique():
    rows = torch.tensor([[1.0, 0], [1, 1]])
    features = torch.tensor([2.0, 3.0]).reshape(1, 2, 1, 1)
    oblique = DirectionConcepts(rows).encode(features).flatten()
    torch.testing.assert_close(oblique, torch.tensor([-1.0, 3.0]))
    single = DirectionConcepts(rows, encoding="projection").encode(features).flatten()
    torch.testing.assert_close(single, torch.tensor([2.0, 2.5]))


def test_more_directions_than_channels_decode_to_the_features():
    rows = torch.randn(25, 10, generator=make_generator(2))
    dictionary = DirectionConcepts(rows)
    torch.testing.assert_close(
        dictionary.decode(dictionary.encode(FEATURES)), FEATURES, atol=1e-4, rtol=0
    )
    assert dictionary.completeness(torch.ones(10)) == pytest.approx(1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"directions": torch.zeros(2, 10)}, "must be finite and not zero"),
        ({"directions": torch.full((2, 10), torch.nan)}, "must be finite"),
        ({"directions": torch.ones(0, 10)}, r"must be a matrix"),
        ({"directions": DIRECTIONS, "sizes": [1, 2]}, "add up to 4 directions"),
        ({"directions": DIRECTIONS, "offset": torch.ones(3)}, "one vector of 10 channels"),
        ({"directions": DIRECTIONS, "gamma": 0.5}, "gamma must be above 1"),
    ],
)
def test_bad_directions(arguments, message):
    with pytest.raises(InputError, match=message):
        DirectionConcepts(**arguments)


@pytest.mark.parametrize("build", [PCAConcepts, NMFConcepts, KMeansConcepts])
def test_more_concepts_than_there_can_be(build):
    with pytest.raises(InputError, match="n_concepts must lie in 1 …"):
        build(1000).fit(FEATURES)
    with pytest.raises(InputError, match="n_concepts must lie in 1 …"):
        build(0).fit(FEATURES)


def test_files_that_are_not_there_or_hold_something_else(tmp_path):
    with pytest.raises(InputError, match="There must be a file of concepts"):
        ConceptDictionary.load(tmp_path / "none.safetensors")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no tensors")
    with pytest.raises(InputError, match="truncated or something else"):
        ConceptDictionary.load(broken)
    from safetensors.torch import save_file

    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="its header says None"):
        ConceptDictionary.load(tmp_path / "other.safetensors")
    write_concepts(tmp_path / "newer.safetensors", {"x": torch.ones(1)}, {"kind": "newer"})
    with pytest.raises(InputError, match="'newer'"):
        ConceptDictionary.load(tmp_path / "newer.safetensors")
