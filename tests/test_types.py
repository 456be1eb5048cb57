"""Feature maps that know their pictures, and pictures of every kind as one batch."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from featinv_diffusion.errors import InputError
from featinv_diffusion.images import center_square, read_batch, read_image, to_tensor
from featinv_diffusion.types import FeatureMaps, Source


@pytest.fixture
def maps() -> FeatureMaps:
    sources = [Source(f"{letter}.png") for letter in "abc"]
    return FeatureMaps.of(torch.arange(24.0).reshape(3, 2, 2, 2), sources)


def names(maps: Tensor) -> list[str]:
    return [source.name for source in maps.sources]  # pyright: ignore[reportAttributeAccessIssue]


def test_slices_keep_their_pictures(maps: FeatureMaps) -> None:
    assert names(maps[:1]) == ["a.png"]
    assert names(maps[1:]) == ["b.png", "c.png"]
    assert names(maps[[2, 0]]) == ["c.png", "a.png"]
    assert names(maps[torch.tensor([True, False, True])]) == ["a.png", "c.png"]
    assert names(maps[1:, :, :1]) == ["b.png", "c.png"]
    assert names(torch.cat([maps[2:], maps[:1]])) == ["c.png", "a.png"]


def test_edits_keep_them_and_other_results_are_plain_tensors(maps: FeatureMaps) -> None:
    assert names(maps * 2 + 1) == names(maps.clone()) == names(maps.double()) == names(maps)
    for plain in (maps[0], maps.mean(), maps.mean(dim=1), maps.flatten(1), maps.shape, maps[:, 0]):
        assert not isinstance(plain, FeatureMaps)
    assert type(F.cosine_similarity(maps, maps, dim=1)) is Tensor
    assert type(torch.cat([maps, torch.zeros(1, 2, 2, 2)])) is Tensor


def test_they_show_themselves_and_travel(maps: FeatureMaps) -> None:
    assert "3×2×2×2" in repr(maps)
    assert "a.png, b.png, c.png" in repr(maps)
    for again in (copy.deepcopy(maps), pickle.loads(pickle.dumps(maps))):
        assert torch.equal(again, maps)
        assert names(again) == names(maps)


def test_one_picture_in_every_form(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "é.png")
    path = tmp_path / "é.png"
    wanted = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    forms = [path, str(path), Image.open(path), pixels, pixels[None], [path], [pixels], wanted]
    forms += [
        wanted[0],
        (pixels / 255).astype(np.float32),
        torch.from_numpy(pixels).permute(2, 0, 1),
    ]
    for form in forms:
        images, sources = read_batch(form, 8)
        torch.testing.assert_close(images, wanted, rtol=0, atol=1e-6)
        assert len(sources) == 1
    (source,) = read_batch(path, 8)[1]
    assert (source.name, source.location, source.size) == ("é.png", str(path), (8, 8))


def test_pictures_of_files_are_centre_squares(tmp_path: Path) -> None:
    Image.effect_noise((30, 20), 50).convert("RGB").save(tmp_path / "a.png")
    images, _ = read_batch([tmp_path / "a.png", tmp_path / "a.png"], 16)
    square = to_tensor(center_square(read_image(tmp_path / "a.png"), 16))
    assert torch.equal(images, torch.cat([square, square]))


def test_a_transparent_picture_in_memory_lies_on_white() -> None:
    images, _ = read_batch(Image.new("RGBA", (4, 4), (255, 0, 0, 0)), 4)
    assert torch.equal(images, torch.ones(1, 3, 4, 4))


@pytest.mark.parametrize(
    ("pictures", "words"),
    [
        ([], "at least one picture, got none"),
        (np.zeros((4, 4), np.uint8), r"got the shape \[4, 4\]"),
        (torch.zeros(1, 1, 4, 4), r"got the shape \[1, 1, 4, 4\]"),
        (torch.full((1, 3, 4, 4), 255.0), "Divide bytes by 255"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.int64), "floats in .0, 1. or bytes"),
        ([3], "got int"),
        ([torch.zeros(3, 4, 4), torch.zeros(3, 5, 5)], "must have one size"),
    ],
)
def test_what_is_no_batch_of_pictures(pictures, words: str) -> None:
    with pytest.raises(InputError, match=words):
        read_batch(pictures, 8)
