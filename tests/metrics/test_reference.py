"""Reference sets: the same figures from a folder and from an npz, and their identity."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from featinv_diffusion.errors import InputError
from featinv_diffusion.metrics import ImageFeatures, frechet_distance, load_reference


class ChannelMeans(ImageFeatures):
    """Three numbers an image, so that moments can be worked out beside it."""

    def __init__(self, convention: str = "means"):
        conventions = {"convention": convention}
        super().__init__(name="channels", distance_name="fd", dim=3, conventions=conventions)
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.largest_batch = 0

    def _describe(self, pixels):
        self.largest_batch = max(self.largest_batch, len(pixels))
        return pixels.double().mean(dim=(2, 3)) * self.scale


def make_pixels(n: int = 7, size: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, size=(n, size, size, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, pixels in enumerate(make_pixels()):
        path = tmp_path / "images" / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return tmp_path / "images"


def test_moments_of_a_folder(folder):
    extractor = ChannelMeans()
    got = load_reference(folder, extractor, size=8, batch_size=3)
    means = make_pixels().reshape(7, -1, 3).mean(axis=1)
    assert got.n == 7
    assert extractor.largest_batch == 3
    np.testing.assert_allclose(got.moments.mean, means.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(got.moments.covariance, np.cov(means.T), rtol=1e-4)
    assert "8×8" in got.preparation
    assert got.sample is not None
    np.testing.assert_allclose(
        np.sort(got.sample.features[:, 0].numpy()), np.sort(means[:, 0]), rtol=1e-6
    )


def test_a_folder_is_scaled_to_the_size_compared(folder):
    got = load_reference(folder, ChannelMeans(), size=4)
    squares = [Image.fromarray(p).resize((4, 4), Image.Resampling.BILINEAR) for p in make_pixels()]
    means = np.stack([np.asarray(s).reshape(-1, 3).mean(axis=0) for s in squares])
    np.testing.assert_allclose(got.moments.mean, means.mean(axis=0), rtol=1e-6)


def test_images_of_an_npz_are_those_of_the_folder(folder, tmp_path):
    np.savez(tmp_path / "images.npz", make_pixels())
    one = load_reference(folder, ChannelMeans(), size=8)
    other = load_reference(tmp_path / "images.npz", ChannelMeans(), size=8, batch_size=2)
    assert frechet_distance(one.moments, other.moments).value < 1e-9
    assert (other.n, other.preparation) == (7, "as the file holds them")


@pytest.mark.parametrize("with_images", [True, False])
def test_published_moments(tmp_path, with_images):
    images = {"arr_0": make_pixels()} if with_images else {}
    covariance = np.diag([1.0, 4.0, 9.0])
    np.savez(tmp_path / "adm.npz", mu=np.arange(3.0), sigma=covariance, **images)
    got = load_reference(tmp_path / "adm.npz", ChannelMeans("adm"), size=8)
    np.testing.assert_array_equal(got.moments.mean, [0, 1, 2])
    np.testing.assert_array_equal(got.moments.covariance, covariance)
    assert got.n is None
    assert (got.sample is not None and len(got.sample) == 7) == with_images


def test_identity_is_of_names_and_bytes(folder, tmp_path):
    def identity(path: Path) -> str:
        return load_reference(path, ChannelMeans(), size=8).sha256

    before = identity(folder)
    shutil.copytree(folder, tmp_path / "copy")
    assert identity(tmp_path / "copy") == before
    (tmp_path / "copy" / "class0" / "0.png").rename(tmp_path / "copy" / "class1" / "0.png")
    renamed = identity(tmp_path / "copy")
    Image.fromarray(make_pixels()[0] // 2).save(tmp_path / "copy" / "class1" / "0.png")
    assert len({before, renamed, identity(tmp_path / "copy")}) == 3


def test_the_sample_is_bounded_and_stays_the_same(folder):
    one = load_reference(folder, ChannelMeans(), size=8, sample_size=4, batch_size=7).sample
    other = load_reference(folder, ChannelMeans(), size=8, sample_size=4, batch_size=2).sample
    assert one is not None
    assert other is not None
    assert len(one) == 4
    assert torch.equal(one.features, other.features)


def test_what_is_no_reference(tmp_path):
    extractor = ChannelMeans()
    with pytest.raises(InputError, match="folder of images or an npz"):
        load_reference(tmp_path / "missing", extractor, size=8)
    (tmp_path / "text.npz").write_text("not an archive")
    with pytest.raises(InputError, match="must be an npz"):
        load_reference(tmp_path / "text.npz", extractor, size=8)
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(InputError, match=r"holds x\.npy"):
        load_reference(tmp_path / "other.npz", extractor, size=8)
    np.savez(tmp_path / "floats.npz", np.zeros((2, 8, 8, 3)))
    with pytest.raises(InputError, match="float64"):
        load_reference(tmp_path / "floats.npz", extractor, size=8)
    np.savez(tmp_path / "half.npz", mu=np.zeros(3))
    with pytest.raises(InputError, match="mu without sigma"):
        load_reference(tmp_path / "half.npz", ChannelMeans("adm"), size=8)


@pytest.mark.parametrize("convention", ["clean", "means"])
def test_moments_of_another_space(tmp_path, convention):
    np.savez(tmp_path / "moments.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(InputError, match=r"same convention, but holds mu\.npy, sigma\.npy"):
        load_reference(tmp_path / "moments.npz", ChannelMeans(convention), size=8)
    np.savez(tmp_path / "both.npz", make_pixels(), mu=np.zeros(3), sigma=np.eye(3))
    got = load_reference(tmp_path / "both.npz", ChannelMeans(convention), size=8)
    assert got.n == 7
    assert got.moments.mean.min() > 50  # of the images


def test_moments_of_another_length(tmp_path):
    np.savez(tmp_path / "long.npz", mu=np.zeros(5), sigma=np.eye(5))
    with pytest.raises(InputError, match="length 3"):
        load_reference(tmp_path / "long.npz", ChannelMeans("adm"), size=8)


def test_an_array_that_is_cut_off(tmp_path):
    np.savez(tmp_path / "whole.npz", make_pixels())
    content = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="must be an npz"):
        load_reference(tmp_path / "cut.npz", ChannelMeans(), size=8)
