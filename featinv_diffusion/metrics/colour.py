"""Difference of two images in colour, as it looks: CIEDE2000 between sRGB images."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from featinv_diffusion.errors import InputError
from featinv_diffusion.types import Images

_TO_XYZ = (
    (0.4124564, 0.3575761, 0.1804375),
    (0.2126729, 0.7151522, 0.0721750),
    (0.0193339, 0.1191920, 0.9503041),
)
"""From linear sRGB (IEC 61966-2-1) to XYZ; the rows sum to the white of D65."""

_CUBE, _SLOPE = (6 / 29) ** 3, (29 / 6) ** 2 / 3
_POWER_25 = 25.0**7


def to_lab(images: Images) -> Float[Tensor, "b 3 height width"]:
    """Converts sRGB to CIELAB with the white of D65: L* in 0 … 100, then a* and b*.

    Values beyond [0, 1] are clamped, as a picture file would. Grey has
    a* = b* = 0 up to rounding.
    """
    rgb = images.to(torch.promote_types(images.dtype, torch.float32)).clamp(0, 1)
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    matrix = linear.new_tensor(_TO_XYZ)
    shares = torch.einsum("xc,bchw->bxhw", matrix / matrix.sum(1, keepdim=True), linear)
    x, y, z = torch.where(
        shares > _CUBE, shares.clamp_min(_CUBE) ** (1 / 3), _SLOPE * shares + 4 / 29
    ).unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


def delta_e_2000(images: Images, others: Float[Tensor, "b 3 _ _"]) -> Float[Tensor, " b"]:
    """Mean over pixels of CIEDE2000 between the two images of each pair.

    0 for equal images, 100 between black and white, below about 1 for colours that look alike.

    Raises:
        InputError: the two are not of one shape.
    """
    return delta_e_2000_map(images, others).mean(dim=(1, 2))


def delta_e_2000_map(
    images: Images, others: Float[Tensor, "b 3 _ _"]
) -> Float[Tensor, "b height width"]:
    """CIEDE2000 of each pixel; see `delta_e_2000`."""
    if images.shape != others.shape:
        raise InputError(
            "Images to compare must have one shape, got "
            f"{list(images.shape)} and {list(others.shape)}."
        )
    return ciede2000(to_lab(images), to_lab(others))


def ciede2000(lab: Float[Tensor, "b 3 *n"], others: Float[Tensor, "b 3 *n"]) -> Tensor:
    """Difference of CIELAB colours, `[b, *n]` (Sharma, Wu and Dalal 2005, equations 2 to 22).

    With k_L = k_C = k_H = 1. Hues are compared the shorter way round; where a colour is grey and
    so has no hue, that of the other counts.
    """
    (l1, a1, b1), (l2, a2, b2) = lab.unbind(1), others.unbind(1)
    shift = 0.5 * (1 - _saturation((a1.hypot(b1) + a2.hypot(b2)) / 2))
    a1, a2 = a1 * (1 + shift), a2 * (1 + shift)
    c1, c2 = a1.hypot(b1), a2.hypot(b2)
    hue, turn = _mean_hue(torch.atan2(b1, a1), torch.atan2(b2, a2), is_grey=c1 * c2 == 0)
    light, chroma = (l1 + l2) / 2, (c1 + c2) / 2
    d_light = (l2 - l1) / (1 + 0.015 * (light - 50) ** 2 / (20 + (light - 50) ** 2).sqrt())
    d_chroma = (c2 - c1) / (1 + 0.045 * chroma)
    d_hue = 2 * (c1 * c2).sqrt() * torch.sin(turn / 2) / (1 + 0.015 * chroma * _hue_weight(hue))
    bend = -2 * _saturation(chroma) * torch.sin(2 * _blue_turn(hue))
    squares = d_light**2 + d_chroma**2 + d_hue**2 + bend * d_chroma * d_hue
    return squares.clamp_min(0).sqrt()


def _mean_hue(h1: Tensor, h2: Tensor, is_grey: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mean of two hues in [0, 2π) and the turn from the first to the second."""
    h1, h2 = h1 % (2 * math.pi), h2 % (2 * math.pi)
    turn, total = h2 - h1, h1 + h2
    far = turn.abs() > math.pi
    turn = torch.where(far, turn - 2 * math.pi * turn.sign(), turn)
    round_trip = torch.where(total < 2 * math.pi, 2 * math.pi, -2 * math.pi)
    mean = (total + torch.where(far, round_trip, 0.0)) / 2
    return torch.where(is_grey, total, mean), torch.where(is_grey, 0.0, turn)


def _saturation(chroma: Tensor) -> Tensor:
    """√(C⁷ / (C⁷ + 25⁷))."""
    return (chroma**7 / (chroma**7 + _POWER_25)).sqrt()


def _hue_weight(hue: Tensor) -> Tensor:
    degree = math.pi / 180
    return (
        1
        - 0.17 * torch.cos(hue - 30 * degree)
        + 0.24 * torch.cos(2 * hue)
        + 0.32 * torch.cos(3 * hue + 6 * degree)
        - 0.20 * torch.cos(4 * hue - 63 * degree)
    )


def _blue_turn(hue: Tensor) -> Tensor:
    """The rotation in the blue, in radians: at most 30°, at hue 275°."""
    return math.radians(30) * torch.exp(-(((hue.rad2deg() - 275) / 25) ** 2))
