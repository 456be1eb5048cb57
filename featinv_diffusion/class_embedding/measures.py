"""The measures of Vilas et al. 2023 as functions of a `Reading`; one value per image each.

Images are the unit of every mean and interval: the tokens of an image are not independent. Block
b of a result stands at position b − 1.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import wilcoxon
from torch import Tensor
from torch.nn import functional as F

from featinv_diffusion.class_embedding.anatomy import Anatomy
from featinv_diffusion.class_embedding.reading import PointReading
from featinv_diffusion.errors import InputError


def class_identifiability(rank: Float[Tensor, "*shape"], n_classes: int) -> Float[Tensor, "*shape"]:
    """r = 1 − rank / |C|: 1 where the class is first, 1 / |C| where it is last."""
    return 1 - rank / n_classes


def chance_identifiability(n_classes: int) -> float:
    """Returns the mean of r over all ranks, (|C| + 1) / 2|C|."""
    return (n_classes + 1) / (2 * n_classes)


def identified(rank: Float[Tensor, "b blocks n"], n_prefix: int) -> Bool[Tensor, "b patches"]:
    """Marks the image tokens that are closest to their class after the last block."""
    return rank[:, -1, n_prefix:] == 0


def identifiability_rate(rank: Float[Tensor, "b blocks n"], n_prefix: int) -> Float[Tensor, " b"]:
    """Share of image tokens with rank 0 after the last block."""
    return identified(rank, n_prefix).float().mean(dim=1)


def any_identified(rank: Float[Tensor, "b blocks n"], n_prefix: int) -> Float[Tensor, " b"]:
    """1 for images with at least one image token of rank 0 after the last block."""
    return identified(rank, n_prefix).any(dim=1).float()


def block_change_rate(states: PointReading, n_prefix: int) -> Float[Tensor, "b blocks"]:
    """Share of image tokens whose class score rises through each block.

    The first block's, from the embeddings, is not in the publication.
    """
    score = states.score[:, :, n_prefix:]
    return (score[:, 1:] > score[:, :-1]).float().mean(dim=2)


def layer_change_rate(
    layer: PointReading, states: PointReading, tokens: slice
) -> Float[Tensor, "b blocks"]:
    """Share of tokens where what a sub-layer adds scores higher than the block's input.

    Both sub-layers are compared with the input of the block, as published.
    """
    higher = layer.score[:, :, tokens] > states.score[:, :-1, tokens]
    return higher.float().mean(dim=2)


def residual_composition(
    states: PointReading, attention: PointReading, mlp: PointReading
) -> dict[str, Float[Tensor, "b blocks"]]:
    """Share of tokens whose top class after a block is that of one of its sources.

    Sources are the block's input (`previous`), its attention and its MLP, which may agree;
    `composition` is the share that agrees with none of the three.
    """
    after = states.top[:, 1:]
    matches = {
        "previous": after == states.top[:, :-1],
        "attention": after == attention.top,
        "mlp": after == mlp.top,
    }
    matches["composition"] = ~(matches["previous"] | matches["attention"] | matches["mlp"])
    return {name: match.float().mean(dim=2) for name, match in matches.items()}


def accuracy(logits: Float[Tensor, "b k"], labels: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
    """1 where the label's class scores highest."""
    return (logits.argmax(dim=1) == labels).float()


def mean_over_classes(values: Float[Tensor, "b ..."], labels: Int[Tensor, " b"]) -> Tensor:
    """Returns the mean of the classes' means, so that a class with many images weighs no more.

    Raises:
        InputError: no image.
    """
    if not len(labels):
        raise InputError("A mean over classes needs at least one image, but none came.")
    return torch.stack([values[labels == c].mean(dim=0) for c in labels.unique()]).mean(dim=0)


# ---- The sub-layers as key–value memories ----

SubLayer = Literal["attention", "mlp"]


def memory_values(anatomy: Anatomy, layer: SubLayer, block: int) -> Float[Tensor, "d m"]:
    """Returns the memories of block `block` (from 0) as columns: the weights, not a copy."""
    parts = anatomy.blocks[block]
    linear = parts.attention_values if layer == "attention" else parts.mlp_values
    return linear.weight.detach()


def class_value_agreement(anatomy: Anatomy, layer: SubLayer) -> Float[Tensor, "blocks k"]:
    """Returns max_m cos(E_c, v_m) of each class: how near a memory of the block comes to it."""
    embedding = F.normalize(anatomy.head.weight.detach().float(), dim=1)
    scores = [
        (embedding @ F.normalize(memory_values(anatomy, layer, b).float(), dim=0)).amax(dim=1)
        for b in range(len(anatomy.blocks))
    ]
    return torch.stack(scores).cpu()


def agreement_p_values(
    agreement: Float[Tensor, "blocks k"], null: Float[Tensor, "blocks k"]
) -> list[float]:
    """Returns one p-value per block that classes agree more than in a model of random weights.

    Wilcoxon's signed-rank test, paired by class, one-sided.
    """
    pairs = zip(agreement.double().numpy(), null.double().numpy(), strict=True)
    tests: list[Any] = [wilcoxon(a, b, alternative="greater") for a, b in pairs]
    return [float(test.pvalue) for test in tests]


def class_memories(anatomy: Anatomy, layer: SubLayer, n: int = 5) -> Int[Tensor, "blocks k n_top"]:
    """Returns the memories with the largest E_c · v_m of each class."""
    return torch.stack([p.topk(n, dim=1).indices for p in _projections(anatomy, layer)]).cpu()


def memory_classes(anatomy: Anatomy, layer: SubLayer) -> Int[Tensor, "blocks m"]:
    """Returns the class with the largest E_c · v_m of each memory."""
    return torch.stack([p.argmax(dim=0) for p in _projections(anatomy, layer)]).cpu()


def key_value_agreement(
    activated: Int[Tensor, "b blocks n n_top"],
    memories: Int[Tensor, "blocks k n_class"],
    labels: Int[Tensor, " b"],
) -> Bool[Tensor, "b blocks n"]:
    """Marks tokens that activate one of their class's memories.

    A token agrees where any of its most activated memories is one of the memories nearest to its
    class. (The text of the publication words it per memory; this is what its code and figures do.)
    """
    of_class = memories[:, labels].transpose(0, 1)[:, :, None, None, :]
    return (activated[..., None] == of_class).flatten(3).any(dim=-1)


def memory_compositionality(
    activated: Int[Tensor, "b blocks n n_top"],
    classes: Int[Tensor, "blocks m"],
    top: Int[Tensor, "b blocks n"],
) -> Bool[Tensor, "b blocks n"]:
    """Marks tokens whose sub-layer says the class that one of their activated memories says."""
    blocks = torch.arange(len(classes))[None, :, None, None]
    return (classes[blocks, activated] == top[..., None]).any(dim=-1)


def _projections(anatomy: Anatomy, layer: SubLayer) -> list[Float[Tensor, "k m"]]:
    embedding = anatomy.head.weight.detach()
    return [embedding @ memory_values(anatomy, layer, b) for b in range(len(anatomy.blocks))]
