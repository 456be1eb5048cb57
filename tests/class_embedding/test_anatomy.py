"""Every kind of ViT: the projection is the head, and what the blocks add is what they add."""

from __future__ import annotations

import pytest
import torch

from featinv_diffusion.class_embedding.anatomy import make_random, read_anatomy, record
from featinv_diffusion.errors import InputError
from tests.backbones import zoo
from tests.class_embedding.vits import CLASS_TOKEN, NAMES, make_images, make_vit, weights_of


@pytest.mark.parametrize("name", NAMES)
def test_last_states_read_out_as_the_models_own_logits(name):
    anatomy = make_vit(name)
    images = make_images(anatomy)
    trace = record(anatomy, images)
    assert torch.equal(trace.logits, anatomy.backbone.classify(images))
    torch.testing.assert_close(
        anatomy.read_out(trace.states[-1]), trace.logits, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("name", CLASS_TOKEN)
def test_projected_class_token_is_the_logits(name):
    anatomy = make_vit(name)
    trace = record(anatomy, make_images(anatomy))
    projected = anatomy.project(trace.states[-1])[:, 0]
    assert (projected - trace.logits).abs().max() < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_what_the_sub_layers_add_is_the_difference_of_the_stream(name):
    anatomy = make_vit(name)
    trace = record(anatomy, make_images(anatomy))
    assert len(trace.states) == 1 + len(anatomy.blocks) == 1 + len(trace.mlp)
    added = torch.stack(trace.attention) + torch.stack(trace.mlp)
    stream = torch.stack(trace.states)
    torch.testing.assert_close(stream[1:] - stream[:-1], added, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(stream[0] + added.sum(dim=0), stream[-1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_tail_and_values_rebuild_what_the_attention_adds(name):
    anatomy = make_vit(name)
    trace = record(anatomy, make_images(anatomy))
    for parts, mixed, added in zip(anatomy.blocks, trace.mixed, trace.attention, strict=True):
        rebuilt = parts.attention_tail(parts.attention_values(mixed))
        torch.testing.assert_close(rebuilt, added, atol=1e-6, rtol=1e-5)


def test_norm_and_bias_can_be_left_out():
    anatomy = make_vit("token")
    tokens = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    head, norm = anatomy.head, anatomy.norm
    plain = tokens @ head.weight.T
    torch.testing.assert_close(anatomy.project(tokens, norm=False, bias=False), plain)
    torch.testing.assert_close(anatomy.project(tokens, norm=False), plain + head.bias)
    torch.testing.assert_close(
        anatomy.project(tokens, bias=False), norm(tokens) @ head.weight.T, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    "name", ["resnet", "deit_tiny_distilled_patch16_224", "beit_base_patch16_224", "dinov2-classes"]
)
def test_models_without_such_a_head_are_refused(name):
    with pytest.raises(InputError, match=r"class embedding of|linear in the class token"):
        read_anatomy(zoo.make(name))


def test_an_attention_pool_is_refused():
    with pytest.raises(InputError, match="pool 'map'"):
        read_anatomy(zoo.make("vit_base_patch16_siglip_224"))


@pytest.mark.parametrize("name", ["token", "vit-classes"])
def test_the_random_model_differs_repeats_and_leaves_the_model_alone(name):
    anatomy = make_vit(name)
    before = weights_of(anatomy)
    random, again = make_random(anatomy, 0), make_random(anatomy, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, weights_of(anatomy), strict=True))
    assert all(
        torch.equal(a, b) for a, b in zip(weights_of(random), weights_of(again), strict=True)
    )
    assert not torch.equal(random.head.weight, anatomy.head.weight)
    assert random.head.weight.std() > 0.01
    images = make_images(anatomy)
    assert random.backbone.classify(images).shape == anatomy.backbone.classify(images).shape


def test_hooks_are_gone_afterwards():
    anatomy = make_vit("token")
    record(anatomy, make_images(anatomy))
    for module in anatomy.backbone.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
