"""Linear probes: equal to scikit-learn's, fitted on images that are measured nowhere else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from featinv_diffusion.class_embedding.anatomy import record
from featinv_diffusion.class_embedding.images import TokenImages, to_input
from featinv_diffusion.class_embedding.measures import identifiability_rate
from featinv_diffusion.class_embedding.probes import POINTS, ProbeTest, fit_probes, split_off
from featinv_diffusion.class_embedding.reading import rank_of, read_images
from featinv_diffusion.errors import InputError
from featinv_diffusion.images import to_pil
from tests.class_embedding.vits import make_vit


def make_pictures(n: int, seed: int) -> TokenImages:
    pixels = torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    labels = [i % 3 for i in range(n)]
    return TokenImages([f"{i}.png" for i in range(n)], labels, "name", to_pil(pixels).__getitem__)


def test_probes_equal_scikit_learns_ridge():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(20, 2, 6, generator=generator) + 1
    labels = torch.randint(0, 4, (20,), generator=generator)
    probes = fit_probes(tokens, labels, 4)
    targets = np.where(np.eye(4)[labels.numpy()] > 0, 1.0, -1.0)
    new = torch.randn(5, 2, 6, generator=generator)
    predicted = probes.predict(new)
    for position in range(2):
        ridge = Ridge(alpha=1.0, solver="cholesky").fit(tokens[:, position].double(), targets)
        expected = ridge.predict(new[:, position].double())
        np.testing.assert_allclose(predicted[:, position].numpy(), expected, atol=1e-8)
    assert probes.rank(new, torch.zeros(5, dtype=torch.long)).shape == (5, 2)


def test_probes_need_images():
    with pytest.raises(InputError, match="at least 2 images"):
        fit_probes(torch.zeros(1, 2, 3), torch.zeros(1, dtype=torch.long), 4)


def test_shares_and_importance_are_those_of_ridge_at_each_block():
    """The probes of each place by scikit-learn, and the projection as the identifiability rate."""
    anatomy, seen, new = make_vit("registers"), make_pictures(9, 1), make_pictures(4, 2)
    test = ProbeTest.fit(anatomy, seen, batch_size=4)
    pixels = to_input([new.read(i) for i in range(4)], anatomy.backbone)
    labels = torch.tensor(new.labels)
    test.add(pixels[:3], labels[:3])
    test.add(pixels[3:], labels[3:])
    found = test.to_metrics()
    assert found["n_fitted"] == 9
    before = record(
        anatomy, to_input([seen.read(i) for i in range(9)], anatomy.backbone), frozenset({"states"})
    )
    after = record(anatomy, pixels, frozenset({"states"}))
    targets = np.where(np.eye(7)[seen.labels] > 0, 1.0, -1.0)
    ranks = torch.zeros(2, 4, 16)
    for block in range(2):
        for patch in range(16):
            x, z = (t.states[block + 1][:, 4 + patch].double() for t in (before, after))
            scores = torch.from_numpy(Ridge(alpha=1.0).fit(x.half().double(), targets).predict(z))
            ranks[block, :, patch] = rank_of(scores, scores.gather(1, labels[:, None]))
        share = (ranks[block] == 0).float().mean().item()
        assert found["hidden"]["probe"][block]["value"] == pytest.approx(share)
    torch.testing.assert_close(test.importance(pixels, labels).float(), -ranks.sum(dim=0))
    reading = read_images(anatomy, pixels, labels, frozenset({"states"}))
    assert reading.states is not None
    rate = identifiability_rate(reading.states.rank, 4).mean().item()
    assert found["hidden"]["projection"][-1]["value"] == pytest.approx(rate)
    for point in POINTS:
        rows = found[point]
        assert len(rows["difference"]) == 2
        for projection, probe, difference in zip(*rows.values(), strict=True):
            expected = projection["value"] - probe["value"]
            assert difference["value"] == pytest.approx(expected, abs=1e-6)


def test_the_last_images_of_each_class_are_split_off():
    images = make_pictures(8, 1)  # classes 0 1 2 0 1 2 0 1
    measured, fitted = split_off(images, 2)
    assert measured.ids == ["0.png", "1.png"]
    assert measured.labels == [0, 1]
    assert fitted.ids == ["2.png", "3.png", "4.png", "5.png", "6.png", "7.png"]
    assert fitted.read(3) is images.read(5)
    with pytest.raises(InputError, match="none of these 8 would be left"):
        split_off(images, 3)
    with pytest.raises(InputError, match="the target class"):
        split_off(images.with_target(1), 1)
    with pytest.raises(InputError, match="the predicted class"):
        split_off(TokenImages(images.ids, None, "predicted", images.read), 1)
