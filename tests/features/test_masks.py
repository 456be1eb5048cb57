"""Regions of cells: rounded out, in the square that the backbone sees."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from featinv_diffusion.errors import InputError
from featinv_diffusion.features import box_mask, picture_mask
from featinv_diffusion.features.edits import to_pixels

FRACTION = st.floats(0, 1)


def rows(mask: torch.Tensor) -> list[str]:
    return ["".join("#" if cell else "." for cell in row) for row in mask.tolist()]


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ([0, 0, 1, 1], ["####", "####", "####", "####"]),
        ([0.25, 0.5, 0.5, 1], ["....", "..##", "....", "...."]),
        ([0.26, 0.49, 0.51, 0.51], ["....", ".##.", ".##.", "...."]),
        ([0.3, 0.3, 0.31, 0.31], ["....", ".#..", "....", "...."]),
        ([0.3, 0.3, 0.3, 0.9], ["....", "....", "....", "...."]),
        ([1, 1, 1, 1], ["....", "....", "....", "...."]),
    ],
)
def test_a_box_is_rounded_out_to_cells(box, expected):
    assert rows(box_mask(box, (4, 4))) == expected


def test_binary_fractions_are_no_reason_for_a_further_cell():
    """0.7 · 10 and 0.3 · 10 and 0.1 + 0.2 are off by a bit."""
    assert box_mask([0.7, 0, 1, 0.1 + 0.2], (10, 10)).sum() == 3 * 3
    assert all(box_mask([0, 0, k / 7, 1], (7, 1)).sum() == k for k in range(8))


@given(FRACTION, FRACTION, st.integers(1, 16))
def test_every_cell_that_is_touched_by_more_than_rounding_is_marked(a, b, n):
    start, end = sorted((a, b))
    mask = box_mask([start, 0, end, 1], (n, 1))[:, 0].tolist()
    for cell, marked in enumerate(mask):
        overlap = min(end, (cell + 1) / n) - max(start, cell / n)
        if overlap > 1e-5:
            assert marked
        if overlap < -1e-5:
            assert not marked


@pytest.mark.parametrize(
    ("box", "words"),
    [
        ([0, 0, 1], "four fractions"),
        ([0, 0, 1, 1.5], "got 0,0,1,1.5"),
        ([-0.1, 0, 1, 1], "each in 0 … 1"),
        ([0, 0, float("nan"), 1], "nan"),
        ([0.5, 0, 0.2, 1], "y0 ≤ y1"),
    ],
)
def test_what_is_no_box(box, words):
    with pytest.raises(InputError, match=words):
        box_mask(box, (4, 4))


def picture(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray((255 * pixels).astype(np.uint8)).convert("RGB")


def test_a_picture_marks_the_cells_in_which_it_is_light():
    pixels = np.zeros((40, 40))
    pixels[11:12, 20:30] = 1  # a thin line in cell (1, 2)
    pixels[39, 0] = 0.6
    pixels[0, 0] = 0.4  # darker than half grey
    assert rows(picture_mask(picture(pixels), (4, 4))) == ["....", "..#.", "....", "#..."]


def test_a_picture_s_centre_square_counts():
    pixels = np.zeros((40, 80))
    pixels[:, :19] = 1  # left of the square
    pixels[:, 70:] = 1  # right of it
    pixels[30:, 50:60] = 1
    mask = picture_mask(picture(pixels), (4, 4), size=(800, 400))
    assert rows(mask) == ["....", "....", "....", "...#"]


def test_a_picture_of_other_proportions_than_the_one_it_belongs_to():
    wide = picture(np.ones((40, 80)))
    with pytest.raises(InputError, match=r"300×400, but it is 80×40"):
        picture_mask(wide, (4, 4), size=(300, 400))
    assert picture_mask(wide, (4, 4), size=(799, 400)).all()  # as near as whole pixels come
    assert picture_mask(picture(np.ones((40, 40))), (4, 4), size=(300, 400)).all()


def test_pixels_belong_to_the_cell_of_their_centre():
    mask = torch.tensor([[True, False, False]])
    assert to_pixels(mask, (1, 8)).tolist() == [[True] * 3 + [False] * 5]
    assert to_pixels(mask, (2, 3)).tolist() == [[True, False, False]] * 2
