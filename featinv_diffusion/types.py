"""The nouns that everything shares: `Images`, `Features` and `FeatureSpec`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from jaxtyping import Float
from msgspec import Meta
from torch import Tensor

from featinv_diffusion.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

Images = Float[Tensor, "b 3 height width"]
"""RGB in [0, 1]. Only `featinv_diffusion.images` knows other ranges and PIL."""

Features = Float[Tensor, "b c h w"]
"""What a layer holds, kind `map`: channels first, prefix tokens dropped."""


_Length = Annotated[int, Meta(ge=1, le=65_536)]  # of what a file may declare


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
    channels: _Length
    grid: tuple[_Length, _Length]
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
                f"got the shape {list(features.shape)}. "
                "Take them from the backbone and layer that the inverter was trained on."
            )
        if not bool(features.isfinite().all()):
            raise InputError(
                f"Features must be finite ({self}), got NaN or infinite values. "
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


@dataclass(frozen=True, eq=False)
class Source:
    """The picture that a feature map comes from.

    Args:
        name: what its noise depends on: the file name, or the id in a data set.
        location: where the picture is; None where it was given in memory.
        square: the square that the backbone saw; None where it was given as a tensor.
        size: (width, height) of the whole picture.
        logits: class scores `[k]` that the backbone gives it; None without a head.
    """

    name: str
    location: str | None = None
    square: Image | None = None
    size: tuple[int, int] | None = None
    logits: Tensor | None = None


class FeatureMaps(Tensor):
    """Feature maps `[b, c, h, w]` that know the pictures they come from.

    An ordinary tensor in every other respect. Slices keep their pictures, and so does arithmetic
    that keeps the number of maps, so that an edited map is sampled with the noise of its original.

    Attributes:
        sources: one per map.
    """

    sources: tuple[Source, ...]

    @staticmethod
    def of(features: Tensor, sources: Sequence[Source]) -> FeatureMaps:
        """Attaches one picture to each map."""
        maps = features.as_subclass(FeatureMaps)
        maps.sources = tuple(sources)
        return maps

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        if not isinstance(result, FeatureMaps):
            return result
        sources = _sources_after(func, args, kwargs or {})
        if result.ndim == 4 and sources is not None and len(sources) == len(result):
            result.sources = sources
            return result
        return result.as_subclass(Tensor)

    def __deepcopy__(self, memo: Any) -> FeatureMaps:
        return FeatureMaps.of(self.as_subclass(Tensor).clone(), self.sources)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return FeatureMaps.of, (self.as_subclass(Tensor), self.sources)

    def __repr__(self, **_: Any) -> str:
        names = ", ".join(source.name or "unnamed" for source in self.sources[:3])
        more = ", …" if len(self.sources) > 3 else ""
        shape = "×".join(map(str, self.shape))
        return f"FeatureMaps({shape}, {self.dtype}, {self.device}, of {names}{more})"


def _sources_after(func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Source, ...] | None:
    """Returns the pictures of what a function of tensors gives; None where they are not known."""
    if func is torch.cat and not kwargs.get("dim", args[1] if len(args) > 1 else 0):
        parts = [getattr(part, "sources", None) for part in args[0]]
        return None if None in parts else tuple(source for part in parts for source in part or ())
    sources = next((s for arg in args if (s := getattr(arg, "sources", None)) is not None), None)
    if sources is None or func is not Tensor.__getitem__:
        return sources
    index = args[1][0] if isinstance(args[1], tuple) else args[1]
    if isinstance(index, slice):
        return sources[index]
    if isinstance(index, Tensor | list) and not isinstance(index, FeatureMaps):
        chosen = torch.arange(len(sources))[index]
        return tuple(sources[i] for i in chosen.tolist()) if chosen.ndim == 1 else None
    return sources if index is Ellipsis else None
