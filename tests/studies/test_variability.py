"""Moments and quantiles that stream, against numpy on everything at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from featinv_diffusion.errors import InputError
from featinv_diffusion.inverters import DiffusionInverter
from featinv_diffusion.studies import measure_variability
from featinv_diffusion.studies.variability import RunningMoments, Variability
from tests import tiny


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
    found = Variability(torch.zeros(3, 4, 4), torch.zeros(4, 4), cosine, torch.zeros(0, 3, 4, 4))
    levels = [0, 0.05, 0.5, 0.77, 1]
    np.testing.assert_allclose(
        found.cosine_quantiles(levels), np.quantile(cosine.numpy(), levels), rtol=1e-6
    )
    np.testing.assert_allclose(
        found.cosine_quantiles_per_cell(levels),
        np.quantile(cosine.numpy(), levels, axis=0),
        rtol=1e-6,
    )


def test_a_study_of_a_map_is_that_of_its_samples(pipeline):
    inverter = DiffusionInverter(pipeline, num_inference_steps=2)
    features = inverter.backbone.features(tiny.make_images(1))
    seeds = list(range(5))
    found = measure_variability(inverter, features, seeds, batch_size=2, n_examples=3)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    images = inverter.invert(features.expand(5, -1, -1, -1), generator=generators).clamp(0, 1)
    torch.testing.assert_close(found.examples, images[:3], rtol=0, atol=1 / 255)
    torch.testing.assert_close(found.mean, images.mean(dim=0), rtol=0, atol=1 / 255)
    std = images.var(dim=0).mean(dim=0).sqrt()
    torch.testing.assert_close(found.std, std, rtol=0, atol=1 / 255)
    assert found.cosine.shape == (5, 8, 8)


def test_one_sample_does_not_vary(pipeline):
    inverter = DiffusionInverter(pipeline, num_inference_steps=2)
    with pytest.raises(InputError, match="at least 2 samples, but 1 came"):
        measure_variability(inverter, tiny.make_features(1), [3])
