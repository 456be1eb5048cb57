"""Features that are kept beside the latents are those of the very crops, and train alike."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from featinv_diffusion.backbones import Backbone, wrap_model
from featinv_diffusion.data.crops import CropDataset, open_training_images, to_images
from featinv_diffusion.errors import InputError
from featinv_diffusion.training import feature_cache, latents, shards
from featinv_diffusion.training.controlnet import (
    ControlNetTask,
    first_batches,
    train_controlnet,
)
from featinv_diffusion.training.entry import make_datasets
from featinv_diffusion.training.feature_cache import (
    ControlNetCacheConfig,
    FeatureCache,
    fill_features,
)
from featinv_diffusion.training.latents import CachedCropDataset, fill_cache
from tests import tiny
from tests.training.test_tasks import controlnet_config, losses, make_folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("features"))


@pytest.fixture
def dataset(base: Path, tmp_path: Path) -> CropDataset:
    config = controlnet_config(base, tmp_path, 1, "data.crop=random_resized").data
    return make_datasets(open_training_images(config), config, 0)[0]


def make_backbone(layer: str = "last") -> Backbone:
    return wrap_model(tiny.make_backbone(), name="tiny/convnext", layer=layer)


def fill(
    dataset: CropDataset, folder: Path, backbone: Backbone | None = None, dtype: str = "float32"
) -> CachedCropDataset:
    accelerator = Accelerator(cpu=True)
    cache = fill_cache(dataset, tiny.make_vae(), folder, 2, 64, accelerator)
    backbone = backbone or make_backbone()
    features = FeatureCache(cache, backbone, dtype)
    fill_features(features, CachedCropDataset(dataset, cache), backbone, accelerator)
    return CachedCropDataset(dataset, cache, features=features)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 1e-3)])
def test_features_are_those_of_the_very_pixels(
    dataset: CropDataset, tmp_path: Path, dtype: str, tolerance: float
) -> None:
    cached, backbone = fill(dataset, tmp_path / "cache", dtype=dtype), make_backbone()
    crops = set()
    for epoch in range(4):
        cached.set_epoch(epoch)
        for position in range(3):
            item = cached[position]
            with torch.no_grad():
                expected = backbone.features(to_images(item["pixels"][None]))[0]
            assert item["features"].dtype == getattr(torch, dtype)
            found = item["features"].float()
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
            crops.add((position, item["pixels"].sum().item()))
    assert len(crops) > 3  # both crops of an image were drawn


def test_a_regression_takes_the_maps_of_the_cache(dataset: CropDataset, tmp_path: Path) -> None:
    cached, backbone = fill(dataset, tmp_path / "cache"), make_backbone()
    assert cached.feature_cache is not None
    few = CachedCropDataset(dataset, cached.cache, with_pixels=False, features=cached.feature_cache)
    batches = list(first_batches(few, 5))
    images, maps = (torch.cat(parts) for parts in zip(*batches, strict=True))
    with torch.no_grad():
        torch.testing.assert_close(maps, backbone.features(images), rtol=1e-5, atol=1e-5)
    plain = list(first_batches(dataset, 5))
    assert [len(images) for images, _ in plain] == [5]
    assert plain[0][1] is None


def test_training_with_kept_features_reads_neither_pixels_nor_the_backbone_and_ends_alike(
    base: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = [f"cache.folder={tmp_path / 'cache'}", "data.crop=random_resized"]
    train_controlnet(controlnet_config(base, tmp_path / "without", 6, *extra))
    expected = losses(tmp_path / "without")
    seen = []
    loss = ControlNetTask.loss

    def spy(task: ControlNetTask, module, batch):
        seen.append(set(batch))
        return loss(task, module, batch)

    monkeypatch.setattr(ControlNetTask, "loss", spy)
    for dtype, tolerance in (("float32", 1e-6), ("float16", 1e-4)):
        more = [*extra, "cache.features=true", f"cache.features_dtype={dtype}"]
        train_controlnet(controlnet_config(base, tmp_path / dtype, 6, *more))
        assert losses(tmp_path / dtype) == pytest.approx(expected, rel=tolerance)
        assert f"Feature cache ({dtype}) in" in capsys.readouterr().out
    assert len(seen) == 12
    assert all("features" in keys and "pixels" not in keys for keys in seen)
    assert losses(tmp_path / "float16") != expected  # the cache was read


def test_a_resumed_run_with_kept_features_ends_alike_and_older_checkpoints_resume(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = [f"cache.folder={tmp_path / 'cache'}", "cache.features=true"]
    train_controlnet(controlnet_config(base, tmp_path / "whole", 6, *extra))
    train_controlnet(controlnet_config(base, tmp_path / "parts", 3, *extra))
    changed = "run.allow_changed_config=true"
    train_controlnet(controlnet_config(base, tmp_path / "parts", 6, *extra, changed))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")

    train_controlnet(controlnet_config(base, tmp_path / "old", 2, extra[0]))
    path = tmp_path / "old/checkpoints/step-00000002/config.yaml"
    kept = [x for x in path.read_text().splitlines() if not x.strip().startswith("features")]
    path.write_text("\n".join(kept))
    capsys.readouterr()
    train_controlnet(controlnet_config(base, tmp_path / "old", 2, extra[0]))
    assert "Resumed from" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"cache\.features: False → True"):
        train_controlnet(controlnet_config(base, tmp_path / "old", 2, *extra))


def test_filling_goes_on_where_it_stopped(
    dataset: CropDataset, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(feature_cache, "BATCH", 10)  # 5 images at once, and the last alone
    monkeypatch.setattr(shards, "SHARD_BYTES", 1)
    cache = fill(dataset, tmp_path / "cache").feature_cache
    assert cache is not None
    assert [len(cache.range(number)) for number in range(4)] == [5, 5, 5, 1]
    whole = [cache.path(number).read_bytes() for number in range(4)]
    cache.path(1).unlink()
    cache.path(2).write_bytes(whole[1])  # is there: must be left alone
    assert cache.missing() == [1]
    fill(dataset, tmp_path / "cache")
    found = [cache.path(number).read_bytes() for number in range(4)]
    assert found == [whole[0], whole[1], whole[1], whole[3]]


def test_another_backbone_layer_or_crop_has_another_folder(
    dataset: CropDataset, tmp_path: Path
) -> None:
    accelerator = Accelerator(cpu=True)
    cache = fill_cache(dataset, tiny.make_vae(), tmp_path / "cache", 2, 64, accelerator)
    other = make_backbone()
    with torch.no_grad():
        next(other.model.parameters()).add_(1)
    recut = latents.LatentCache(cache.folder, cache.shape, "other crops")
    variants = [
        FeatureCache(cache, make_backbone(), "float16"),
        FeatureCache(cache, make_backbone(), "float32"),
        FeatureCache(cache, other, "float16"),
        FeatureCache(cache, make_backbone("stages.2"), "float16"),
        FeatureCache(recut, make_backbone(), "float16"),
    ]
    assert len({variant.folder for variant in variants}) == len(variants)
    assert FeatureCache(cache, make_backbone(), "float16").folder == variants[0].folder
    n = len(dataset)
    assert variants[0].n_bytes == n * 2 * tiny.CHANNELS * 64 * 2
    assert variants[1].n_bytes == n * 2 * tiny.CHANNELS * 64 * 4


def test_sizes_are_said_and_refused_together_before_anything_is_written(
    base: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # 16 images × 2 crops: 33,360 bytes of latents, 131,072 of features in float16
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda _: usage(0, 0, 100_000))
    extra = [f"cache.folder={tmp_path / 'cache'}", "cache.features=true"]
    with pytest.raises(InputError, match=r"latent cache and feature cache .* GiB are free"):
        train_controlnet(controlnet_config(base, tmp_path / "run", 1, *extra))
    assert not (tmp_path / "cache").exists()
    printed = capsys.readouterr().out
    assert "Latent cache in" in printed
    assert "Feature cache (float16) in" in printed
    train_controlnet(controlnet_config(base, tmp_path / "run", 1, extra[0]))  # these have room


def test_features_too_large_for_float16_are_refused(dataset: CropDataset, tmp_path: Path) -> None:
    backbone = make_backbone()
    large = backbone.intervene({"stages.3": lambda maps: 1e6 * maps})
    with large, pytest.raises(InputError, match=r"cache\.features_dtype=float32"):
        fill(dataset, tmp_path / "cache", backbone, "float16")
    assert not list((tmp_path / "cache").glob("features-*"))


def test_features_need_the_crops_of_a_latent_cache(base: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cache\.folder is not set"):
        ControlNetCacheConfig(features=True)
    with pytest.raises(InputError, match=r"cache\.folder is not set"):
        controlnet_config(base, tmp_path, 1, "cache.features=true")
