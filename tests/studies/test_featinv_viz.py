"""FeatInv-Viz: what is sampled, with which noise, and what the measures and their nulls are."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from featinv_diffusion.concepts import MCD, ConceptDictionary, DirectionConcepts
from featinv_diffusion.concepts.base import ACTIVE_FROM
from featinv_diffusion.errors import InputError
from featinv_diffusion.features import box_mask
from featinv_diffusion.features.edits import high_cells, random_part, shorten
from featinv_diffusion.inverters import DiffusionInverter
from featinv_diffusion.seeds import make_generator
from featinv_diffusion.studies.concepts import find_concepts
from featinv_diffusion.studies.featinv_viz import show_concept
from featinv_diffusion.studies.viz_figure import fade
from featinv_diffusion.studies.viz_measures import (
    EditEffect,
    energy_inside,
    median,
    normalise,
    over_images,
    p_value,
    rgb_distance,
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
    arguments = {"seeds": SEEDS, "film": [], "concept": 0, "n_directions": 3, **arguments}
    return show_concept(painting, features, make_concepts(inverter, class_index=4), **arguments)


# ---- what is sampled -----------------------------------------------------------------------------


def test_the_map_by_hand(inverter):
    """Attenuated to 25 %, the upper half loses 0.3 in each of the three channels."""
    found = show(inverter, upper_part())
    expected = torch.zeros(64, 64)
    expected[:32] = math.sqrt(3) * 0.3
    torch.testing.assert_close(found.map, expected, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(found.signed_map, -expected / math.sqrt(3), rtol=0, atol=1 / 255)
    assert found.other_noise == 0
    numbers = found.numbers()
    assert numbers["area_inside"] == 0.5
    assert numbers["energy_inside"] == {"value": 1, "low": 1, "high": 1, "n": 3}
    assert numbers["signed_change"]["value"] == pytest.approx(-0.3, abs=1 / 255)
    rows = found.rows()
    assert [rows[i]["distance"] for i in (0, -1)] == [found.map[0, 0].item(), 0]
    assert [rows[i]["normalised"] for i in (0, -1)] == [1, 0]
    assert numbers["affected_as_published"] == 0.5


def test_measures_of_features_by_hand(inverter):
    """From the features of the samples alone, with formulas of their own."""
    features = upper_part()
    found = show(inverter, features, noise=0.2)
    backbone = inverter.backbone
    before, after = (backbone.features(d.images).flatten(1) for d in (found.before, found.after))
    asked = np.zeros((32, 8, 8))
    asked[0, :4] = -0.3
    change = (after - before).double().numpy()
    dots = change @ asked.ravel()
    numbers = found.numbers()
    cosine = dots / np.linalg.norm(change, axis=1) / np.linalg.norm(asked)
    assert numbers["realised_change"]["value"] == pytest.approx(cosine.mean(), abs=1e-5)
    assert numbers["arrived"]["value"] == pytest.approx((dots / (asked**2).sum()).mean(), abs=1e-5)
    lengths = [x.reshape(3, 32, 64)[:, 0].abs().mean().item() for x in (after, before)]
    ratio = numbers["activation_ratio"]
    assert ratio["value"] == pytest.approx(lengths[0] / lengths[1], rel=1e-5)
    assert ratio["low"] <= ratio["value"] <= ratio["high"]
    shares = [
        x.softmax(dim=1)[:, found.class_index]
        for x in map(backbone.classify, (found.after.images, found.before.images))
    ]
    difference = (shares[0] - shares[1]).mean().item()
    assert numbers["class_probability_change"]["value"] == pytest.approx(difference, abs=1e-5)


def test_pairs_share_their_noise_and_other_noise_does_not(inverter):
    found = show(inverter, upper_part(), noise=0.2, concept=1)
    assert found.map.max() == 0
    noise = [torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(s)) for s in SEEDS]
    pairs = [0.2 * (noise[i] - noise[j]).norm(dim=0) for i, j in ((0, 1), (1, 2), (2, 0))]
    expected = torch.stack(pairs).median(dim=0).values.mean().item()
    assert found.other_noise == pytest.approx(expected, abs=ROUNDING)


def test_nulls_are_equally_long_parts_of_the_same_map(inverter):
    features = upper_part()
    found = show(inverter, features, factor=0.5, n_directions=3)
    part = make_concepts(inverter).part(features, 0)
    cells = shorten(features[0].flatten(1))
    for k in range(3):
        generator = make_generator(SEEDS[0], "direction", k)
        random, rank = random_part(features, part, cells, generator)
        assert found.nulls[k].dimensions == rank
        torch.testing.assert_close(found.nulls[k].features, features - 0.5 * random)
        torch.testing.assert_close(random.norm(), part.norm())
        shift = 0.5 * random[0, :2].sum(dim=0).abs() * math.sqrt(3)
        expected = shift.repeat_interleave(8, 0).repeat_interleave(8, 1)
        torch.testing.assert_close(found.null_maps[k], expected, rtol=0, atol=ROUNDING)
    assert not torch.equal(found.null_maps[0], found.null_maps[2])


# ---- against the null ----------------------------------------------------------------------------


def rich_part() -> torch.Tensor:
    """Cells of all channels, of which pictures show the first two: concept 0 much, concept 1 not"""
    features = 0.2 * tiny.make_features(1)
    features[:, 0, :4] = 0.9
    features[:, 5, 4:] = 0.9
    return features


def test_what_pictures_show_is_above_the_null_and_what_they_hide_is_not(inverter):
    seen = show(inverter, rich_part(), noise=0.1, n_directions=19)
    assert seen.is_above_null
    assert seen.p_value("effect") == 1 / 20
    assert seen.affected[:32].double().mean() > 0.5
    assert seen.numbers()["affected"] == seen.affected.double().mean().item()
    hidden = show(inverter, rich_part(), noise=0.1, n_directions=19, concept=1)
    assert hidden.p_value("effect") > 1 / 20
    assert not hidden.affected.any()
    assert hidden.numbers()["affected"] == 0
    assert "no pixel is marked as affected" in hidden.summary()
    assert "no pixel is marked as affected" not in seen.summary()
    words = {text.get_text() for text in hidden.figure().findobj(lambda a: hasattr(a, "get_text"))}
    assert {"not above its null", "signed change", "class probability of class 4"} & words
    assert "p" not in words


def test_an_edit_of_nothing_raises_no_alarm(inverter):
    features = inverter.backbone.features(tiny.make_images(1))
    concepts = make_concepts(inverter, class_index=4)
    found = show_concept(
        inverter, features, concepts, concept=0, factor=1, film=[], seeds=SEEDS[:2]
    )
    assert torch.equal(found.map, torch.zeros(64, 64))
    assert torch.equal(normalise(found.map), torch.zeros(64, 64))
    assert torch.equal(found.null_maps, torch.zeros(19, 64, 64))
    numbers = found.numbers()
    assert (numbers["effect"], numbers["null_natural"]["effect"], numbers["affected"]) == (0, 0, 0)
    assert numbers["energy_inside"] is None
    known = {name: p for name, p in numbers["p_values"].items() if p is not None}
    assert known == dict.fromkeys(set(numbers["p_values"]) - {"energy_inside"}, 1.0)
    assert numbers["activation_ratio"]["value"] == 1
    assert numbers["class_probability_change"]["value"] == 0


def test_random_subspaces_as_concepts_raise_alarms_at_the_nominal_rate(inverter):
    """Each null in turn as the concept among the others: 1 of 20 is above all, for any measure."""
    found = show(inverter, rich_part(), noise=0.1, n_directions=20)
    nulls = found.null_effects
    for measure in ("effect", "activation_ratio", "realised_change", "class_probability_change"):
        alarms = [
            p_value(measure, null, nulls[:i] + nulls[i + 1 :], 0.25) <= 0.05
            for i, null in enumerate(nulls)
        ]
        assert sum(alarms) == 1, measure


def test_a_concept_that_is_the_whole_map_has_no_null(inverter):
    features = upper_part()
    concepts = DirectionConcepts(torch.eye(32)[:1], spec=inverter.backbone.spec)
    whole = features.clone()
    whole[:, 1:] = 0
    painting = PaintingInverter(inverter.backbone)
    found = show_concept(painting, whole, concepts, film=[], seeds=SEEDS, n_directions=3)
    assert not found.has_null
    assert not found.affected.any()
    assert set(found.numbers()["p_values"].values()) == {None}
    assert "There is no null" in found.summary()
    assert found._repr_png_().startswith(b"\x89PNG")


def test_without_a_number_the_concept_with_most_energy_is_shown(inverter):
    features = upper_part()
    features[:, 5] = 0.2
    given = {"concept": None}
    assert show(inverter, features, **given).arguments["concept"] == 0
    features[:, 5] = 0.5
    found = show(inverter, features, **given)
    assert found.arguments["concept"] == 1
    assert found.part_energy == pytest.approx(0.5**2 * 64 / features.square().sum().item())


def test_the_threshold_of_the_pictures_that_concepts_were_found_in(inverter):
    features = upper_part()
    features[:, 0, 4:] = 0.1
    threshold = 0.3 * features.norm(dim=1).max().item()
    painting = PaintingInverter(inverter.backbone)
    common = {"concept": 0, "film": [], "seeds": SEEDS, "n_directions": 1}
    longest = features.norm(dim=1).max()
    for low, share in ((0.05, 1.0), (0.3, 0.5), (0.9, 0.0)):
        concepts = make_concepts(inverter, **{ACTIVE_FROM: [low / longest.item(), 0]})
        found = show_concept(painting, features, concepts, **common)
        assert found.main_figures()["area_inside"] == share
    assert "active nowhere in this picture" in found.summary()
    assert threshold > 0


def test_the_published_basis_is_named(inverter):
    images = tiny.make_images(4)
    found = {}
    for basis in ("centred", "uncentred"):
        concepts = MCD(1, basis=basis, spec=inverter.backbone.spec)
        concepts.fit(inverter.backbone.features(images))
        painting = PaintingInverter(inverter.backbone)
        features = inverter.backbone.features(images[:1])
        viz = show_concept(painting, features, concepts, film=[], seeds=SEEDS, n_directions=1)
        found[basis] = viz.numbers()["concept_basis"]
        assert found[basis] in viz.summary()
    assert found == {
        "centred": "centred basis, as published",
        "uncentred": "uncentred basis (published: centred)",
    }


# ---- real samplers, files, and what is refused ---------------------------------------------------


def test_the_samples_are_those_of_the_edited_maps(inverter):
    """Of a real sampler: factors in order, same noise, the backbone's own class scores."""
    features = inverter.backbone.features(tiny.make_images(1))
    concepts = make_concepts(inverter, class_index=3)
    found = show_concept(
        inverter, features, concepts, concept=0, seeds=SEEDS[:2], film=[2, 0], n_directions=1
    )
    part = concepts.part(features, 0)
    assert [dose.factor for dose in found.doses] == [0, 0.25, 1, 2]
    assert found.after.factor == 0.25
    for dose in found.doses:
        generators = [torch.Generator().manual_seed(seed) for seed in SEEDS[:2]]
        edited = (features - (1 - dose.factor) * part).expand(2, -1, -1, -1)
        images = inverter.invert(edited, generator=generators)
        torch.testing.assert_close(dose.images, images.clamp(0, 1), rtol=0, atol=1 / 255)
        scores = inverter.backbone.classify(dose.images)
        np.testing.assert_allclose(dose.probability(3), scores.softmax(dim=1)[:, 3], rtol=1e-5)
    changed = (found.after.images - found.before.images).square().sum(dim=1).sqrt()
    torch.testing.assert_close(found.distance, changed)
    names = ["factor_0_0.png", "factor_0.25_0.png", "factor_1_0.png", "factor_2_0.png"]
    assert list(found.pictures())[::2] == [*names, "null_0_0.png"]
    assert "Class probability of class 3: 0." in found.summary()
    assert found._repr_png_().startswith(b"\x89PNG")


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
        PaintingInverter(inverter.backbone, None),
        path,
        make_concepts(inverter),
        film=[],
        n_directions=1,
    )
    logits = inverter.encode(path).sources[0].logits
    assert (found.class_index, found.class_name) == (logits.argmax(), f"class {logits.argmax()}")


def test_a_deterministic_inverter_has_no_other_noise(inverter):
    found = show(inverter, upper_part(), noise=None)
    numbers = found.numbers()
    assert len(numbers["samples"]) == 2 + 3
    assert (numbers["other_noise"], numbers["effect_over_other_noise"]) == (None, None)
    assert numbers["null_natural"]["effect"] > 0
    assert numbers["realised_change"]["n"] == 1
    assert "a deterministic inverter has no other noise" in found.summary()
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


def make_effect(distance: float, ratio: float) -> EditEffect:
    ones = [1.0, 1.0]
    return EditEffect(ones, ones, [ratio, ratio], ones, ones, None, ones, ones, distance)


def test_p_values_by_hand():
    """Attenuated, a smaller activation is the stronger effect; amplified, a greater one."""
    own, nulls = make_effect(2, 0.8), [make_effect(1, 0.7), make_effect(2, 0.9), make_effect(3, 1)]
    assert p_value("effect", own, nulls, 0.25) == 3 / 4
    assert p_value("activation_ratio", own, nulls, 0.25) == 2 / 4
    assert p_value("activation_ratio", own, nulls, 2) == 3 / 4
    assert p_value("class_probability_change", own, nulls, 0.25) is None


def test_over_images_by_hand():
    pairs = [
        (make_effect(4, 0.5), [make_effect(1, 1), make_effect(3, 1)]),
        (make_effect(2, 0.7), [make_effect(1, 1), make_effect(5, 1)]),
    ]
    found = over_images("effect", pairs, 0.25)
    assert (found.value.value, found.null.value, found.difference.value) == (3, 2.5, 0.5)
    assert (found.n_above, found.value.n) == (1, 2)
    assert over_images("activation_ratio", pairs, 0.25).value.value == pytest.approx(0.6)
    assert over_images("class_probability_change", pairs, 0.25) is None


def test_faded_pixels_are_those_that_are_not_kept():
    picture, kept = torch.rand(3, 4, 4, generator=make_generator(0)), torch.zeros(4, 4).bool()
    kept[:2] = True
    shown = fade(picture, kept)
    assert torch.equal(shown[:, :2], picture[:, :2])
    assert (shown[:, 2:] > picture[:, 2:]).all()


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
