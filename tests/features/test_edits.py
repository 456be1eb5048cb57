"""Edits of feature maps are pure, exact and seeded."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from featinv_diffusion.errors import InputError
from featinv_diffusion.features import (
    in_sequence,
    interpolate,
    mix,
    paste,
    permute_cells,
    scale_part,
)
from featinv_diffusion.features.edits import random_like, random_part, shorten
from featinv_diffusion.features.natural_maps import fit_basis
from tests.features import natural

FRACTION = st.floats(-2, 2, allow_nan=False)


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
    with pytest.raises(InputError, match="got 3 for 2 maps"):
        permute_cells(make_map(), [make_generator()] * 3)


# ---- mixtures ----------------------------------------------------------------------------------


def random_maps(b: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(b, 3, 4, 5, generator=make_generator(seed))


def test_mix_is_the_weighted_sum_of_any_number_of_maps():
    maps = [random_maps(seed=i) for i in range(3)]
    mixed = mix(maps, [0.5, -2, 0.25])
    assert mixed[1, 2, 3, 4].item() == pytest.approx(
        0.5 * maps[0][1, 2, 3, 4].item()
        - 2 * maps[1][1, 2, 3, 4].item()
        + 0.25 * maps[2][1, 2, 3, 4].item()
    )


def test_interpolating_to_the_ends_gives_the_maps_bit_for_bit():
    a, b = random_maps(), random_maps(seed=1)
    assert torch.equal(interpolate(a, b, 1), a)
    assert torch.equal(interpolate(a, b, 0), b)


@given(FRACTION)
def test_interpolation_is_symmetric(weight: float):
    a, b = random_maps(), random_maps(seed=1)
    torch.testing.assert_close(interpolate(a, b, weight), interpolate(b, a, 1 - weight))


def test_one_other_map_serves_a_whole_batch():
    a, b = random_maps(3), random_maps(1, seed=1)
    mixed = interpolate(a, b, 0.3)
    torch.testing.assert_close(mixed[2:], interpolate(a[2:], b, 0.3))


@pytest.mark.parametrize(
    ("maps", "weights", "words"),
    [
        ([], [], "0 maps"),
        ([random_maps()], [1, 2], "got 2 weights and 1 maps"),
        ([random_maps()], [float("nan")], "finite"),
        ([random_maps(), random_maps()[:, :2]], [1, 2], r"\[2, 3, 4, 5\] and \[2, 2, 4, 5\]"),
        ([random_maps(), random_maps(3)], [1, 2], r"\[3, 3, 4, 5\]"),
    ],
)
def test_maps_that_cannot_be_mixed(maps, weights, words):
    with pytest.raises(InputError, match=words):
        mix(maps, weights)


# ---- regions -----------------------------------------------------------------------------------


def corner_mask() -> torch.Tensor:
    """Cells (0, 0), (0, 1) of 4×5."""
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[0, :2] = True
    return mask


def test_paste_takes_whole_vectors_of_marked_cells_only():
    a, b = make_map(), -make_map()
    pasted = paste(a, b, corner_mask())
    assert pasted[0, :, 0, 1].tolist() == [-1, -101, -201]
    assert pasted[0, :, 0, 2].tolist() == [2, 102, 202]
    assert (pasted != a).sum() == 2 * (2 * 3 - 1)  # of the first cell, channel 0 holds ±0


def test_swapping_a_region_twice_is_the_identity():
    a, b, mask = random_maps(), random_maps(seed=1), corner_mask()
    assert torch.equal(paste(paste(a, b, mask), a, mask), a)


def test_a_mask_per_map():
    a, b = random_maps(), random_maps(seed=1)
    masks = torch.stack([corner_mask(), ~corner_mask()])
    pasted = paste(a, b, masks)
    assert torch.equal(pasted[0], paste(a, b, corner_mask())[0])
    assert torch.equal(pasted[1], paste(a, b, ~corner_mask())[1])


@pytest.mark.parametrize("shape", [(5, 4), (3, 4, 5), (2, 2, 4, 5), (4,)])
def test_a_mask_of_another_shape(shape):
    with pytest.raises(InputError, match="mask"):
        paste(random_maps(), random_maps(), torch.ones(shape, dtype=torch.bool))


# ---- parts -------------------------------------------------------------------------------------


def first_channel(features: torch.Tensor) -> torch.Tensor:
    return torch.cat([features[:, :1], torch.zeros_like(features[:, 1:])], dim=1)


@given(FRACTION)
def test_scaling_a_part_scales_it_and_leaves_the_rest(factor: float):
    features = random_maps()
    edited = scale_part(features, first_channel, factor)
    torch.testing.assert_close(edited[:, 0], factor * features[:, 0])
    assert torch.equal(edited[:, 1:], features[:, 1:])


def test_factor_one_is_the_identity_bit_for_bit():
    features = random_maps()
    assert torch.equal(scale_part(features, random_maps(seed=1), 1), features)


def test_a_part_may_be_scaled_in_a_region():
    features = random_maps()
    edited = scale_part(features, features, 0.25, corner_mask())
    expected = features.clone()
    expected[:, :, 0, :2] *= 0.25
    torch.testing.assert_close(edited, expected)


def test_a_factor_must_be_finite():
    with pytest.raises(InputError, match="finite"):
        scale_part(random_maps(), first_channel, float("inf"))


# ---- all ---------------------------------------------------------------------------------------


def test_edits_compose_in_order_and_leave_their_input():
    a, b = random_maps(), random_maps(seed=1)
    before = a.clone()
    double = partial(scale_part, part=lambda f: f, factor=2.0)
    put = partial(paste, other=b, mask=corner_mask())
    assert torch.equal(in_sequence(double, put)(a), paste(2 * a, b, corner_mask()))
    assert torch.equal(in_sequence(put, double)(a), 2 * paste(a, b, corner_mask()))
    assert in_sequence()(a) is a
    interpolate(a, b, 0.5)
    assert torch.equal(a, before)


def test_edits_keep_the_dtype():
    half = random_maps().half()
    assert interpolate(half, random_maps(seed=1), 0.5).dtype == torch.float16
    assert paste(half, random_maps(seed=1), corner_mask()).dtype == torch.float16
    assert scale_part(half, first_channel, 0.5).dtype == torch.float16


# ---- the null of an edit -------------------------------------------------------------------------


def test_random_changes_keep_lengths_and_angles_and_lie_in_the_natural_span():
    basis = fit_basis(natural.make_maps(200, seed=1))
    frame = basis.axes * basis.std
    change = torch.randn(3, natural.CHANNELS, *natural.GRID, generator=make_generator())
    change[1:] = change[1:, :2].sum(dim=1, keepdim=True) * change[:1, :, :1, :1]  # one direction
    turned = random_like(change[1:], frame, make_generator(1))
    torch.testing.assert_close(turned.norm(dim=1), change[1:].norm(dim=1))
    cells = turned.permute(0, 2, 3, 1).flatten(0, 2)
    assert torch.linalg.matrix_rank(cells, rtol=1e-4) == 1
    off = cells - cells @ basis.axes @ basis.axes.T
    assert off.norm() <= 1e-4 * cells.norm()
    assert torch.equal(turned, random_like(change[1:], frame, make_generator(1)))
    assert not torch.allclose(turned, random_like(change[1:], frame, make_generator(2)))
    every = random_like(change[:1], frame, make_generator(1))
    torch.testing.assert_close(every.norm(dim=1), change[:1].norm(dim=1))
    assert not random_like(torch.zeros_like(change), frame, make_generator()).any()


def test_random_directions_vary_as_natural_cells_do():
    basis = fit_basis(natural.make_maps(200, seed=1))
    frame = basis.axes * basis.std
    change = torch.zeros(1, natural.CHANNELS, 1, 1)
    change[:, 0] = 1.0
    drawn = [random_like(change, frame, make_generator(seed)).flatten() for seed in range(2000)]
    found = (torch.stack(drawn) @ basis.axes).square().mean(dim=0)
    noise = torch.randn(20_000, len(basis.std), generator=make_generator()) * basis.std
    expected = (noise / noise.norm(dim=1, keepdim=True)).square().mean(dim=0)
    torch.testing.assert_close(found, expected, atol=0.03, rtol=0.1)


def test_a_random_part_is_an_equally_long_projection():
    """Of the map on a subspace of the frame, shortened: what is removed is there to be removed."""
    basis = fit_basis(natural.make_maps(200, seed=1))
    frame = basis.axes[:, :6] * basis.std[:6]
    features = natural.make_maps(1, seed=2)
    projected = torch.einsum("bchw,ck,dk->bdhw", features, basis.axes[:, :6], basis.axes[:, :6])
    cells = features.permute(0, 2, 3, 1).flatten(0, 2).double()
    for length, least in ((0.1, 2), (0.9, 1)):
        wanted = length * projected
        part, rank = random_part(features, wanted, frame, make_generator(1), least)
        torch.testing.assert_close(part.norm(), wanted.norm())
        rows = part.permute(0, 2, 3, 1).flatten(0, 2).double()
        assert torch.linalg.matrix_rank(rows, rtol=1e-4) == rank >= least
        _, _, span = torch.linalg.svd(rows, full_matrices=False)
        share = (cells @ span[:rank].T @ span[:rank]).norm() / rows.norm()
        assert share >= 1 - 1e-5
        torch.testing.assert_close(
            rows * share, cells @ span[:rank].T @ span[:rank], rtol=1e-3, atol=1e-4
        )
        again, _ = random_part(features, wanted, frame, make_generator(1), least)
        other, _ = random_part(features, wanted, frame, make_generator(2), least)
        assert torch.equal(part, again)
        assert not torch.allclose(part, other)
    whole, rank = random_part(features, features, frame, make_generator(1))
    assert rank == 6
    torch.testing.assert_close(whole.norm(), features.norm())
    nothing, _ = random_part(features, torch.zeros_like(features), frame, make_generator(1))
    assert not nothing.any()


def test_a_shortened_frame_has_the_same_second_moment():
    frame = torch.randn(5, 2, generator=make_generator()) @ torch.randn(
        2, 9, generator=make_generator(1)
    )
    found = shorten(frame)
    assert found.shape == (5, 2)
    torch.testing.assert_close(found @ found.T, frame @ frame.T, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[:, 0] @ found[:, 1], torch.tensor(0.0), atol=1e-4, rtol=0)
    assert not shorten(torch.zeros(3, 4)).any()
