"""Measures against cases that were worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import wilcoxon

from featinv_diffusion.class_embedding import measures
from featinv_diffusion.class_embedding.measures import PointReading
from featinv_diffusion.class_embedding.reading import rank_of, read_images
from featinv_diffusion.errors import InputError
from tests.class_embedding.vits import make_images, make_vit, weights_of

LABELS = torch.tensor([0, 3, 2])


def points(score=None, top=None, rank=None) -> PointReading:
    shape = next(torch.tensor(x).shape for x in (score, top, rank) if x is not None)
    filled = [torch.zeros(shape) if x is None else torch.tensor(x).float() for x in (rank, score)]
    return PointReading(
        *filled, torch.zeros(shape).long() if top is None else torch.tensor(top).long()
    )


def test_rank_counts_higher_classes_and_half_of_equal_ones():
    projection = torch.tensor([[5.0, 1.0, 7.0, 5.0], [2.0, 2.0, 2.0, 2.0]])
    rank = rank_of(projection, projection[:, :1])
    assert rank.tolist() == [1.5, 1.5]
    assert measures.class_identifiability(rank, 4).tolist() == [0.625, 0.625]


def test_identifiability_from_best_to_worst():
    rank = torch.tensor([0.0, 1.0, 3.0])
    assert measures.class_identifiability(rank, 4).tolist() == [1.0, 0.75, 0.25]


def test_the_rate_looks_at_image_tokens_of_the_last_block():
    rank = torch.tensor([[[9, 0, 0, 0], [0, 0, 2, 1]], [[0, 0, 0, 0], [0, 3, 1, 5]]]).float()
    torch.testing.assert_close(measures.identifiability_rate(rank, 1), torch.tensor([1 / 3, 0.0]))
    assert measures.any_identified(rank, 1).tolist() == [1.0, 0.0]
    torch.testing.assert_close(measures.identifiability_rate(rank, 0), torch.tensor([2 / 4, 1 / 4]))


def test_change_rates():
    states = points(score=[[[0, 1, 1], [5, 2, 1], [6, 3, 0]]])  # one prefix token
    assert measures.block_change_rate(states, 1).tolist() == [[0.5, 0.5]]
    attention = points(score=[[[9, 0, 2], [0, 3, 2]]])
    image, prefix = slice(1, None), slice(0, 1)
    assert measures.layer_change_rate(attention, states, image).tolist() == [[0.5, 1.0]]
    assert measures.layer_change_rate(attention, states, prefix).tolist() == [[1.0, 0.0]]


def test_composition_tests_each_source():
    states = points(top=[[[1, 1, 1, 1], [1, 2, 3, 4]]])
    attention = points(top=[[[1, 2, 0, 0]]])
    mlp = points(top=[[[0, 0, 3, 0]]])
    found = measures.residual_composition(states, attention, mlp)
    assert {name: value.item() for name, value in found.items()} == {
        "previous": 0.25,
        "attention": 0.5,
        "mlp": 0.25,
        "composition": 0.25,
    }


def test_a_class_weighs_the_same_however_many_images_it_has():
    values, labels = torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.tensor([4, 4, 9, 9])
    assert measures.mean_over_classes(values, labels) == 0.25
    assert measures.mean_over_classes(values, torch.tensor([4, 9, 9, 9])) == 0.5
    with pytest.raises(InputError, match="at least one image"):
        measures.mean_over_classes(torch.empty(0), torch.empty(0, dtype=torch.long))


# ---- memories ----------------------------------------------------------------------------------


def test_class_value_agreement_by_numpy_and_without_touching_weights():
    anatomy = make_vit("token")
    before = weights_of(anatomy)
    found = measures.class_value_agreement(anatomy, "mlp")
    head = anatomy.head.weight.detach().numpy()
    values = anatomy.blocks[1].mlp_values.weight.detach().numpy()
    cosines = (head @ values) / np.outer(
        np.linalg.norm(head, axis=1), np.linalg.norm(values, axis=0)
    )
    np.testing.assert_allclose(found[1].numpy(), cosines.max(axis=1), rtol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(before, weights_of(anatomy), strict=True))


def test_p_values_are_paired_and_one_sided():
    generator = torch.Generator().manual_seed(0)
    null = torch.rand(2, 12, generator=generator)
    agreement = null + torch.stack([torch.full((12,), 0.1), -torch.full((12,), 0.1)])
    larger, smaller = measures.agreement_p_values(agreement, null)
    assert larger == pytest.approx(2.0**-12)  # all 12 signs positive: the smallest there is
    assert smaller == 1.0
    expected = wilcoxon(agreement[0].double(), null[0].double(), alternative="greater").pvalue
    assert larger == expected


def test_key_value_agreement_by_hand():
    of_class = torch.tensor([[[0, 1], [2, 3]]])  # one block, two classes, two memories each
    activated = torch.tensor([[[[0, 9], [7, 8]]], [[[1, 0], [3, 5]]]])
    found = measures.key_value_agreement(activated, of_class, torch.tensor([0, 1]))
    assert found.tolist() == [[[True, False]], [[False, True]]]


def test_compositionality_by_hand():
    classes = torch.tensor([[4, 5, 6, 4]])  # of four memories
    activated = torch.tensor([[[[0, 1], [2, 1], [3, 0]]]])
    found = measures.memory_compositionality(activated, classes, torch.tensor([[[5, 4, 4]]]))
    assert found.tolist() == [[[True, False, True]]]


def test_memories_of_a_class_are_its_largest_projections():
    anatomy = make_vit("token")
    projection = anatomy.head.weight @ anatomy.blocks[0].attention_values.weight
    assert torch.equal(
        measures.class_memories(anatomy, "attention", 3)[0],
        projection.argsort(dim=1, descending=True)[:, :3],
    )
    assert torch.equal(measures.memory_classes(anatomy, "attention")[0], projection.argmax(dim=0))


@pytest.mark.parametrize("key", ["before", "after"])
def test_coefficients_before_and_after_the_activation(key):
    anatomy = make_vit("token")
    images = make_images(anatomy)
    inputs = []
    block = anatomy.blocks[0]
    seen = block.mlp_keys if key == "before" else block.mlp_values
    handle = seen.register_forward_hook(
        lambda _m, x, y: inputs.append(y if key == "before" else x[0])
    )
    reading = read_images(anatomy, images, None, frozenset({"memories"}), mlp_key=key)
    handle.remove()
    assert reading.mlp_memories is not None
    assert torch.equal(reading.mlp_memories[:, 0], inputs[0].topk(5, dim=-1).indices)


# ---- readings ----------------------------------------------------------------------------------


def test_a_reading_is_the_same_in_any_batch():
    anatomy = make_vit("token")
    images = make_images(anatomy)
    whole = read_images(anatomy, images, LABELS)
    for i in range(3):
        alone = read_images(anatomy, images[i : i + 1], LABELS[i : i + 1])
        assert whole.states is not None
        assert alone.states is not None
        assert whole.relevance is not None
        assert torch.equal(whole.states.rank[i : i + 1], alone.states.rank)
        torch.testing.assert_close(
            whole.relevance[i : i + 1], alone.relevance, atol=1e-6, rtol=1e-4
        )


def test_a_reading_agrees_with_the_model_and_leaves_its_weights():
    anatomy = make_vit("token")
    before = weights_of(anatomy)
    images = make_images(anatomy)
    reading = read_images(anatomy, images, None)
    logits = anatomy.backbone.classify(images)
    assert torch.equal(reading.labels, logits.argmax(dim=1))
    assert reading.states is not None
    assert (reading.states.rank[:, -1, 0] == 0).all()
    torch.testing.assert_close(reading.states.score[:, -1, 0], logits.amax(dim=1))
    assert all(torch.equal(a, b) for a, b in zip(before, weights_of(anatomy), strict=True))


def test_only_what_is_asked_for_is_read():
    anatomy = make_vit("token")
    reading = read_images(anatomy, make_images(anatomy), None, frozenset({"states"}))
    assert reading.states is not None
    assert reading.attention is reading.mlp is reading.relevance is reading.mlp_memories is None


def test_a_random_model_is_at_chance():
    """200 classes, 24 images, 17 tokens: the mean rank has a standard error below 2 % of |C|."""
    anatomy = make_vit("token", num_classes=200)
    images = torch.rand(24, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(24) * 8
    reading = read_images(anatomy, images, labels, frozenset({"states"}))
    assert reading.states is not None
    found = measures.class_identifiability(reading.states.rank, 200)
    assert abs(found[:, -1].mean() - 0.5) < 0.15  # tokens of a model agree with each other
    assert measures.identifiability_rate(reading.states.rank, 1).mean() < 0.05
