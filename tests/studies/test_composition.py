"""Composed maps: the pair shares its noise, and changes are counted where they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from featinv_diffusion.errors import InputError
from featinv_diffusion.features import box_mask, paste
from featinv_diffusion.inverters import DiffusionInverter
from featinv_diffusion.studies.composition import compose
from tests import tiny
from tests.studies.painting import PaintingInverter, assert_alike, save_pictures


@pytest.fixture
def inverter(pipeline) -> DiffusionInverter:
    return DiffusionInverter(pipeline, num_inference_steps=2)


def make_maps(inverter) -> tuple[torch.Tensor, torch.Tensor]:
    return inverter.backbone.features(tiny.make_images(2)).split(1)


def test_changes_inside_and_outside_by_hand(inverter):
    """A is black, B is 0.2 at the upper left quarter's cells and 0.6 elsewhere."""
    a, b = torch.zeros(1, 32, 8, 8), torch.zeros(1, 32, 8, 8)
    b[:, 0] = 0.6
    b[:, 0, :4, :4] = 0.2
    b[:, 5] = 1
    painting = PaintingInverter(inverter.backbone)
    found = compose(painting, a, b, box=[0, 0, 0.5, 1], n_samples=2, batch_size=1)
    assert found.change_inside == pytest.approx([(0.2 + 0.6) / 2] * 2, abs=1e-6)
    assert found.change_outside == pytest.approx([0, 0])
    assert found.region.shape == (64, 64)
    assert found.region[:32].all()
    assert not found.region[32:].any()
    torch.testing.assert_close(found.change[1, 3, 60], torch.tensor(0.6), atol=1e-6, rtol=0)
    assert [row["change_inside"] for row in found.rows()] == found.change_inside
    assert found.numbers()["change_inside"] == pytest.approx(0.4)
    assert np.array(found.numbers()["cells"]).sum() == 32
    assert "32 of 64 cells" in found.summary()
    assert "0.400 inside, 0.000 outside" in found.summary()


def test_both_of_a_pair_have_the_same_noise(inverter):
    a, b = make_maps(inverter)
    found = compose(inverter, a, b, box=[0.5, 0.5, 1, 1], seeds=[5])
    edited = paste(a, b, box_mask([0.5, 0.5, 1, 1], (8, 8)))
    for images, features in ((found.before, a), (found.after, edited)):
        again = inverter.invert(features, generator=[torch.Generator().manual_seed(5)])
        torch.testing.assert_close(images, again.clamp(0, 1), rtol=0, atol=0.51 / 255)


def test_without_a_region_nothing_changes_and_there_is_no_inside(inverter):
    a, b = make_maps(inverter)
    found = compose(inverter, a, b, box=[0.5, 0.5, 0.5, 1], seeds=[5, 6])
    assert torch.equal(found.before, found.after)
    assert found.change_inside is None
    assert found.change_outside == [0, 0]
    assert "inside" not in found.summary()


def test_with_all_cells_it_is_the_other_map_and_there_is_no_outside(inverter):
    a, b = make_maps(inverter)
    found = compose(inverter, a, b, mask=torch.ones(8, 8, dtype=torch.bool), seeds=[5])
    again = inverter.invert(b, generator=[torch.Generator().manual_seed(5)])
    torch.testing.assert_close(found.after, again.clamp(0, 1), rtol=0, atol=0.51 / 255)
    assert found.change_outside is None


def test_paths_pictures_and_maps_give_the_same(inverter, tmp_path):
    """A mask as a file, as a picture, as cells, and the box that it draws, too."""
    a, b = save_pictures(tmp_path)
    light = np.zeros((64, 64), dtype=np.uint8)
    light[:32, :32] = 255
    mask = Image.fromarray(light)
    mask.save(tmp_path / "mask.png")
    cells = torch.zeros(8, 8, dtype=torch.bool)
    cells[:4, :4] = True
    assert_alike(
        [
            compose(inverter, a, b, box=(0, 0, 0.5, 0.5), seeds=[5]),
            compose(inverter, str(a), str(b), mask=tmp_path / "mask.png", seeds=[5]),
            compose(inverter, Image.open(a), Image.open(b), mask=mask, seeds=[5]),
            compose(inverter, inverter.encode(a), inverter.encode(b), mask=cells, seeds=[5]),
            compose(inverter, inverter.encode(a), Image.open(b), mask=cells.numpy(), seeds=[5]),
        ]
    )
    named = compose(inverter, a, b, mask=tmp_path / "mask.png", n_samples=1)
    assert named.arguments["a"] == str(a)
    assert (named.arguments["box"], named.arguments["mask"]) == (None, str(tmp_path / "mask.png"))


def test_a_deterministic_inverter_makes_one_pair(inverter, tmp_path):
    a, b = save_pictures(tmp_path)
    found = compose(PaintingInverter(inverter.backbone, noise=None), a, b, box=(0, 0, 0.5, 1))
    assert len(found.rows()) == 1
    assert list(found.pictures()) == ["composed_0.png", "unedited_0.png"]
    assert found._repr_png_().startswith(b"\x89PNG")
    assert repr(found).startswith("Composition: 32 of 64 cells")


@pytest.mark.parametrize(
    ("region", "words"),
    [
        ({}, "got none"),
        ({"box": (0, 0, 1, 1), "mask": "m.png"}, "got both"),
        ({"mask": torch.ones(8, 8)}, r"cells as bool \[8, 8\], got torch.float32"),
        ({"mask": torch.ones(4, 8, dtype=torch.bool)}, r"got torch.bool \[4, 8\]"),
        ({"mask": 3}, "got int"),
        ({"box": (0, 0, 1, 1), "n_samples": 0}, "n_samples must be at least 1"),
    ],
)
def test_what_cannot_be_composed(inverter, region, words):
    a, b = make_maps(inverter)
    with pytest.raises(InputError, match=words):
        compose(inverter, a, b, **region)


def test_two_maps_are_no_single_one(inverter):
    a, b = make_maps(inverter)
    for pair in ((torch.cat([a, b]), b), (a, torch.cat([a, b]))):
        with pytest.raises(InputError, match="got 2"):
            compose(inverter, *pair, box=(0, 0, 1, 1))
