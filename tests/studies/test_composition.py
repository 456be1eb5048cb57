"""Composed maps: the pair shares its noise, and changes are counted where they are."""

from __future__ import annotations

import pytest
import torch

from featinv_diffusion.features import box_mask, paste
from featinv_diffusion.inverters import DiffusionInverter
from featinv_diffusion.studies import compose
from tests import tiny


class PaintingInverter:
    """Deterministic: each cell becomes a patch whose grey level is the cell's first channel."""

    def __init__(self, backbone):
        self.backbone, self.spec = backbone, backbone.spec

    def invert(self, features, *, generator=None):
        return features[:, :1].repeat_interleave(8, 2).repeat_interleave(8, 3).expand(-1, 3, -1, -1)


@pytest.fixture
def inverter(pipeline) -> DiffusionInverter:
    return DiffusionInverter(pipeline, num_inference_steps=2)


def test_changes_inside_and_outside_by_hand(inverter):
    """A is black, B is 0.2 at the upper left quarter's cells and 0.6 elsewhere."""
    a, b = torch.zeros(1, 32, 8, 8), torch.full((1, 32, 8, 8), 0.6)
    b[:, :, :4, :4] = 0.2
    mask = box_mask([0, 0, 0.5, 1], (8, 8))
    found = compose(PaintingInverter(inverter.backbone), a, b, mask, [1, 2], batch_size=1)
    assert found.change_inside == pytest.approx([(0.2 + 0.6) / 2] * 2, abs=1e-6)
    assert found.change_outside == pytest.approx([0, 0])
    assert found.region.shape == (64, 64)
    assert found.region[:32].all()
    assert not found.region[32:].any()
    torch.testing.assert_close(found.change[1, 3, 60], torch.tensor(0.6), atol=1e-6, rtol=0)


def test_both_of_a_pair_have_the_same_noise(inverter):
    a, b = inverter.backbone.features(tiny.make_images(2)).split(1)
    mask = box_mask([0.5, 0.5, 1, 1], (8, 8))
    found = compose(inverter, a, b, mask, [5])
    for images, features in ((found.before, a), (found.after, paste(a, b, mask))):
        again = inverter.invert(features, generator=[torch.Generator().manual_seed(5)])
        torch.testing.assert_close(images, again.clamp(0, 1), rtol=0, atol=0.51 / 255)


def test_without_a_region_nothing_changes_and_there_is_no_inside(inverter):
    a, b = inverter.backbone.features(tiny.make_images(2)).split(1)
    found = compose(inverter, a, b, box_mask([0.5, 0.5, 0.5, 1], (8, 8)), [5, 6])
    assert torch.equal(found.before, found.after)
    assert found.change_inside is None
    assert found.change_outside == [0, 0]


def test_with_all_cells_it_is_the_other_map_and_there_is_no_outside(inverter):
    a, b = inverter.backbone.features(tiny.make_images(2)).split(1)
    found = compose(inverter, a, b, box_mask([0, 0, 1, 1], (8, 8)), [5])
    again = inverter.invert(b, generator=[torch.Generator().manual_seed(5)])
    torch.testing.assert_close(found.after, again.clamp(0, 1), rtol=0, atol=0.51 / 255)
    assert found.change_outside is None
