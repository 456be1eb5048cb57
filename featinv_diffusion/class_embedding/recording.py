"""Hooks for one forward pass: what passes through a vision transformer, and edits on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from featinv_diffusion.class_embedding.anatomy import Anatomy, BlockParts
from featinv_diffusion.types import Images

Part = Literal["states", "attention", "mlp"]
"""The residual stream after a block, or what one of its sub-layers adds to it."""

AttentionEdit = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""From queries, keys, values and the concatenated heads of A V to other concatenated heads."""

ALL = frozenset({"states", "attention", "mlp", "values", "memories"})


@dataclass(eq=False)
class Trace:
    """What one forward pass left; lists have one entry per block but for `states`.

    Attributes:
        logits: of the model itself, `[b, k]`.
        states: residual stream before the first block and after each, `[b, n, d]`.
        attention, mlp: what each sub-layer adds to the stream.
        mixed: concatenated heads of A V, the input of W_O.
        values: V, `[b, heads, n, head_dim]`.
        attention_memories, mlp_memories: numbers of the memories with the largest coefficients.
    """

    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    states: list[Tensor] = field(default_factory=list)
    attention: list[Tensor] = field(default_factory=list)
    mlp: list[Tensor] = field(default_factory=list)
    mixed: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    attention_memories: list[Tensor] = field(default_factory=list)
    mlp_memories: list[Tensor] = field(default_factory=list)

    def of(self, part: Part) -> list[Tensor]:
        return {"states": self.states, "attention": self.attention, "mlp": self.mlp}[part]


@torch.no_grad()
def record(
    anatomy: Anatomy,
    images: Images,
    wanted: frozenset[str] = ALL,
    *,
    n_memories: int = 5,
    mlp_key: Literal["before", "after"] = "before",
) -> Trace:
    """Runs the model once and keeps what `wanted` names.

    Args:
        wanted: of `states`, `attention`, `mlp`, `values` (with `mixed`) and `memories`.
        mlp_key: memory coefficients of the MLP before or after its activation; published: before.
    """
    trace = Trace()
    with hooks() as add:
        for number, parts in enumerate(anatomy.blocks):
            if "states" in wanted:
                if number == 0:
                    add.before(parts.block, lambda x: trace.states.append(x))
                add.after(parts.block, trace.states.append)
            if "attention" in wanted:
                add.after(parts.attention_added, trace.attention.append)
            if "mlp" in wanted:
                add.after(parts.mlp_added, trace.mlp.append)
            if "values" in wanted:
                add.heads(parts, lambda _q, _k, v: trace.values.append(v))
                add.before(parts.attention_values, lambda x: trace.mixed.append(x))
            if "memories" in wanted:
                _add_memories(add, parts, trace, n_memories, mlp_key)
        trace.logits = anatomy.backbone.classify(images)
    return trace


def _add_memories(add: Hooks, parts: BlockParts, trace: Trace, n: int, mlp_key: str) -> None:
    def keep(found: list[Tensor]) -> Callable[[Tensor], None]:
        return lambda x: found.append(x.topk(n, dim=-1).indices)

    add.before(parts.attention_values, keep(trace.attention_memories))
    if mlp_key == "before" and parts.mlp_keys is not None:
        add.after(parts.mlp_keys, keep(trace.mlp_memories))
    else:
        add.before(parts.mlp_values, keep(trace.mlp_memories))


@contextmanager
def keeping_tokens(anatomy: Anatomy, kept: Int[Tensor, "b m"]) -> Iterator[None]:
    """Drops patches after the position embeddings: only those of `kept` enter the first block.

    Args:
        kept: numbers of patches per image, from 0; the prefix tokens always stay.
    """
    index = torch.cat(
        [torch.arange(anatomy.n_prefix).expand(len(kept), -1), kept.cpu() + anatomy.n_prefix], dim=1
    )

    def gather(x: Tensor) -> Tensor:
        return x.gather(1, index.to(x.device)[..., None].expand(-1, -1, x.shape[2]))

    with hooks() as add:
        add.before(anatomy.blocks[0].block, gather)
        yield


@contextmanager
def editing_attention(anatomy: Anatomy, edit: AttentionEdit) -> Iterator[None]:
    """Replaces the concatenated heads that W_O reads, in every block."""
    with hooks() as add:
        for parts in anatomy.blocks:
            _add_edit(add, parts, edit)
        yield


def _add_edit(add: Hooks, parts: BlockParts, edit: AttentionEdit) -> None:
    heads: list[tuple[Tensor, Tensor, Tensor]] = []
    add.heads(parts, lambda q, k, v: heads.append((q * parts.scale, k, v)))
    add.before(parts.attention_values, lambda mixed: edit(*heads.pop(), mixed))


def attention_weights(
    q: Float[Tensor, "b heads n d"], k: Float[Tensor, "b heads n d"]
) -> Float[Tensor, "b heads n n"]:
    """Returns softmax(q kᵀ); `editing_attention` hands out queries that are scaled already."""
    return (q @ k.transpose(-2, -1)).softmax(dim=-1)


def merge_heads(x: Float[Tensor, "b heads n d"]) -> Float[Tensor, "b n c"]:
    """Concatenates the heads of each token, as W_O reads them."""
    return x.transpose(1, 2).flatten(2)


class Hooks:
    """Adds forward hooks and removes them all at the end."""

    def __init__(self, stack: ExitStack):
        self.stack = stack

    def before(self, module: nn.Module, see: Callable[[Tensor], Tensor | None]) -> None:
        """Shows `see` the first input; a tensor that it returns takes its place."""

        def hook(_module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
            changed = see(inputs[0])
            return None if changed is None else ((changed, *inputs[1:]), options)

        self._keep(module.register_forward_pre_hook(hook, with_kwargs=True))

    def after(self, module: nn.Module, see: Callable[[Tensor], None]) -> None:
        """Shows `see` the output, the first of several."""

        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            see(output[0] if isinstance(output, Sequence) else output)

        self._keep(module.register_forward_hook(hook))

    def heads(self, parts: BlockParts, see: Callable[[Tensor, Tensor, Tensor], None]) -> None:
        """Shows `see` queries, keys and values, before W_O runs."""
        outputs: list[Tensor] = []
        for module in parts.heads:
            self.after(module, outputs.append)

        def show(_mixed: Tensor) -> None:
            q, k, v = parts.split_heads(outputs)
            outputs.clear()
            see(q, k, v)

        self.before(parts.attention_values, show)

    def _keep(self, handle: Any) -> None:
        self.stack.callback(handle.remove)


@contextmanager
def hooks() -> Iterator[Hooks]:
    """Yields an adder of hooks that live as long as the block."""
    with ExitStack() as stack:
        yield Hooks(stack)
