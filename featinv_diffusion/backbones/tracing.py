"""Shapes without arithmetic (a copy on the meta device) and layers by name (forward hooks)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn

from featinv_diffusion.backbones.layout import Layout, is_elementwise, leaf_layout

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
    """Returns the tensor that a layer's output is, or starts with."""
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
        return {p: self.found[p] for p, _ in self.model.named_modules() if p in self.found}

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
