"""FeatInv-Viz: what is sampled, with which noise, and what the maps and their nulls are."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from featinv_diffusion.errors import InputError
from featinv_diffusion.features import box_mask
from featinv_diffusion.inverters import DiffusionInverter
from featinv_diffusion.seeds import make_generator
from featinv_diffusion.studies.featinv_viz import (
    dominance,
    energy_inside,
    fade,
    high_cells,
    measure_concept,
    median,
    normalise,
    rgb_distance,
    summarise,
    turn_part,
)
from tests import tiny

SEEDS = [11, 12, 13]
ROUNDING = math.sqrt(3) / 255  # two 8-bit pictures may each be off by half a level per channel


class PaintingInverter:
    """Each cell becomes a patch as grey as its first channel, plus noise of the generator."""

    def __init__(self, backbone, noise: float = 0.0):
        self.backbone, self.spec, self.noise = backbone, backbone.spec, noise

    def invert(self, features, *, generator=None):
        patches = features[:, :1].repeat_interleave(8, 2).repeat_interleave(8, 3)
        noise = torch.stack([torch.rand(3, 64, 64, generator=g) for g in generator])
        return patches.expand(-1, 3, -1, -1) + self.noise * noise


@pytest.fixture
def inverter(pipeline) -> DiffusionInverter:
    return DiffusionInverter(pipeline, num_inference_steps=2)


def upper_part() -> tuple[torch.Tensor, torch.Tensor]:
    """Grey cells of 0.8, half of which is the concept's in the upper half."""
    features, part = torch.zeros(1, 32, 8, 8), torch.zeros(1, 32, 8, 8)
    features[:, 0] = 0.8
    part[:, 0, :4] = 0.4
    return features, part


# ---- what is sampled -----------------------------------------------------------------------------


def test_the_map_by_hand(inverter):
    """Attenuated to 25 %, the upper half loses 0.3 in each of the three channels."""
    features, part = upper_part()
    found = measure_concept(PaintingInverter(inverter.backbone), features, part, 0.25, SEEDS)
    expected = torch.zeros(64, 64)
    expected[:32] = math.sqrt(3) * 0.3
    torch.testing.assert_close(found.map, expected, rtol=0, atol=ROUNDING)
    assert found.null_map.max() == 0
    kept = fade(found.before.images[0], found.map)
    assert torch.equal(kept[:, :32], found.before.images[0][:, :32])
    assert (kept[:, 32:] > found.before.images[0][:, 32:]).all()


def test_pairs_share_their_noise_and_the_noise_null_does_not(inverter):
    features, part = upper_part()
    noisy = PaintingInverter(inverter.backbone, noise=0.2)
    found = measure_concept(noisy, features, 0 * part, 0.25, SEEDS)
    assert found.map.max() == 0
    noise = [torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(s)) for s in SEEDS]
    for j, (one, other) in enumerate([(0, 1), (1, 2), (2, 0)]):
        expected = 0.2 * (noise[one] - noise[other]).norm(dim=0)
        torch.testing.assert_close(found.seed_noise[j], expected, rtol=0, atol=ROUNDING)


def test_random_directions_move_what_they_are_given_to_move(inverter):
    features, part = upper_part()
    found = measure_concept(
        PaintingInverter(inverter.backbone), features, part, 0.5, SEEDS, n_directions=2
    )
    for k in range(2):
        turned = turn_part(part, make_generator(SEEDS[0], "direction", k))
        shift = 0.5 * turned[0, 0].abs() * math.sqrt(3)
        expected = shift.repeat_interleave(8, 0).repeat_interleave(8, 1)
        torch.testing.assert_close(found.random[k, 1], expected, rtol=0, atol=ROUNDING)
    assert not torch.equal(found.random[0], found.random[1])
    mean = (found.random[0, 0] + found.random[1, 0]) / 2
    torch.testing.assert_close(found.random_map, mean)


def test_the_samples_are_those_of_the_edited_maps(inverter):
    """Of a real sampler: factors in order, same noise, the backbone's own class scores."""
    features = inverter.backbone.features(tiny.make_images(1))
    part = 0.5 * tiny.make_features(1)
    found = measure_concept(
        inverter, features, part, 0.25, SEEDS[:2], film=[2, 0], n_directions=1, class_index=3
    )
    assert [dose.factor for dose in found.doses] == [0, 0.25, 1, 2]
    assert found.after.factor == 0.25
    for dose in found.doses:
        generators = [torch.Generator().manual_seed(seed) for seed in SEEDS[:2]]
        edited = (features - (1 - dose.factor) * part).expand(2, -1, -1, -1)
        images = inverter.invert(edited, generator=generators)
        torch.testing.assert_close(dose.images, images.clamp(0, 1), rtol=0, atol=1 / 255)
        scores = inverter.backbone.classify(dose.images)
        torch.testing.assert_close(dose.probability, scores.softmax(dim=1)[:, 3])
    changed = (found.after.images - found.before.images).square().sum(dim=1).sqrt()
    torch.testing.assert_close(found.distance, changed)


def test_factor_one_gives_a_map_of_exactly_zero(inverter):
    features = inverter.backbone.features(tiny.make_images(1))
    found = measure_concept(inverter, features, tiny.make_features(1), 1.0, SEEDS[:2])
    assert torch.equal(found.map, torch.zeros(64, 64))
    assert torch.equal(normalise(found.map), torch.zeros(64, 64))
    assert torch.equal(found.random_map, torch.zeros(64, 64))
    figures = summarise(found, torch.ones(8, 8, dtype=torch.bool))
    assert (figures["effect"], figures["null_random"], figures["affected"]) == (0, 0, 0)
    assert figures["energy_inside"] is None
    assert figures["effect_over_null_random"] is None
    assert figures["effect_over_null"] == 0
    assert figures["dominance_random"] == 0


def test_what_cannot_be_measured(inverter):
    features, part = upper_part()
    with pytest.raises(InputError, match="2 samples and 1 random direction, but 1 and 3 came"):
        measure_concept(inverter, features, part, 0.25, [1])
    with pytest.raises(InputError, match="but 2 and 0 came"):
        measure_concept(inverter, features, part, 0.25, [1, 2], n_directions=0)
    with pytest.raises(InputError, match="finite"):
        measure_concept(inverter, features, part, math.nan, [1, 2])


# ---- random directions ---------------------------------------------------------------------------


def test_a_turned_part_keeps_norms_and_angles_of_its_cells():
    part = tiny.make_features(1)
    turned = turn_part(part, make_generator(0))
    cells, others = (m[0].flatten(1).T.double() for m in (part, turned))
    torch.testing.assert_close(others @ others.T, cells @ cells.T, rtol=1e-4, atol=1e-4)
    assert (cells - others).norm() > cells.norm()
    assert torch.equal(turned, turn_part(part, make_generator(0)))
    assert not torch.allclose(turned, turn_part(part, make_generator(1)))


def test_a_concept_of_one_dimension_becomes_one_random_direction():
    generator = torch.Generator().manual_seed(0)
    codes, direction = torch.randn(64, generator=generator), torch.zeros(32)
    direction[0] = 1
    part = torch.outer(direction, codes).reshape(1, 32, 8, 8)
    cells = turn_part(part, make_generator(3))[0].flatten(1)
    singular = torch.linalg.svdvals(cells)
    assert singular[1] < 1e-4 * singular[0]
    along = cells.T @ (cells[:, 0] / codes[0])
    torch.testing.assert_close(along, codes, rtol=1e-4, atol=1e-4)


def test_nothing_turned_is_nothing():
    part = torch.zeros(1, 32, 8, 8)
    assert torch.equal(turn_part(part, make_generator(0)), part)


# ---- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_the_median_is_numpy_s(n):
    values = torch.rand(n, 3, 4, generator=torch.Generator().manual_seed(n))
    np.testing.assert_allclose(median(values), np.median(values.numpy(), axis=0), rtol=1e-6)


def test_the_distance_of_black_and_white_is_the_diagonal_of_the_cube():
    black, white = torch.zeros(1, 3, 2, 2), torch.ones(1, 3, 2, 2)
    torch.testing.assert_close(rgb_distance(black, white), torch.full((1, 2, 2), math.sqrt(3)))


def test_a_normalised_map_ends_at_one():
    torch.testing.assert_close(
        normalise(torch.tensor([[0.0, 0.1], [0.2, 0.4]])), torch.tensor([[0, 0.25], [0.5, 1]])
    )


def test_dominance_by_hand():
    """Pairs 1>0, 1<2, 2>0, 2=2: (2 − 1) / 4."""
    assert dominance(torch.tensor([1.0, 2.0]), torch.tensor([[0.0], [2.0]])) == 0.25
    assert dominance(torch.ones(3), torch.zeros(2)) == 1


def test_the_share_of_energy_by_hand():
    """Distance 2 on one pixel inside and 1 on two outside: 4 / 6, whatever the leading axes."""
    distance = torch.zeros(4, 4)
    distance[0, 0], distance[3, 3], distance[0, 3] = 2, 1, 1
    cells = box_mask([0, 0, 0.5, 0.5], (2, 2))
    for values in (distance[None], distance.expand(3, 2, 4, 4)):
        assert energy_inside(values, cells) == pytest.approx(4 / 6)
    assert energy_inside(torch.zeros(1, 4, 4), cells) is None


def test_high_cells_reach_half_of_the_greatest():
    activation = torch.tensor([[0.0, 0.39], [0.4, 0.8]])
    assert high_cells(activation).tolist() == [[False, False], [True, True]]
    assert not high_cells(torch.zeros(2, 2)).any()
