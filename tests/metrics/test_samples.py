"""The bounded sample: independent of order, batches and processes, and fair."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from featinv_diffusion.errors import InputError
from featinv_diffusion.metrics import FeatureSample

IDS = [f"image-{i}" for i in range(100)]
FEATURES = torch.arange(200.0).reshape(100, 2)


def rows(sample: FeatureSample) -> list[list[float]]:
    return sorted(sample.features.tolist())


def test_all_vectors_where_they_fit():
    sample = FeatureSample(2, size=100)
    sample.update(FEATURES, IDS)
    assert len(sample) == 100
    assert rows(sample) == FEATURES.tolist()


@pytest.mark.parametrize("batch", [1, 7, 100])
def test_order_and_batches_do_not_matter(batch):
    one, other = FeatureSample(2, size=12), FeatureSample(2, size=12)
    one.update(FEATURES, IDS)
    for order in torch.randperm(100, generator=torch.Generator().manual_seed(1)).split(batch):
        other.update(FEATURES[order], [IDS[i] for i in order])
    assert len(one) == 12
    assert torch.equal(one.features, other.features)


def test_each_image_is_as_likely_as_any():
    drawn = np.zeros(100)
    for seed in range(400):
        sample = FeatureSample(2, size=25, seed=seed)
        sample.update(FEATURES, IDS)
        drawn[(sample.features[:, 0] / 2).int().numpy()] += 1
    # 100 draws expected of each, binomial with standard deviation 8.7.
    assert abs(drawn - 100).max() < 40
    assert drawn.std() == pytest.approx(8.7, rel=0.3)


def test_memory_is_that_of_the_sample():
    sample = FeatureSample(2, size=12)
    for i in range(0, 100, 5):
        sample.update(FEATURES[i : i + 5], IDS[i : i + 5])
        assert sum(len(ranks) for _, ranks in sample._parts) <= 24
        assert len(sample) == min(12, i + 5)


def test_the_caller_s_tensor_may_be_used_again():
    sample, batch = FeatureSample(2, size=12), FEATURES[:3].clone()
    sample.update(batch, IDS[:3])
    batch.zero_()
    assert rows(sample) == FEATURES[:3].tolist()


def test_what_does_not_fit():
    sample = FeatureSample(2, size=5)
    with pytest.raises(InputError, match=r"\[n, 2\] with n ids"):
        sample.update(torch.zeros(3, 4), ["a", "b", "c"])
    with pytest.raises(InputError, match="with 2 ids"):
        sample.update(torch.zeros(3, 2), ["a", "b"])
    with pytest.raises(InputError, match="at least one"):
        FeatureSample(2, size=0)
