"""Agreement of the features and class scores of a reconstruction with those of the original."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from featinv_diffusion.errors import InputError
from featinv_diffusion.features.edits import permute_cells
from featinv_diffusion.types import Features, Images


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
            "Feature maps to compare must have one shape, got "
            f"{list(original.shape)} and {list(reconstruction.shape)}."
        )
    cosine = F.cosine_similarity(original.float(), reconstruction.float(), dim=1)
    return cosine.mean(dim=(1, 2))


def centred_cosine(
    original: Features, reconstruction: Float[Tensor, "b ..."], mean: Float[Tensor, "c 1 1"]
) -> Float[Tensor, " b"]:
    """`feature_cosine` of the maps less the mean cell of natural maps.

    Cells of any two images share a large part of their direction, which the cosine counts as
    agreement. Without it another image has about 0, whatever the backbone.

    Args:
        mean: of the cells of natural maps, by channel.

    Raises:
        InputError: the two are not of one shape.
    """
    mean = mean.to(original.device)
    return feature_cosine(original.float() - mean, reconstruction.float() - mean)


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
        raise InputError(f"k must lie in 1 … {original.shape[1]} (the classes), got {k}.")
    top = reconstruction.topk(k, dim=1).indices
    return (top == original.argmax(dim=1, keepdim=True)).any(dim=1)


# ---- Agreement of two images pixel by pixel ------------------------------------------------------

MSE_FLOOR = (1 / 255) ** 2 / 12
"""The mean square of rounding to 8 bits. No smaller error is told from none: 58.9 dB at most."""

_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2


def psnr(images: Images, others: Float[Tensor, "b 3 _ _"]) -> Float[Tensor, " b"]:
    """Peak signal-to-noise ratio in dB of each pair, for images of range 1.

    The squared error is taken to be at least that of rounding to 8 bits (`MSE_FLOOR`), so that
    equal images count 58.9 dB and a mean over images stays finite.

    Raises:
        InputError: the two are not of one shape.
    """
    _check_pair(images, others)
    error = (images.float() - others.float()).square().mean(dim=(1, 2, 3))
    return -10 * error.clamp_min(MSE_FLOOR).log10()


def ssim(images: Images, others: Float[Tensor, "b 3 _ _"]) -> Float[Tensor, " b"]:
    """Structural similarity of each pair (Wang et al. 2004, equation 13), for images of range 1.

    Gaussian window of 11×11 pixels with σ = 1.5, K₁ = .01 and K₂ = .03, averaged over the places
    where the window lies inside the image and over R, G and B. In [-1, 1]; 1 for equal images.

    Raises:
        InputError: the two are not of one shape, or smaller than the window.
    """
    _check_pair(images, others)
    if min(images.shape[-2:]) < _WINDOW:
        raise InputError(
            f"SSIM needs images of at least {_WINDOW}×{_WINDOW} pixels, "
            f"got {images.shape[-2]}×{images.shape[-1]}."
        )
    x, y = images.float(), others.float()
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x = _blur(x * x) - mean_x * mean_x
    variance_y = _blur(y * y) - mean_y * mean_y
    covariance = _blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x * mean_x + mean_y * mean_y + _C1)
    structure = (2 * covariance + _C2) / (variance_x + variance_y + _C2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def _blur(x: Tensor) -> Tensor:
    # Shifted sums rather than a convolution, which GPUs round to TF32: that is as coarse as C2.
    weights = [math.exp(-((i - _WINDOW // 2) ** 2) / (2 * _SIGMA**2)) for i in range(_WINDOW)]
    for dim in (2, 3):
        length = x.shape[dim] - _WINDOW + 1
        total = torch.zeros_like(x.narrow(dim, 0, length))
        for start, weight in enumerate(weights):
            total += x.narrow(dim, start, length) * (weight / sum(weights))
        x = total
    return x


def _check_pair(images: Tensor, others: Tensor) -> None:
    if images.shape != others.shape:
        raise InputError(
            "Images to compare must have one shape, got "
            f"{list(images.shape)} and {list(others.shape)}."
        )
