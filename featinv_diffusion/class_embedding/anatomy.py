"""Where a vision transformer keeps what the class-embedding measures read, timm's or transformers'.

Modules are named, never changed: everything else in this package hooks into them for one forward
pass and lets go.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from featinv_diffusion.backbones.base import Backbone
from featinv_diffusion.backbones.transformers import TransformersBackbone
from featinv_diffusion.errors import InputError

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
        mlp_keys: its output are the memory coefficients before the activation; None where the MLP
            is gated and has as many only after it.
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
