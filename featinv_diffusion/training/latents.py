"""Latent cache: posterior mean and std of several crops per image, with the crops themselves."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from jaxtyping import Float
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import pil_to_tensor

from featinv_diffusion.data.crops import Crop, CropDataset, draw_crop, to_images
from featinv_diffusion.images import without_notes
from featinv_diffusion.runs.sampling import batched
from featinv_diffusion.seeds import derive_seed, make_generator
from featinv_diffusion.settings import Depth, check
from featinv_diffusion.training.shards import Layout, Rows, ShardedArrays, join_rows


@dataclass(frozen=True)
class CacheConfig:
    """Where latents are kept, and how many crops of each image; no folder, no cache."""

    folder: str | None = None
    n_crops: Depth = 2

    def __post_init__(self) -> None:
        check(self)


def encode_posterior(vae: AutoencoderKL, images: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Mean and std `[b, c, size/f, size/f]` of the posterior of images in [0, 1], unscaled.

    Images are resized to `size` (bilinear, antialiased) and encoded under an autocast to bf16 as
    it is, but never in fp16, in which SD's VAE overflows: there in the VAE's own precision.
    """
    if images.shape[-1] != size:
        images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
    kind = images.device.type
    keep = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16
    with torch.no_grad(), torch.autocast(kind, torch.bfloat16, enabled=keep):
        posterior = vae.encode((images * 2 - 1).to(vae.dtype)).latent_dist  # pyright: ignore[reportAttributeAccessIssue]
    return posterior.mean.float(), posterior.std.float()


class LatentCache(ShardedArrays):
    """Arrays `mean`, `std` fp16 `[n, crops, c, h, w]`, `box`, `flip` and `attempt`."""

    def __init__(self, folder: Path, shape: tuple[int, ...], fingerprint: str):
        self.shape = shape
        crops = shape[1]
        layout: Layout = {
            "mean": (shape[1:], np.float16),
            "std": (shape[1:], np.float16),
            "box": ((crops, 4), np.int32),
            "flip": ((crops, 2), np.bool_),
            "attempt": ((), np.uint8),  # of an image in place of one that cannot be read
        }
        advice = "Lower cache.n_crops or set cache.folder."
        super().__init__(folder, layout, shape[0], fingerprint, "Latent cache", advice)


class _CacheCrops(Dataset):
    """All crops of the images of a cache."""

    def __init__(self, source: CropDataset, n_crops: int):
        self.source, self.n_crops = source, n_crops

    def __getitem__(self, position: int) -> dict[str, Any]:
        index = self.source.indices[position]
        image, attempt = self.source.read(index)
        config = self.source.config
        crops = [
            draw_crop(config, *image.size, make_generator(self.source.seed, "cache", k, index))
            for k in range(self.n_crops)
        ]
        return {
            "attempt": attempt,
            "pixels": torch.stack([pil_to_tensor(c.apply(image, config.size)) for c in crops]),
            "box": torch.tensor([c.box for c in crops]),
            "flip": torch.tensor([(c.hflip, c.vflip) for c in crops]),
        }


class CachedCropDataset(CropDataset):
    """Crops drawn from a cache: items hold `latent_mean`, `latent_std` and the identical pixels.

    Args:
        features: arrays `features` `[n, crops, ...]` of the same crops, which items then hold too.
    """

    def __init__(
        self,
        source: CropDataset,
        cache: LatentCache,
        with_pixels: bool = True,
        features: ShardedArrays | None = None,
    ):
        super().__init__(source.images, source.indices, source.config, source.seed)
        self.cache, self.with_pixels, self.feature_cache = cache, with_pixels, features
        self.rows: Rows | None = None
        self.feature_rows: Rows | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "rows": None, "feature_rows": None}  # each worker maps its own

    def with_its_pixels(self) -> CachedCropDataset:
        """Returns the same crops, whose items hold the pixels too."""
        return CachedCropDataset(self, self.cache, features=self.feature_cache)

    def _rows(self) -> Rows:
        self.rows = self.rows or Rows(self.cache)
        return self.rows

    def __getitem__(self, position: int) -> dict[str, Any]:
        rows = self._rows()
        index = self.indices[position]
        generator = make_generator(self.seed, self.epoch, index)
        k = int(torch.randint(0, self.cache.shape[1], (), generator=generator))
        attempt = int(rows.read("attempt", position))
        item = {
            "latent_mean": torch.from_numpy(rows.read("mean", position, k).astype(np.float32)),
            "latent_std": torch.from_numpy(rows.read("std", position, k).astype(np.float32)),
            "label": self.labels[self.substitute(index, attempt)],
            "index": index,
            "seed": int(torch.randint(0, 2**62, (1,), generator=generator)),
            "n_unreadable": attempt,
        }
        if self.feature_cache is not None:
            self.feature_rows = self.feature_rows or Rows(self.feature_cache)
            item["features"] = torch.from_numpy(self.feature_rows.read("features", position, k))
        if self.with_pixels:
            item["pixels"] = self.pixels(position, [k])[0]
        return item

    def pixels(self, position: int, crops: Sequence[int]) -> list[Tensor]:
        """Cuts the crops that the latents were made of again, uint8 `[3, size, size]`."""
        rows = self._rows()
        used = self.substitute(self.indices[position], int(rows.read("attempt", position)))
        with without_notes():
            image = self.images.read(used)
        boxes, flips = rows.read("box", position).tolist(), rows.read("flip", position).tolist()
        cut = []
        for k in crops:
            top, left, height, width = boxes[k]
            hflip, vflip = flips[k]
            crop = Crop((top, left, height, width), hflip, vflip)
            cut.append(pil_to_tensor(crop.apply(image, self.config.size)))
        return cut


def fill_cache(
    dataset: CropDataset,
    vae: AutoencoderKL,
    folder: str | Path,
    n_crops: int,
    size: int,
    accelerator: Accelerator,
    batch_size: int = 32,
) -> LatentCache:
    """Encodes `n_crops` crops of every image of `dataset` at `size` pixels, once.

    Prints the disk size before it begins.
    """
    cache = plan_latents(dataset, vae, folder, n_crops, size)
    accelerator.print(str(cache))
    return fill_latents(cache, dataset, vae, size, accelerator, batch_size)


def plan_latents(
    dataset: CropDataset, vae: AutoencoderKL, folder: str | Path, n_crops: int, size: int
) -> LatentCache:
    """Returns the cache that `fill_latents` fills; writes nothing."""
    factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
    shape = (len(dataset), n_crops, vae.config["latent_channels"], size // factor, size // factor)
    return LatentCache(Path(folder), shape, _fingerprint(dataset, vae, n_crops, size))


def fill_latents(
    cache: LatentCache,
    dataset: CropDataset,
    vae: AutoencoderKL,
    size: int,
    accelerator: Accelerator,
    batch_size: int = 32,
) -> LatentCache:
    """Encodes what is missing in `cache`; no batch crosses a shard, so that its rows are always
    the same."""
    mine, n_crops = cache.share(accelerator), cache.shape[1]
    size_of_batch = max(1, batch_size // n_crops)
    batches = {n: list(batched(cache.range(n), size_of_batch)) for n in mine}
    loader = DataLoader(
        _CacheCrops(dataset, n_crops),
        batch_sampler=[one for some in batches.values() for one in some],
        num_workers=dataset.config.num_workers,
    )
    hidden = not accelerator.is_main_process or not mine
    found = iter(track(loader, "encoding latents", disable=hidden))
    for number, some in batches.items():
        parts = []
        for batch in islice(found, len(some)):
            images = to_images(batch["pixels"].flatten(0, 1).to(accelerator.device))
            posterior = zip(("mean", "std"), encode_posterior(vae, images, size), strict=True)
            maps = {name: x.half().cpu().unflatten(0, (-1, n_crops)) for name, x in posterior}
            more = {"box": batch["box"].int(), "flip": batch["flip"]}
            parts.append({**maps, **more, "attempt": batch["attempt"].byte()})
        cache.write(number, join_rows(parts))
    cache.finish(accelerator)
    return cache


def _fingerprint(dataset: CropDataset, vae: AutoencoderKL, n_crops: int, size: int) -> str:
    weights = hashlib.sha256()
    for parameter in vae.encoder.parameters():
        weights.update(parameter.detach().float().cpu().numpy().tobytes())
    ids = [dataset.images.ids[i] for i in dataset.indices]
    crop = (dataset.config.crop, dataset.config.scale, dataset.config.shift, dataset.config.hflip)
    source = (Path(dataset.config.root or "").name, dataset.config.split)
    identity = (
        "in shards",
        weights.hexdigest(),
        *source,
        dataset.seed,
        n_crops,
        size,
        dataset.config.size,
        crop,
    )
    return f"{derive_seed(*identity, dataset.config.vflip, *ids):016x}"


# ---- Random draws that belong to a sample, not to a batch or a process ---------------------------


class SampleNoise:
    """Draws for a batch, each sample from its own CPU generator, so batches may be split anyhow.

    Args:
        seeds: one per sample, e.g. `batch["seed"]`.
    """

    def __init__(self, seeds: Sequence[int] | Tensor, device: torch.device):
        self.generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        self.device = device

    def normal(self, *shape: int) -> Float[Tensor, "b ..."]:
        return torch.stack([torch.randn(shape, generator=g) for g in self.generators]).to(
            self.device
        )

    def uniform(self, *shape: int) -> Float[Tensor, "b ..."]:
        return torch.stack([torch.rand(shape, generator=g) for g in self.generators]).to(
            self.device
        )

    def timesteps(self, n_train_timesteps: int) -> Tensor:
        """Integers `[b]`, uniform in [0, n_train_timesteps)."""
        draws = [torch.randint(0, n_train_timesteps, (), generator=g) for g in self.generators]
        return torch.stack(draws).to(self.device)
