"""The parts of a vision transformer, timm's or transformers', that the measures read.

Modules are found, never changed: the rest of this package hooks into them for one forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from featinv_diffusion.backbones.base import Backbone
from featinv_diffusion.backbones.transformers import TransformersBackbone
from featinv_diffusion.errors import InputError
from featinv_diffusion.types import Images

Heads = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values, `[b, heads, n, head_dim]` each."""

TRANSFORMERS_READOUT = {
    "ViTForImageClassification": "token",
    "DeiTForImageClassification": "token",
    "IJepaForImageClassification": "avg",
}


@dataclass(frozen=True, eq=False)
class BlockParts:
    """The modules of one block, in the order in which they run.

    Args:
        block: the whole; its output is the residual stream.
        heads: modules whose outputs hold queries, keys and values.
        split_heads: from those outputs to queries, keys and values.
        scale: of the attention scores.
        attention_values: W_O; its input is the concatenated heads of A V.
        attention_tail: from the output of W_O to what the block adds to the stream: layer scale,
            or the norm of a residual-post-norm block.
        attention_added: its output is that addition.
        mlp_keys: its output holds the memory coefficients before the activation; None for a gated
            MLP, which has them only after it.
        mlp_values: the last linear layer of the MLP.
        mlp_added: its output is what the MLP adds to the stream.
    """

    block: nn.Module
    heads: tuple[nn.Module, ...]
    split_heads: Callable[[list[Tensor]], Heads]
    scale: float
    attention_values: nn.Linear
    attention_tail: Callable[[Tensor], Tensor]
    attention_added: nn.Module
    mlp_keys: nn.Module | None
    mlp_values: nn.Linear
    mlp_added: nn.Module


@dataclass(frozen=True, eq=False)
class Anatomy:
    """A vision transformer with a linear head on its class token, or on the mean of its tokens.

    Args:
        norm: ln, of each token.
        pool_norm: of the pooled token; one of both is the identity.
        head: E and β.
        n_prefix: class, distillation and register tokens before the patches.
        grid: (h, w) of the patches.
        read_tokens: which tokens the head reads the mean of.
    """

    backbone: Backbone
    blocks: tuple[BlockParts, ...]
    norm: nn.Module
    pool_norm: nn.Module
    head: nn.Linear
    n_prefix: int
    grid: tuple[int, int]
    read_tokens: slice

    @property
    def n_classes(self) -> int:
        return self.head.out_features

    @property
    def n_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def has_class_token(self) -> bool:
        """Whether the head reads one token, the first."""
        return self.read_tokens == slice(0, 1)

    def project(
        self, tokens: Float[Tensor, "... d"], *, norm: bool = True, bias: bool = True
    ) -> Float[Tensor, "... k"]:
        """Returns E ln(x) + β of each token; the formula of Vilas et al. 2023 has neither ln nor β.

        For models that pool before they normalise, ln is that norm, as if the token were pooled.
        """
        if norm:
            tokens = self.pool_norm(self.norm(tokens))
        return F.linear(tokens, self.head.weight, self.head.bias if bias else None)

    def read_out(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b k"]:
        """Returns the class scores of the last hidden states, as the model computes them."""
        return self.read_out_rows(tokens[:, self.read_tokens])

    def read_out_rows(self, rows: Float[Tensor, "b m d"]) -> Float[Tensor, "b k"]:
        """Returns the class scores of the tokens that the head reads, normalised and pooled."""
        return self.head(self.pool_norm(self.norm(rows).mean(dim=1)))


def read_anatomy(backbone: Backbone) -> Anatomy:
    """Finds the parts of a backbone's model.

    Raises:
        InputError: no vision transformer of timm or transformers, or a head that no single token
            can be projected on.
    """
    from timm.models.vision_transformer import VisionTransformer

    if isinstance(backbone.model, VisionTransformer):
        return _of_timm(backbone)
    is_known = type(backbone.model).__name__ in TRANSFORMERS_READOUT
    if isinstance(backbone, TransformersBackbone) and is_known:
        return _of_transformers(backbone)
    known = ["VisionTransformer of timm", *TRANSFORMERS_READOUT]
    raise InputError(
        f"Tokens are projected on the class embedding of a {', '.join(known)}, but "
        f"{backbone.name!r} is a {type(backbone.model).__name__}. Use such a ViT, "
        "e.g. tiny/vit or vit."
    )


def _of_timm(backbone: Backbone) -> Anatomy:
    model: Any = backbone.model
    pool = model.global_pool
    is_plain = model.attn_pool is None and not hasattr(model, "head_dist")
    if pool not in ("token", "avg") or not is_plain or not isinstance(model.head, nn.Linear):
        raise InputError(
            "The head must be linear in the class token or in the mean of the tokens, but that of "
            f"{backbone.name!r} is not (pool {pool!r}). Choose a ViT with such a head."
        )
    start = 0 if model.pool_include_prefix else model.num_prefix_tokens
    return Anatomy(
        backbone=backbone,
        blocks=tuple(_timm_block(block, backbone.name) for block in model.blocks),
        norm=model.norm,
        pool_norm=model.fc_norm,
        head=model.head,
        n_prefix=model.num_prefix_tokens,
        grid=backbone.spec.grid if backbone.spec.layer == "last" else model.patch_embed.grid_size,
        read_tokens=slice(0, 1) if pool == "token" else slice(start, None),
    )


def _timm_block(block: Any, name: str) -> BlockParts:
    from timm.layers.attention import Attention
    from timm.models.vision_transformer import Block, ResPostBlock

    attention = block.attn if isinstance(block, Block | ResPostBlock) else None
    if (
        type(attention) is not Attention
        or attention.gate is not None
        or not isinstance(attention.norm, nn.Identity)
    ):
        raise InputError(
            f"The blocks must be timm's Block or ResPostBlock with plain attention, but those of "
            f"{name!r} are {type(block).__name__} with {type(attention).__name__}."
        )
    mlp: Any = block.mlp
    keys = getattr(mlp, "fc1", None)
    is_gated = keys is None or keys.out_features != mlp.fc2.in_features
    return BlockParts(
        block=block,
        heads=(attention.qkv,),
        split_heads=lambda outputs: _split_timm(attention, outputs[0]),
        scale=attention.scale,
        attention_values=attention.proj,
        attention_tail=block.norm1 if isinstance(block, ResPostBlock) else block.ls1,
        attention_added=block.drop_path1,
        mlp_keys=None if is_gated else keys,
        mlp_values=mlp.fc2,
        mlp_added=block.drop_path2,
    )


def _split_timm(attention: Any, qkv: Tensor) -> Heads:
    q, k, v = qkv.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return attention.q_norm(q), attention.k_norm(k), v


def _of_transformers(backbone: TransformersBackbone) -> Anatomy:
    tower: Any = backbone.tower
    model: Any = backbone.model
    layout = backbone.last_layout
    pool = TRANSFORMERS_READOUT[type(model).__name__]
    return Anatomy(
        backbone=backbone,
        blocks=tuple(_transformers_block(layer) for layer in tower.layers),
        norm=tower.layernorm,
        pool_norm=nn.Identity(),
        head=model.classifier,
        n_prefix=layout.n_prefix,
        grid=layout.grid,
        read_tokens=slice(0, 1) if pool == "token" else slice(0, None),
    )


def _transformers_block(layer: Any) -> BlockParts:
    attention, mlp = layer.attention, layer.mlp

    def split(outputs: list[Tensor]) -> Heads:
        shape = (attention.num_attention_heads, attention.head_dim)
        q, k, v = (output.unflatten(-1, shape).transpose(1, 2) for output in outputs)
        return q, k, v

    return BlockParts(
        block=layer,
        heads=(attention.q_proj, attention.k_proj, attention.v_proj),
        split_heads=split,
        scale=attention.scaling,
        attention_values=attention.o_proj,
        attention_tail=nn.Identity(),
        attention_added=attention,
        mlp_keys=mlp.fc1,
        mlp_values=mlp.fc2,
        mlp_added=mlp,
    )


def make_random(anatomy: Anatomy, seed: int = 0) -> Anatomy:
    """Returns the same architecture with newly initialised weights: the null of every measure."""
    from copy import deepcopy

    from featinv_diffusion.backbones import wrap_model

    backbone = anatomy.backbone
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = deepcopy(backbone.model).to("cpu")
        if hasattr(model, "init_weights") and hasattr(model, "forward_features"):
            for module in model.modules():  # older timm initialises the linear layers alone
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
            model.init_weights()
            nn.init.trunc_normal_(model.head.weight, std=0.02)  # some recipes start it at zero
        else:
            model = type(model)(model.config).to(backbone.dtype)
    wrapped = wrap_model(model, name=backbone.name, input_size=backbone.input_size)
    wrapped.preprocessing = backbone.preprocessing
    return read_anatomy(wrapped.to(backbone.device))


# ---- Hooks for one forward pass ------------------------------------------------------------------

AttentionEdit = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""From queries, keys, values and the concatenated heads of A V to other concatenated heads."""

ALL = frozenset({"states", "attention", "mlp", "values", "memories"})


@dataclass(eq=False)
class Trace:
    """What one forward pass leaves; lists have one entry per block, `states` has one more.

    Attributes:
        logits: of the model itself, `[b, k]`.
        states: residual stream before the first block and after each, `[b, n, d]`.
        attention, mlp: what each sub-layer adds to the stream.
        mixed: concatenated heads of A V, the input of W_O.
        values: V, `[b, heads, n, head_dim]`.
        attention_memories, mlp_memories: indices of the memories with the largest coefficients.
    """

    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    states: list[Tensor] = field(default_factory=list)
    attention: list[Tensor] = field(default_factory=list)
    mlp: list[Tensor] = field(default_factory=list)
    mixed: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    attention_memories: list[Tensor] = field(default_factory=list)
    mlp_memories: list[Tensor] = field(default_factory=list)


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
        wanted: any of `states`, `attention`, `mlp`, `values` (with `mixed`) and `memories`.
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
        kept: indices of the patches to keep in each image; the prefix tokens always stay.
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
