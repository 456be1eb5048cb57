"""Moments and quantiles that stream, against numpy on everything at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from featinv_diffusion.errors import InputError
from featinv_diffusion.inverters import DiffusionInverter
from featinv_diffusion.studies.variability import RunningMoments, Variability, variability
from featinv_diffusion.types import Source
from tests import tiny
from tests.studies.painting import PaintingInverter, assert_alike, save_pictures


def random_images(n: int, spread: float = 1.0) -> torch.Tensor:
    noise = torch.rand(n, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    return 0.5 + spread * (noise - 0.5)


@pytest.mark.parametrize("sizes", [[7], [1] * 7, [3, 4], [2, 5]])
@pytest.mark.parametrize("spread", [1.0, 1e-5])
def test_moments_do_not_depend_on_batches_and_do_not_cancel(sizes, spread):
    images = random_images(7, spread)
    moments = RunningMoments()
    for batch in images.split(sizes):
        moments.update(batch)
    pixels = images.double().numpy()
    np.testing.assert_allclose(moments.mean, pixels.mean(axis=0), rtol=1e-6)
    std = np.sqrt(pixels.var(axis=0, ddof=1).mean(axis=0))
    np.testing.assert_allclose(moments.std, std, rtol=1e-4)


def test_quantiles_are_numpy_s():
    cosine = torch.rand(9, 3, 2, generator=torch.Generator().manual_seed(1))
    picture, nothing = Source("a.png"), torch.zeros(0, 3, 4, 4)
    maps = {"mean": torch.zeros(3, 4, 4), "std": torch.zeros(4, 4)}
    found = Variability(
        None, {}, None, None, picture=picture, cosine=cosine, examples=nothing, **maps
    )
    levels = [0, 0.05, 0.5, 0.77, 1]
    np.testing.assert_allclose(
        found.cosine_quantiles(levels), np.quantile(cosine.numpy(), levels), rtol=1e-6
    )
    np.testing.assert_allclose(
        found.cosine_quantiles_per_cell(levels),
        np.quantile(cosine.numpy(), levels, axis=0),
        rtol=1e-6,
    )


@pytest.fixture
def inverter(pipeline) -> DiffusionInverter:
    return DiffusionInverter(pipeline, num_inference_steps=2)


def test_a_study_of_a_map_is_that_of_its_samples(inverter):
    features = inverter.backbone.features(tiny.make_images(1))
    seeds = list(range(5))
    found = variability(inverter, features, seeds=seeds, batch_size=2)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    images = inverter.invert(features.expand(5, -1, -1, -1), generator=generators).clamp(0, 1)
    torch.testing.assert_close(found.examples, images[:2], rtol=0, atol=1 / 255)
    torch.testing.assert_close(found.mean, images.mean(dim=0), rtol=0, atol=1 / 255)
    std = images.var(dim=0).mean(dim=0).sqrt()
    torch.testing.assert_close(found.std, std, rtol=0, atol=1 / 255)
    assert found.cosine.shape == (5, 8, 8)
    rows = found.rows()
    assert len(rows) == 64 * 64
    assert (rows[65]["y"], rows[65]["x"]) == (1, 1)
    assert rows[65]["std"] == found.std[1, 1].item()
    assert rows[65]["mean_green"] == found.mean[1, 1, 1].item()
    assert found.numbers()["pixel_std_mean"] == pytest.approx(found.std.mean().item(), abs=1e-6)
    assert found.summary().startswith("5 samples: standard deviation of a pixel 0.")
    assert found._repr_png_().startswith(b"\x89PNG")


def test_paths_pictures_and_maps_give_the_same(inverter, tmp_path):
    (path,) = save_pictures(tmp_path, 1)
    given = (path, str(path), Image.open(path), inverter.encode(path))
    assert_alike([variability(inverter, each, seeds=[1, 2]) for each in given])


def test_one_sample_does_not_vary(inverter):
    with pytest.raises(InputError, match="n_samples must be at least 2 here"):
        variability(inverter, tiny.make_features(1), n_samples=1)
    with pytest.raises(InputError, match="got 1"):
        variability(inverter, tiny.make_features(1), seeds=[3])


@pytest.mark.parametrize("n_samples", [1, 32])
def test_a_deterministic_inverter_has_no_spread_and_says_so(inverter, tmp_path, n_samples):
    (path,) = save_pictures(tmp_path, 1)
    painting = PaintingInverter(inverter.backbone, noise=None)
    found = variability(painting, path, n_samples=n_samples)
    numbers = found.numbers()
    assert (numbers["pixel_std_mean"], numbers["cosine_quantiles_per_cell"]) == (None, None)
    assert len(numbers["cosines"]) == len(numbers["seeds"]) == 1
    assert numbers["cosine_quantiles"]["0.5"] == pytest.approx(
        np.median(found.cosine[0].numpy()), abs=1e-6
    )
    assert {row["std"] for row in found.rows()} == {None}
    assert "deterministic inverter, which has no spread" in found.summary()
    words = {text.get_text() for text in found.figure().findobj(lambda a: hasattr(a, "get_text"))}
    assert {"original", "sample 0", "cosine of cells"} <= words
    assert not {"std of pixels", "sample 1"} & words
    assert found._repr_png_().startswith(b"\x89PNG")
    assert list(found.pictures()) == ["mean.png"]
