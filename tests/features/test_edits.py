"""Edits of feature maps are pure, exact and seeded."""

from __future__ import annotations

import pytest
import torch

from featinv_diffusion.errors import InputError
from featinv_diffusion.features import permute_cells


def make_generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_map(b: int = 2) -> torch.Tensor:
    """Every value of cell (y, x) tells its place: channel k holds 100 k + 10 y + x."""
    channel, y, x = torch.meshgrid(*(torch.arange(n) for n in (3, 4, 5)), indexing="ij")
    return (100 * channel + 10 * y + x).float().expand(b, -1, -1, -1)


def test_cells_move_as_whole_vectors():
    features = make_map()
    shuffled = permute_cells(features, make_generator())
    assert shuffled.shape == features.shape
    first, second, third = shuffled.unbind(dim=1)
    torch.testing.assert_close(second, first + 100)
    torch.testing.assert_close(third, first + 200)
    torch.testing.assert_close(
        first.flatten(1).sort().values, features[:, 0].flatten(1).sort().values
    )
    assert not torch.equal(shuffled, features)


def test_input_stays_and_the_seed_decides():
    features = make_map()
    before = features.clone()
    once, again = (permute_cells(features, make_generator(3)) for _ in range(2))
    torch.testing.assert_close(once, again, rtol=0, atol=0)
    torch.testing.assert_close(features, before, rtol=0, atol=0)
    assert not torch.equal(once, permute_cells(features, make_generator(4)))


def test_each_map_has_its_own_permutation():
    shuffled = permute_cells(make_map(), make_generator())
    assert not torch.equal(shuffled[0], shuffled[1])


def test_a_generator_per_map_makes_a_map_independent_of_its_batch():
    features = make_map(3)
    batch = permute_cells(features, [make_generator(i) for i in range(3)])
    alone = permute_cells(features[2:], [make_generator(2)])
    torch.testing.assert_close(batch[2:], alone, rtol=0, atol=0)


def test_every_permutation_is_about_as_likely():
    features = torch.arange(3.0).reshape(1, 1, 1, 3).expand(6000, -1, -1, -1)
    shuffled = permute_cells(features, make_generator()).flatten(1)
    _, counts = shuffled.unique(dim=0, return_counts=True)
    assert len(counts) == 6
    assert (counts - 1000).abs().max() < 150  # 5 standard deviations of a fair draw


def test_wrong_number_of_generators():
    with pytest.raises(InputError, match="3 came for 2 maps"):
        permute_cells(make_map(), [make_generator()] * 3)
