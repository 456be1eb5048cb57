"""Forms of heads against the heads themselves."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from featinv_diffusion import wrap_model
from featinv_diffusion.concepts import make_head, read_head
from featinv_diffusion.errors import InputError
from tests import tiny
from tests.concepts.planted import make_generator

FEATURES = torch.randn(3, 6, 4, 5, generator=make_generator()) + 0.5


@tiny.seeded
def make_layers() -> tuple[nn.Linear, nn.LayerNorm]:
    norm = nn.LayerNorm(6, eps=1e-2)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return nn.Linear(6, 4), norm


@tiny.seeded
def make_resnet():
    return timm.create_model(
        "resnet10t", num_classes=5, channels=(8, 8, 16, 16), stem_width=8, pretrained=False
    )


def test_a_linear_head_is_itself():
    linear, _ = make_layers()
    head = make_head(linear)
    expected = linear(FEATURES.mean(dim=(2, 3)))
    torch.testing.assert_close(head.logits(FEATURES), expected)
    torch.testing.assert_close(head.scale(FEATURES), torch.ones(3))
    assert head.form == "logit = w · mean(f) + b"


def test_a_norm_between_is_folded_exactly():
    linear, norm = make_layers()
    head = make_head(linear, norm)
    expected = linear(norm(FEATURES.mean(dim=(2, 3))))
    torch.testing.assert_close(head.logits(FEATURES), expected)
    assert "var(mean(f))" in head.form
    torch.testing.assert_close(head.weight.sum(dim=1), torch.zeros(4), atol=1e-6, rtol=0)


def test_the_head_of_a_convnext_has_a_norm():
    backbone = wrap_model(tiny.make_backbone(), name="convnext")
    norm = backbone.model.head.norm
    with torch.no_grad():
        norm.weight.normal_(generator=make_generator(1))
        norm.bias.normal_(generator=make_generator(2))
    head = read_head(backbone)
    assert head.norm == "layer_norm"
    features = tiny.make_features(3)
    torch.testing.assert_close(head.logits(features), backbone.logits(features))


def test_the_head_of_a_resnet_is_linear():
    backbone = wrap_model(make_resnet(), name="resnet", input_size=(64, 64))
    head = read_head(backbone)
    assert head.norm == "none"
    features = torch.rand(2, backbone.spec.channels, *backbone.spec.grid)
    torch.testing.assert_close(head.logits(features), backbone.logits(features))


def test_a_head_that_takes_the_maximum_is_refused():
    model = make_resnet()
    model.reset_classifier(5, "max")
    with pytest.raises(InputError, match="must average the map"):
        read_head(wrap_model(model, name="resnet", input_size=(64, 64)))


def test_no_such_class():
    with pytest.raises(InputError, match=r"must lie in 0 … 3, got 4"):
        make_head(make_layers()[0]).direction(4)
