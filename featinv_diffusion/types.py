"""The nouns that everything shares: `Images`, `Features` and `FeatureSpec`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from featinv_diffusion.errors import InputError

Images = Float[Tensor, "b 3 height width"]
"""RGB in [0, 1]. Only `featinv_diffusion.images` knows other ranges and PIL."""

Features = Float[Tensor, "b c h w"]
"""What a layer holds, kind `map`: channels first, prefix tokens dropped."""


@dataclass(frozen=True)
class FeatureSpec:
    """Where features come from and which shape they have; wiring compares two of these.

    Args:
        backbone: the name the backbone was loaded by, e.g. `tiny/convnext`.
        layer: dotted module path, or `last` for the last spatial map before pooling.
        kind: `map` is `[b, c, h, w]`; `tokens` and `queries` are `[b, n, c]`.
        channels: c.
        grid: (h, w) of the map; (n, 1) where the kind has no grid.
    """

    backbone: str
    layer: str
    channels: int
    grid: tuple[int, int]
    kind: Literal["map", "tokens", "queries"] = "map"

    def __str__(self) -> str:
        shape = (
            f"{self.channels}×{self.grid[0]}×{self.grid[1]}"
            if self.kind == "map"
            else f"{self.grid[0]}×{self.channels}"
        )
        return f"{self.kind} of {self.backbone} at layer {self.layer!r}, {shape}"

    def check_features(self, features: Tensor) -> None:
        """Raises `InputError` unless `features` are a finite batch of this shape."""
        want = (self.channels, *self.grid) if self.kind == "map" else (self.grid[0], self.channels)
        if tuple(features.shape[1:]) != want:
            raise InputError(
                f"Features must have shape [batch, {', '.join(map(str, want))}] ({self}), "
                f"but came with shape {list(features.shape)}. "
                "Take them from the backbone and layer that the inverter was trained on."
            )
        if not bool(features.isfinite().all()):
            raise InputError(
                f"Features must be finite ({self}), but NaN or infinite values came. "
                "Look for overflow in half precision or a broken edit."
            )

    def check_matches(self, other: FeatureSpec) -> None:
        """Raises `InputError` unless `other` can feed what was trained on this spec."""
        mine = (self.layer, self.kind, self.channels, self.grid)
        if (other.layer, other.kind, other.channels, other.grid) != mine:
            raise InputError(
                f"The inverter reads a {self}, but the features are a {other}. "
                "Use the pipeline that was trained for this backbone and layer."
            )
