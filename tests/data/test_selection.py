"""Which images are drawn, whatever else is asked for."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featinv_diffusion.data.crops import split_held_back
from featinv_diffusion.data.selection import Item, digest, select_items
from featinv_diffusion.data.sets import ImageSet
from featinv_diffusion.errors import InputError
from featinv_diffusion.evaluation.settings import EvaluationSettings
from featinv_diffusion.runs.sampling import make_jobs
from featinv_diffusion.settings import Selection, from_flat


def make_set(labels: list[int] | None, n: int = 0) -> ImageSet:
    n = len(labels) if labels is not None else n

    def read(index: int):
        raise AssertionError("selection reads no picture")

    return ImageSet([f"data:{i:03d}" for i in range(n)], labels, None, read)


def select(images: ImageSet, seed: int = 0, **options) -> list[Item]:
    return select_items(images, Selection(**options), seed)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.data())
@settings(max_examples=40, deadline=None)
def test_classes_are_drawn_evenly_and_a_smaller_selection_begins_a_larger(labels, data):
    n = data.draw(st.integers(1, len(labels)))
    images = make_set(labels)
    items, every = select(images, n_images=n), select(images)
    assert [i.id for i in items] == [i.id for i in every[:n]]
    assert len({item.index for item in items}) == n
    available, drawn = Counter(labels), Counter(item.label for item in items)
    level = max(drawn.values())
    for label, count in available.items():
        assert drawn[label] >= min(count, level - 1)  # as many as the others, or all there are


def test_the_seed_of_the_noise_changes_the_noise_and_not_the_images():
    images = make_set([0, 1] * 20)
    one, two = select(images, n_images=6), select(images, n_images=6, seed=1)
    assert [i.id for i in one] == [i.id for i in two]
    assert all(a.seed != b.seed for a, b in zip(one, two, strict=True))
    assert [i.id for i in one] != [f"data:{i:03d}" for i in range(6)]


def test_first_takes_the_first_of_each_class_in_the_order_of_ids():
    items = select(make_set([2, 0, 0, 1, 2, 0, 1, 1]), selection="first", per_class=2)
    assert [item.id[-1] for item in items] == ["1", "3", "0", "2", "6", "4"]
    assert [item.label for item in items] == [0, 1, 2, 0, 1, 2]


def test_held_back_images_are_those_that_training_holds_back():
    labels = [0, 0, 1, 0, 1, 1, 0, 1, 0]
    items = select(make_set(labels), held_back_per_class=2)
    assert sorted(item.index for item in items) == split_held_back(labels, 2)[1]


def test_a_picture_of_a_folder_has_the_noise_of_its_first_sample():
    images = replace(make_set(None, 2), ids=["a/one.png", "b/two.jpg"])
    jobs = make_jobs(replace(images, locations=images.ids), seed=5, n_samples=3)
    for item in select(images, seed=5):
        assert item.seed == jobs[item.index].seeds[0]


@pytest.mark.parametrize("n_null", [0, 1, 4, 10, 99])
def test_nulls_are_spread_over_the_images(n_null: int):
    places = [
        i
        for i, item in enumerate(select(make_set([0] * 10), n_null_images=n_null))
        if item.has_null
    ]
    assert len(places) == min(n_null, 10)
    gaps = {b - a for a, b in pairwise(places)}
    assert max(gaps, default=0) - min(gaps, default=0) <= 1


def test_more_than_there_are_is_refused():
    with pytest.raises(InputError, match="3 images to choose from, but 4 were asked for"):
        select(make_set([0, 1, 1]), n_images=4)
    with pytest.raises(InputError, match="2 images to choose from, at most 1 of each class, but 3"):
        select(make_set([0, 1, 1]), n_images=3, per_class=1)


def test_the_digest_tells_the_order():
    assert digest(["a", "b"]) != digest(["b", "a"])
    assert digest(["a", "b"]) != digest(["ab"])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"n_images": 0}, "n_images must be at least 1, got 0"),
        ({"shard_size": 1}, "shard_size must be at least 2"),
        ({"n_null_images": -1}, "n_null_images must be at least 0"),
        ({"selection": "frist"}, "No selection is named 'frist'; did you mean 'first'"),
        ({"fid": "legacy"}, "Choices: torch-fidelity, clean, adm"),
        ({"evaluated_by": ("a", "a")}, "names a backbone twice"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"guidance": "both"}, "No guidance is named 'both'"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, sentence):
    with pytest.raises(InputError, match=sentence):
        from_flat(EvaluationSettings, options)


@pytest.mark.parametrize("option", ["per_class", "held_back_per_class"])
def test_numbers_per_class_need_classes(option: str):
    with pytest.raises(InputError, match=f"--{option.replace('_', '-')} needs images with classes"):
        select(make_set(None, 4), **{option: 1})
