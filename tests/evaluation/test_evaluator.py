"""The figures of a unit, each against what it is by definition."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from featinv_diffusion.backbones import wrap_model
from featinv_diffusion.data.crops import to_images
from featinv_diffusion.data.selection import Item
from featinv_diffusion.data.sets import ImageSet
from featinv_diffusion.errors import InputError
from featinv_diffusion.evaluation.evaluator import Evaluator, find_partners
from featinv_diffusion.evaluation.labels import match_labels
from featinv_diffusion.evaluation.views import OWN
from featinv_diffusion.features import permute_cells
from featinv_diffusion.images import to_pil
from featinv_diffusion.inverters import DiffusionInverter, Inverter, LatentInverter
from featinv_diffusion.metrics import feature_cosine, psnr
from featinv_diffusion.metrics.extractors import ClassifierFeatures
from featinv_diffusion.runs.sampling import to_pixels
from featinv_diffusion.seeds import make_generator
from tests import tiny

N = 5


@pytest.fixture(scope="module")
def backbone():
    return wrap_model(tiny.make_backbone(), name="convnext")


@pytest.fixture(scope="module")
def inverter() -> DiffusionInverter:
    pipeline = tiny.make_pipeline()
    return DiffusionInverter(pipeline, num_inference_steps=2)


@pytest.fixture(scope="module")
def originals() -> torch.Tensor:
    """8-bit pictures at the resolution of samples and backbone, so that no resize interferes."""
    return to_images(to_pixels(tiny.make_images(N)))


def image_set(originals: torch.Tensor, labels: list[int] | None = None) -> ImageSet:
    pictures = to_pil(originals)
    ids = [f"image{i}" for i in range(len(pictures))]
    return ImageSet(ids, labels, None, pictures.__getitem__)


def make_items(images: ImageSet, nulls=()) -> list[Item]:
    labels = images.labels or [None] * len(images)
    return [Item(i, name, labels[i], 1000 + i, i in nulls) for i, name in enumerate(images.ids)]


def make_evaluator(inverter, images: ImageSet, **options) -> Evaluator:
    options = {"batch_size": 2, **options}
    return Evaluator(inverter, {OWN: inverter.backbone}, images, **options)


class Memory(Inverter):
    """A deterministic inverter that knows the image of each feature map."""

    backbone = spec = networks = None  # pyright: ignore[reportAssignmentType]

    def __init__(self, backbone, images: torch.Tensor, known: torch.Tensor):
        self.backbone, self.spec, self.networks = backbone, backbone.spec, {}
        self.features, self.images = backbone.features(images), known

    def _invert(self, features, generator):
        assert len(generator) == len(features)
        nearest = torch.cdist(features.flatten(1), self.features.flatten(1)).argmin(dim=1)
        return self.images[nearest]


def test_an_inverter_without_error_agrees_wholly(backbone, originals):
    images = image_set(originals, [0, 1, 2, 3, 4])
    result = make_evaluator(Memory(backbone, originals, originals), images).run(make_items(images))
    np.testing.assert_allclose(result.columns["cosine"], 1, atol=1e-5)
    assert result.columns["top1_match"].tolist() == [1] * N
    np.testing.assert_allclose(result.columns["psnr"], 58.9, atol=0.1)
    np.testing.assert_allclose(result.columns["ssim"], 1, atol=1e-5)
    np.testing.assert_allclose(result.columns["resized_original_cosine"], 1, atol=1e-5)
    assert not [name for name in result.columns if name.startswith(("vae", "prior"))]


def test_other_image_is_the_reconstruction_of_the_next_one(backbone, originals):
    images = image_set(originals)
    result = make_evaluator(Memory(backbone, originals, originals), images).run(make_items(images))
    features = backbone.features(originals)
    other = originals.roll(-1, dims=0)
    expected = feature_cosine(features, backbone.features(other))
    np.testing.assert_allclose(result.columns["other_image_cosine"], expected, atol=1e-5)
    np.testing.assert_allclose(
        result.columns["other_image_psnr"], psnr(originals, other), rtol=1e-5
    )


def test_the_samples_are_those_of_the_inverter_alone(inverter, originals):
    images = image_set(originals)
    result = make_evaluator(inverter, images).run(make_items(images))
    features = inverter.backbone.features(originals[3:4])
    alone = inverter.invert(features, generator=[torch.Generator().manual_seed(1003)])
    assert result.pixels is not None
    difference = to_pixels(alone)[0].int() - result.pixels[3].int()
    assert int(difference.abs().max()) <= 1
    seen = inverter.backbone.features(to_images(to_pixels(alone)))
    expected = float(feature_cosine(features, seen))
    assert result.columns["cosine"][3] == pytest.approx(expected, abs=1e-3)


def test_sampled_nulls_on_the_images_chosen_for_them(inverter, originals):
    images = image_set(originals)
    result = make_evaluator(inverter, images, seed=7).run(make_items(images, nulls=(0, 3, 4)))
    for null in ("permuted_cells", "prior_only"):
        has_value = np.isfinite(result.columns[f"{null}_cosine"]).tolist()
        assert has_value == [True, False, False, True, True]
    features = inverter.backbone.features(originals[3:4])
    noise = [torch.Generator().manual_seed(1003)]
    permuted = permute_cells(features, make_generator(7, "image3", "permuted_cells"))
    seen = inverter.backbone.features(
        to_images(to_pixels(inverter.invert(permuted, generator=noise)))
    )
    expected = float(feature_cosine(features, seen))
    assert result.columns["permuted_cells_cosine"][3] == pytest.approx(expected, abs=1e-3)
    noise = [torch.Generator().manual_seed(1003)]
    prior = to_images(to_pixels(inverter.sample_prior(1, generator=noise)))
    expected = float(feature_cosine(features, inverter.backbone.features(prior)))
    assert result.columns["prior_only_cosine"][3] == pytest.approx(expected, abs=1e-3)


def test_the_prior_knows_nothing_of_the_features(inverter):
    noise = [torch.Generator().manual_seed(3)]
    prior = inverter.sample_prior(1, generator=noise)
    pipeline = inverter.pipeline
    unet_alone = pipeline(
        features=tiny.make_features(1) * 3,
        controlnet_conditioning_scale=0.0,
        num_inference_steps=2,
        generator=[torch.Generator().manual_seed(3)],
        output_type="pt",
    ).images
    torch.testing.assert_close(prior, unet_alone)


def test_the_round_trip_is_the_mean_of_the_autoencoder(inverter, originals):
    vae = inverter.pipeline.vae
    with torch.no_grad():
        latents = vae.encode(originals * 2 - 1).latent_dist.mean
        expected = (vae.decode(latents).sample + 1) / 2
    trip = inverter.round_trip(originals)
    torch.testing.assert_close(trip, expected.clamp(0, 1))
    images = image_set(originals)
    result = make_evaluator(inverter, images).run(make_items(images))
    expected = psnr(originals, to_images(to_pixels(trip)))
    np.testing.assert_allclose(result.columns["vae_round_trip_psnr"], expected, rtol=1e-4)


def test_the_round_trip_is_in_float32_and_leaves_the_dtype(originals):
    pipeline = tiny.make_pipeline()
    pipeline.vae.to(torch.bfloat16)
    trip = DiffusionInverter(pipeline).round_trip(originals)
    assert trip.dtype == torch.float32
    assert pipeline.vae.dtype == torch.bfloat16


def test_who_is_a_latent_inverter(inverter, backbone, originals):
    memory = Memory(backbone, originals, originals)
    assert isinstance(memory, Inverter)
    assert not isinstance(memory, LatentInverter)
    assert isinstance(inverter, LatentInverter)
    assert inverter.image_size == (tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)


def test_batches_do_not_change_figures(inverter, originals):
    images = image_set(originals)
    items = make_items(images, nulls=(1, 2))
    one = make_evaluator(inverter, images, batch_size=1).run(items)
    all_at_once = make_evaluator(inverter, images, batch_size=8).run(items)
    assert one.columns.keys() == all_at_once.columns.keys()
    for name in ("cosine", "prior_only_cosine", "vae_round_trip_cosine", "other_image_cosine"):
        np.testing.assert_allclose(one.columns[name], all_at_once.columns[name], atol=2e-3)


def test_images_that_fail_are_reported_and_the_others_measured(backbone, originals):
    images = image_set(originals)

    def read(index: int) -> Image.Image:
        if index == 1:
            raise InputError("image1 is cut off.")
        return images.read(index)

    samples = originals.clone()
    samples[3] = float("nan")
    memory = Memory(backbone, originals, samples)
    result = make_evaluator(memory, replace(images, read=read)).run(make_items(images))
    assert [item.id for item in result.items] == ["image0", "image2", "image4"]
    assert [failure["id"] for failure in result.failures] == ["image1", "image3"]
    assert result.failures[0]["error"] == "image1 is cut off."
    assert "NaN" in result.failures[1]["error"]
    assert all(len(column) == 3 for column in result.columns.values())


def test_a_single_image_has_no_other(backbone, originals):
    images = image_set(originals[:1])
    result = make_evaluator(Memory(backbone, originals, originals), images).run(make_items(images))
    assert "other_image_cosine" not in result.columns
    assert "cosine" in result.columns


def test_another_backbone_looks_at_the_same_pictures(backbone, inverter, originals):
    other = wrap_model(tiny.make_backbone(dims=(8, 8, 16, 16)), name="b", input_size=64)
    images = image_set(originals)
    backbones = {OWN: inverter.backbone, "b": other}
    result = Evaluator(inverter, backbones, images, batch_size=2).run(make_items(images))
    assert result.pixels is not None
    seen, wanted = other.features(to_images(result.pixels)), other.features(originals)
    expected = feature_cosine(wanted, seen)
    np.testing.assert_allclose(result.columns["evaluated_by_b_cosine"], expected, atol=1e-5)
    assert "other_image_evaluated_by_b_top5_match" in result.columns


def test_label_accuracy_reads_the_class_of_the_label(backbone, originals):
    images = image_set(originals, [0] * N)
    predicted = backbone.classify(originals).argmax(dim=1)
    memory = Memory(backbone, originals, originals)
    for class_number in {int(predicted[0]), (int(predicted[0]) + 1) % tiny.CLASSES}:
        evaluator = make_evaluator(memory, images, class_of_label=[class_number])
        columns = evaluator.run(make_items(images)).columns
        expected = (predicted == class_number).double().tolist()
        assert columns["label_correct_original"].tolist() == expected
        assert columns["label_correct_reconstruction"].tolist() == expected
    columns = make_evaluator(memory, images).run(make_items(images)).columns
    assert "label_correct_original" not in columns


def test_vectors_for_distances(backbone, originals):
    images = image_set(originals)
    extractors = {"classifier": ClassifierFeatures(backbone), "more": ClassifierFeatures(backbone)}
    evaluator = make_evaluator(
        Memory(backbone, originals, originals.flip(0)),
        images,
        extractors=extractors,
    )
    result = evaluator.run(make_items(images))
    expected = backbone.features(originals).mean(dim=(2, 3))
    np.testing.assert_allclose(result.original["classifier"], expected, atol=1e-5)
    np.testing.assert_allclose(result.reconstructed["more"], expected.flip(0), atol=1e-5)
    assert list(result.original) == list(result.reconstructed) == ["classifier", "more"]


def test_partners_are_others_and_of_other_classes_where_there_are_any():
    assert find_partners([None] * 3) == [1, 2, 0]
    assert find_partners([5]) == []
    assert find_partners([0, 0, 1, 1]) == [2, 3, 0, 1]
    partners = find_partners([0, 0, 0, 1])
    assert all(i != p for i, p in enumerate(partners))
    assert sorted(partners) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        ([0, 1], ["class 7", "Class 2"], ("name", [7, 2])),
        ([0], [f"n{i:08d}" for i in range(tiny.CLASSES)], ("number", list(range(tiny.CLASSES)))),
        ([0, 3], None, (None, None)),
        ([0, tiny.CLASSES - 1], None, ("number", list(range(tiny.CLASSES)))),
        ([0, 1], ["class 7", "class 7"], (None, None)),
        ([0], [f"n{i:08d}" for i in range(tiny.CLASSES - 1)], (None, None)),
        ([0, 1], ["class 7", "unknown"], (None, None)),
        ([0, tiny.CLASSES], None, (None, None)),
        (None, None, (None, None)),
    ],
)
def test_labels_are_matched_by_name_else_by_number(backbone, labels, names, expected):
    images = ImageSet(["a", "b"], labels, names, lambda _: Image.new("RGB", (4, 4)))
    assert match_labels(images, backbone) == expected


@pytest.mark.parametrize(
    ("names", "known", "expected"),
    [
        (["crane", "dog", "crane"], ["crane", "dog", "crane"], ("number", [0, 1, 2])),
        (["dog", "crane", "crane"], ["crane", "dog", "crane"], (None, None)),
        (["dog", "crane"], ["crane", "dog", "crane"], (None, None)),  # which of the two?
        (["dog", "cat"], ["cat", "crane", "Dog", "crane"], ("name", [2, 0])),
        (["dog", "cat", "eel"], ["ant", "bee", "cow"], (None, None)),  # as many, of other things
        (["dog", "cat", "eel"], ["LABEL_0", "LABEL_1", "LABEL_2"], ("number", [0, 1, 2])),
        (["n01443537", "n01629819", "n01641577"], ["fish", "newt", "frog"], ("number", [0, 1, 2])),
        (["0", "1", "2"], None, ("number", [0, 1, 2])),
        (["0", "1"], None, (None, None)),
    ],
)
def test_only_equal_classes_are_matched(names, known, expected):
    model = timm.create_model("convnext_atto", num_classes=3, depths=(1,) * 4, dims=(4,) * 4)
    backbone = wrap_model(model, name="a", input_size=32)
    backbone.__dict__["labels"] = known and tuple(known)
    images = ImageSet(["a"], [0], names, lambda _: Image.new("RGB", (4, 4)))
    assert match_labels(images, backbone) == expected


class Broken(DiffusionInverter):
    """Some of what it makes is NaN."""

    def sample_prior(self, n, *, generator=None):
        return self._break(super().sample_prior(n, generator=generator), 0)

    def round_trip(self, images):
        return self._break(super().round_trip(images), 1)

    def _break(self, images, row: int):
        images[row:] = torch.nan
        return images


def test_nan_of_a_null_or_a_ceiling_is_no_black_picture(originals):
    images = image_set(originals[:2])
    broken = Broken(tiny.make_pipeline(), num_inference_steps=2)
    result = make_evaluator(broken, images).run(make_items(images, nulls=(1,)))
    assert np.isfinite(result.columns["vae_round_trip_psnr"]).tolist() == [True, False]
    assert not np.isfinite(result.columns["prior_only_cosine"]).any()
    assert np.isfinite(result.columns["permuted_cells_cosine"]).tolist() == [False, True]
    assert np.isfinite(result.columns["cosine"]).all()
    assert result.failures == []
    found = [(failure["id"], failure["figure"]) for failure in result.partial_failures]
    assert found == [("image1", "vae_round_trip"), ("image1", "prior_only")]
    assert "image1 has no cosine, top1_match" in result.partial_failures[0]["error"]


def test_nan_of_another_backbone_or_extractor_is_reported(backbone, originals):
    other = wrap_model(tiny.make_backbone(dims=(8, 8, 16, 16)), name="b")
    first = next(other.model.parameters())
    first.data[:] = torch.nan
    images = image_set(originals)
    memory = Memory(backbone, originals, originals)
    extractors = {"broken": ClassifierFeatures(other)}
    evaluator = Evaluator(
        memory, {OWN: backbone, "b": other}, images, batch_size=2, extractors=extractors
    )
    result = evaluator.run(make_items(images))
    assert np.isfinite(result.columns["cosine"]).all()
    assert not np.isfinite(result.columns["evaluated_by_b_top5_match"]).any()
    reported = {(failure["id"], failure["figure"]) for failure in result.partial_failures}
    figures = ("reconstruction", "other_image", "resized_original", "broken")
    assert reported == {(f"image{i}", figure) for i in range(N) for figure in figures}


def test_reconstructions_are_looked_at_once(backbone, originals, monkeypatch):
    seen = []
    features_and_logits = type(backbone).features_and_logits

    def count(self, images):
        seen.append(len(images))
        return features_and_logits(self, images)

    images, memory = image_set(originals), Memory(backbone, originals, originals)
    monkeypatch.setattr(type(backbone), "features_and_logits", count)
    result = make_evaluator(memory, images).run(make_items(images))
    assert sum(seen) == 3 * N  # the originals, the reconstructions, and the resized originals
    assert "other_image_cosine" in result.columns
    predicted = [name for name in result.columns if name.endswith("predicted_class")]
    assert sorted(predicted) == ["original_predicted_class", "predicted_class"]
