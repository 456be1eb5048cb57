"""The sub-layers as key–value memories: columns of their last weight matrix, and who opens them.

A memory is a column v_m of W_O (attention) or of the MLP's last layer; its coefficient is an entry
of that layer's input (attention) or of the MLP before its activation. Layer scale and norms behind
a sub-layer, which the published models but one do not have, are left out.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import wilcoxon
from torch import Tensor
from torch.nn import functional as F

from featinv_diffusion.class_embedding.anatomy import Anatomy

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
