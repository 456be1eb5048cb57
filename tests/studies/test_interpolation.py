"""Mixtures of maps: what is sampled, with which noise, and what is measured."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from featinv_diffusion.errors import InputError
from featinv_diffusion.inverters import DiffusionInverter
from featinv_diffusion.runs.sampling import sample_map
from featinv_diffusion.studies.interpolation import interpolate, sample_mixtures
from tests import tiny
from tests.studies.painting import PaintingInverter, assert_alike, save_pictures

SEEDS = [11, 12, 13]


@pytest.fixture
def inverter(pipeline) -> DiffusionInverter:
    return DiffusionInverter(pipeline, num_inference_steps=2)


def maps_of_images(inverter, n: int) -> list[torch.Tensor]:
    return list(inverter.backbone.features(tiny.make_images(n)).split(1))


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in SEEDS]


def test_k_maps_are_mixed_and_each_mixture_has_the_same_noise(inverter):
    maps = maps_of_images(inverter, 3)
    weights = [(0.2, 0.3, 0.5), (0.0, 0.0, 1.0)]
    found = sample_mixtures(inverter, maps, weights, SEEDS)
    assert found.images.shape == (2, 3, 3, 64, 64)
    assert found.cosine.shape == (2, 3)
    assert found.cosine_to_maps.shape == (2, 3, 3)
    mixed = 0.2 * maps[0] + 0.3 * maps[1] + 0.5 * maps[2]
    for i, target in enumerate((mixed, maps[2])):
        images = inverter.invert(target.expand(3, -1, -1, -1), generator=generators())
        torch.testing.assert_close(found.images[i], images.clamp(0, 1), rtol=0, atol=1 / 255)
        seen = inverter.backbone.features(found.images[i]).double()
        for j in range(3):
            cosine = _cosine(target[0].double(), seen[j])
            assert found.cosine[i, j].item() == pytest.approx(cosine, abs=1e-5)
            to_first = _cosine(maps[0][0].double(), seen[j])
            assert found.cosine_to_maps[i, j, 0].item() == pytest.approx(to_first, abs=1e-5)


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0))).mean().item()


def test_samples_come_in_batches_and_keep_their_seeds(inverter):
    features = maps_of_images(inverter, 1)[0]
    seen: list[list[int]] = []
    plain = inverter.invert

    def invert(maps, *, generator=None):
        seen.append([g.initial_seed() for g in generator])
        return plain(maps, generator=generator)

    inverter.invert = invert
    batches = list(sample_map(inverter, features, SEEDS, batch_size=2))
    assert seen == [[11, 12], [13]]
    assert [len(batch.images) for batch in batches] == [2, 1]
    pixels = torch.cat([batch.images for batch in batches]) * 255
    torch.testing.assert_close(pixels, pixels.round(), rtol=0, atol=1e-4)
    target = features.expand_as(batches[0].features)
    expected = F.cosine_similarity(target.double(), batches[0].features.double(), dim=1)
    torch.testing.assert_close(batches[0].cosine.double(), expected, rtol=0, atol=1e-6)


def test_what_cannot_be_sampled(inverter):
    with pytest.raises(InputError, match="2 maps and 3 seeds"):
        list(sample_map(inverter, tiny.make_features(2), SEEDS, 8))
    with pytest.raises(InputError, match="0 seeds"):
        list(sample_map(inverter, tiny.make_features(1), [], 8))
    inverter.invert = lambda maps, *, generator=None: torch.full((len(maps), 3, 64, 64), torch.nan)
    with pytest.raises(InputError, match="NaN"):
        list(sample_map(inverter, tiny.make_features(1), SEEDS, 8))
    bare = DiffusionInverter(tiny.make_pipeline(backbone=None))
    with pytest.raises(InputError, match="must have its backbone"):
        list(sample_map(bare, tiny.make_features(1), SEEDS, 8))


def test_the_result_holds_the_mixtures(inverter):
    a, b = maps_of_images(inverter, 2)
    found = interpolate(inverter, a, b, weights=[0, 0.5], seeds=SEEDS)
    same = sample_mixtures(inverter, [a, b], [(0, 1), (0.5, 0.5)], SEEDS)
    assert torch.equal(found.images, same.images)
    assert [row["cosine"] for row in found.rows()] == same.cosine.flatten().tolist()
    assert list(found.pictures())[3] == "weight_0.5_0.png"
    assert found.summary().startswith("Cosine to the mixed map by weight of A: 0: 0.")
    assert found._repr_png_().startswith(b"\x89PNG")


def test_paths_pictures_and_maps_give_the_same(inverter, tmp_path):
    a, b = save_pictures(tmp_path)
    pairs = [(a, b), (Image.open(a), str(b)), (inverter.encode(a), inverter.encode(b))]
    assert_alike([interpolate(inverter, *pair, weights=[0.3], seeds=[1, 2]) for pair in pairs])


def test_a_deterministic_inverter_makes_one_sample_of_each_mixture(inverter, tmp_path):
    painting = PaintingInverter(inverter.backbone, noise=None)
    found = interpolate(painting, *save_pictures(tmp_path), weights=[0, 1], n_samples=4)
    assert found.images.shape[:2] == (2, 1)
    assert found._repr_png_().startswith(b"\x89PNG")
