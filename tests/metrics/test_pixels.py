"""Pixel metrics against formulas worked by hand and SSIM written anew with scipy's filter."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from featinv_diffusion.errors import InputError
from featinv_diffusion.metrics import psnr, ssim


def make_images(n: int = 2, size: tuple[int, int] = (20, 31), seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(seed))


def smooth_images(n: int = 2, seed: int = 0) -> torch.Tensor:
    coarse = make_images(n, (5, 6), seed)
    return torch.nn.functional.interpolate(coarse, (24, 32), mode="bilinear")


def reference_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """Of one channel in float64: population moments in a Gaussian window, borders cut off."""

    def blur(image: np.ndarray) -> np.ndarray:
        return gaussian_filter(image, 1.5, radius=5)[5:-5, 5:-5]

    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x**2) - mx**2, blur(y**2) - my**2, blur(x * y) - mx * my
    c1, c2 = 1e-4, 9e-4
    value = ((2 * mx * my + c1) * (2 * cov + c2)) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    return float(value.mean())


@pytest.mark.parametrize(("error", "decibel"), [(0.1, 20.0), (0.5, 6.0206), (1.0, 0.0)])
def test_psnr_by_hand(error, decibel):
    images = torch.zeros(2, 3, 4, 4)
    assert psnr(images, images + error).tolist() == pytest.approx([decibel] * 2, abs=1e-3)


def test_psnr_is_of_each_image_and_over_all_its_pixels():
    images, others = torch.zeros(2, 3, 2, 2), torch.zeros(2, 3, 2, 2)
    others[0, 0, 0, 0] = 1  # one of 12 values: mean square 1/12
    others[1] = 1
    assert psnr(images, others).tolist() == pytest.approx([10 * math.log10(12), 0])


def test_equal_images_are_finite_and_best():
    images = make_images()
    best = 10 * math.log10(12 * 255**2)
    assert psnr(images, images).tolist() == pytest.approx([best] * 2, abs=1e-3)
    one_level = psnr(images, images + 1 / 255)
    assert one_level.tolist() == pytest.approx([20 * math.log10(255)] * 2, abs=1e-2)
    assert bool((one_level < best).all())


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.3])
def test_ssim_is_the_formula(noise):
    images = smooth_images()
    others = (images + noise * (make_images(2, (24, 32), 1) - 0.5)).clamp(0, 1)
    got = ssim(images, others)
    for x, y, value in zip(images, others, got, strict=True):
        channels = zip(x.double().numpy(), y.double().numpy(), strict=True)
        assert value.item() == pytest.approx(
            np.mean([reference_ssim(*c) for c in channels]), abs=1e-5
        )


def test_ssim_of_constants_by_hand():
    # No variance: the structure is 1, the luminance (2·.2·.6 + C1) / (.04 + .36 + C1).
    dark, light = torch.full((1, 3, 16, 16), 0.2), torch.full((1, 3, 16, 16), 0.6)
    assert ssim(dark, light).item() == pytest.approx(0.2401 / 0.4001, abs=1e-4)


def test_ssim_of_an_inverted_image_is_negative():
    images = make_images()
    assert bool((ssim(images, 1 - images) < -0.5).all())
    assert ssim(images, images).tolist() == pytest.approx([1, 1])


def test_ssim_of_the_smallest_image_is_one_window():
    images, others = make_images(1, (11, 11)), make_images(1, (11, 11), 1)
    channels = zip(images[0].double().numpy(), others[0].double().numpy(), strict=True)
    expected = np.mean([reference_ssim(*c) for c in channels])
    assert ssim(images, others).item() == pytest.approx(expected, abs=1e-5)


def test_half_precision_is_computed_in_float32():
    images, others = make_images(), make_images(seed=1)
    assert ssim(images.half(), others.half()).dtype == torch.float32
    torch.testing.assert_close(
        psnr(images.half(), others.half()), psnr(images, others), atol=0.01, rtol=0
    )


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_shapes_must_agree(metric):
    with pytest.raises(InputError, match=r"\[2, 3, 20, 31\] and \[2, 3, 20, 20\]"):
        metric(make_images(), make_images(size=(20, 20)))


def test_ssim_of_images_smaller_than_its_window():
    with pytest.raises(InputError, match=r"at least 11×11 pixels, got 8×16"):
        ssim(make_images(1, (8, 16)), make_images(1, (8, 16)))
