"""Latent cache: posterior mean and std of several crops per image, with the crops themselves."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
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
from featinv_diffusion.errors import InputError
from featinv_diffusion.images import without_notes
from featinv_diffusion.seeds import derive_seed, make_generator
from featinv_diffusion.settings import Depth, check


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


class MappedArrays:
    """Memory-mapped arrays in one folder, whose first axis is the images of a data set.

    Filling is resumable and shared among processes: each writes its own images and marks them in
    `done`. The marker file, which is written last, says what the arrays belong to.

    Args:
        what: how messages call the contents, `Latent cache`.
        advice: what frees disk space.
    """

    def __init__(
        self,
        folder: Path,
        layout: dict[str, tuple[tuple[int, ...], Any]],
        fingerprint: str,
        what: str,
        advice: str,
    ):
        self.folder, self.layout, self.fingerprint = folder, layout, fingerprint
        self.what, self.advice = what, advice

    @property
    def n_bytes(self) -> int:
        return sum(int(np.prod(s)) * np.dtype(d).itemsize for s, d in self.layout.values())

    @property
    def marker(self) -> Path:
        return self.folder / "cache.json"

    def __str__(self) -> str:
        return f"{self.what} in {self.folder}: {self.n_bytes / 2**30:.2f} GiB"

    def create(self) -> None:
        """Makes the files, or keeps them where they belong to the same contents."""
        if self.marker.exists():
            found = json.loads(self.marker.read_text())["fingerprint"]
            if found != self.fingerprint:
                raise InputError(
                    f"{self.folder} holds latents of other data, crops or another VAE. "
                    "Delete it or set another cache.folder."
                )
            if "attempt" in self.layout and not (self.folder / "attempt.npy").exists():
                self._create("attempt")  # the others were written before there were any
            return
        check_room([self])
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in self.layout:
            self._create(name)
        self.marker.write_text(json.dumps({"fingerprint": self.fingerprint}))

    def _create(self, name: str) -> None:
        shape, dtype = self.layout[name]
        path = self.folder / f"{name}.npy"
        np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape).flush()

    def open(self, mode: str = "r") -> dict[str, np.ndarray]:
        return {name: np.load(self.folder / f"{name}.npy", mmap_mode=mode) for name in self.layout}  # pyright: ignore[reportArgumentType]


def check_room(caches: Sequence[MappedArrays]) -> None:
    """Raises `InputError` where the disk has no room for all that is not yet there."""
    new = [cache for cache in caches if not cache.marker.exists()]
    if not new:
        return
    folder = new[0].folder
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free, needed = shutil.disk_usage(existing).free, sum(cache.n_bytes for cache in new)
    if free < needed:
        names = " and ".join(cache.what[0].lower() + cache.what[1:] for cache in new)
        verb = "needs" if len(new) == 1 else "need"
        raise InputError(
            f"The {names} {verb} {needed / 2**30:.1f} GiB in {folder}, but "
            f"{free / 2**30:.1f} GiB are free. {new[-1].advice}"
        )


class LatentCache(MappedArrays):
    """Arrays `mean`, `std` fp16 `[n, crops, c, h, w]`, `box` and `flip`."""

    def __init__(self, folder: Path, shape: tuple[int, ...], fingerprint: str):
        self.shape = shape
        n, crops = shape[:2]
        layout = {
            "mean": (shape, np.float16),
            "std": (shape, np.float16),
            "box": ((n, crops, 4), np.int32),
            "flip": ((n, crops, 2), np.bool_),
            "done": ((n,), np.bool_),
            "attempt": ((n,), np.uint8),  # of an image in place of one that cannot be read
        }
        advice = "Lower cache.n_crops or set cache.folder."
        super().__init__(folder, layout, fingerprint, "Latent cache", advice)


class _CacheCrops(Dataset):
    """All crops of the images still missing from a cache."""

    def __init__(self, source: CropDataset, positions: Sequence[int], n_crops: int):
        self.source, self.positions, self.n_crops = source, positions, n_crops

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, i: int) -> dict[str, Any]:
        position = self.positions[i]
        index = self.source.indices[position]
        image, attempt = self.source.read(index)
        config = self.source.config
        crops = [
            draw_crop(config, *image.size, make_generator(self.source.seed, "cache", k, index))
            for k in range(self.n_crops)
        ]
        return {
            "position": position,
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
        features: MappedArrays | None = None,
    ):
        super().__init__(source.images, source.indices, source.config, source.seed)
        self.cache, self.with_pixels, self.feature_cache = cache, with_pixels, features
        self.arrays: dict[str, np.ndarray] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "arrays": None}  # a memory map is opened again in each worker

    def opened(self) -> dict[str, np.ndarray]:
        if self.arrays is None:
            more = self.feature_cache.open() if self.feature_cache else {}
            self.arrays = {**more, **self.cache.open()}
        return self.arrays

    def __getitem__(self, position: int) -> dict[str, Any]:
        arrays = self.opened()
        index = self.indices[position]
        generator = make_generator(self.seed, self.epoch, index)
        k = int(torch.randint(0, self.cache.shape[1], (), generator=generator))
        attempt = int(arrays["attempt"][position])
        item = {
            "latent_mean": torch.from_numpy(arrays["mean"][position, k].astype(np.float32)),
            "latent_std": torch.from_numpy(arrays["std"][position, k].astype(np.float32)),
            "label": self.labels[self.substitute(index, attempt)],
            "index": index,
            "seed": int(torch.randint(0, 2**62, (1,), generator=generator)),
            "n_unreadable": attempt,
        }
        if self.feature_cache is not None:
            item["features"] = torch.from_numpy(np.array(arrays["features"][position, k]))
        if self.with_pixels:
            item["pixels"] = self.pixels(position, [k])[0]
        return item

    def pixels(self, position: int, crops: Sequence[int]) -> list[Tensor]:
        """Cuts the crops that the latents were made of again, uint8 `[3, size, size]`."""
        arrays = self.opened()
        used = self.substitute(self.indices[position], int(arrays["attempt"][position]))
        with without_notes():
            image = self.images.read(used)
        cut = []
        for k in crops:
            top, left, height, width = arrays["box"][position, k].tolist()
            hflip, vflip = arrays["flip"][position, k].tolist()
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
    """Encodes what is missing in `cache`."""
    arrays, missing = open_for_filling(cache, accelerator)
    shape, n_crops = cache.shape, cache.shape[1]
    loader = DataLoader(
        _CacheCrops(dataset, missing, n_crops),
        batch_size=max(1, batch_size // n_crops),
        num_workers=dataset.config.num_workers,
    )
    hidden = not accelerator.is_main_process or not missing
    for batch in track(loader, "encoding latents", disable=hidden):
        images = to_images(batch["pixels"].flatten(0, 1).to(accelerator.device))
        mean, std = encode_posterior(vae, images, size)
        rows = batch["position"].numpy()
        arrays["mean"][rows] = mean.half().cpu().numpy().reshape(len(rows), *shape[1:])
        arrays["std"][rows] = std.half().cpu().numpy().reshape(len(rows), *shape[1:])
        arrays["box"][rows], arrays["flip"][rows] = batch["box"].numpy(), batch["flip"].numpy()
        arrays["attempt"][rows] = batch["attempt"].numpy()
        arrays["done"][rows] = True
    flush(arrays, accelerator)
    return cache


def open_for_filling(
    cache: MappedArrays, accelerator: Accelerator
) -> tuple[dict[str, np.ndarray], list[int]]:
    """Creates the files where they are not there; returns them and what this process must fill."""
    if accelerator.is_main_process:
        cache.create()
    accelerator.wait_for_everyone()
    arrays = cache.open("r+")
    mine = range(accelerator.process_index, len(arrays["done"]), accelerator.num_processes)
    return arrays, [i for i in mine if not arrays["done"][i]]


def flush(arrays: dict[str, np.ndarray], accelerator: Accelerator) -> None:
    for array in arrays.values():
        array.flush()  # pyright: ignore[reportAttributeAccessIssue]
    accelerator.wait_for_everyone()


def _fingerprint(dataset: CropDataset, vae: AutoencoderKL, n_crops: int, size: int) -> str:
    weights = hashlib.sha256()
    for parameter in vae.encoder.parameters():
        weights.update(parameter.detach().float().cpu().numpy().tobytes())
    ids = [dataset.images.ids[i] for i in dataset.indices]
    crop = (dataset.config.crop, dataset.config.scale, dataset.config.shift, dataset.config.hflip)
    source = (Path(dataset.config.root or "").name, dataset.config.split)
    identity = (
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
