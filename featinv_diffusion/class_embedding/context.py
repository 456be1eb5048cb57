"""Tokens on the object beside tokens of its context, by a mask."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from featinv_diffusion.errors import InputError
from featinv_diffusion.features.masks import CellMask

UNLABELLED = (0, 1000)
"""Background and `ignore` of ImageNet-S."""


@dataclass(frozen=True)
class Difference:
    """Mean of class tokens − mean of context tokens.

    Args:
        p_value: share of permutations of the token labels with a difference at least as large,
            the observed one counted: one-sided.
        n_images: that have tokens of both kinds.
    """

    value: float
    p_value: float
    n_images: int


def class_context_difference(
    values: Float[Tensor, "b n"],
    is_class: Bool[Tensor, "b n"],
    *,
    n_permutations: int = 300,
    seed: int = 0,
) -> Difference:
    """Compares tokens on the class with tokens of the context, within each image.

    Differences are taken per image and averaged, and labels are permuted within an image, since
    its tokens are not independent of each other. Images of one kind of token are left out.

    Raises:
        InputError: no image has tokens of both kinds.
    """
    mixed = is_class.any(dim=1) & ~is_class.all(dim=1)
    if not mixed.any():
        raise InputError(
            "Class and context can be compared only where an image has tokens of both kinds, but "
            "none has. Look at the masks: the object must not fill or miss the whole image."
        )
    values, is_class = values[mixed].double(), is_class[mixed]
    observed = _difference(values, is_class)
    generator = torch.Generator().manual_seed(seed)
    n_larger = 0
    for _ in range(n_permutations):
        shuffled = torch.rand(values.shape, generator=generator).argsort(dim=1)
        n_larger += int(_difference(values, is_class.gather(1, shuffled)) >= observed)
    p_value = (1 + n_larger) / (1 + n_permutations)
    return Difference(float(observed), p_value, int(mixed.sum()))


def token_mask(picture: Image.Image, grid: tuple[int, int]) -> CellMask:
    """Marks the patches of which more than half the area belongs to the object.

    Args:
        picture: labels R + 256 G as in ImageNet-S, of which the most frequent other than 0
            (background) and 1000 (ignored) is the object; a black and white mask is one label.
        grid: (h, w) of the patches; the whole mask is laid over it, as images are squashed.
    """
    pixels = torch.from_numpy(np.array(picture.convert("RGB"))).long()
    labels = pixels[..., 0] + 256 * pixels[..., 1]
    known = labels[~torch.isin(labels, torch.tensor(UNLABELLED))]
    found, counts = known.unique(return_counts=True)
    marked = labels == found[counts.argmax()] if len(found) else torch.zeros_like(labels).bool()
    return F.adaptive_avg_pool2d(marked[None].float(), grid)[0] > 0.5


def box_token_mask(
    box: tuple[float, float, float, float], size: tuple[int, int], grid: tuple[int, int]
) -> CellMask:
    """Marks the patches of which more than half the area lies in a box.

    Args:
        box: (x0, y0, x1, y1) in pixels, ends included, as Tiny-ImageNet has them.
        size: (width, height) of the image.
    """
    x0, y0, x1, y1 = box
    marked = torch.zeros(size[1], size[0])
    marked[int(y0) : int(y1) + 1, int(x0) : int(x1) + 1] = 1
    return F.adaptive_avg_pool2d(marked[None], grid)[0] > 0.5


def _difference(values: Tensor, is_class: Tensor) -> Tensor:
    on = (values * is_class).sum(dim=1) / is_class.sum(dim=1)
    off = (values * ~is_class).sum(dim=1) / (~is_class).sum(dim=1)
    return (on - off).mean()
