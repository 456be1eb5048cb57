"""The forward pass of timm's vision transformers, stage by stage."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from jaxtyping import Float
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from featinv_diffusion.backbones.layout import Layout
from featinv_diffusion.backbones.preprocessing import Preprocessing
from featinv_diffusion.errors import InputError
from featinv_diffusion.inverters.path import ForwardPath


class VitPath(ForwardPath):
    """A ViT as patches → encoder → last.

    - `patches`: the tokens that enter the first block, prefix tokens and positions included.
    - `encoder`: the tokens after all blocks, before the final norm. `blocks.i` are those after
      block i (counted from 0) and `blocks.i.attention` those after its attention.
    - `last`: the map `[b, c, h, w]` behind the final norm without prefix tokens, which is the
      `last` layer of the backbone and what its diffusion inverter reads.

    Args:
        model: a timm `VisionTransformer` of pre-norm blocks.
        name: what the model is called in specs and messages.
        preprocessing: as of the backbone.
        labels: names of the classes.

    Raises:
        InputError: a model of other blocks.
    """

    family: ClassVar[str] = "vit"
    main_stages: ClassVar[tuple[str, ...]] = ("patches", "encoder", "last")
    sequence_kind: ClassVar[Literal["tokens", "queries"]] = "tokens"

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str,
        preprocessing: Preprocessing,
        labels: tuple[str, ...] | None = None,
    ):
        plain = isinstance(model, VisionTransformer) and all(
            type(block) is Block for block in model.blocks
        )
        if not plain:
            raise InputError(
                f"{name!r} must be a timm VisionTransformer of pre-norm blocks, but a "
                f"{type(model).__name__} came. Choose one such as vit_base_patch16_224."
            )
        self.labels = labels
        super().__init__(model, name=name, preprocessing=preprocessing)

    @property
    def n_prefix(self) -> int:
        """Number of class and register tokens before the patches."""
        return self._vit.num_prefix_tokens

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) in patches."""
        height, width = self._vit.patch_embed.grid_size
        return height, width

    @property
    def embeds_linearly(self) -> bool:
        """Whether the tokens that enter the first block are linear in the pixels: no norm."""
        norms = (self._vit.norm_pre, self._vit.patch_embed.norm)
        return all(isinstance(norm, nn.Identity) for norm in norms)

    def advance(
        self, stage: str, previous: Float[Tensor, "b ..."]
    ) -> dict[str, Float[Tensor, "b ..."]]:
        """Returns a main stage and the states within it; see `ForwardPath.advance`."""
        steps = {"patches": self._patches, "encoder": self._encoder, "last": self._last}
        return steps[stage](previous)

    def logits(self, tokens: Float[Tensor, "b n c"]) -> Float[Tensor, "b k"]:
        """Returns the class scores of tokens of stage `encoder`, through the final norm."""
        return self._vit.forward_head(self._vit.norm(tokens))

    def positions(self) -> Float[Tensor, "n c"]:
        """Returns the position embedding, a row per token; zeros for prefix tokens without one.

        Raises:
            InputError: the model has no table of positions.
        """
        table = self._vit.pos_embed
        if table is None:
            raise InputError(f"{self.name!r} must add a table of positions, but has none.")
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
            tokens = tokens + block.ls1(block.attn(block.norm1(tokens)))
            states[f"blocks.{i}.attention"] = tokens
            tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
            states[f"blocks.{i}"] = tokens
        return states | {"encoder": tokens}

    def _last(self, tokens: Tensor) -> dict[str, Tensor]:
        return {"last": Layout("NLC", self.n_prefix, self.grid).to_map(self._vit.norm(tokens))}
