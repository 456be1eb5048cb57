"""Relevance: equal to a finite difference in the attention weights, and to autograd by hand."""

from __future__ import annotations

import pytest
import torch

from featinv_diffusion.class_embedding.anatomy import (
    Anatomy,
    attention_weights,
    editing_attention,
    merge_heads,
    record,
)
from featinv_diffusion.class_embedding.reading import (
    attention_rollout_relevance,
    cross_entropy,
    negative_probability,
    read_images,
    relevance_of,
)
from tests.class_embedding.vits import NAMES, make_images, make_vit

LABELS = torch.tensor([0, 3, 2])


def capture_attention(anatomy: Anatomy, images: torch.Tensor) -> tuple[list, list]:
    """A and V of every block, recomputed."""
    weights, values = [], []

    def see(q, k, v, mixed):
        weights.append(attention_weights(q, k))
        values.append(v)
        return mixed

    with editing_attention(anatomy, see):
        anatomy.backbone.classify(images)
    return weights, values


@pytest.mark.parametrize("name", NAMES)
def test_recomputed_attention_is_the_models_own(name):
    anatomy = make_vit(name)
    images = make_images(anatomy)
    weights, values = capture_attention(anatomy, images)
    trace = record(anatomy, images)
    for a, v, kept, mixed in zip(weights, values, trace.values, trace.mixed, strict=True):
        torch.testing.assert_close(v, kept, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(merge_heads(a @ v), mixed, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("objective", [cross_entropy, negative_probability])
@pytest.mark.parametrize("name", ["token", "layer-scale", "post-norm", "gap", "vit-classes"])
def test_relevance_equals_a_finite_difference(name, objective):
    """The weight of one token and head is moved by ±h in every row that the head reads."""
    anatomy = make_vit(name)
    anatomy.backbone.double()
    images = make_images(anatomy).double()
    weights, values = capture_attention(anatomy, images)
    block, head, token, h = 1, 1, 4, 1e-5
    parts = anatomy.blocks[block]

    def loss(shift: float) -> torch.Tensor:
        moved = weights[block].clone()
        moved[:, head, anatomy.read_tokens, token] += shift
        rows = merge_heads(moved @ values[block])[:, anatomy.read_tokens]
        added = parts.attention_tail(parts.attention_values(rows))
        scores = anatomy.head(anatomy.pool_norm(anatomy.norm(added).mean(dim=1)))
        return objective(scores, LABELS)

    difference = (loss(h) - loss(-h)) / (2 * h)
    mixed = merge_heads(weights[block] @ values[block])
    found, _ = relevance_of(anatomy, block, mixed, values[block], LABELS, objective)
    torch.testing.assert_close(found[:, head, token], -difference, atol=1e-8, rtol=1e-5)


def test_confidence_times_relevance_is_the_gradient_of_the_probability():
    anatomy = make_vit("token")
    trace = record(anatomy, make_images(anatomy))
    mixed, values = trace.mixed[0], trace.values[0]
    by_entropy, confidence = relevance_of(anatomy, 0, mixed, values, LABELS)
    by_probability, _ = relevance_of(anatomy, 0, mixed, values, LABELS, negative_probability)
    torch.testing.assert_close(
        by_entropy * confidence[:, None, None], by_probability, atol=1e-6, rtol=1e-4
    )


def test_readings_hold_the_sum_over_heads():
    anatomy = make_vit("registers")
    images = make_images(anatomy)
    trace = record(anatomy, images)
    reading = read_images(anatomy, images, LABELS)
    found, confidence = relevance_of(anatomy, 1, trace.mixed[1], trace.values[1], LABELS)
    assert reading.relevance is not None
    assert reading.confidence is not None
    torch.testing.assert_close(reading.relevance[:, 1], found.sum(dim=1))
    torch.testing.assert_close(reading.confidence[:, 1], confidence)


def test_rollout_of_one_block_by_hand():
    """With one block, R = 1 + mean_heads(relu(∂logit/∂A ⊙ A)), the gradient by differences."""
    anatomy = make_vit("token", depth=1)
    anatomy.backbone.double()
    images = make_images(anatomy, 1).double()
    (weights,), _ = capture_attention(anatomy, images)
    token, h = 5, 1e-5

    def logit(head: int, shift: float) -> torch.Tensor:
        moved = weights.clone()
        moved[:, head, 0, token] += shift

        def edit(q, k, v, mixed):
            return merge_heads(moved @ v)

        with editing_attention(anatomy, edit):
            return anatomy.backbone.classify(images)[0, 3]

    gradient = torch.stack([(logit(i, h) - logit(i, -h)) / (2 * h) for i in range(2)])
    expected = (gradient * weights[0, :, 0, token]).clamp(min=0).mean()
    found = attention_rollout_relevance(anatomy, images, torch.tensor([3]))
    torch.testing.assert_close(found[0, token].double(), expected, atol=1e-8, rtol=1e-4)
