"""The widgets of a notebook: what a slider and a press of a cell change."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import featinv_diffusion as fi
from featinv_diffusion.app.studio import Studio
from featinv_diffusion.errors import InputError

pytest.importorskip("ipywidgets", reason="ipywidgets is not installed")


def test_a_slider_draws_another_picture_and_1_the_first_again(studio: Studio) -> None:
    inverter, maps = studio.open("tiny/convnext"), studio.encode("flower", "tiny/convnext")
    shown = fi.slider(inverter, maps, "tiny/convnext-sae", n_concepts=2, n_samples=2)
    before, picture = shown.samples.images, shown.picture.value
    concept, slider = next(iter(shown.sliders.items()))
    slider.value = 0.0
    assert not torch.equal(shown.samples.images, before)
    assert shown.picture.value != picture
    part = fi.load_concepts("tiny/convnext-sae").part(maps.as_subclass(Tensor), concept)
    torch.testing.assert_close(shown.features.as_subclass(Tensor), maps.as_subclass(Tensor) - part)
    slider.value = 1.0
    assert torch.equal(shown.samples.images, before)
    assert "application/vnd.jupyter.widget-view+json" in shown._repr_mimebundle_()


def test_in_full_it_draws_what_sample_gives(studio: Studio) -> None:
    inverter, maps = studio.open("tiny/convnext", "draft"), studio.encode("flower", "tiny/convnext")
    shown = fi.slider(inverter, maps, "tiny/convnext-sae", n_samples=2)
    shown.full.click()
    assert torch.equal(shown.samples.images, fi.sample(inverter, maps, n_samples=2).images)


def test_pressed_cells_come_from_b_and_no_others_change(studio: Studio) -> None:
    inverter = studio.open("tiny/convnext")
    a, b = (studio.encode(key, "tiny/convnext") for key in ("flower", "china"))
    shown = fi.paint(inverter, a, b, n_samples=1)
    shown.buttons[9].click()
    shown.brush.value = "erase"
    shown.buttons[10].click()
    changed = shown.features.as_subclass(Tensor)[0].flatten(1)
    expected = a.as_subclass(Tensor)[0].flatten(1).clone()
    expected[:, 9], expected[:, 10] = b.as_subclass(Tensor)[0].flatten(1)[:, 9], 0
    assert torch.equal(changed, expected)
    shown.brush.value = "restore"
    for cell in (9, 10):
        shown.buttons[cell].click()
    assert torch.equal(shown.features.as_subclass(Tensor), a.as_subclass(Tensor))


def test_features_without_places_cannot_be_painted(studio: Studio) -> None:
    with pytest.raises(InputError, match="places of a picture"):
        fi.paint(studio.open("vit@blocks.2"), "flower.jpg", "china.jpg")
