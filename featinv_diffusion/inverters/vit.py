"""Vision transformers: their forward pass by stages, and inverses of blocks and patch embedding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, ClassVar, Literal

import torch
from diffusers.configuration_utils import register_to_config
from jaxtyping import Float
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from featinv_diffusion.backbones.traced import Layout
from featinv_diffusion.errors import InputError
from featinv_diffusion.inverters.blocks import InverseModule
from featinv_diffusion.inverters.path import IMAGE, ClassifierPath


class VitPath(ClassifierPath):
    """A ViT or DeiT as patches → encoder → last.

    - `patches`: the tokens that enter the first block, with prefix tokens (class, distillation,
      registers) and positions.
    - `encoder`: the tokens after all blocks, before the final norm. `blocks.i` are those after
      block i (counted from 0) and `blocks.i.attention` those after its attention.
    - `last`: the map `[b, c, h, w]` after the final norm, without prefix tokens. It is the `last`
      layer of the backbone, which the diffusion inverter reads.

    Args:
        model: a timm `VisionTransformer` with pre-norm blocks.
        name: name of the model in specs and messages.
        preprocessing: preprocessing of the backbone.
        labels: names of the classes.

    Raises:
        InputError: a model with other blocks.
    """

    family: ClassVar[str] = "vit"
    sequence_kind: ClassVar[Literal["tokens", "queries"]] = "tokens"

    @staticmethod
    def check_model(model: nn.Module, name: str) -> None:
        """Raises `InputError` where a model is no ViT of timm with pre-norm blocks."""
        plain = isinstance(model, VisionTransformer) and all(
            type(block) is Block for block in model.blocks
        )
        if not plain:
            raise InputError(
                f"{name!r} must be a timm VisionTransformer with pre-norm blocks, got a "
                f"{type(model).__name__}. Choose one such as vit_base_patch16_224."
            )

    @property
    def n_prefix(self) -> int:
        """Number of class, distillation and register tokens before the patches."""
        return self._vit.num_prefix_tokens

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) in patches."""
        height, width = self._vit.patch_embed.grid_size
        return height, width

    @property
    def embeds_linearly(self) -> bool:
        """Whether no norm comes between the pixels and the tokens that enter the first block."""
        norms = (self._vit.norm_pre, self._vit.patch_embed.norm)
        return all(isinstance(norm, nn.Identity) for norm in norms)

    def logits(self, encoder: Float[Tensor, "b n c"]) -> Float[Tensor, "b k"]:
        """Returns the class scores of the tokens of stage `encoder`."""
        return self._vit.forward_head(self._vit.norm(encoder))

    def positions(self) -> Float[Tensor, "n c"]:
        """Returns the position embedding, a row per token; prefix tokens may have zeros.

        Raises:
            InputError: the model has no table of positions.
        """
        table = self._vit.pos_embed
        if table is None:
            raise InputError(f"{self.name!r} must have a table of positions, but has none.")
        n_missing = self.spec("patches").grid[0] - table.shape[1]
        return nn.functional.pad(table.detach()[0], (0, 0, n_missing, 0))

    @property
    def _vit(self) -> Any:
        return self.model

    def _patches(self, pixels: Tensor) -> dict[str, Tensor]:
        tokens = self._vit._pos_embed(self._vit.patch_embed(pixels))
        return {"patches": self._vit.norm_pre(self._vit.patch_drop(tokens))}

    def _encoder(self, tokens: Tensor) -> dict[str, Tensor]:
        states: dict[str, Tensor] = {}
        for i, block in enumerate(self._vit.blocks):
            between: list[Tensor] = []
            handle = block.norm2.register_forward_pre_hook(
                lambda _module, inputs, seen=between: seen.append(inputs[0])
            )
            try:
                tokens = block(tokens)  # the block itself, so that its own hooks run
            finally:
                handle.remove()
            states[f"blocks.{i}.attention"], states[f"blocks.{i}"] = between[0], tokens
        return states | {"encoder": tokens}

    def _last(self, tokens: Tensor) -> dict[str, Tensor]:
        return {"last": Layout("NLC", self.n_prefix, self.grid).to_map(self._vit.norm(tokens))}


class BlocksInverse(InverseModule):
    """encoder⁻¹ and the inverse of any range of blocks: timm's pre-norm blocks, tokens to tokens.

    A module that reads a map (stage `last`) puts learned prefix tokens before its cells.

    Args:
        depth, n_heads, mlp_ratio: sizes of the blocks; published are 12, 12 and 4 for ViT-B/16.
    """

    reads_kinds = ("tokens", "map")
    writes_kinds = ("tokens",)

    @register_to_config
    def __init__(
        self,
        reads_spec: dict[str, Any],
        writes_spec: dict[str, Any],
        depth: int = 12,
        n_heads: int = 12,
        mlp_ratio: float = 4.0,
    ):
        super().__init__()
        reads, writes = self._wire(reads_spec, writes_spec)
        if reads.channels != writes.channels:
            raise InputError(
                f"Blocks must read as many channels as they write, got {reads} and {writes}."
            )
        make: Any = Block
        sizes: dict[str, Any] = {"mlp_ratio": mlp_ratio, "norm_layer": nn.LayerNorm}
        blocks = (make(reads.channels, n_heads, **sizes) for _ in range(depth))
        self.blocks = nn.Sequential(*blocks)
        if reads.kind == "map":
            n_prefix = writes.grid[0] - reads.grid[0] * reads.grid[1]
            self.prefix = nn.Parameter(torch.zeros(1, n_prefix, reads.channels))

    def transform(self, embedding: Float[Tensor, "b ..."]) -> Float[Tensor, "b n c"]:
        """Returns the tokens of the stage that is written."""
        if embedding.ndim == 4:
            tokens = embedding.flatten(2).transpose(1, 2)
            embedding = torch.cat([self.prefix.expand(len(tokens), -1, -1), tokens], dim=1)
        return self.blocks(embedding)


class AnalyticPatchInverse(InverseModule):
    """The pseudo-inverse of a ViT's patch embedding: x = W⁺ (e − position − bias).

    It is exact if W is square and invertible, as for patches of 16 pixels and 768 channels; errors
    of e grow by up to `condition_number`. Nothing is trained, and pixels are not clamped.

    Args:
        patch: (h, w) in pixels.
        grid: (h, w) in patches.
        n_prefix: number of tokens before the patches.
        condition: largest singular value of W by the smallest one that is kept.
    """

    reads_kinds = ("tokens",)
    writes_kinds = (IMAGE,)
    standardises_input = False
    weight: Tensor
    offset: Tensor
    mean: Tensor
    std: Tensor

    @register_to_config
    def __init__(
        self,
        reads_spec: dict[str, Any],
        writes_spec: dict[str, Any],
        patch: Sequence[int] = (16, 16),
        grid: Sequence[int] = (14, 14),
        n_prefix: int = 1,
        condition: float = 0.0,
    ):
        super().__init__()
        reads, _ = self._wire(reads_spec, writes_spec)
        self.register_buffer("weight", torch.zeros(3 * patch[0] * patch[1], reads.channels))
        self.register_buffer("offset", torch.zeros(grid[0] * grid[1], reads.channels))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("std", torch.ones(3))

    @classmethod
    def from_path(cls, path: VitPath, rcond: float = 1e-6) -> AnalyticPatchInverse:
        """Inverts the patch embedding of a model; the module is in float64.

        Args:
            rcond: singular values below this share of the largest count as zero.

        Raises:
            InputError: a model that normalises its patches before the first block.
        """
        vit: Any = path.model
        if not path.embeds_linearly:
            raise InputError(
                f"{path.name!r} must not normalise its patches before the first block, but it has "
                "a norm there. Train a backbone inverse instead."
            )
        projection = vit.patch_embed.proj
        weight = projection.weight.detach().double().flatten(1)
        values = torch.linalg.svdvals(weight)
        kept = values[values > rcond * values[0]]
        module = cls(
            reads_spec=asdict(path.spec("patches")),
            writes_spec=asdict(path.spec(IMAGE)),
            patch=tuple(projection.kernel_size),
            grid=path.grid,
            n_prefix=path.n_prefix,
            condition=float(kept[0] / kept[-1]),
        ).double()
        module.weight.copy_(torch.linalg.pinv(weight, rtol=rcond))
        positions = path.positions()[path.n_prefix :]
        bias = 0 if projection.bias is None else projection.bias.detach()
        module.offset.copy_(positions + bias)
        module.mean.copy_(torch.tensor(path.preprocessing.mean, dtype=torch.float64))
        module.std.copy_(torch.tensor(path.preprocessing.std, dtype=torch.float64))
        return module

    @property
    def condition_number(self) -> float:
        """Largest singular value by the smallest one that is kept."""
        return self.config["condition"]

    def transform(self, embedding: Float[Tensor, "b n c"]) -> Float[Tensor, "b 3 h w"]:
        """Returns pixels; they lie in [0, 1] for tokens of an image."""
        config: Any = self.config
        patches = (embedding[:, config.n_prefix :] - self.offset) @ self.weight.T
        height, width = self.writes.grid
        patch = tuple(config.patch)
        pixels = F.fold(patches.transpose(1, 2), (height, width), patch, stride=patch)
        return pixels * self.std[:, None, None] + self.mean[:, None, None]
