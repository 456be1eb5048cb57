"""What studies of edits share: one picture's features, and the samples of one map."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from featinv_diffusion.backbones.base import Backbone
from featinv_diffusion.errors import InputError
from featinv_diffusion.images import center_square, read_image, to_pil, to_tensor
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.types import Features, Images


@dataclass(frozen=True, eq=False)
class Encoded:
    """A picture as the backbone sees it.

    Args:
        size: (width, height) of the picture in its file.
        square: its centre square.
        features: `[1, c, h, w]`.
    """

    size: tuple[int, int]
    square: Image.Image
    features: Features


@dataclass(frozen=True, eq=False)
class SampleBatch:
    """Samples of one feature map.

    Args:
        images: rounded to 8 bits, as a PNG holds them; float32 on the CPU.
        features: what the backbone sees in them.
        cosine: of each cell to the map that was inverted.
    """

    images: Images
    features: Features
    cosine: Float[Tensor, "b h w"]


def backbone_of(inverter: Inverter) -> Backbone:
    """Returns the inverter's backbone.

    Raises:
        InputError: it has none.
    """
    if inverter.backbone is None:
        raise InputError("The inverter must have its backbone to read pictures, but has none.")
    return inverter.backbone


@torch.no_grad()
def encode_picture(inverter: Inverter, path: str | Path) -> Encoded:
    """Reads a picture and returns its features, bit for bit those that `reconstruct` inverts.

    Raises:
        InputError: no picture that can be read, or features that are not finite.
    """
    backbone = backbone_of(inverter)
    picture = read_image(path)
    square = center_square(picture, max(backbone.input_size))
    features, _ = backbone.features_and_logits(to_tensor(square).to(backbone.device))
    if not bool(features.isfinite().all()):
        raise InputError(f"The features of {path} hold NaN or infinite values.")
    return Encoded(picture.size, square, features)


@torch.no_grad()
def sample_map(
    inverter: Inverter, features: Features, seeds: Sequence[int], batch_size: int
) -> Iterator[SampleBatch]:
    """Yields samples of one map, one per seed and in batches, so that any number fits in memory.

    Batches are those that `featinv sample` makes of a single picture, so an edit that changes
    nothing gives its very samples, bit for bit.

    Raises:
        InputError: not one map, no seed, or samples that are not finite.
    """
    if len(features) != 1 or not seeds:
        raise InputError(
            "Samples need one feature map and at least one seed, "
            f"but {len(features)} maps and {len(seeds)} seeds came."
        )
    backbone = backbone_of(inverter)
    for start in range(0, len(seeds), batch_size):
        chosen = seeds[start : start + batch_size]
        generators = [torch.Generator().manual_seed(seed) for seed in chosen]
        repeated = features.expand(len(chosen), -1, -1, -1).contiguous()
        images = inverter.invert(repeated, generator=generators)
        if not bool(images.isfinite().all()):
            raise InputError("The samples hold NaN or infinite values; use --dtype float32.")
        images = to_tensor(to_pil(images))
        seen = backbone.features(images.to(backbone.device))
        yield SampleBatch(images, seen, cell_cosine(features, seen))


def sample_all(
    inverter: Inverter, features: Features, seeds: Sequence[int], batch_size: int
) -> SampleBatch:
    """Returns the samples of one map, one per seed, all at once."""
    batches = list(sample_map(inverter, features, seeds, batch_size))
    return SampleBatch(
        torch.cat([batch.images for batch in batches]),
        torch.cat([batch.features for batch in batches]),
        torch.cat([batch.cosine for batch in batches]),
    )


def cell_cosine(features: Float[Tensor, "#b c h w"], seen: Features) -> Float[Tensor, "b h w"]:
    """Returns the cosine of each cell of the maps seen to the same cell of `features`."""
    return F.cosine_similarity(features.float(), seen.float(), dim=1)


def to_list(values: Float[Tensor, ...]) -> list:
    """Returns plain numbers, nested as the tensor is."""
    return values.double().cpu().tolist()
