"""One forward pass read as numbers per token: rank, score and top class, memories, relevance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from featinv_diffusion.class_embedding.anatomy import (
    Anatomy,
    Trace,
    attention_weights,
    editing_attention,
    hooks,
    merge_heads,
    record,
)
from featinv_diffusion.errors import InputError
from featinv_diffusion.types import Images

# ---- Which image tokens an attention layer takes its evidence for a class from -------------------

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


STATES = frozenset({"states"})
MEASURES = STATES | {"attention", "mlp", "memories", "relevance"}


@dataclass(frozen=True, eq=False)
class PointReading:
    """What the projection on the class embedding says at each block and token.

    Args:
        rank: 0-based place of the class among all; ties count half, so that a constant projection
            reads as chance.
        score: p_c, the projection on the class.
        top: the class with the largest projection.
    """

    rank: Float[Tensor, "b blocks n"]
    score: Float[Tensor, "b blocks n"]
    top: Int[Tensor, "b blocks n"]


@dataclass(frozen=True, eq=False)
class Reading:
    """The numbers of a batch, on the CPU; what was not asked for is None.

    Args:
        labels: the class that is read.
        logits: of the model.
        states: of the residual stream before the first block and after each: B + 1 of them.
        attention, mlp: of what each sub-layer adds.
        attention_memories, mlp_memories: the memories with the largest coefficients.
        relevance: −∂CE/∂a of every token in the row that the head reads, heads summed.
        confidence: softmax probability of the class in the projected attention output; times it,
            `relevance` is the gradient of that probability.
    """

    labels: Int[Tensor, " b"]
    logits: Float[Tensor, "b k"]
    states: PointReading | None = None
    attention: PointReading | None = None
    mlp: PointReading | None = None
    attention_memories: Int[Tensor, "b blocks n 5"] | None = None
    mlp_memories: Int[Tensor, "b blocks n 5"] | None = None
    relevance: Float[Tensor, "b blocks n"] | None = None
    confidence: Float[Tensor, "b blocks"] | None = None


def read_images(
    anatomy: Anatomy,
    images: Images,
    labels: Int[Tensor, " b"] | None,
    measures: frozenset[str] = MEASURES,
    *,
    mlp_key: Literal["before", "after"] = "before",
) -> Reading:
    """Reads a batch in one forward pass.

    Args:
        labels: class of each image; None takes the one that the model predicts.
        measures: which of `MEASURES` to take; the fewer, the less is computed.
        mlp_key: see `record`.
    """
    wanted = measures | ({"values"} if "relevance" in measures else set())
    trace = record(anatomy, images, frozenset(wanted), mlp_key=mlp_key)
    chosen = trace.logits.argmax(dim=1) if labels is None else labels.to(trace.logits.device)
    return read_trace(anatomy, trace, chosen)


def read_trace(anatomy: Anatomy, trace: Trace, labels: Int[Tensor, " b"]) -> Reading:
    """Projects whatever a trace holds."""
    relevance = confidence = None
    if trace.mixed:
        found = [
            relevance_of(anatomy, number, mixed, values, labels)
            for number, (mixed, values) in enumerate(zip(trace.mixed, trace.values, strict=True))
        ]
        relevance = torch.stack([r.sum(dim=1) for r, _ in found], dim=1).float().cpu()
        confidence = torch.stack([c for _, c in found], dim=1).float().cpu()
    return Reading(
        labels=labels.cpu(),
        logits=trace.logits.float().cpu(),
        states=read_points(anatomy, trace.states, labels),
        attention=read_points(anatomy, trace.attention, labels),
        mlp=read_points(anatomy, trace.mlp, labels),
        attention_memories=_stack(trace.attention_memories),
        mlp_memories=_stack(trace.mlp_memories),
        relevance=relevance,
        confidence=confidence,
    )


@torch.no_grad()
def read_points(
    anatomy: Anatomy, points: Sequence[Tensor], labels: Int[Tensor, " b"]
) -> PointReading | None:
    """Projects tokens `[b, n, d]` of each block with ln and β; None where there are no blocks."""
    if not points:
        return None
    ranks, scores, tops = [], [], []
    for tokens in points:
        projection = anatomy.project(tokens).float()
        if not bool(projection.isfinite().all()):
            raise InputError(
                "Projections on the class embedding must be finite, got NaN or infinite "
                "values. Look at the weights of the model."
            )
        score = projection.gather(2, labels[:, None, None].expand(-1, projection.shape[1], 1))
        ranks.append(rank_of(projection, score).cpu())
        scores.append(score[..., 0].cpu())
        tops.append(projection.argmax(dim=-1).cpu())
    return PointReading(*(torch.stack(x, dim=1) for x in (ranks, scores, tops)))


def rank_of(projection: Float[Tensor, "... k"], score: Float[Tensor, "... 1"]) -> Tensor:
    """Returns how many classes score higher, and half of how many others score the same."""
    higher = (projection > score).sum(dim=-1)
    same = (projection == score).sum(dim=-1) - 1
    return higher + same / 2


def _stack(found: list[Tensor]) -> Tensor | None:
    return torch.stack(found, dim=1).cpu() if found else None
