"""Two models through one inverter: a planted difference is named, two alike raise no alarm."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from featinv_diffusion.backbones import wrap_module
from featinv_diffusion.errors import InputError
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.studies.differencing import compare_models


class Pixels(nn.Module):
    """Each cell holds the mean colour of its pixels, turned by a matrix."""

    def __init__(self, turn: torch.Tensor):
        super().__init__()
        self.turn = nn.Parameter(turn)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("dc,bchw->bdhw", self.turn, nn.functional.avg_pool2d(x, 4))


class Enlarging(Inverter):
    """Shows the cells as pixels."""

    def __init__(self, backbone):
        self.backbone, self.spec, self.networks = backbone, backbone.spec, {}

    def _invert(self, features, generator):
        return nn.functional.interpolate(features, scale_factor=4).clamp(0, 1)


def model(turn: torch.Tensor, name: str):
    return wrap_module(
        Pixels(turn), input_size=32, preprocess=((0.0,) * 3, (1.0,) * 3), axes="NCHW", name=name
    )


def pictures(n: int = 24) -> torch.Tensor:
    cells = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return nn.functional.interpolate(cells, scale_factor=4)


@pytest.fixture
def inverter():
    return Enlarging(model(torch.eye(3), "a"))


def test_a_model_without_colour_is_named_first(inverter):
    grey = model(torch.tensor([[0.299, 0.587, 0.114]] * 3), "grey")
    generator = torch.Generator().manual_seed(1)
    noise = [0.01 * torch.randn(3, 3, generator=generator) for _ in range(4)]
    nulls = [model(torch.eye(3) + each, "null") for each in noise]
    for mapping in ("none", "ridge"):
        found = compare_models(inverter, grey, pictures(), nulls=nulls, mapping=mapping)
        first = found.metrics["attributes"][0]
        assert first["attribute"] == "colour"
        assert first["alarm"]
        assert first["change"] < 0
        assert "colour falls" in found.summary()
        assert found.figure() is not None


def test_a_model_in_other_coordinates_is_mapped_and_raises_no_alarm(inverter):
    turned = model(torch.tensor([[0.0, 1, 0], [0, 0, 2], [3, 0, 0]]), "turned")
    found = compare_models(inverter, turned, pictures())
    assert found.metrics["mapping"] == "ridge"
    assert found.metrics["null_basis"] == "bootstrap of the ridge map"
    same = compare_models(inverter, inverter.require_backbone(), pictures())
    assert same.metrics["mapping"] == "none"
    assert not any(row["alarm"] for row in same.metrics["attributes"])


def test_another_training_is_no_alarm_though_all_its_pictures_differ(inverter):
    """Each null is brighter or darker than A in every picture, and so is B."""
    shifts = (0.98, 1.01, 0.97, 1.02)
    nulls = [model(shift * torch.eye(3), "null") for shift in shifts]
    found = compare_models(
        inverter, model(0.99 * torch.eye(3), "b"), pictures() * 0.9, nulls=nulls, mapping="none"
    )
    assert not any(row["alarm"] for row in found.metrics["attributes"])
    far = compare_models(
        inverter, model(0.7 * torch.eye(3), "b"), pictures() * 0.9, nulls=nulls, mapping="none"
    )
    assert "brightness falls" in far.summary()


def test_too_few_pictures_are_refused(inverter):
    with pytest.raises(InputError, match="At least 8 pictures"):
        compare_models(inverter, inverter.require_backbone(), pictures(10))
