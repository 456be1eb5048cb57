"""Which image tokens an attention layer takes its evidence for a class from."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from featinv_diffusion.class_embedding.anatomy import Anatomy
from featinv_diffusion.class_embedding.recording import (
    attention_weights,
    editing_attention,
    hooks,
    merge_heads,
)
from featinv_diffusion.types import Images

Objective: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""From class scores `[b, k]` and labels to a loss per image."""


def cross_entropy(scores: Float[Tensor, "b k"], labels: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
    """−log softmax(scores)_c."""
    return F.cross_entropy(scores, labels, reduction="none")


def negative_probability(
    scores: Float[Tensor, "b k"], labels: Int[Tensor, " b"]
) -> Float[Tensor, " b"]:
    """−softmax(scores)_c, the loss that the published figures amount to (softmax taken twice)."""
    return -scores.softmax(dim=-1).gather(1, labels[:, None])[:, 0]


def relevance_of(
    anatomy: Anatomy,
    block: int,
    mixed: Float[Tensor, "b n d"],
    values: Float[Tensor, "b heads n head_dim"],
    labels: Int[Tensor, " b"],
    objective: Objective = cross_entropy,
) -> tuple[Float[Tensor, "b heads n"], Float[Tensor, " b"]]:
    """Returns −∂loss/∂a of one block's attention weights, and the softmax probability of the class.

    The loss is of what the attention adds to the class token, projected on the class embedding
    (Vilas et al. 2023, §6). That is a function of Σ_t a_t v_t, so the gradient to a_t is the one to
    the sum times v_t, and the graph ends there. Where the head reads the mean of several tokens,
    so does the loss, and the gradients of their rows are summed.

    Args:
        block: its number, from 0.
        mixed, values: of that block, see `Trace`.
    """
    parts = anatomy.blocks[block]
    with torch.enable_grad():
        rows = mixed[:, anatomy.read_tokens].detach().requires_grad_()
        linear = parts.attention_values  # its weights alone: an ablation may have hooks on it
        added = parts.attention_tail(F.linear(rows, linear.weight, linear.bias))
        scores = anatomy.read_out_rows(added)
        loss = objective(scores, labels)
        (gradient,) = torch.autograd.grad(loss.sum(), rows)
    per_head = gradient.sum(dim=1).unflatten(-1, (values.shape[1], -1))
    confidence = scores.detach().softmax(dim=-1).gather(1, labels[:, None])[:, 0]
    return -torch.einsum("bhd,bhnd->bhn", per_head, values), confidence


def attention_rollout_relevance(
    anatomy: Anatomy, images: Images, labels: Int[Tensor, " b"]
) -> Float[Tensor, "b n"]:
    """Returns the relevance of every token by Chefer et al. 2021 (ICCV), equations 5 and 6.

    R ← R + mean_heads(relu(∂logit_c/∂A ⊙ A)) R from the first block on, R = 1 before it; then the
    row that the head reads, or the mean of its rows.
    """
    weights: list[Tensor] = []

    def remember(q: Tensor, k: Tensor, v: Tensor, _mixed: Tensor) -> Tensor:
        weights.append(attention_weights(q, k))
        return merge_heads(weights[-1] @ v)

    with torch.enable_grad(), hooks() as add, editing_attention(anatomy, remember):
        add.before(anatomy.blocks[0].block, lambda x: x.detach().requires_grad_())
        logits = anatomy.backbone.classify(images)
        score = logits.gather(1, labels.to(logits.device)[:, None]).sum()
        gradients = torch.autograd.grad(score, weights)
    n = weights[0].shape[-1]
    relevance = torch.eye(n, dtype=weights[0].dtype, device=logits.device).expand(len(images), n, n)
    for gradient, weight in zip(gradients, weights, strict=True):
        step = (gradient * weight.detach()).clamp(min=0).mean(dim=1)
        relevance = relevance + step @ relevance
    return relevance[:, anatomy.read_tokens].mean(dim=1)
