"""`TracedBackbone`: finds a model's layers and their shapes by running it on the meta device."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from featinv_diffusion.backbones.base import LAST, Backbone, Preprocessing
from featinv_diffusion.errors import InputError
from featinv_diffusion.types import Features, FeatureSpec, Images

# ---- Which axis of a layer's output is what ------------------------------------------------------

Axes = Literal["NCHW", "NHWC", "NLC"]


@dataclass(frozen=True)
class Layout:
    """The axes of a layer's output, as the model declares them.

    Args:
        axes: `NCHW`, `NHWC`, or `NLC` for tokens in raster order.
        n_prefix: `NLC` only: class and register tokens that come before the map.
        grid: `NLC` only: (h, w) of the map.
    """

    axes: Axes
    n_prefix: int = 0
    grid: tuple[int, int] = (0, 0)

    def fits(self, shape: tuple[int, ...], size: tuple[int, int]) -> bool:
        """Whether an output of this shape can be a map of an input of (h, w) = `size`.

        This only refuses: a map is as wide for its height as the input, up to rounding.
        """
        if self.axes == "NLC":
            return len(shape) == 3 and shape[1] == self.n_prefix + self.grid[0] * self.grid[1]
        if len(shape) != 4:
            return False
        height, width = shape[2:] if self.axes == "NCHW" else shape[1:3]
        return abs(height * size[1] - width * size[0]) < max(size)

    def grid_of(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Returns (h, w) of the map in an output of this shape."""
        if self.axes == "NLC":
            return self.grid
        return (shape[2], shape[3]) if self.axes == "NCHW" else (shape[1], shape[2])

    def to_map(self, output: Tensor) -> Features:
        """Returns the map `[b, c, h, w]` without its prefix tokens."""
        if self.axes == "NCHW":
            return output
        if self.axes == "NHWC":
            return output.permute(0, 3, 1, 2).contiguous()
        return output[:, self.n_prefix :].transpose(1, 2).unflatten(2, self.grid).contiguous()

    def from_map(self, features: Features) -> Tensor:
        """Returns the map in this layout; prefix tokens, which the map does not hold, are zero."""
        if self.axes == "NCHW":
            return features
        if self.axes == "NHWC":
            return features.permute(0, 2, 3, 1)
        tokens = features.flatten(2).transpose(1, 2)
        return nn.functional.pad(tokens, (0, 0, self.n_prefix, 0))


def leaf_layout(module: nn.Module) -> Layout | None:
    """Returns the 4-d layout that the class of a childless module implies, None where it does not.

    Classes named `…2d`, PyTorch's and timm's, work on NCHW; linear layers and layer norms on the
    last axis, but for those of transformers whose `data_format` says otherwise.
    """
    if getattr(module, "data_format", None) == "channels_first":
        return Layout("NCHW")
    if any(cls.__name__.endswith("2d") for cls in type(module).__mro__):
        return Layout("NCHW")
    if isinstance(module, nn.GroupNorm):
        return Layout("NCHW")
    if isinstance(module, nn.Linear | nn.LayerNorm | nn.RMSNorm):
        return Layout("NHWC")
    return None


def is_elementwise(module: nn.Module) -> bool:
    """Whether a module is a leaf without weights, such as an activation, dropout or identity.

    Where its output has the shape of its input, it also has the axes of its input.
    """
    leaf = next(module.children(), None) is None
    return leaf and not module._parameters and not module._buffers


# ---- Shapes without arithmetic (a copy on the meta device) and layers by name (forward hooks) ----

M = TypeVar("M", bound=nn.Module)

TRACE_BATCH = 7  # no layer has 7 windows, heads or groups where the batch should be


class _Reached(Exception):
    """Ends a forward pass at the layer that was asked for."""


def to_meta(module: M) -> M:
    """Returns a copy on the meta device that shares no weight and costs no memory."""
    memo: dict[int, Any] = {id(b): b.to("meta") for b in module.buffers()}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    return copy.deepcopy(module, memo)


def first_tensor(output: Any) -> Tensor | None:
    """Returns a layer's output where it is a tensor, or the first tensor in it."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, dict):  # the outputs of transformers are dicts
        output = list(output.values())
    if isinstance(output, list | tuple) and output:
        return first_tensor(output[0])
    return None


def run_to_layer(module: nn.Module, run: Callable[[], Any]) -> Tensor:
    """Calls `run` and stops it at the first output of `module`, which is returned."""
    found: list[Tensor] = []

    def stop(_module: nn.Module, _inputs: Any, output: Any) -> None:
        tensor = first_tensor(output)
        if tensor is not None:
            found.append(tensor)
            raise _Reached

    handle = module.register_forward_hook(stop)
    try:
        run()
    except _Reached:
        return found[0]
    finally:
        handle.remove()
    raise RuntimeError("The forward pass did not reach the layer.")


@contextmanager
def record_layer(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the outputs of `module` during forward passes that run to their end."""
    outputs: list[Tensor] = []

    def record(_module: nn.Module, _inputs: Any, output: Any) -> None:
        tensor = first_tensor(output)
        if tensor is not None:
            outputs.append(tensor.clone())  # later layers may work in place

    handle = module.register_forward_hook(record)
    try:
        yield outputs
    finally:
        handle.remove()


class LayerTrace:
    """Finds, in one forward pass on the meta device, every module whose output is a map.

    Axes come from the class of a leaf, through modules that work elementwise, and for blocks from
    the model's declaration. A block whose shape contradicts that, or fits another order of axes as
    well, is left out unless the model names it among its feature stages.

    Args:
        model: on the meta device.
        declared: the model's layouts, at most one of 3 and one of 4 dimensions.
        size: (h, w) of the input.
        stages: module paths that the model itself declares as maps in its 4-d layout.
    """

    def __init__(
        self,
        model: nn.Module,
        declared: Sequence[Layout],
        size: tuple[int, int],
        stages: Sequence[str] = (),
    ):
        self.model, self.declared, self.size, self.stages = model, declared, size, stages
        self.found: dict[str, tuple[Layout, tuple[int, ...]]] = {}
        self._known: dict[int, tuple[Tensor, Layout]] = {}  # holds the tensor: its id stays unique

    def run(self, forward: Callable[[], Any]) -> dict[str, tuple[Layout, tuple[int, ...]]]:
        """Returns layout and output shape by module path, in the model's order."""
        handles = [
            module.register_forward_hook(self._hook(path))
            for path, module in self.model.named_modules()
            if path
        ]
        try:
            forward()
        finally:
            for handle in handles:
                handle.remove()
        paths = (path for path, _ in self.model.named_modules())
        return {p: self.found[p] for p in paths if p in self.found and not self._is_matrix(p)}

    def _is_matrix(self, path: str) -> bool:
        """Whether an output is a matrix of each token with each other, such as of attention.

        Its sides are the number of cells of a map. Where a map may be that large as well, it is
        one, unless a linear layer of a model of tokens made it.
        """
        layout, shape = self.found[path]
        height, width = layout.grid_of(shape)
        cells = [h * w for h, w in (x.grid_of(s) for x, s in self.found.values()) if h * w > 1]
        if layout.axes == "NLC" or height != width or height not in cells:
            return False
        declared = {x.axes for x in self.declared}
        by_linear = "NLC" in declared and layout.axes not in declared
        return by_linear or self.size[0] % height != 0

    def _hook(self, path: str) -> Callable[[nn.Module, Any, Any], None]:
        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            tensor = first_tensor(output)
            if tensor is None or tensor.ndim < 3 or tensor.shape[0] != TRACE_BATCH:
                return
            layout = self._layout(path, module, first_tensor(inputs), tensor)
            if layout is not None and layout.fits(tuple(tensor.shape), self.size):
                self._known[id(tensor)] = (tensor, layout)
                self.found.setdefault(path, (layout, tuple(tensor.shape)))

        return note

    def _layout(
        self, path: str, module: nn.Module, source: Tensor | None, output: Tensor
    ) -> Layout | None:
        if id(output) in self._known:
            return self._known[id(output)][1]
        if output.ndim == 3:
            return next((x for x in self.declared if x.axes == "NLC"), None)
        if next(module.children(), None) is None:
            return leaf_layout(module) or self._passed_through(module, source, output)
        return self._block_layout(path, tuple(output.shape))

    def _passed_through(
        self, module: nn.Module, source: Tensor | None, output: Tensor
    ) -> Layout | None:
        same = source is not None and source.shape == output.shape
        if not (same and is_elementwise(module) and id(source) in self._known):
            return None
        return self._known[id(source)][1]

    def _block_layout(self, path: str, shape: tuple[int, ...]) -> Layout | None:
        declared = next((x for x in self.declared if x.axes != "NLC"), None)
        if declared is None or path in self.stages:
            return declared
        other = Layout("NHWC" if declared.axes == "NCHW" else "NCHW")
        return None if other.fits(shape, self.size) else declared


@dataclass(frozen=True)
class LastLayer:
    """The last layer of a model.

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
    """A backbone that shows any layer of a model; adapters say how the model runs.

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
        """Runs the model once on the meta device and returns its last layer."""

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

    def _features(self, images: Images) -> Features:
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

    def layout(self, layer: str = LAST) -> Layout:
        """As `Backbone.layout`."""
        if layer == self.spec.layer:
            return self._layout
        if layer == LAST:
            return self._last.layout
        found = self._trace_layers(*self._on_meta())
        if layer not in found:
            known = layer in dict(self.model.named_modules())
            problem = "does not hold a spatial map in" if known else "is not a layer of"
            raise layer_error(self, layer, problem)
        return found[layer][1]

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
            raise layer_error(self, layer, "is not a layer of")
        ghost, pixels = self._on_meta()
        try:
            with torch.no_grad():
                self._last = ghost._inspect(pixels)
        except InputError:
            raise
        except (AssertionError, RuntimeError, ValueError) as error:
            if "channel" in str(error):
                self._check_channels()
            raise InputError(
                f"{self.name!r} must accept images of {self.input_size[0]}×{self.input_size[1]} "
                f"pixels, but refuses: {error}"
            ) from error
        self._layout = self._last.layout
        self.spec = self._last_spec = self._make_spec(LAST, self._layout, self._last.shape)
        if layer != LAST:
            self._select(layer, ghost, pixels)

    def _check_channels(self) -> None:
        """Raises `InputError` where the model reads other images than RGB."""
        convolutions = (m for m in self.model.modules() if isinstance(m, nn.Conv2d))
        first = next(convolutions, None)
        if first is not None and first.in_channels != 3:
            raise InputError(
                f"{self.name!r} must read RGB images, which have 3 channels, but its first layer "
                f"reads {first.in_channels}. Load it with 3 (in_chans=3 in timm, num_channels=3 in "
                "transformers)."
            )

    def _select(self, layer: str, ghost: TracedBackbone, pixels: Tensor) -> None:
        found = self._trace_layers(ghost, pixels)
        if layer not in found:
            raise layer_error(self, layer, "does not hold a spatial map in")
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


def layer_error(backbone: Backbone, layer: str, problem: str) -> InputError:
    """Returns the error of a layer that cannot be read, with the nearest names."""
    paths = [path for path, _ in backbone.model.named_modules() if path]
    near = get_close_matches(layer, [p for p in paths if p != layer], n=3, cutoff=0.4)
    nearest = f" Nearest names: {', '.join(near)}." if near else ""
    return InputError(
        f"{layer!r} {problem} {backbone.name!r}.{nearest} "
        f"The default is {LAST!r}; `featinv layers {backbone.name}` lists all that can be used."
    )
