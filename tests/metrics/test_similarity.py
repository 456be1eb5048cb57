"""Retrieval and CKA on planted sets; the sketch against exact inner products."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from featinv_diffusion.errors import InputError
from featinv_diffusion.metrics.features import centred_cosine, feature_cosine
from featinv_diffusion.metrics.similarity import linear_cka, retrieval_ranks, sketch


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_centred_cosine_sees_through_what_all_maps_share():
    mean = 5 * noise(8, 1, 1, seed=9)
    one, other = mean + noise(3, 8, 4, 4, seed=1), mean + noise(3, 8, 4, 4, seed=2)
    assert feature_cosine(one, other).min() > 0.8
    assert centred_cosine(one, other, mean).abs().max() < 0.3
    by_hand = F.cosine_similarity(one - mean, other - mean, dim=1).mean(dim=(1, 2))
    torch.testing.assert_close(centred_cosine(one, other, mean), by_hand)
    torch.testing.assert_close(centred_cosine(one, one, mean), torch.ones(3))


def test_ranks_count_the_others_that_are_as_near():
    originals = torch.tensor([[1.0, 0], [0, 1], [1, 1], [1, 1]])
    made = torch.tensor([[3.0, 0.1], [1, 0], [1, 1], [1, 1]])
    assert retrieval_ranks(originals, made).tolist() == [0, 3, 1, 1]  # a copy is as near
    assert retrieval_ranks(originals, made, [0, 0, 1, 2]).tolist() == [0, 1, 0, 0]
    assert retrieval_ranks(originals, made[:1], [0, 1, 0, 0]).tolist() == [0]
    assert retrieval_ranks(originals, originals[1:2].flip(1)).tolist() == [0]  # more only compete
    with pytest.raises(InputError, match="the vector of an original for each reconstruction"):
        retrieval_ranks(originals[:2], made, [0, 0])


def test_a_sketch_keeps_inner_products():
    maps = noise(6, 32, 16, 16) + 1
    short = sketch(maps, 4096)
    assert short.shape == (6, 4096)
    exact = F.normalize(maps.flatten(1)) @ F.normalize(maps.flatten(1)).T
    found = F.normalize(short) @ F.normalize(short).T
    torch.testing.assert_close(found, exact, atol=0.08, rtol=0)
    torch.testing.assert_close(sketch(maps[2:3], 4096), short[2:3])
    torch.testing.assert_close(sketch(maps, 8192), maps.flatten(1))


def test_cka_is_one_up_to_rotation_and_scale_and_zero_without_relation():
    x = noise(60, 12)
    rotation = torch.linalg.qr(noise(12, 12, seed=1)).Q
    same = linear_cka(x, 3 * x @ rotation + 7)
    assert same is not None
    assert same.value == pytest.approx(1, abs=1e-4)
    unrelated = linear_cka(x, noise(60, 500, seed=2))  # the plain estimate is 0.42 here
    assert unrelated is not None
    assert unrelated.low < 0.0 < unrelated.high
    assert unrelated.value == pytest.approx(0, abs=0.05)
    half = linear_cka(x, torch.cat([x[:, :6], noise(60, 6, seed=3)], dim=1))
    assert half is not None
    assert 0.3 < half.low < half.value < half.high < 0.75
    assert linear_cka(x[:7], x[:7]) is None
    assert linear_cka(torch.ones(9, 3), x[:9]) is None
