"""FeatInv-Viz: what is sampled, with which noise, and what the maps and their nulls are."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from featinv_diffusion.concepts import ConceptDictionary, DirectionConcepts
from featinv_diffusion.errors import InputError
from featinv_diffusion.features import box_mask
from featinv_diffusion.features.edits import high_cells
from featinv_diffusion.inverters import DiffusionInverter
from featinv_diffusion.seeds import make_generator
from featinv_diffusion.studies.concepts import find_concepts
from featinv_diffusion.studies.featinv_viz import (
    dominance,
    energy_inside,
    fade,
    median,
    normalise,
    rgb_distance,
    show_concept,
    turn_part,
)
from tests import tiny
from tests.studies.painting import PaintingInverter, assert_alike, save_pictures

SEEDS = [11, 12, 13]
ROUNDING = math.sqrt(3) / 255  # two 8-bit pictures may each be off by half a level per channel


@pytest.fixture
def inverter(pipeline) -> DiffusionInverter:
    return DiffusionInverter(pipeline, num_inference_steps=2)


def make_concepts(inverter, **origin) -> ConceptDictionary:
    """Concept 0 is the first channel, and concept 1 the sixth."""
    concepts = DirectionConcepts(torch.eye(32)[[0, 5]], spec=inverter.backbone.spec)
    concepts.origin = origin
    return concepts


def upper_part() -> torch.Tensor:
    """Grey cells of 0.8; half of it is the first channel's in the upper half, none below."""
    features = torch.zeros(1, 32, 8, 8)
    features[:, 0, :4] = features[:, 1, :4] = 0.4
    features[:, 1, 4:] = 0.8
    return features


def show(inverter, features, *, noise=0.0, **arguments):
    painting = PaintingInverter(inverter.backbone, noise)
    arguments = {"seeds": SEEDS, "film": [], **arguments}
    return show_concept(painting, features, make_concepts(inverter), **arguments)


# ---- what is sampled -----------------------------------------------------------------------------


def test_the_map_by_hand(inverter):
    """Attenuated to 25 %, the upper half loses 0.3 in each of the three channels."""
    found = show(inverter, upper_part())
    expected = torch.zeros(64, 64)
    expected[:32] = math.sqrt(3) * 0.3
    torch.testing.assert_close(found.map, expected, rtol=0, atol=ROUNDING)
    assert found.null_map.max() == 0
    assert found.numbers()["null"] == 0
    assert found.numbers()["area_inside"] == 0.5
    assert found.numbers()["energy_inside"] == 1
    kept = fade(found.before.images[0], found.map)
    assert torch.equal(kept[:, :32], found.before.images[0][:, :32])
    assert (kept[:, 32:] > found.before.images[0][:, 32:]).all()
    rows = found.rows()
    assert [rows[i]["distance"] for i in (0, -1)] == [found.map[0, 0].item(), 0]
    assert [rows[i]["normalised"] for i in (0, -1)] == [1, 0]


def test_pairs_share_their_noise_and_the_noise_null_does_not(inverter):
    found = show(inverter, upper_part(), noise=0.2, concept=1)
    assert found.map.max() == 0
    noise = [torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(s)) for s in SEEDS]
    for j, (one, other) in enumerate([(0, 1), (1, 2), (2, 0)]):
        expected = 0.2 * (noise[one] - noise[other]).norm(dim=0)
        torch.testing.assert_close(found.seed_noise[j], expected, rtol=0, atol=ROUNDING)


def test_random_directions_move_what_they_are_given_to_move(inverter):
    features = upper_part()
    found = show(inverter, features, factor=0.5, n_directions=3)
    part = make_concepts(inverter).part(features, 0)
    for k in range(3):
        turned = turn_part(part, make_generator(SEEDS[0], "direction", k))
        shift = 0.5 * turned[0, :2].sum(dim=0).abs() * math.sqrt(3)
        expected = shift.repeat_interleave(8, 0).repeat_interleave(8, 1)
        torch.testing.assert_close(found.random[k, 1], expected, rtol=0, atol=ROUNDING)
    assert not torch.equal(found.random[0], found.random[2])
    torch.testing.assert_close(found.random_map, found.random[:, 0].mean(dim=0))


def test_the_samples_are_those_of_the_edited_maps(inverter):
    """Of a real sampler: factors in order, same noise, the backbone's own class scores."""
    features = inverter.backbone.features(tiny.make_images(1))
    concepts = make_concepts(inverter, class_index=3)
    found = show_concept(inverter, features, concepts, seeds=SEEDS[:2], film=[2, 0], n_directions=1)
    part = concepts.part(features, 0)
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
    names = ["factor_0_0.png", "factor_0.25_0.png", "factor_1_0.png", "factor_2_0.png"]
    assert list(found.pictures())[::2] == [*names, "random_0_0.png"]
    assert "Probability of class 3: 0." in found.summary()
    assert found._repr_png_().startswith(b"\x89PNG")


def test_factor_one_gives_a_map_of_exactly_zero(inverter):
    features = inverter.backbone.features(tiny.make_images(1))
    concepts = make_concepts(inverter)
    found = show_concept(inverter, features, concepts, factor=1, film=[], seeds=SEEDS[:2])
    assert torch.equal(found.map, torch.zeros(64, 64))
    assert torch.equal(normalise(found.map), torch.zeros(64, 64))
    assert torch.equal(found.random_map, torch.zeros(64, 64))
    numbers = found.numbers()
    assert (numbers["effect"], numbers["null_random"], numbers["affected"]) == (0, 0, 0)
    assert numbers["energy_inside"] is None
    assert numbers["effect_over_null_random"] is None
    assert numbers["effect_over_null"] == 0
    assert numbers["dominance_random"] == 0


def test_paths_pictures_and_maps_give_the_same(inverter, tmp_path):
    """And concepts in memory, from a file, and as `find_concepts` returns them."""
    (path,) = save_pictures(tmp_path, 1)
    concepts = find_concepts(inverter, [path], method="pca", n_concepts=2)
    concepts.save(tmp_path / "c.safetensors")
    given = [
        (path, tmp_path / "c.safetensors"),
        (Image.open(path), str(tmp_path / "c.safetensors")),
        (inverter.encode(path), concepts),
        (str(path), concepts.concepts),
    ]
    settings = {"seeds": SEEDS[:2], "film": [], "n_directions": 1}
    results = [show_concept(inverter, *each, **settings) for each in given]
    assert_alike(results)
    assert results[0].class_index == concepts.target.index
    assert results[0].arguments["concepts"] == str(tmp_path / "c.safetensors")
    assert results[2].arguments["concepts"] is None


def test_without_a_class_of_the_concepts_it_is_the_picture_s_own(inverter, tmp_path):
    (path,) = save_pictures(tmp_path, 1)
    found = show_concept(
        PaintingInverter(inverter.backbone, None), path, make_concepts(inverter), film=[]
    )
    logits = inverter.encode(path).sources[0].logits
    assert (found.class_index, found.class_name) == (logits.argmax(), f"class {logits.argmax()}")


def test_a_deterministic_inverter_has_no_null_of_other_noise(inverter):
    found = show(inverter, upper_part(), noise=None)
    numbers = found.numbers()
    assert len(numbers["samples"]) == 2 + 3
    for name in ("null", "effect_over_null", "dominance", "energy_inside_null"):
        assert numbers[name] is None
    assert numbers["effect_over_null_random"] > 0
    assert found.null_map is None
    assert {row["null"] for row in found.rows()} == {None}
    assert "a deterministic inverter has no null of other noise" in found.summary()
    words = {text.get_text() for text in found.figure().findobj(lambda a: hasattr(a, "get_text"))}
    assert {"concept", "null: random"} <= words
    assert "null: other noise" not in words
    assert found._repr_png_().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"seeds": [1]}, "n_samples must be at least 2 here"),
        ({"n_directions": 0}, "n_directions must be from 1 to 1000, got 0"),
        ({"factor": math.nan}, "finite"),
        ({"film": [math.inf]}, "finite"),
        ({"film": [0.25 + 1e-15]}, "rounding errors"),
        ({"concept": 2}, "0 … 1"),
    ],
)
def test_what_cannot_be_shown(inverter, arguments, words):
    with pytest.raises(InputError, match=words):
        show(inverter, upper_part(), **arguments)


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
