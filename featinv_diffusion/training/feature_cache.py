"""Feature cache: a backbone's maps of the very crops that a latent cache holds, beside it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from featinv_diffusion.backbones import Backbone
from featinv_diffusion.backbones.base import weights_sha256
from featinv_diffusion.data.crops import to_images
from featinv_diffusion.errors import InputError
from featinv_diffusion.runs.sampling import batched
from featinv_diffusion.seeds import derive_seed
from featinv_diffusion.training.latents import (
    CacheConfig,
    CachedCropDataset,
    LatentCache,
)
from featinv_diffusion.training.shards import Layout, ShardedArrays, join_rows

BATCH = 32
"""Crops that are computed at once."""


@dataclass(frozen=True)
class ControlNetCacheConfig(CacheConfig):
    """Whether the latent cache holds the backbone's features of its crops too.

    Args:
        features: keep them in `folder`, so that neither pictures nor the backbone are read again.
            They are computed in float32, whatever `run.mixed_precision` is.
        features_dtype: of what is kept; float32 takes twice the space of float16 and loses nothing.
    """

    features: bool = False
    features_dtype: Literal["float16", "float32"] = "float16"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.features and not self.folder:
            raise InputError(
                "A feature cache holds the crops of a latent cache, since new crops have new "
                "features, but cache.folder is not set. Set it, or unset cache.features."
            )


class FeatureCache(ShardedArrays):
    """Array `features` `[n, crops, c, h, w]`, in a folder of its own below that of the latents.

    The name of the folder stands for the latents' crops, the backbone's weights, layer and
    preprocessing, and the number format, so that several backbones share one latent cache.
    It is filled in batches of images that are always the same, several in a shard: the last bits of
    a map depend on the batch that it is computed in.
    """

    def __init__(self, latents: LatentCache, backbone: Backbone, dtype: str):
        n, crops = latents.shape[:2]
        shape = (crops, backbone.spec.channels, *backbone.spec.grid)
        self.batch = max(1, BATCH // crops)
        self.dtype = np.dtype(dtype)
        layout: Layout = {"features": (shape, self.dtype)}
        weights = weights_sha256({"": backbone.model})
        spec, reads = backbone.spec, repr(backbone.preprocessing)
        parts = (latents.fingerprint, weights, spec.layer, str((n, *shape)), reads, dtype)
        key = f"{derive_seed(*parts):016x}"
        advice = (
            "Lower cache.n_crops, set cache.folder"
            + (", take cache.features_dtype=float16" if dtype == "float32" else "")
            + " or unset cache.features."
        )
        what = f"Feature cache ({dtype})"
        folder = latents.folder / f"features-{key}"
        super().__init__(folder, layout, n, key, what, advice, self.batch)


def fill_features(
    cache: FeatureCache, source: CachedCropDataset, backbone: Backbone, accelerator: Accelerator
) -> None:
    """Computes what is missing in `cache`, from the crops of a filled latent cache.

    Raises:
        InputError: features that the number format cannot hold; the folder is removed.
    """
    mine = cache.share(accelerator)
    n_crops, batches = cache.layout["features"][0][0], {}
    for number in mine:
        batches[number] = list(batched(cache.range(number), cache.batch))
    every = [one for some in batches.values() for one in some]
    crops = _BatchesOfCrops(source, every, n_crops)
    loader = DataLoader(crops, batch_size=None, num_workers=source.config.num_workers)
    hidden = not accelerator.is_main_process or not mine
    found = iter(track(loader, "reading features", disable=hidden))
    for number, some in batches.items():
        parts = []
        for pixels in islice(found, len(some)):
            images = to_images(pixels.to(accelerator.device))
            with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
                maps = backbone.features(images).float().cpu()
            parts.append({"features": _to_stored(maps, cache).unflatten(0, (-1, n_crops))})
        cache.write(number, join_rows(parts))
    cache.finish(accelerator)


def _to_stored(maps: Tensor, cache: FeatureCache) -> Tensor:
    try:
        return to_number_format(maps, cache.dtype.name)
    except InputError:
        shutil.rmtree(cache.folder, ignore_errors=True)
        raise


def to_number_format(maps: Tensor, dtype: str) -> Tensor:
    """Returns maps in `float16` or `float32`.

    Raises:
        InputError: maps that are not finite, or whose numbers the format cannot hold.
    """
    largest, limit = float(maps.abs().max()), float(np.finfo(dtype).max)
    if not largest <= limit:
        wider = "Set cache.features_dtype=float32, for new-backbone --features-dtype float32."
        finite = "Check the weights and the preprocessing of the backbone."
        raise InputError(
            f"The features must be finite numbers that {dtype} holds, up to {limit:.4g}, but "
            f"reach {largest:.4g}. {wider if math.isfinite(largest) else finite}"
        )
    return maps.half() if dtype == "float16" else maps.float()


class _BatchesOfCrops(Dataset):
    """Pixels uint8 `[images · crops, 3, s, s]` of some batches of images of a latent cache."""

    def __init__(self, source: CachedCropDataset, batches: Sequence[list[int]], n_crops: int):
        self.source, self.batches, self.n_crops = source, batches, n_crops

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, i: int) -> Tensor:
        crops = range(self.n_crops)
        cut = [one for position in self.batches[i] for one in self.source.pixels(position, crops)]
        return torch.stack(cut)
