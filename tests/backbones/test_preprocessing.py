from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional

from featinv_diffusion.backbones.base import Preprocessing
from featinv_diffusion.errors import InputError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PILLOW = {
    "bilinear": transforms.InterpolationMode.BILINEAR,
    "bicubic": transforms.InterpolationMode.BICUBIC,
}


def make_picture(height: int, width: int) -> Image.Image:
    """Noise that keeps clear of black and white, where Pillow clips between its two passes."""
    pixels = np.random.default_rng(0).integers(64, 192, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("source", [(150, 211), (40, 33)])
def test_equals_pillow_and_torchvision_up_to_their_rounding(interpolation, source):
    """Pillow rounds to integers after each of its two passes: 2/255 at most before division."""
    picture = make_picture(*source)
    reference = transforms.Compose(
        [
            transforms.Resize((96, 64), PILLOW[interpolation]),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    preprocess = Preprocessing((96, 64), MEAN, STD, interpolation)
    images = functional.to_tensor(picture)[None]
    expected: Any = reference(picture)
    difference = (preprocess(images)[0] - expected).abs()
    assert difference.shape == (3, 96, 64)
    assert difference.max() < 2 / 255 / min(STD)


def test_overshoot_is_clipped_as_in_pillow():
    """A black and white edge, across rows only: one pass resizes, the other has nothing to do."""
    pixels = np.zeros((64, 32, 3), dtype=np.uint8)
    pixels[30:] = 255
    picture = Image.fromarray(pixels)
    images = functional.to_tensor(picture)[None]
    result = Preprocessing((40, 32), (0.0,) * 3, (1.0,) * 3)(images)
    resized = picture.resize((32, 40), Image.Resampling.BICUBIC)
    assert result.min() == 0
    assert result.max() == 1
    assert (result[0] - functional.to_tensor(resized)).abs().max() < 1 / 255


def test_an_image_of_the_right_size_is_only_normalised():
    images = torch.rand(2, 3, 8, 6, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([(images[:, i] - MEAN[i]) / STD[i] for i in range(3)], dim=1)
    assert torch.allclose(Preprocessing((8, 6), MEAN, STD)(images), expected)


def test_a_constant_image_stays_constant():
    result = Preprocessing((5, 7), (0.5,) * 3, (0.25,) * 3)(torch.full((1, 3, 30, 20), 0.75))
    assert torch.allclose(result, torch.ones(1, 3, 5, 7), atol=1e-6)


def test_statistics_are_float32_whatever_the_images_are():
    images = torch.full((1, 3, 4, 4), 0.5, dtype=torch.bfloat16)
    result = Preprocessing((4, 4), MEAN, STD)(images)
    assert result.dtype == torch.float32
    assert result[0, 0, 0, 0] == pytest.approx((0.5 - 0.485) / 0.229, abs=1e-6)


def test_gradient_equals_finite_differences():
    images = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.25
    images.requires_grad_()
    preprocess = Preprocessing((4, 4), MEAN, STD)
    weights = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(1))

    def loss(images: Tensor) -> Tensor:
        return (preprocess(images) * weights).sum()

    loss(images).backward()
    assert images.grad is not None
    step = torch.zeros_like(images)
    step[0, 1, 2, 3] = 1e-2
    with torch.no_grad():
        slope = (loss(images + step) - loss(images - step)) / 2e-2
    assert images.grad[0, 1, 2, 3] == pytest.approx(float(slope), rel=1e-2)


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(3, 8, 8),
        torch.zeros(1, 4, 8, 8),
        torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
    ],
)
def test_what_is_no_batch_of_images_is_refused(images):
    # `__wrapped__`: without the type checks of the tests
    call = Preprocessing.__call__
    with pytest.raises(InputError, match="Images must be a float tensor"):
        getattr(call, "__wrapped__", call)(Preprocessing((8, 8), MEAN, STD), images)


def test_unknown_interpolation_is_refused():
    with pytest.raises(InputError, match="'hamming'"):
        Preprocessing((8, 8), MEAN, STD, "hamming")


def test_pictures_are_seen_through_a_smaller_size():
    """Two passes of Pillow, to 24 and on to 48; more of the picture does not come through."""
    picture = make_picture(150, 211)
    steps = [
        transforms.Resize((side, side), transforms.InterpolationMode.BICUBIC) for side in (24, 48)
    ]
    expected = functional.to_tensor(transforms.Compose(steps)(picture))
    preprocess = Preprocessing((48, 48), (0.0,) * 3, (1.0,) * 3, through=(24, 24))
    assert preprocess.picture_size == (24, 24)
    result = preprocess(functional.to_tensor(picture)[None])[0]
    assert result.shape == (3, 48, 48)
    assert (result - expected).abs().max() < 4 / 255  # each pass of Pillow rounds twice
    direct = Preprocessing((48, 48), (0.0,) * 3, (1.0,) * 3)(functional.to_tensor(picture)[None])
    assert (direct[0] - expected).abs().max() > 10 / 255


def test_without_a_smaller_size_nothing_changes():
    preprocess = Preprocessing((48, 40), MEAN, STD)
    assert preprocess.picture_size == (48, 40)
    same = Preprocessing((48, 40), MEAN, STD, through=(48, 40))
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(preprocess(images), same(images))
