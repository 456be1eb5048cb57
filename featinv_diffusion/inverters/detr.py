"""Inverses of DETR's encoder, decoder and prediction heads.

Source: "Inverting DETR" (modular inversion), section 3. The layers are transformers' own DETR
layers, for the paper's inverses have the architecture of what they undo.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DetrConfig
from transformers.models.detr.modeling_detr import (
    DetrDecoderLayer,
    DetrEncoderLayer,
    DetrSinePositionEmbedding,
)

from featinv_diffusion.inverters.blocks import InverseModule, spec_of


class EncoderInverse(InverseModule):
    """encoder⁻¹: post-norm encoder layers from the encoder's map E to the backbone's map B.

    Args:
        depth, n_heads, feedforward: of the layers; published are 6, 8 and 2048.
        linear_output: end in a linear layer. The published modules end in a layer norm, which
            fixes mean and variance of each cell; those of B vary.
    """

    reads_kinds = ("map",)
    writes_kinds = ("map",)

    @register_to_config
    def __init__(
        self,
        reads_spec: dict[str, Any],
        writes_spec: dict[str, Any],
        depth: int = 6,
        n_heads: int = 8,
        feedforward: int = 2048,
        linear_output: bool = True,
    ):
        super().__init__()
        reads, writes = spec_of(reads_spec), spec_of(writes_spec)
        self._wire(reads, writes)
        config = make_layer_config(reads.channels, n_heads, feedforward)
        self.layers = nn.ModuleList([DetrEncoderLayer(config) for _ in range(depth)])
        self.head = _make_head(reads.channels, writes.channels, linear_output)

    def transform(self, embedding: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        """Returns a map of the same grid."""
        positions = sine_positions(embedding.shape[1], embedding)
        tokens = embedding.flatten(2).transpose(1, 2)
        for layer in self.layers:
            tokens = layer(tokens, None, spatial_position_embeddings=positions)
        return self.head(tokens).transpose(1, 2).unflatten(2, embedding.shape[2:])


class DecoderInverse(InverseModule):
    """decoder⁻¹: decoder layers whose queries are the cells of E, zero at first, reading D.

    The cells have sine positions; the rows of D, DETR's queries, a learned position each.

    Args:
        depth, n_heads, feedforward, linear_output: as in `EncoderInverse`.
    """

    reads_kinds = ("queries", "tokens")
    writes_kinds = ("map",)

    @register_to_config
    def __init__(
        self,
        reads_spec: dict[str, Any],
        writes_spec: dict[str, Any],
        depth: int = 6,
        n_heads: int = 8,
        feedforward: int = 2048,
        linear_output: bool = True,
    ):
        super().__init__()
        reads, writes = spec_of(reads_spec), spec_of(writes_spec)
        self._wire(reads, writes)
        config = make_layer_config(reads.channels, n_heads, feedforward)
        self.layers = nn.ModuleList([DetrDecoderLayer(config) for _ in range(depth)])
        self.query_positions = nn.Embedding(reads.grid[0], reads.channels)
        self.head = _make_head(reads.channels, writes.channels, linear_output)

    def transform(self, embedding: Float[Tensor, "b n c"]) -> Float[Tensor, "b d h w"]:
        """Returns the map of cells."""
        height, width = self.writes.grid
        like = embedding.new_empty(len(embedding), 1, height, width)
        positions = sine_positions(embedding.shape[2], like)
        memory_positions = self.query_positions.weight.expand(len(embedding), -1, -1)
        cells = torch.zeros_like(positions)
        for layer in self.layers:
            cells = layer(cells, None, memory_positions, positions, embedding)
        return self.head(cells).transpose(1, 2).unflatten(2, (height, width))


class HeadInverse(InverseModule):
    """prediction head⁻¹ and detection⁻¹: an MLP per query from class scores and box to D.

    Which of the two it is follows from the stage it reads: `prediction` or `detection`.

    Args:
        hidden: widths of the two hidden layers.
    """

    reads_kinds = ("queries", "tokens")
    writes_kinds = ("queries", "tokens")
    standardises_input = False  # a one-hot code of rare classes would become huge

    @register_to_config
    def __init__(
        self,
        reads_spec: dict[str, Any],
        writes_spec: dict[str, Any],
        hidden: Sequence[int] = (512, 256),
    ):
        super().__init__()
        reads, writes = spec_of(reads_spec), spec_of(writes_spec)
        self._wire(reads, writes)
        self.fc1 = nn.Linear(reads.channels, hidden[0])
        self.fc2 = nn.Linear(hidden[0], hidden[1])
        self.fc3 = nn.Linear(hidden[1], writes.channels)

    def transform(self, embedding: Float[Tensor, "b n c"]) -> Float[Tensor, "b n d"]:
        """Returns one row of D per query."""
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(embedding)))))


def make_layer_config(channels: int, n_heads: int, feedforward: int) -> DetrConfig:
    """Returns what transformers' DETR layers read, without dropout."""
    make: Any = DetrConfig
    return make(
        d_model=channels,
        encoder_attention_heads=n_heads,
        decoder_attention_heads=n_heads,
        encoder_ffn_dim=feedforward,
        decoder_ffn_dim=feedforward,
        dropout=0.0,
        attn_implementation="sdpa",
    )


def sine_positions(
    channels: int, like: Float[Tensor, "b _ h w"]
) -> Float[Tensor, "b cells {channels}"]:
    """Returns DETR's sine positions for the grid of `like`, in raster order."""
    embed = DetrSinePositionEmbedding(channels // 2, normalize=True)
    positions: Tensor = embed(shape=like.shape, device=like.device, dtype=like.dtype)
    return positions.flatten(2).transpose(1, 2)


def _make_head(n_in: int, n_out: int, linear: bool) -> nn.Module:
    return nn.Linear(n_in, n_out) if linear or n_in != n_out else nn.Identity()
