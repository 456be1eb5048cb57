"""Swin transformers: their forward pass by stages, and the inverse of a stage.

A Swin halves its map from stage to stage, so that each stage has an inverse of its own and chains
lead through them, where a ViT has one for all of its blocks.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from diffusers.configuration_utils import register_to_config
from jaxtyping import Float
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn
from torch.nn import functional as F

from featinv_diffusion.backbones.traced import Layout
from featinv_diffusion.errors import InputError
from featinv_diffusion.inverters.blocks import InverseModule
from featinv_diffusion.inverters.path import ClassifierPath

NHWC = Layout("NHWC")


class SwinPath(ClassifierPath):
    """A Swin as patches → encoder → last, all of them maps `[b, c, h, w]`.

    - `patches`: the map that enters the first stage.
    - `encoder`: the map after all stages, before the final norm. `layers.i` are the maps after
      stage i (counted from 0), which merges patches first, and `layers.i.merged` those between.
    - `last`: the map after the final norm, which is the `last` layer of the backbone.

    Args:
        model: a timm `SwinTransformer` or `SwinTransformerV2`.
        name: name of the model in specs and messages.
        preprocessing: preprocessing of the backbone.
        labels: names of the classes.

    Raises:
        InputError: another model.
    """

    family: ClassVar[str] = "swin"
    sequence_kind: ClassVar[Literal["tokens", "queries"]] = "tokens"

    @staticmethod
    def check_model(model: nn.Module, name: str) -> None:
        """Raises `InputError` where a model is no Swin of timm."""
        if not is_swin(model):
            raise InputError(
                f"{name!r} must be a timm SwinTransformer or SwinTransformerV2, got a "
                f"{type(model).__name__}. Choose one such as swin_tiny_patch4_window7_224."
            )

    def logits(self, encoder: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        """Returns the class scores of the map of stage `encoder`."""
        return self._swin.forward_head(self._swin.norm(NHWC.from_map(encoder)))

    @property
    def _swin(self) -> Any:
        return self.model

    def _patches(self, pixels: Tensor) -> dict[str, Tensor]:
        return {"patches": NHWC.to_map(self._swin.patch_embed(pixels))}

    def _encoder(self, patches: Tensor) -> dict[str, Tensor]:
        states: dict[str, Tensor] = {}
        cells = NHWC.from_map(patches)
        for i, stage in enumerate(self._swin.layers):
            between: list[Tensor] = []
            handle = stage.downsample.register_forward_hook(
                lambda _module, _inputs, output, seen=between: seen.append(output)
            )
            try:
                cells = stage(cells)  # the stage itself, so that its own hooks run
            finally:
                handle.remove()
            if not isinstance(stage.downsample, nn.Identity):
                states[f"layers.{i}.merged"] = NHWC.to_map(between[0])
            states[f"layers.{i}"] = NHWC.to_map(cells)
        return states | {"encoder": states[f"layers.{len(self._swin.layers) - 1}"]}

    def _last(self, encoder: Tensor) -> dict[str, Tensor]:
        return {"last": NHWC.to_map(self._swin.norm(NHWC.from_map(encoder)))}


def is_swin(model: nn.Module) -> bool:
    """Whether a model is one that `SwinPath` can follow."""
    return isinstance(model, SwinTransformer | SwinTransformerV2)


class SwinInverse(InverseModule):
    """The inverse of a Swin's stages: windowed blocks on the map that is read, and unmerging.

    It has the architecture of what it undoes, the other way round: timm's Swin blocks, the second,
    fourth … of which shift their windows, then a linear layer that gives each cell the
    factor × factor cells that were merged into it, and a layer norm before it.

    Args:
        depth, n_heads, mlp_ratio: sizes of the blocks.
        window: side of the windows in cells.

    Raises:
        InputError: a grid to write that is not a whole multiple of the one that is read.
    """

    reads_kinds = ("map",)
    writes_kinds = ("map",)

    @register_to_config
    def __init__(
        self,
        reads_spec: dict[str, Any],
        writes_spec: dict[str, Any],
        depth: int = 2,
        n_heads: int = 4,
        window: int = 7,
        mlp_ratio: float = 4.0,
    ):
        super().__init__()
        reads, writes = self._wire(reads_spec, writes_spec)
        self.factor = writes.grid[0] // reads.grid[0]
        if tuple(n * self.factor for n in reads.grid) != writes.grid or self.factor == 0:
            raise InputError(
                "The inverse of a stage of a Swin must write whole multiples of the grid that it "
                f"reads, got {reads} and {writes}."
            )
        make: Any = SwinTransformerBlock
        sizes: dict[str, Any] = {
            "input_resolution": reads.grid,
            "num_heads": n_heads,
            "window_size": window,
            "mlp_ratio": mlp_ratio,
        }
        shifts = (0 if i % 2 == 0 else window // 2 for i in range(depth))
        self.blocks = nn.Sequential(
            *(make(reads.channels, shift_size=shift, **sizes) for shift in shifts)
        )
        self.norm = nn.LayerNorm(reads.channels)
        self.unmerge = nn.Linear(reads.channels, writes.channels * self.factor**2)

    def transform(self, embedding: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d H W"]:
        """Returns the map of the stage that is written."""
        cells = self.blocks(NHWC.from_map(embedding))
        return F.pixel_shuffle(NHWC.to_map(self.unmerge(self.norm(cells))), self.factor)
