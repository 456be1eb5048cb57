"""`TracedBackbone`: a model whose layers and their shapes are found by running it on nothing."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from difflib import get_close_matches

import torch
from jaxtyping import Float
from torch import Tensor, nn

from featinv_diffusion.backbones.base import LAST, Backbone
from featinv_diffusion.backbones.layout import Layout
from featinv_diffusion.backbones.preprocessing import Preprocessing
from featinv_diffusion.backbones.tracing import (
    TRACE_BATCH,
    LayerTrace,
    record_layer,
    run_to_layer,
    to_meta,
)
from featinv_diffusion.errors import InputError
from featinv_diffusion.types import Features, FeatureSpec, Images


@dataclass(frozen=True)
class LastLayer:
    """What a model is at its end.

    Args:
        layout: axes of the output.
        shape: of the output, with any batch.
        has_head: whether the model classifies.
        head_reads_map: whether its class scores are a function of the map alone.
        is_extracted: timm only: the map is not the output of `forward_features` but must be asked
            for with `forward_intermediates`.
    """

    layout: Layout
    shape: tuple[int, ...]
    has_head: bool
    head_reads_map: bool
    is_extracted: bool = False


class TracedBackbone(Backbone):
    """A backbone that shows any layer of a model, of which an adapter says how it runs.

    The model is frozen in place. Shapes are found on the meta device, so that building one costs
    no forward pass.

    Args:
        layer: `last` or a dotted module path inside the model.
        model, name, preprocessing: as in `Backbone`.

    Raises:
        InputError: unknown layer, layer without a map, input size that the model refuses.
    """

    def __init__(self, model: nn.Module, *, name: str, layer: str, preprocessing: Preprocessing):
        super().__init__(model.requires_grad_(False), name=name, preprocessing=preprocessing)
        self._describe(layer)

    # What an adapter supplies.

    @abstractmethod
    def _inspect(self, pixels: Tensor) -> LastLayer:
        """Runs the model once, on the meta device, and says what its last layer is."""

    @abstractmethod
    def _run_last(self, pixels: Tensor) -> Tensor:
        """Returns the last layer's output in the model's own layout."""

    @abstractmethod
    def _run_last_and_head(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns what `_run_last` and `_run` return, in one forward pass."""

    @abstractmethod
    def _run_head(self, output: Tensor) -> Tensor:
        """Returns the class scores of an output of the last layer with zeros for prefix tokens."""

    @abstractmethod
    def _declared_layouts(self) -> list[Layout]:
        """Returns the layouts in which the model's blocks hold maps."""

    def _declared_stages(self) -> list[str]:
        """Returns the paths of blocks that the model itself declares as feature maps."""
        return []

    # What everyone else uses.

    @property
    def last_layout(self) -> Layout:
        """The axes of the last layer's output in the model."""
        return self._last.layout

    @property
    def has_head(self) -> bool:
        """Whether the model classifies."""
        return self._last.has_head

    @property
    def head_reads_map(self) -> bool:
        """Whether the class scores are a function of the features."""
        return self._last.head_reads_map and self.spec.layer == LAST

    def features(self, images: Images) -> Features:
        """Returns the map of `spec`; a layer before the last ends the forward pass there."""
        pixels = self.preprocess(images)
        if self.spec.layer == LAST:
            return self._layout.to_map(self._run_last(pixels))
        layer = self.model.get_submodule(self.spec.layer)
        return self._layout.to_map(run_to_layer(layer, lambda: self._run(pixels)))

    def logits(self, features: Features) -> Float[Tensor, "b k"]:
        """As `Backbone.logits`, where the head reads the map."""
        if not self.head_reads_map:
            return super().logits(features)
        self._require_head()
        self.spec.check_features(features)
        return self._run_head(self._layout.from_map(features.to(self.dtype)))

    def features_and_logits(self, images: Images) -> tuple[Features, Float[Tensor, "b k"] | None]:
        """Returns `features` and `classify` (None without a head) of one forward pass."""
        if not self.has_head:
            return self.features(images), None
        pixels = self.preprocess(images)
        if self.spec.layer == LAST:
            output, scores = self._run_last_and_head(pixels)
            return self._layout.to_map(output), scores
        with record_layer(self.model.get_submodule(self.spec.layer)) as outputs:
            scores = self._run(pixels)
        return self._layout.to_map(outputs[0]), scores

    def layers(self) -> list[FeatureSpec]:
        """Returns `last` and every module whose output is a spatial map, in the model's order.

        Identities, dropout and what has been pooled to one cell are left out.
        """
        found = self._trace_layers(*self._on_meta())
        specs = [spec for path, (spec, _) in found.items() if self._is_of_interest(path, spec)]
        return [self._last_spec, *specs]

    # How it knows.

    def _on_meta(self) -> tuple[TracedBackbone, Tensor]:
        ghost = to_meta(self)
        return ghost, torch.zeros(TRACE_BATCH, 3, *self.input_size, dtype=self.dtype, device="meta")

    def _describe(self, layer: str) -> None:
        if layer != LAST and layer not in dict(self.model.named_modules()):
            raise self._layer_error(layer, "is not a layer of")
        ghost, pixels = self._on_meta()
        try:
            with torch.no_grad():
                self._last = ghost._inspect(pixels)
        except InputError:
            raise
        except (AssertionError, RuntimeError, ValueError) as error:
            raise InputError(
                f"{self.name!r} must accept images of {self.input_size[0]}×{self.input_size[1]} "
                f"pixels, but refuses: {error}"
            ) from error
        self._layout = self._last.layout
        self.spec = self._last_spec = self._make_spec(LAST, self._layout, self._last.shape)
        if layer != LAST:
            self._select(layer, ghost, pixels)

    def _select(self, layer: str, ghost: TracedBackbone, pixels: Tensor) -> None:
        found = self._trace_layers(ghost, pixels)
        if layer not in found:
            raise self._layer_error(layer, "does not hold a spatial map in")
        self.spec, self._layout = found[layer]

    def _trace_layers(
        self, ghost: TracedBackbone, pixels: Tensor
    ) -> dict[str, tuple[FeatureSpec, Layout]]:
        trace = LayerTrace(
            ghost.model,
            self._declared_layouts(),
            self.input_size,
            self._declared_stages(),
        )
        with torch.no_grad():
            found = trace.run(lambda: ghost._run(pixels))
        return {
            path: (self._make_spec(path, layout, shape), layout)
            for path, (layout, shape) in found.items()
        }

    def _is_of_interest(self, path: str, spec: FeatureSpec) -> bool:
        module = self.model.get_submodule(path)
        changes = not isinstance(module, nn.Identity) and not type(module).__name__.startswith(
            "Drop"
        )
        return changes and (spec.grid != (1, 1) or self._last_spec.grid == (1, 1))

    def _make_spec(self, layer: str, layout: Layout, shape: tuple[int, ...]) -> FeatureSpec:
        channels, height, width = layout.to_map(torch.empty(shape, device="meta")).shape[1:]
        return FeatureSpec(self.name, layer, channels, (height, width))

    def _layer_error(self, layer: str, problem: str) -> InputError:
        paths = [path for path, _ in self.model.named_modules() if path]
        near = get_close_matches(layer, [p for p in paths if p != layer], n=3, cutoff=0.4)
        nearest = f" Nearest names: {', '.join(near)}." if near else ""
        return InputError(
            f"{layer!r} {problem} {self.name!r}.{nearest} "
            f"The default is {LAST!r}; `featinv layers {self.name}` lists all that can be used."
        )
