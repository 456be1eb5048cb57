"""CIEDE2000 against the published pairs, CIELAB against its definition worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featinv_diffusion.errors import InputError
from featinv_diffusion.metrics.colour import ciede2000, delta_e_2000, delta_e_2000_map, to_lab

# Sharma, Wu and Dalal 2005, table 1: L, a, b of two colours, and their difference to 4 decimals.
PAIRS = """
50.0000 2.6772 -79.7751 50.0000 0.0000 -82.7485 2.0425
50.0000 3.1571 -77.2803 50.0000 0.0000 -82.7485 2.8615
50.0000 2.8361 -74.0200 50.0000 0.0000 -82.7485 3.4412
50.0000 -1.3802 -84.2814 50.0000 0.0000 -82.7485 1.0000
50.0000 -1.1848 -84.8006 50.0000 0.0000 -82.7485 1.0000
50.0000 -0.9009 -85.5211 50.0000 0.0000 -82.7485 1.0000
50.0000 0.0000 0.0000 50.0000 -1.0000 2.0000 2.3669
50.0000 -1.0000 2.0000 50.0000 0.0000 0.0000 2.3669
50.0000 2.4900 -0.0010 50.0000 -2.4900 0.0009 7.1792
50.0000 2.4900 -0.0010 50.0000 -2.4900 0.0010 7.1792
50.0000 2.4900 -0.0010 50.0000 -2.4900 0.0011 7.2195
50.0000 2.4900 -0.0010 50.0000 -2.4900 0.0012 7.2195
50.0000 -0.0010 2.4900 50.0000 0.0009 -2.4900 4.8045
50.0000 -0.0010 2.4900 50.0000 0.0010 -2.4900 4.8045
50.0000 -0.0010 2.4900 50.0000 0.0011 -2.4900 4.7461
50.0000 2.5000 0.0000 50.0000 0.0000 -2.5000 4.3065
50.0000 2.5000 0.0000 73.0000 25.0000 -18.0000 27.1492
50.0000 2.5000 0.0000 61.0000 -5.0000 29.0000 22.8977
50.0000 2.5000 0.0000 56.0000 -27.0000 -3.0000 31.9030
50.0000 2.5000 0.0000 58.0000 24.0000 15.0000 19.4535
50.0000 2.5000 0.0000 50.0000 3.1736 0.5854 1.0000
50.0000 2.5000 0.0000 50.0000 3.2972 0.0000 1.0000
50.0000 2.5000 0.0000 50.0000 1.8634 0.5757 1.0000
50.0000 2.5000 0.0000 50.0000 3.2592 0.3350 1.0000
60.2574 -34.0099 36.2677 60.4626 -34.1751 39.4387 1.2644
63.0109 -31.0961 -5.8663 62.8187 -29.7946 -4.0864 1.2630
61.2901 3.7196 -5.3901 61.4292 2.2480 -4.9620 1.8731
35.0831 -44.1164 3.7933 35.0232 -40.0716 1.5901 1.8645
22.7233 20.0904 -46.6940 23.0331 14.9730 -42.5619 2.0373
36.4612 47.8580 18.3852 36.2715 50.5065 21.2231 1.4146
90.8027 -2.0831 1.4410 91.1528 -1.6435 0.0447 1.4441
90.9257 -0.5406 -0.9208 88.6381 -0.8985 -0.7239 1.5381
6.7747 -0.2908 -2.4247 5.8714 -0.0985 -2.2286 0.6377
2.0776 0.0795 -1.1350 0.9033 -0.0636 -0.5514 0.9082
"""


def read_pairs() -> torch.Tensor:
    rows = [[float(word) for word in line.split()] for line in PAIRS.strip().splitlines()]
    return torch.tensor(rows, dtype=torch.float64)


def one_colour(*rgb: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor(rgb, dtype=dtype)[None, :, None, None].expand(1, 3, 2, 3)


def test_the_published_pairs():
    pairs = read_pairs()
    assert pairs.shape == (34, 7)
    found = ciede2000(pairs[:, :3], pairs[:, 3:6])
    torch.testing.assert_close(found, pairs[:, 6], atol=5e-5, rtol=0)
    # Pairs 10 and 14 lie exactly where the hues are opposite: either way round is as short.
    back = ciede2000(pairs[:, 3:6], pairs[:, :3])
    apart = torch.tensor([i not in (9, 13) for i in range(34)])
    torch.testing.assert_close(back[apart], pairs[apart, 6], atol=5e-5, rtol=0)


@pytest.mark.parametrize(
    ("rgb", "lab"),
    [
        ((1, 1, 1), (100, 0, 0)),
        ((0, 0, 0), (0, 0, 0)),
        ((1, 0, 0), (53.2408, 80.0925, 67.2032)),
        ((0, 1, 0), (87.7347, -86.1827, 83.1793)),
        ((0, 0, 1), (32.2970, 79.1875, -107.8602)),
        # Y = (0.5 + 0.055)^2.4 / 1.055^2.4 = 0.21404, L* = 116 Y^(1/3) - 16
        ((0.5, 0.5, 0.5), (116 * (0.555 / 1.055) ** 0.8 - 16, 0, 0)),
        # below both thresholds: Y = 0.004 / 12.92, L* = 24389/27 Y
        ((0.004, 0.004, 0.004), (24389 / 27 * 0.004 / 12.92, 0, 0)),
    ],
)
def test_lab_of_known_colours(rgb, lab):
    found = to_lab(one_colour(*rgb))
    assert found.shape == (1, 3, 2, 3)
    expected = one_colour(*lab)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)


def test_black_and_white_differ_by_100_and_equal_images_by_none():
    black, white = one_colour(0, 0, 0), one_colour(1, 1, 1)
    assert delta_e_2000(black, white).item() == pytest.approx(100, abs=1e-3)
    assert delta_e_2000(white, white).item() == 0


def test_the_mean_is_over_pixels():
    images = one_colour(0, 0, 0).clone().expand(2, 3, 2, 3).clone()
    others = images.clone()
    others[0, :, 0, 0] = 1
    others[1, :, :, :2] = 1
    found = delta_e_2000_map(images, others)
    assert found[0, 0, 0].item() == pytest.approx(100, abs=1e-3)
    assert found[0].count_nonzero() == 1
    shares = torch.tensor([100 / 6, 400 / 6], dtype=torch.float64)
    torch.testing.assert_close(delta_e_2000(images, others), shares, atol=1e-3, rtol=0)


def test_single_precision_is_enough_and_half_is_widened():
    generator = torch.Generator().manual_seed(0)
    images, others = torch.rand(2, 4, 3, 8, 8, dtype=torch.float64, generator=generator)
    exact = delta_e_2000(images, others)
    single = delta_e_2000(images.float(), others.float())
    torch.testing.assert_close(single.double(), exact, atol=1e-3, rtol=0)
    assert delta_e_2000(images.half(), others.half()).dtype == torch.float32


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 255), min_size=6, max_size=6))
def test_it_is_a_difference(values):
    a, b = one_colour(*(v / 255 for v in values[:3])), one_colour(*(v / 255 for v in values[3:]))
    there, back = delta_e_2000(a, b).item(), delta_e_2000(b, a).item()
    assert math.isfinite(there)
    assert there >= 0
    assert there == pytest.approx(back, abs=1e-9)
    assert (there == 0) == (values[:3] == values[3:])


def test_images_of_other_shapes_are_refused():
    with pytest.raises(InputError, match="must have one shape"):
        delta_e_2000(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 5))
