from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch.utils.data import DataLoader

from featinv_diffusion.data.crops import CropDataset, DataConfig, open_training_images, to_images
from featinv_diffusion.errors import InputError
from featinv_diffusion.training import shards
from featinv_diffusion.training.latents import (
    CachedCropDataset,
    encode_posterior,
    fill_cache,
    fill_latents,
    plan_latents,
)
from featinv_diffusion.training.shards import Rows
from tests import tiny


@pytest.fixture
def dataset(tmp_path: Path) -> CropDataset:
    random = np.random.default_rng(0)
    (tmp_path / "images/a").mkdir(parents=True)
    for i in range(5):
        pixels = random.integers(0, 256, (70, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"images/a/{i}.png")
    config = DataConfig(root=str(tmp_path / "images"), size=48, vflip=True, num_workers=0)
    return CropDataset(open_training_images(config), range(5), config, seed=0)


def fill(dataset: CropDataset, folder: Path, n_crops: int = 3, vae=None) -> CachedCropDataset:
    cache = fill_cache(dataset, vae or tiny.make_vae(), folder, n_crops, 64, Accelerator(cpu=True))
    return CachedCropDataset(dataset, cache)


def test_cached_latents_are_those_of_the_very_pixels(dataset: CropDataset, tmp_path: Path) -> None:
    vae = tiny.make_vae()
    cached = fill(dataset, tmp_path / "cache")
    seen = set()
    for epoch in range(6):
        cached.set_epoch(epoch)
        for position in range(5):
            item = cached[position]
            mean, std = encode_posterior(vae, to_images(item["pixels"][None]), 64)
            # Stored in fp16: relative error 2⁻¹¹.
            torch.testing.assert_close(item["latent_mean"], mean[0], rtol=1e-3, atol=2e-3)
            torch.testing.assert_close(item["latent_std"], std[0], rtol=1e-3, atol=2e-3)
            seen.add((position, item["pixels"].sum().item()))
    assert len(seen) > 10  # several crops of each of the five images
    assert len({cached[0]["seed"], cached[1]["seed"]}) == 2


def test_workers_read_the_same_cache(dataset: CropDataset, tmp_path: Path) -> None:
    cached = fill(dataset, tmp_path / "cache")
    loaded = next(iter(DataLoader(cached, batch_size=5, num_workers=1)))
    expected = torch.stack([cached[i]["latent_mean"] for i in range(5)])
    assert torch.equal(loaded["latent_mean"], expected)


def test_latents_of_a_broken_image_are_those_of_its_replacement(
    dataset: CropDataset, tmp_path: Path
) -> None:
    (tmp_path / "images/a/2.png").write_bytes(b"broken")
    cached = fill(dataset, tmp_path / "cache", n_crops=1)
    item = cached[2]
    assert (item["index"], item["n_unreadable"]) == (2, 1)
    assert cached.unreadable(2, 1) == [str(tmp_path / "images/a/2.png")]
    mean, _ = encode_posterior(tiny.make_vae(), to_images(item["pixels"][None]), 64)
    torch.testing.assert_close(item["latent_mean"], mean[0], rtol=1e-3, atol=2e-3)
    assert cached[1]["n_unreadable"] == 0


def test_machines_fill_whole_shards_of_one_folder(
    dataset: CropDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 2 * 3 * 1042 + 2)  # two images
    shared, alone = tmp_path / "shared", tmp_path / "alone"
    whole = fill(dataset, alone).cache
    assert [len(whole.range(number)) for number in range(3)] == [2, 2, 1]
    cache = plan_latents(dataset, tiny.make_vae(), shared, 3, 64)
    with monkeypatch.context() as patch:  # the second of two machines, alone
        for name, number in (("process_index", 1), ("num_processes", 2)):
            patch.setattr(Accelerator, name, property(lambda _, n=number: n))
        with pytest.raises(InputError, match="2 shards are not there"):
            fill_latents(cache, dataset, tiny.make_vae(), 64, Accelerator(cpu=True))
    assert cache.missing() == [0, 2]
    first = cache.path(1).stat().st_mtime_ns
    fill(dataset, shared)
    assert cache.path(1).stat().st_mtime_ns == first  # what is there is left alone
    names = [path.name for path in sorted((shared / "shards").iterdir())]
    assert names == ["00000.safetensors", "00001.safetensors", "00002.safetensors"]
    for name in names:
        assert (shared / "shards" / name).read_bytes() == (alone / "shards" / name).read_bytes()
    assert Rows(cache).read("mean", 4, 2).shape == (4, 8, 8)


def test_size_is_announced_and_another_vae_refused(
    dataset: CropDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cached = fill(dataset, tmp_path / "cache")
    # 5 images × 3 crops × (two maps 4×8×8 of fp16, 4 int32, 2 flips) + 5 attempts
    assert cached.cache.n_bytes == 5 * 3 * (2 * 256 * 2 + 16 + 2) + 5
    assert "Latent cache" in capsys.readouterr().out
    other = tiny.make_vae()
    with torch.no_grad():
        other.encoder.conv_in.weight.add_(1)
    with pytest.raises(InputError, match="another VAE"):
        fill(dataset, tmp_path / "cache", vae=other)


def test_too_small_a_disk_is_said_before_anything_is_written(
    dataset: CropDataset, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="GiB are free"):
        fill(dataset, tmp_path / "cache", n_crops=10**9)
    assert not (tmp_path / "cache").exists()


def test_latents_follow_an_autocast_to_bf16_but_never_one_to_fp16() -> None:
    vae, images = tiny.make_vae(), tiny.make_images(2)
    mean, std = encode_posterior(vae, images, 64)
    with torch.autocast("cpu", torch.float16):
        unchanged = encode_posterior(vae, images, 64)
    assert torch.equal(unchanged[0], mean)
    assert torch.equal(unchanged[1], std)
    with torch.autocast("cpu", torch.bfloat16):
        reduced, _ = encode_posterior(vae, images, 64)
    assert reduced.dtype == torch.float32
    assert not torch.equal(reduced, mean)
    torch.testing.assert_close(reduced, mean, rtol=0.05, atol=0.05)
