"""What the scope says of maps: words, marks, and None where nothing is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from matplotlib.figure import Figure

from featinv_diffusion.data.sets import ImageSet
from featinv_diffusion.errors import InputError
from featinv_diffusion.features.natural_maps import Calibration, NaturalMaps, fit_density
from featinv_diffusion.figures.board import ORANGE
from featinv_diffusion.images import to_pil
from featinv_diffusion.inverters import DiffusionInverter
from featinv_diffusion.inverters.quality import other_qualities
from featinv_diffusion.runs.scope import (
    UNKNOWN,
    Scope,
    caption,
    sampling_of,
    scope_line,
    scope_notes,
)
from featinv_diffusion.runs.scope_fit import ScopeSplit, fit_scope, recalibrate, split_images
from featinv_diffusion.types import FeatureSpec
from tests import tiny
from tests.features.natural import CHANNELS, GRID, make_maps


@pytest.fixture(scope="module")
def natural() -> NaturalMaps:
    density = fit_density(make_maps(300, 1).split(50))
    calibration = Calibration(density.distance(make_maps(199, 2)), torch.linspace(0.4, 0.8, 199))
    return NaturalMaps(FeatureSpec("t", "last", CHANNELS, GRID), "", density, calibration, {}, 300)


def make_set(labels: list[int] | None, n: int) -> ImageSet:
    return ImageSet([str(i) for i in range(n)], labels, None, read=lambda index: None)  # type: ignore


def test_nothing_is_known_without_statistics():
    scope = Scope()
    assert scope.p_value(make_maps(1, 3), 0.5) is None
    assert scope.p_values(make_maps(2, 3), [0.5, 0.5]) is None
    assert scope.basis is None
    assert scope_notes(None) == []
    assert scope_line(None, None) == UNKNOWN
    assert "featinv scope" in UNKNOWN
    assert "featinv scope" not in scope_line(None, None, of_pipeline=False)


def test_cosines_count_where_they_are_comparable(natural: NaturalMaps):
    maps, cosines = make_maps(3, 3), [0.1, 0.6, 0.9]
    alone, both = Scope(natural), Scope(natural, uses_cosines=True)
    assert (alone.basis, both.basis) == ("map", "map and reconstruction")
    assert alone.p_values(maps, cosines) == natural.p_values(maps)
    assert both.p_values(maps, cosines) == natural.p_values(maps, cosines)
    assert both.p_value(maps[:1], 0.1) == natural.p_values(maps[:1], [0.1])[0]
    with pytest.raises(InputError, match="3 maps and 1 cosines"):
        both.p_values(maps, [0.5])


def test_statistics_are_taken_that_fit_the_samples(natural: NaturalMaps, tmp_path):
    """Of several settings, also from a file; the p-values are those of these cosines alone."""
    maps, cosines = make_maps(3, 3), [0.1, 0.6, 0.9]
    others = torch.linspace(0.0, 0.5, 199)
    several = replace(natural, sampling={"steps": 6}, others=(({"steps": 2}, others),))
    several.save(tmp_path / "scope.safetensors")
    for held in (several, NaturalMaps.load(tmp_path / "scope.safetensors")):
        of_two, of_six = (held.calibrated_for({"steps": n}) for n in (2, 6))
        assert of_two is not None
        assert of_six is not None
        alone = replace(natural, calibration=Calibration(natural.calibration.distances, others))
        assert of_two.p_values(maps, cosines) == alone.p_values(maps, cosines)
        assert of_six.p_values(maps, cosines) == natural.p_values(maps, cosines)
        assert held.calibrated_for({"steps": 3}) is None


def test_reconstructions_are_calibrated_by_each_quality(tmp_path):
    pipeline = tiny.make_pipeline()
    pipeline.register_to_config(best_refine=1, default_num_inference_steps=1)
    inverter = DiffusionInverter(pipeline)
    pictures = to_pil(tiny.make_images(300))
    images = ImageSet([f"{i}.png" for i in range(300)], None, None, read=pictures.__getitem__)
    split = ScopeSplit(list(range(200)), list(range(200, 300)))
    natural = fit_scope(inverter, images, split, 99, others=other_qualities(inverter))
    assert natural.sampling == sampling_of(inverter)
    found = [(s["steps"], s.get("refine", 0)) for s, _ in natural.others]
    assert found == [(2, 0), (1, 1)]  # draft and best
    best = natural.others[1][1]
    assert best.mean() > natural.calibration.cosines.mean()
    again = recalibrate(natural, [inverter], images, split, 99)
    assert torch.equal(again.calibration.cosines, natural.calibration.cosines)
    with pytest.raises(InputError, match="these are others"):
        recalibrate(natural, [inverter], images, ScopeSplit([], list(range(100))), 99)


def test_lines_of_the_terminal():
    assert scope_line(0.4, "map") == (
        "Scope: no sign that the map is unlike feature maps of sharp photos, scope p = 0.400 (map)."
    )
    assert scope_line(0.049, "map") == (
        "Scope: unlike feature maps of sharp photos, scope p = 0.049 (map)."
    )
    assert scope_line([0.5, 0.01], "map") == (
        "Scope: 1 of 2 maps unlike feature maps of sharp photos (scope p < 0.05), "
        "scope p = 0.500, 0.010 (map)."
    )
    assert "sharp photos (scope p < 0.05), scope p = 0.100 … 0.900 (map)" in scope_line(
        [i / 10 for i in range(1, 10)], "map"
    )


@pytest.mark.parametrize(("p_value", "marked"), [(None, False), (0.05, False), (0.0499, True)])
def test_captions_mark_what_is_out_of_scope(p_value: float | None, marked: bool):
    axes = Figure().add_subplot()
    caption(axes, "0.83", p_value)
    (text,) = axes.texts
    assert text.get_text() == ("0.83 · outside" if marked else "0.83")
    assert (text.get_color() == ORANGE) == marked


def test_images_are_split_by_class_or_by_chance():
    labels = [i % 4 for i in range(400)]
    split = split_images(make_set(labels, 400), held_back_per_class=25, n_images=50)
    assert sorted(split.held_out) == list(range(300, 400))  # the last 25 of each class
    assert len(split.fitted) == 50
    assert max(split.fitted) < 300
    assert split == split_images(make_set(labels, 400), held_back_per_class=25, n_images=50)
    chance = split_images(make_set(None, 500))
    assert len(chance.held_out) == 100
    assert sorted(chance.fitted + chance.held_out) == list(range(500))
    with pytest.raises(InputError, match="must have classes"):
        split_images(make_set(None, 500), held_back_per_class=5)
