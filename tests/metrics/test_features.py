"""Feature metrics against cases worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from featinv_diffusion.errors import InputError
from featinv_diffusion.metrics import feature_cosine, shuffled_cosine, top_k_match


def make_generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_map(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=make_generator(seed))


def test_cosine_is_the_mean_over_cells_by_hand():
    # 2 channels, cells: same direction, opposite, right angle, 45 degrees.
    original = torch.tensor([[[1.0, 1.0], [1.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]])[None]
    other = torch.tensor([[[3.0, -2.0], [0.0, 5.0]], [[0.0, 0.0], [7.0, 5.0]]])[None]
    expected = (1 - 1 + 0 + 1 / math.sqrt(2)) / 4
    assert feature_cosine(original, other).tolist() == pytest.approx([expected])


def test_cosine_is_not_the_cosine_of_the_whole_map():
    # One strong cell agrees and three weak ones do not: as one long vector they would agree.
    original = torch.tensor([100.0, 1.0, 1.0, 1.0]).reshape(1, 1, 2, 2)
    other = torch.tensor([100.0, -1.0, -1.0, -1.0]).reshape(1, 1, 2, 2)
    assert feature_cosine(original, other).item() == pytest.approx(-0.5)


@given(scale=st.floats(0.01, 100), seed=st.integers(0, 100))
def test_cosine_with_itself_is_one_at_any_scale(scale, seed):
    features = make_map(2, 8, 3, 3, seed=seed)
    assert feature_cosine(features, scale * features).tolist() == pytest.approx([1, 1], abs=1e-5)


def test_cosine_of_half_precision_is_taken_in_float32():
    features = make_map(1, 64, 3, 3) * 300  # squares overflow in float16
    got = feature_cosine(features.half(), features.half())
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(1, abs=1e-5)


def test_a_zero_vector_counts_zero():
    features = torch.ones(1, 4, 1, 2)
    features[..., 1] = 0
    assert feature_cosine(features, torch.ones(1, 4, 1, 2)).item() == pytest.approx(0.5)


def test_images_of_a_batch_do_not_mix():
    a, b = make_map(3, 4, 2, 2, seed=1), make_map(3, 4, 2, 2, seed=2)
    alone = [feature_cosine(a[i : i + 1], b[i : i + 1]).item() for i in range(3)]
    assert feature_cosine(a, b).tolist() == pytest.approx(alone)


def test_shapes_must_agree():
    with pytest.raises(InputError, match=r"\[1, 4, 2, 2\] and \[1, 4, 3, 3\]"):
        feature_cosine(make_map(1, 4, 2, 2), make_map(1, 4, 3, 3))


def test_shuffled_cosine_forgets_the_place_only():
    # Cells are unit vectors of their own: cell i meets cell j, 1 where the permutation stays.
    features = torch.eye(9).reshape(1, 9, 3, 3)
    order = torch.randperm(9, generator=make_generator(5))
    fixed_points = (order == torch.arange(9)).float().mean().item()
    got = shuffled_cosine(features, features, make_generator(5))
    assert got.item() == pytest.approx(fixed_points)
    assert feature_cosine(features, features).item() == pytest.approx(1)


def test_shuffled_cosine_of_constant_maps_is_one():
    # Where all cells are alike the null agrees too: such a cosine proves no layout.
    features = torch.ones(2, 5, 4, 4)
    assert shuffled_cosine(features, features, make_generator()).tolist() == pytest.approx([1, 1])


def test_top_k_match_by_hand():
    original = torch.tensor([[9.0, 1, 2, 3], [0, 0, 0, 1], [1, 5, 2, 3]])
    other = torch.tensor([[5.0, 9, 1, 2], [9, 1, 2, 0], [1, 2, 0, 0]])
    assert top_k_match(original, other, 1).tolist() == [False, False, True]
    assert top_k_match(original, other, 2).tolist() == [True, False, True]
    assert top_k_match(original, other, 4).tolist() == [True, True, True]


def test_top_k_is_asked_of_the_reconstruction_not_of_the_original():
    original, other = torch.tensor([[3.0, 2, 1]]), torch.tensor([[1.0, 2, 3]])
    assert top_k_match(original, other, 2).tolist() == [False]
    original, other = torch.tensor([[1.0, 2, 3]]), torch.tensor([[9.0, 1, 2]])
    assert top_k_match(original, other, 2).tolist() == [True]  # class 2 is second there


@pytest.mark.parametrize("k", [0, 4])
def test_k_beyond_the_classes(k):
    with pytest.raises(InputError, match=r"1 … 3"):
        top_k_match(torch.zeros(1, 3), torch.zeros(1, 3), k)
