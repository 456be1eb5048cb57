"""What image tokens can say without attention to others, to the class token, or without context."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from featinv_diffusion.class_embedding.anatomy import Anatomy
from featinv_diffusion.class_embedding.reading import MEASURES, Reading, read_images
from featinv_diffusion.class_embedding.recording import (
    AttentionEdit,
    attention_weights,
    editing_attention,
    keeping_tokens,
    merge_heads,
)
from featinv_diffusion.errors import InputError, choices_hint
from featinv_diffusion.types import Images

AttentionAblation = Literal["self_only", "no_cls"]
STATES = frozenset({"states"})


@contextmanager
def ablating_attention(anatomy: Anatomy, kind: str) -> Iterator[None]:
    """Changes the attention of image tokens in every block; prefix rows stay as they are.

    Args:
        kind: `self_only`: each image token attends to itself with weight 1; `no_cls`: the weight of
            the class token is set to 0 without renormalising the others.

    Raises:
        InputError: another kind, or `no_cls` where the head reads no class token.
    """
    kinds = list(get_args(AttentionAblation))
    if kind not in kinds:
        raise InputError(f"No attention ablation is named {kind!r}; {choices_hint(kind, kinds)}")
    if kind == "no_cls" and not anatomy.has_class_token:
        raise InputError(
            f"The ablation no_cls needs a class token, but the head of {anatomy.backbone.name!r} "
            "reads the mean of the tokens. Use self_only."
        )
    edit = _self_only if kind == "self_only" else _without_class_token
    with editing_attention(anatomy, edit(anatomy.n_prefix)):
        yield


def read_ablated(
    anatomy: Anatomy,
    images: Images,
    labels: Int[Tensor, " b"],
    kind: str,
    measures: frozenset[str] = MEASURES,
) -> Reading:
    """Reads a batch under `ablating_attention`."""
    with ablating_attention(anatomy, kind):
        return read_images(anatomy, images, labels, measures)


@dataclass(frozen=True, eq=False)
class TokensAlone:
    """Image tokens that went through the model without the others.

    Args:
        rate: share of the kept tokens with rank 0 after the last block; NaN where none is kept.
        correct: whether the model still predicts the label; NaN likewise.
    """

    rate: Float[Tensor, " b"]
    correct: Float[Tensor, " b"]


def read_tokens_alone(
    anatomy: Anatomy,
    images: Images,
    labels: Int[Tensor, " b"],
    kept: Bool[Tensor, "b patches"],
) -> TokensAlone:
    """Drops the image tokens that are not `kept` after the position embeddings, and reads the rest.

    Prefix tokens stay and are not counted. Images that keep as many tokens run as one batch.
    """
    rate = torch.full((len(images),), torch.nan)
    correct = rate.clone()
    counts = kept.sum(dim=1)
    for count in counts[counts > 0].unique().tolist():
        chosen = (counts == count).nonzero()[:, 0]
        index = kept[chosen].nonzero()[:, 1].view(len(chosen), count)
        with keeping_tokens(anatomy, index):
            found = read_images(anatomy, images[chosen], labels[chosen], STATES)
        assert found.states is not None
        last = found.states.rank[:, -1, anatomy.n_prefix :]
        rate[chosen] = (last == 0).float().mean(dim=1)
        correct[chosen] = (found.logits.argmax(dim=1) == labels[chosen]).float()
    return TokensAlone(rate, correct)


def _self_only(n_prefix: int) -> AttentionEdit:
    def edit(_q: Tensor, _k: Tensor, v: Tensor, mixed: Tensor) -> Tensor:
        return torch.cat([mixed[:, :n_prefix], merge_heads(v)[:, n_prefix:]], dim=1)

    return edit


def _without_class_token(n_prefix: int) -> AttentionEdit:
    def edit(q: Tensor, k: Tensor, v: Tensor, mixed: Tensor) -> Tensor:
        to_class = attention_weights(q, k)[:, :, n_prefix:, :1]
        lost = merge_heads(to_class * v[:, :, :1])
        return torch.cat([mixed[:, :n_prefix], mixed[:, n_prefix:] - lost], dim=1)

    return edit
