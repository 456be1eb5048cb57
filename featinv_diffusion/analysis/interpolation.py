"""Weighted combinations of feature maps, seen (FeatInv, section 4.3 and figure 5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from featinv_diffusion.analysis.sampling import sample_all
from featinv_diffusion.features import mix
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.metrics import feature_cosine
from featinv_diffusion.types import Features


@dataclass(frozen=True, eq=False)
class Mixtures:
    """The samples of n combinations of k maps, one per seed.

    Args:
        maps: the combinations.
        images: in [0, 1], rounded to 8 bits.
        cosine: of each sample's features to the combination it was sampled from.
        cosine_to_maps: of each sample's features to the k maps that were combined.
    """

    maps: Float[Tensor, "n c h w"]
    images: Float[Tensor, "n seeds 3 height width"]
    cosine: Float[Tensor, "n seeds"]
    cosine_to_maps: Float[Tensor, "n seeds k"]


def sample_mixtures(
    inverter: Inverter,
    maps: Sequence[Features],
    weights: Sequence[Sequence[float]],
    seeds: Sequence[int],
    batch_size: int = 8,
) -> Mixtures:
    """Samples each combination Σ_k weights[i][k] · maps[k] with the same seeds.

    Args:
        maps: k of them, `[1, c, h, w]` each.
        weights: n rows of k; they need not sum to 1.
        seeds: noise of the samples; the same for all combinations, so that only the map differs.

    Raises:
        InputError: as `mix` and `sample_map`.
    """
    combined = [mix(maps, row) for row in weights]
    samples = [sample_all(inverter, features, seeds, batch_size) for features in combined]
    to_maps = [
        [feature_cosine(features.expand_as(done.features), done.features) for features in maps]
        for done in samples
    ]
    return Mixtures(
        torch.cat(combined),
        torch.stack([done.images for done in samples]),
        torch.stack([done.cosine.mean(dim=(1, 2)) for done in samples]),
        torch.stack([torch.stack(columns, dim=1) for columns in to_maps]),
    )
