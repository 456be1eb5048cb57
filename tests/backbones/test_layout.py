from __future__ import annotations

import pytest
import timm.layers
import torch
from torch import nn
from transformers.models.sam.modeling_sam import SamLayerNorm

from featinv_diffusion.backbones.traced import Layout, is_elementwise, leaf_layout


def test_tokens_by_hand():
    """Two prefix tokens, then a grid of 2×3 in raster order, of one channel."""
    tokens = torch.tensor([-1.0, -2, 0, 1, 2, 3, 4, 5])[None, :, None]
    layout = Layout("NLC", n_prefix=2, grid=(2, 3))
    features = layout.to_map(tokens)
    assert features.tolist() == [[[[0, 1, 2], [3, 4, 5]]]]
    assert layout.from_map(features).flatten().tolist() == [0, 0, 0, 1, 2, 3, 4, 5]


def test_channels_last_by_hand():
    output = torch.arange(12.0).reshape(1, 2, 3, 2)  # rows, columns, channels
    features = Layout("NHWC").to_map(output)
    assert features[0, 0].tolist() == [[0, 2, 4], [6, 8, 10]]
    assert features[0, 1].tolist() == [[1, 3, 5], [7, 9, 11]]
    assert torch.equal(Layout("NHWC").from_map(features), output)


def test_channels_first_is_left_alone():
    output = torch.rand(1, 2, 3, 4)
    assert Layout("NCHW").to_map(output) is output
    assert Layout("NCHW").from_map(output) is output


@pytest.mark.parametrize(
    ("layout", "shape", "fits"),
    [
        (Layout("NCHW"), (1, 8, 4, 6), True),
        (Layout("NCHW"), (1, 4, 6, 20), False),
        (Layout("NCHW"), (1, 8, 24), False),
        (Layout("NHWC"), (1, 4, 6, 8), True),
        (Layout("NHWC"), (1, 8, 4, 6), False),
        (Layout("NLC", 1, (4, 6)), (1, 25, 8), True),
        (Layout("NLC", 1, (4, 6)), (1, 24, 8), False),
        (Layout("NLC", 1, (4, 6)), (1, 25, 8, 1), False),
    ],
)
def test_fits_refuses_what_is_not_as_wide_as_the_input(layout, shape, fits):
    assert layout.fits(shape, (64, 96)) is fits


def test_fits_allows_for_rounding():
    assert Layout("NCHW").fits((1, 8, 4, 7), (100, 200))  # 100 → 4, 200 → 7 with stride 28


@pytest.mark.parametrize(
    ("module", "axes"),
    [
        (nn.Conv2d(3, 4, 1), "NCHW"),
        (nn.BatchNorm2d(4), "NCHW"),
        (nn.GroupNorm(2, 4), "NCHW"),
        (nn.MaxPool2d(2), "NCHW"),
        (timm.layers.LayerNorm2d(4), "NCHW"),
        (timm.layers.BatchNormAct2d(4), "NCHW"),
        (nn.LayerNorm(4), "NHWC"),
        (SamLayerNorm(4), "NHWC"),
        (SamLayerNorm(4, data_format="channels_first"), "NCHW"),
        (nn.Linear(4, 4), "NHWC"),
    ],
)
def test_leaves_keep_to_the_axes_of_their_class(module, axes):
    images = torch.rand(2, 3, 5, 6) if isinstance(module, nn.Conv2d) else torch.rand(2, 4, 5, 6)
    layout = leaf_layout(module)
    assert layout == Layout(axes)
    output = module(images if axes == "NCHW" else images.permute(0, 2, 3, 1))
    assert output.shape[1 if axes == "NCHW" else 3] == 4


def test_other_leaves_say_nothing():
    assert leaf_layout(nn.GELU()) is None
    assert is_elementwise(nn.GELU())
    assert is_elementwise(nn.Identity())
    assert not is_elementwise(nn.Linear(2, 2))
    assert not is_elementwise(nn.BatchNorm1d(2, affine=False))
    assert not is_elementwise(nn.Sequential(nn.GELU()))
