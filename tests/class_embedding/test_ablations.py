"""Ablations and the perturbation test, against forwards that were written out by hand."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from featinv_diffusion.class_embedding.anatomy import keeping_tokens, record
from featinv_diffusion.class_embedding.images import box_token_mask, token_mask
from featinv_diffusion.class_embedding.measures import class_context_difference
from featinv_diffusion.class_embedding.reading import read_images
from featinv_diffusion.class_embedding.removal import (
    RemovalCurve,
    RemovalTest,
    ablating_attention,
    join_curves,
    mean_curve,
    order_by,
    read_ablated,
    read_tokens_alone,
    removal_curve,
    spread_counts,
)
from featinv_diffusion.errors import InputError
from tests.class_embedding.vits import NAMES, make_images, make_vit, weights_of

LABELS = torch.tensor([0, 3, 2])


def forward_by_hand(anatomy, images, kind: str) -> torch.Tensor:
    """The last hidden states of a plain timm ViT, attention written out and changed."""
    model = anatomy.backbone.model
    x = model.norm_pre(model._pos_embed(model.patch_embed(anatomy.backbone.preprocess(images))))
    for block in model.blocks:
        qkv = block.attn.qkv(block.norm1(x)).reshape(*x.shape[:2], 3, 2, 16)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(2, 3) / 4).softmax(dim=-1)
        if kind == "self_only":
            weights[:, :, 1:] = torch.eye(x.shape[1])[1:]
        if kind == "no_cls":
            weights[:, :, 1:, 0] = 0
        mixed = (weights @ v).transpose(1, 2).flatten(2)
        x = x + block.attn.proj(mixed)
        hidden = F.gelu(block.mlp.fc1(block.norm2(x)))
        x = x + block.mlp.fc2(hidden)
    return x


@pytest.mark.parametrize("kind", ["self_only", "no_cls"])
def test_attention_ablations_equal_a_forward_by_hand(kind):
    anatomy = make_vit("token")
    images, before = make_images(anatomy), weights_of(anatomy)
    with torch.no_grad():
        expected = forward_by_hand(anatomy, images, kind)
        plain = forward_by_hand(anatomy, images, "none")
    with ablating_attention(anatomy, kind):
        states = record(anatomy, images).states
    torch.testing.assert_close(states[-1], expected, atol=1e-4, rtol=1e-4)
    assert (expected - plain).abs().max() > 0.01
    torch.testing.assert_close(record(anatomy, images).states[-1], plain, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(before, weights_of(anatomy), strict=True))
    reading = read_ablated(anatomy, images, LABELS, kind)
    assert reading.states is not None
    assert reading.states.score.shape == (3, 3, 17)


@pytest.mark.parametrize("name", NAMES)
def test_self_only_leaves_each_image_token_alone(name):
    """Then changing one patch of the picture changes no other image token."""
    anatomy = make_vit(name)
    images = make_images(anatomy, 1)
    changed = images.clone()
    patch = images.shape[-1] // 4
    changed[..., :patch, :patch] = 0
    with ablating_attention(anatomy, "self_only"):
        a, b = (record(anatomy, x).states[-1] for x in (images, changed))
    first = anatomy.n_prefix
    assert not torch.allclose(a[:, first], b[:, first])
    torch.testing.assert_close(a[:, first + 1 :], b[:, first + 1 :])


def test_ablations_that_cannot_be():
    with (
        pytest.raises(InputError, match="needs a class token"),
        ablating_attention(make_vit("gap"), "no_cls"),
    ):
        pass
    with (
        pytest.raises(InputError, match="did you mean 'no_cls'"),
        ablating_attention(make_vit("token"), "no_clss"),
    ):
        pass


@pytest.mark.parametrize("name", NAMES)
def test_keeping_all_tokens_changes_nothing_and_order_does_not_matter(name):
    anatomy = make_vit(name)
    images = make_images(anatomy)
    order = torch.stack([torch.randperm(16) for _ in range(3)])
    logits = anatomy.backbone.classify(images)
    with keeping_tokens(anatomy, order):
        torch.testing.assert_close(anatomy.backbone.classify(images), logits, atol=1e-4, rtol=1e-4)
    with keeping_tokens(anatomy, order[:, :5]):
        assert record(anatomy, images).states[-1].shape[1] == anatomy.n_prefix + 5


def test_dropped_tokens_have_no_influence():
    anatomy = make_vit("token")
    images = make_images(anatomy, 1)
    changed = images.clone()
    changed[..., :8, :8] = 0  # patch 0
    with keeping_tokens(anatomy, torch.tensor([[3, 7, 9]])):
        a, b = (anatomy.backbone.classify(x) for x in (images, changed))
    assert torch.equal(a, b)


def test_tokens_alone_run_in_groups_and_match_one_by_one():
    anatomy = make_vit("token")
    images = torch.cat([make_images(anatomy), make_images(anatomy, 2)])
    labels = torch.tensor([0, 3, 2, 1, 1])
    kept = torch.zeros(5, 16, dtype=torch.bool)
    kept[0, :4] = kept[1, 3:7] = kept[2, 2:12] = kept[3] = True  # the last keeps nothing
    found = read_tokens_alone(anatomy, images, labels, kept)
    assert found.rate[4].isnan()
    assert found.correct[4].isnan()
    for i in range(4):
        with keeping_tokens(anatomy, kept[i].nonzero().T):
            one = read_images(anatomy, images[i : i + 1], labels[i : i + 1])
        assert one.states is not None
        assert found.rate[i] == (one.states.rank[:, -1, 1:] == 0).float().mean()
        assert found.correct[i] == float(one.logits.argmax() == labels[i])


# ---- perturbation ------------------------------------------------------------------------------


def test_order_is_by_relevance_with_ties_in_raster_order():
    assert order_by(torch.tensor([[1.0, 5.0, 1.0, 7.0]])).tolist() == [[3, 1, 0, 2]]


def test_counts_are_spread_over_all():
    assert spread_counts(16, 16) == tuple(range(1, 17))
    assert spread_counts(49, 5) == (1, 13, 25, 37, 49)
    with pytest.raises(InputError, match="2 to 16 points"):
        spread_counts(16, 1)


def test_areas_by_hand():
    curve = RemovalCurve((1, 3, 4), torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 1.0]]))
    assert curve.at_each_count().tolist() == [[0, 0.5, 1, 1], [0, 0, 0, 1]]
    assert curve.area().tolist() == [0.625, 0.25]
    # mean accuracies of 1 … 3 tokens are 0, ¼, ½: their sum over 4 · ½
    assert curve.published_area() == pytest.approx(0.375)
    best = RemovalCurve((1, 2, 3, 4), torch.ones(2, 4))
    assert best.published_area() == pytest.approx(1 - 1 / 4)
    assert RemovalCurve((1, 2), torch.zeros(2, 2)).published_area() is None
    assert join_curves([curve, curve]).correct.shape == (4, 3)
    assert torch.equal(mean_curve([curve, curve]).correct, curve.correct)


@pytest.mark.parametrize(("direction", "first"), [("negative", 3), ("positive", 0)])
def test_the_curve_keeps_the_right_tokens(direction, first):
    anatomy = make_vit("token")
    images = make_images(anatomy)
    order = torch.arange(16).flip(0).expand(3, -1).contiguous()  # token 15 is the most relevant
    curve = removal_curve(anatomy, images, LABELS, order, direction)
    expected = torch.arange(12, 16) if direction == "negative" else torch.arange(4)
    with keeping_tokens(anatomy, expected.expand(3, -1)):
        top = anatomy.backbone.classify(images).argmax(dim=1)
    assert torch.equal(curve.correct[:, 3], (top == LABELS).float())
    whole = anatomy.backbone.classify(images).argmax(dim=1)
    assert torch.equal(curve.correct[:, -1], (whole == LABELS).float())
    assert first in (0, 3)


def test_patches_are_ordered_for_the_label_the_prediction_and_a_wrong_class():
    """Each curve is that of the order by the relevance for its class; accuracy is of the label."""
    anatomy = make_vit("token")
    images = make_images(anatomy)
    top = anatomy.backbone.classify(images).argmax(dim=1)
    labels = torch.stack([top[0], (top[1] + 1) % 7, (top[2] + 3) % 7])  # the first is right
    reading = read_images(anatomy, images, labels)
    test, apart = (RemovalTest(anatomy, n_points=4, n_random=1) for _ in range(2))
    ids = ["a", "b", "c"]
    test.add(images, reading, ids)
    wrong = test._wrong(labels, top, ids)
    assert not (wrong == labels).any()
    assert not (wrong == top).any()
    for source, chosen in (("", labels), ("/predicted", top), ("/wrong", wrong)):
        relevance = read_images(anatomy, images, chosen).relevance
        assert relevance is not None
        order = order_by(relevance.sum(dim=1)[:, anatomy.n_prefix :])
        for direction in ("negative", "positive"):
            (found,) = test.curves[f"gradient/{direction}{source}"]
            expected = removal_curve(anatomy, images, labels, order, direction, 4)
            assert torch.equal(found.correct, expected.correct), (source, direction)
    for i in range(3):  # one by one: the wrong class hangs on the image alone
        one = read_images(anatomy, images[i : i + 1], labels[i : i + 1])
        apart.add(images[i : i + 1], one, ids[i : i + 1])
    assert apart.to_metrics() == test.to_metrics()
    found = test.to_metrics()
    areas = {name: row["area"]["value"] for name, row in found.items() if name != "n_kept"}
    row = found["chefer/negative/predicted"]
    assert row["area_minus_wrong"]["value"] == pytest.approx(
        areas["chefer/negative/predicted"] - areas["chefer/negative/wrong"], abs=1e-6
    )
    assert "area_minus_wrong" not in found["chefer/negative/wrong"]


def test_a_given_importance_orders_the_patches_and_predictions_are_not_read_twice():
    anatomy = make_vit("token")
    images = make_images(anatomy)
    reading = read_images(anatomy, images, None)
    asked: list[list[int]] = []

    def last_first(pictures: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        asked.append(classes.tolist())
        return torch.arange(16.0).expand(len(pictures), -1)

    test = RemovalTest(
        anatomy, 4, n_random=1, methods=(), probe=last_first, label_is_predicted=True
    )
    test.add(images, reading, ["a", "b", "c"])
    assert set(test.curves) == {
        *(f"probe/{d}{s}" for d in ("negative", "positive") for s in ("", "/wrong")),
        "random",
    }
    assert asked[0] == reading.labels.tolist()
    assert len(asked) == 2
    order = torch.arange(16).flip(0).expand(3, -1).contiguous()
    expected = removal_curve(anatomy, images, reading.labels, order, "negative", 4)
    assert torch.equal(test.curves["probe/negative"][0].correct, expected.correct)


def test_a_control_needs_a_third_class():
    with pytest.raises(InputError, match="at least 3 classes"):
        RemovalTest(make_vit("token", num_classes=2))


# ---- class and context -------------------------------------------------------------------------


def test_difference_by_hand_and_exact_p_value():
    values = torch.tensor([[4.0, 0.0, 0.0, 0.0], [9.0, 9.0, 9.0, 9.0]])
    is_class = torch.tensor([[True, False, False, False], [False] * 4])  # the second has no class
    found = class_context_difference(values, is_class, n_permutations=4000)
    assert found.value == 4
    assert found.n_images == 1
    assert found.p_value == pytest.approx(0.25, abs=0.03)  # one of four labellings is as large


def test_no_image_with_both_kinds():
    with pytest.raises(InputError, match="tokens of both kinds"):
        class_context_difference(torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool))


def test_masks_by_area_majority_and_by_label():
    picture = Image.new("RGB", (8, 8))
    picture.paste((7, 1, 0), (0, 0, 4, 8))  # label 7 + 256, the left half
    picture.paste((232, 3, 0), (4, 0, 8, 8))  # 1000: ignored, though as large
    picture.paste((5, 0, 0), (6, 6, 8, 8))  # another object, smaller
    assert token_mask(picture, (2, 2)).tolist() == [[True, False], [True, False]]
    assert token_mask(picture, (1, 1)).tolist() == [[False]]  # half is no majority
    white = Image.new("L", (4, 4))
    white.paste(255, (0, 0, 3, 3))
    assert token_mask(white, (2, 2)).tolist() == [[True, False], [False, False]]
    assert not token_mask(Image.new("L", (4, 4)), (2, 2)).any()


def test_boxes_include_their_ends():
    assert box_token_mask((0, 0, 3, 7), (8, 8), (2, 2)).tolist() == [[True, False], [True, False]]
