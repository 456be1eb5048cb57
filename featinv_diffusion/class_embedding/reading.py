"""One forward pass read as numbers per token: rank, score and top class, memories, relevance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from featinv_diffusion.class_embedding.anatomy import Anatomy
from featinv_diffusion.class_embedding.recording import Trace, record
from featinv_diffusion.class_embedding.relevance import relevance_of
from featinv_diffusion.errors import InputError
from featinv_diffusion.types import Images

MEASURES = frozenset({"states", "attention", "mlp", "memories", "relevance"})


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
    """Numbers of a batch, on the CPU; what was not asked for is None.

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
        measures: of `MEASURES`, what is wanted; the less, the less is computed.
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
                "Projections on the class embedding must be finite, but NaN or infinite values "
                "came: look at the weights of the model."
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


def concatenate(readings: Sequence[Reading]) -> Reading:
    """Joins batches."""
    columns = {
        field.name: [getattr(reading, field.name) for reading in readings]
        for field in fields(Reading)
    }
    return Reading(**{name: _join(values) for name, values in columns.items()})


def _join(values: list[Any]) -> Any:
    if isinstance(values[0], PointReading):
        names = [field.name for field in fields(PointReading)]
        return PointReading(*(torch.cat([getattr(v, name) for v in values]) for name in names))
    return None if values[0] is None else torch.cat(values)


def _stack(found: list[Tensor]) -> Tensor | None:
    return torch.stack(found, dim=1).cpu() if found else None
