"""What every backbone promises, whatever model is inside."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from featinv_diffusion.backbones import LAST, Backbone, list_backbones, load_backbone
from featinv_diffusion.backbones.names import PUBLISHED
from featinv_diffusion.errors import InputError
from tests.backbones import zoo

EVERY = pytest.mark.parametrize("name", zoo.NAMES)


@pytest.fixture
def backbone(name: str) -> Backbone:
    return zoo.make(name)


def test_every_registered_name_is_tested():
    assert set(PUBLISHED) <= set(zoo.NAMES)
    for name in list_backbones():  # with their weights
        backbone = load_backbone(name)
        backbone.spec.check_features(backbone.features(zoo.make_images(1)))


@EVERY
def test_features_are_a_finite_map_of_the_spec(backbone, name):
    features = backbone.features(zoo.make_images(3, (50, 70)))
    assert features.shape == (3, backbone.spec.channels, *backbone.spec.grid)
    backbone.spec.check_features(features)
    assert (backbone.spec.backbone, backbone.spec.layer) == (PUBLISHED.get(name, name), LAST)
    assert backbone.spec.kind == "map"


@EVERY
def test_an_image_is_the_same_alone_and_in_a_batch(backbone):
    images = zoo.make_images(3)
    alone = backbone.features(images[2:])
    assert torch.allclose(backbone.features(images)[2:], alone, atol=1e-4, rtol=1e-3)


@EVERY
def test_frozen(backbone):
    nn.Sequential(backbone).train()
    backbone.train()
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert not any(module.training for module in backbone.modules())


@EVERY
def test_gradients_reach_the_images_and_nothing_else(backbone):
    images = zoo.make_images(1, (40, 40)).requires_grad_()
    backbone.features(images).square().mean().backward()
    assert images.grad is not None
    assert bool(images.grad.isfinite().all())
    assert images.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in backbone.parameters())


@EVERY
def test_scores_of_features_are_the_models_own(backbone):
    images = zoo.make_images()
    features, scores = backbone.features_and_logits(images)
    assert torch.equal(features, backbone.features(images))
    if not backbone.has_head:
        assert scores is None
        assert backbone.labels is None
        with pytest.raises(InputError, match="must have a classification head"):
            backbone.classify(images)
        with pytest.raises(InputError, match="must have a classification head"):
            backbone.logits(features)
        return
    assert scores is not None
    assert torch.allclose(scores, backbone.classify(images), atol=1e-5)
    assert scores.std() > 1e-3
    if backbone.head_reads_map:
        assert torch.allclose(backbone.logits(features), scores, atol=1e-5, rtol=1e-4)
    else:
        with pytest.raises(InputError, match="Use classify"):
            backbone.logits(features)


@EVERY
def test_features_and_logits_is_one_forward_pass(backbone):
    calls: list[int] = []
    first = next(m for m in backbone.model.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    first.register_forward_hook(lambda *_: calls.append(1))
    backbone.features_and_logits(zoo.make_images())
    assert len(calls) == 1


@EVERY
def test_listed_layers_can_be_selected_and_have_the_shape_that_was_listed(backbone):
    images, listed = zoo.make_images(), backbone.layers()
    assert listed[0] == backbone.spec
    for spec in listed[1 :: max(1, len(listed) // 3)]:
        inner = zoo.at(backbone, spec.layer)
        features, scores = inner.features_and_logits(images)
        assert inner.spec == spec
        spec.check_features(features)
        assert torch.equal(features, inner.features(images))  # the early exit changes nothing
        assert (scores is None) == (not inner.has_head)
        assert not inner.head_reads_map


@pytest.mark.parametrize(
    "name", ["resnet", "convnext", "swin", "vit", "dinov2", "clip", "sam", "internvit"]
)
def test_a_map_changes_most_where_the_image_changes(backbone):
    """Channels taken for rows, or a prefix token for a cell, would break this."""
    images = zoo.make_images(1)
    other = images.clone()
    other[..., 48:, :16] = 1 - other[..., 48:, :16]  # the corner at the lower left
    for spec in backbone.layers()[1:7]:
        inner = zoo.at(backbone, spec.layer)
        change = (inner.features(images) - inner.features(other)).abs().sum(dim=(0, 1))
        row, column = divmod(int(change.argmax()), spec.grid[1])
        assert row >= spec.grid[0] // 2, spec
        assert column < -(-spec.grid[1] // 2), spec


@EVERY
def test_half_precision_follows_the_model(backbone):
    backbone = backbone.to(torch.bfloat16)
    images = zoo.make_images(1, (50, 50))
    assert torch.equal(
        backbone.preprocess(images), backbone.preprocessing(images).to(torch.bfloat16)
    )
    assert backbone.features(images).dtype == torch.bfloat16


@EVERY
def test_a_wrong_map_is_refused(backbone):
    if backbone.head_reads_map:
        features = backbone.features(zoo.make_images())
        with pytest.raises(InputError, match="must have shape"):
            backbone.logits(features[:, 1:])
        with pytest.raises(InputError, match="must be finite"):
            backbone.logits(features * torch.nan)
