"""Feature cache: a backbone's maps of the very crops that a latent cache holds, beside it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

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
from featinv_diffusion.seeds import derive_seed
from featinv_diffusion.training.latents import (
    CacheConfig,
    CachedCropDataset,
    LatentCache,
    MappedArrays,
    flush,
    open_for_filling,
)

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


class FeatureCache(MappedArrays):
    """Array `features` `[n, crops, c, h, w]`, in a folder of its own below that of the latents.

    The name of the folder stands for the latents' crops, the backbone's weights, layer and
    preprocessing, and the number format, so that several backbones share one latent cache.
    It is filled in batches of `rows` images that are always the same, and `done` marks those: the
    last bits of a map depend on the batch that it is computed in.
    """

    def __init__(self, latents: LatentCache, backbone: Backbone, dtype: str):
        n, crops = latents.shape[:2]
        shape = (n, crops, backbone.spec.channels, *backbone.spec.grid)
        self.rows = max(1, BATCH // crops)
        n_batches = math.ceil(n / self.rows)
        layout = {"features": (shape, np.dtype(dtype)), "done": ((n_batches,), np.bool_)}
        weights = weights_sha256({"": backbone.model})
        spec, reads = backbone.spec, repr(backbone.preprocessing)
        parts = (latents.fingerprint, weights, spec.layer, str(shape), reads, dtype)
        key = f"{derive_seed(*parts):016x}"
        advice = (
            "Lower cache.n_crops, set cache.folder"
            + (", take cache.features_dtype=float16" if dtype == "float32" else "")
            + " or unset cache.features."
        )
        what = f"Feature cache ({dtype})"
        super().__init__(latents.folder / f"features-{key}", layout, key, what, advice)


def fill_features(
    cache: FeatureCache, source: CachedCropDataset, backbone: Backbone, accelerator: Accelerator
) -> None:
    """Computes what is missing in `cache`, from the crops of a filled latent cache.

    Raises:
        InputError: features that the number format cannot hold; the folder is removed.
    """
    arrays, missing = open_for_filling(cache, accelerator)
    features, done = arrays["features"], arrays["done"]
    crops = _BatchesOfCrops(source, missing, cache.rows, features.shape[1])
    loader = DataLoader(crops, batch_size=None, num_workers=source.config.num_workers)
    hidden = not accelerator.is_main_process or not missing
    for number, pixels in track(loader, "reading features", disable=hidden):
        images = to_images(pixels.to(accelerator.device))
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            maps = backbone.features(images).float().cpu()
        first = number * cache.rows
        stored = _to_array(maps, features.dtype, cache)
        features[first : first + cache.rows] = stored.reshape(-1, *features.shape[1:])
        done[number] = True
    flush(arrays, accelerator)


def _to_array(maps: Tensor, dtype: Any, cache: FeatureCache) -> np.ndarray:
    largest = float(maps.abs().max())
    if not largest <= np.finfo(dtype).max:
        shutil.rmtree(cache.folder, ignore_errors=True)
        raise InputError(
            f"The features must be finite numbers that {dtype} holds, up to "
            f"{np.finfo(dtype).max:.4g}, but reach {largest:.4g}. "
            "Set cache.features_dtype=float32, or unset cache.features."
        )
    return maps.numpy().astype(dtype)


class _BatchesOfCrops(Dataset):
    """(number, pixels uint8 `[rows · crops, 3, s, s]`) of some batches of a latent cache."""

    def __init__(self, source: CachedCropDataset, numbers: Sequence[int], rows: int, n_crops: int):
        self.source, self.numbers, self.rows, self.n_crops = source, numbers, rows, n_crops

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> tuple[int, Tensor]:
        number = self.numbers[i]
        end = min((number + 1) * self.rows, len(self.source))
        crops = [
            crop
            for position in range(number * self.rows, end)
            for crop in self.source.pixels(position, range(self.n_crops))
        ]
        return number, torch.stack(crops)
