"""Agreement of the features and class scores of a reconstruction with those of the original."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from featinv_diffusion.errors import InputError
from featinv_diffusion.features.edits import permute_cells
from featinv_diffusion.types import Features


def feature_cosine(
    original: Features, reconstruction: Float[Tensor, "b ..."]
) -> Float[Tensor, " b"]:
    """Mean over cells of the cosine between the vectors of two maps (FeatInv, section 3).

    In [-1, 1] for each map, computed in float32; a vector of zeros counts 0.

    Raises:
        InputError: the two are not of one shape.
    """
    if original.shape != reconstruction.shape:
        raise InputError(
            "Feature maps to compare must have one shape, but came with "
            f"{list(original.shape)} and {list(reconstruction.shape)}."
        )
    cosine = F.cosine_similarity(original.float(), reconstruction.float(), dim=1)
    return cosine.mean(dim=(1, 2))


def shuffled_cosine(
    original: Features,
    reconstruction: Features,
    generator: torch.Generator | Sequence[torch.Generator],
) -> Float[Tensor, " b"]:
    """`feature_cosine` against the original with its cells permuted: the null of layout.

    What two maps agree on without agreeing on any place, e.g. because all cells are alike.
    """
    return feature_cosine(permute_cells(original, generator), reconstruction)


def top_k_match(
    original: Float[Tensor, "b n_classes"], reconstruction: Float[Tensor, "b n_classes"], k: int
) -> Bool[Tensor, " b"]:
    """Whether the top-1 class of the original is among the top-k classes of the reconstruction."""
    if not 1 <= k <= original.shape[1]:
        raise InputError(f"k must lie in 1 … {original.shape[1]} (the classes), but {k} came.")
    top = reconstruction.topk(k, dim=1).indices
    return (top == original.argmax(dim=1, keepdim=True)).any(dim=1)
