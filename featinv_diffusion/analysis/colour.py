"""What a model keeps of colour: recoloured objects and their reconstructions from each stage.

Source: "Inverting DETR" (modular inversion), section 4.3 and figures 6 to 8.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import numpy as np
import torch
from jaxtyping import Bool, Float
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from torch import Tensor

from featinv_diffusion.errors import InputError, choices_hint
from featinv_diffusion.types import Images

HUES = {"red": 0.0, "green": 1 / 3, "blue": 2 / 3}
"""Filters that set the hue, in turns."""
TURNS = {"+120": 1 / 3, "+240": 2 / 3}
"""Filters that turn the hue."""
NONE, GREY = "none", "grey"
COMPARED = (NONE, *HUES, *TURNS)
"""The versions of an image whose pairwise differences are measured: 15 pairs."""
FILTERS = (*COMPARED, GREY)


def recolour(
    images: Images, inside: Bool[Tensor, "b height width"], name: str
) -> Float[Tensor, "b 3 height width"]:
    """Changes the hue inside the masks; `grey` removes colour everywhere.

    Saturation and value stay, so grey pixels stay grey. The result is rounded to 8 bits, as is
    that of `none`, which thus differs from another filter by the filter alone.

    Raises:
        InputError: unknown filter.
    """
    if name not in FILTERS:
        raise InputError(f"No colour filter is named {name!r}; {choices_hint(name, list(FILTERS))}")
    if name == GREY:
        weights = images.new_tensor([0.299, 0.587, 0.114])[:, None, None]
        changed = (images * weights).sum(1, keepdim=True).expand_as(images)
    elif name == NONE:
        changed = images
    else:
        changed = torch.where(inside[:, None], _with_hue(images, name), images)
    return (changed * 255).round() / 255


def pairwise_mse(versions: Mapping[str, Images]) -> Float[Tensor, " b"]:
    """Returns per image the MSE between two versions, averaged over all pairs."""
    pairs = list(combinations(versions.values(), 2))
    errors = [(a - b).square().mean(dim=(1, 2, 3)) for a, b in pairs]
    return torch.stack(errors).mean(0)


def _with_hue(images: Tensor, name: str) -> Tensor:
    hsv = rgb_to_hsv(images.movedim(1, -1).double().numpy())
    hue = HUES[name] if name in HUES else (hsv[..., 0] + TURNS[name]) % 1
    hsv[..., 0] = hue
    return torch.from_numpy(np.asarray(hsv_to_rgb(hsv))).movedim(-1, 1).to(images.dtype)
