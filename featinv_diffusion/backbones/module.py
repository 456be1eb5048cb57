"""Anybody's torch module as a `Backbone`: any layer whose output is a map, tokens or NHWC."""

from __future__ import annotations

import logging
import runpy
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from featinv_diffusion.backbones.base import LAST, Backbone, Preprocessing
from featinv_diffusion.backbones.traced import (
    Axes,
    Layout,
    first_tensor,
    layer_error,
    leaf_layout,
    record_layer,
    run_to_layer,
)
from featinv_diffusion.errors import InputError
from featinv_diffusion.files import expand_path
from featinv_diffusion.trust import FACTORY
from featinv_diffusion.types import Features, FeatureSpec, Images

logger = logging.getLogger(__name__)

Normalise = Callable[[Images], Tensor]
MAX_PREFIX = 32
"""Class and register tokens that a grid is looked for behind."""
BATCH_TOLERANCE = 1e-3
"""Greatest change of a map, relative to its own size, that company in a batch may make."""


def wrap_module(
    model: nn.Module,
    layer: str = LAST,
    *,
    input_size: int | tuple[int, int],
    preprocess: tuple[Any, Any] | Normalise,
    classify: Callable[[Any], Tensor] | bool | None = None,
    labels: tuple[str, ...] | None = None,
    axes: Axes | None = None,
    n_prefix: int | None = None,
    grid: tuple[int, int] | None = None,
    name: str | None = None,
) -> Backbone:
    """Makes a backbone of any PyTorch module; the module itself is frozen, in evaluation mode.

    Args:
        model: takes one batch of images `[b, 3, h, w]`.
        layer: dotted path of the module that is read, or `last` for the model's own output. Its
            output must be a tensor, or have one first: a map `[b, c, h, w]` or `[b, h, w, c]`, or
            tokens `[b, n, c]` in raster order behind any prefix tokens.
        input_size: (height, width) or side in pixels; pictures are resized to it.
        preprocess: (mean, std) per channel of RGB in [0, 1], or a differentiable function from
            images in [0, 1] of that size to what the model takes.
        classify: function from the model's output to class scores `[b, k]`; True where the output
            is class scores; None for a model that does not classify.
        labels: names of the classes.
        axes: `NCHW`, `NHWC` or `NLC`; default is found from the shape and logged where that is a
            guess.
        n_prefix, grid: of tokens: how many come before the map, and its (height, width).
        name: what the backbone is called in specs and files; default is the class's name.

    Raises:
        InputError: no such layer, an output that is no map, a model that lets no gradient through
            to the image or whose maps depend on the rest of the batch.
    """
    size = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
    if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
        raise InputError(f"input_size must be one or two positive whole numbers, got {input_size}.")
    return ModuleBackbone(
        model,
        name=name or type(model).__name__,
        layer=layer,
        preprocessing=_to_preprocessing((size[0], size[1]), preprocess),
        classify=classify,
        labels=labels,
        layout=_Wanted(axes, n_prefix, grid),
    )


def make_by_factory(name: str, layer: str, *, trust_code: bool) -> Backbone:
    """Calls the function that `FILE.py:FUNCTION` or `MODULE:FUNCTION` names, without arguments.

    The backbone is called by that name, so that it can be made again from a manifest's words.

    Raises:
        InputError: a module that is not trusted, no such file or function, a function that fails
            or gives no backbone, or one of another layer.
    """
    match = FACTORY.fullmatch(name)
    assert match is not None
    place, function = match["place"], match["function"]
    if not place.endswith(".py") and not trust_code:
        raise InputError(
            f"The backbone {name!r} runs the code of the module {place!r}. Say --trust-code (or "
            "trust_code=True) if you trust it, or name your file as path/to/file.py:function."
        )
    try:
        if place.endswith(".py"):
            path = expand_path(place)
            if not path.is_file():
                raise InputError(f"The backbone {name!r} must be in a file, but {path} is none.")
            made = runpy.run_path(str(path)).get(function)
        else:
            made = getattr(import_module(place), function, None)
        if not callable(made):
            raise InputError(f"{place} must have a function {function!r}, but has none.")
        backbone = made()
    except InputError:
        raise
    except Exception as error:  # whatever the user's code raises
        raise InputError(
            f"The backbone {name!r} could not be made: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(backbone, Backbone):
        raise InputError(
            f"{function!r} of {place} must return a Backbone, such as wrap_module makes, but gives "
            f"a {type(backbone).__name__}."
        )
    if layer not in (LAST, backbone.spec.layer):
        raise InputError(
            f"The backbone {name!r} reads its layer {backbone.spec.layer!r}, but the layer "
            f"{layer!r} was asked for. Leave that out, or change the function."
        )
    backbone.name = name
    backbone.spec = replace(backbone.spec, backbone=name)
    return backbone


def _to_preprocessing(size: tuple[int, int], given: Any) -> Preprocessing:
    if callable(given):
        return _OwnPreprocessing(size, (0.0,) * 3, (1.0,) * 3, function=given)  # pyright: ignore[reportArgumentType]
    try:
        mean, std = (tuple(float(value) for value in values) for values in given)
    except (TypeError, ValueError):
        mean = std = ()
    if len(mean) != 3 or len(std) != 3 or not all(value > 0 for value in std):
        raise InputError(
            "preprocess must be a pair (mean, std) of three numbers each, the latter positive, or "
            f"a function of images, got {given!r}."
        )
    return Preprocessing(size, mean, std)


@dataclass(frozen=True)
class _OwnPreprocessing(Preprocessing):
    """Resizes, then calls a function of the user's."""

    function: Normalise | None = None

    def __call__(self, images: Images) -> Tensor:
        assert self.function is not None
        return self.function(super().__call__(images))


@dataclass(frozen=True)
class _Wanted:
    """What a user says of a layer's layout; None is to be found."""

    axes: Axes | None
    n_prefix: int | None
    grid: tuple[int, int] | None


class ModuleBackbone(Backbone):
    """A backbone of a module that nothing is known of; made by `wrap_module`, which checks it."""

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str,
        layer: str,
        preprocessing: Preprocessing,
        classify: Callable[[Any], Tensor] | bool | None,
        labels: tuple[str, ...] | None,
        layout: _Wanted,
    ):
        super().__init__(model.requires_grad_(False), name=name, preprocessing=preprocessing)
        self._classify, self._labels = classify, labels
        if layer != LAST and layer not in dict(model.named_modules()):
            raise layer_error(self, layer, "is not a layer of")
        images = self._probe(2)
        output = self._output(images, layer)
        self._layout = self._find_layout(layer, output, layout)
        channels, *cells = self._layout.to_map(output).shape[1:]
        self.spec = FeatureSpec(name, layer, channels, (cells[0], cells[1]))
        self._check_alone(images, output)
        self.check_gradient()
        self._check_scores(images)

    @property
    def has_head(self) -> bool:
        """Whether a way to class scores was given."""
        return self._classify not in (None, False)

    def _features(self, images: Images) -> Features:
        return self._layout.to_map(self._output(images, self.spec.layer))

    def features_and_logits(self, images: Images) -> tuple[Features, Float[Tensor, "b k"] | None]:
        """Returns `features` and `classify` (None without a head) of one forward pass."""
        if not self.has_head:
            return self._features(images), None
        pixels = self.preprocess(images)
        with record_layer(self._module(self.spec.layer)) as outputs:
            scores = self._run(pixels)
        return self._layout.to_map(outputs[0]), scores

    def layers(self) -> list[FeatureSpec]:
        """Returns every module whose output is a map for certain, in the model's order."""
        found: dict[str, Tensor] = {}

        def keep(path: str) -> Callable[..., None]:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                if (tensor := first_tensor(output)) is not None:
                    found.setdefault(path, tensor)

            return hook

        handles = [m.register_forward_hook(keep(p)) for p, m in self.model.named_modules() if p]
        try:
            with torch.no_grad():
                self.model(self.preprocess(self._probe(2)))
        finally:
            for handle in handles:
                handle.remove()
        specs = []
        for path, _ in self.model.named_modules():
            candidates = self._candidates(path, found[path]) if path in found else []
            if len({candidate.axes for candidate in candidates}) == 1:
                channels, *cells = candidates[0].to_map(found[path]).shape[1:]
                if cells != [1, 1]:
                    specs.append(FeatureSpec(self.name, path, channels, (cells[0], cells[1])))
        return specs

    @torch.no_grad()
    def layout(self, layer: str = LAST) -> Layout:
        """As `Backbone.layout`."""
        if layer == self.spec.layer:
            return self._layout
        if layer != LAST and layer not in dict(self.model.named_modules()):
            raise layer_error(self, layer, "is not a layer of")
        output = self._output(self._probe(1), layer)
        return self._find_layout(layer, output, _Wanted(None, None, None))

    def _run(self, pixels: Tensor) -> Tensor:
        output = self.model(pixels)
        if callable(self._classify):
            return self._classify(output)
        scores = first_tensor(output)
        assert scores is not None
        return scores

    def _class_names(self) -> tuple[str, ...] | None:
        return self._labels

    def _module(self, layer: str) -> nn.Module:
        return self.model if layer == LAST else self.model.get_submodule(layer)

    def _output(self, images: Images, layer: str) -> Tensor:
        pixels = self.preprocess(images)
        try:
            return run_to_layer(self._module(layer), lambda: self.model(pixels))
        except RuntimeError as error:
            raise InputError(
                f"{self.name!r} must take a batch of images of the shape {list(pixels.shape)} and "
                f"reach the layer {layer!r}, but: {' '.join(str(error).split())}"
            ) from error

    # What is found out about a layer, and what is checked.

    def _probe(self, n: int) -> Images:
        generator = torch.Generator().manual_seed(0)
        return torch.rand(n, 3, *self.input_size, generator=generator).to(self.device)

    def _find_layout(self, layer: str, output: Tensor, wanted: _Wanted) -> Layout:
        candidates = [x for x in self._candidates(layer, output) if _agrees(x, wanted)]
        if output.ndim == 3 and wanted.grid is not None:
            prefix = output.shape[1] - wanted.grid[0] * wanted.grid[1]
            candidates = [Layout("NLC", prefix, wanted.grid)] if prefix >= 0 else []
            candidates = [x for x in candidates if wanted.n_prefix in (None, prefix)]
        if not candidates:
            raise InputError(
                f"The output of {layer!r} in {self.name!r} must be a map [b, c, h, w], "
                "[b, h, w, c] or tokens [b, n, c] with the proportions of the input, but has the "
                f"shape {list(output.shape)}. Name another layer, or give axes, n_prefix or grid."
            )
        axes = {candidate.axes for candidate in candidates}
        if len(axes) > 1:
            raise InputError(
                f"The output of {layer!r} in {self.name!r}, of shape {list(output.shape)}, can be "
                "NCHW or NHWC. Give axes."
            )
        chosen = candidates[0]
        if chosen.axes == "NLC" and wanted.n_prefix is None and wanted.grid is None:
            logger.warning(
                "The %d tokens of %r are read as a grid of %d×%d with n_prefix=%d; give n_prefix "
                "or grid where that is wrong.",
                output.shape[1],
                layer,
                *chosen.grid,
                chosen.n_prefix,
            )
        return chosen

    def _candidates(self, layer: str, output: Tensor) -> list[Layout]:
        """Returns the layouts that a layer's output can have, likeliest first."""
        if output.ndim == 4:
            module = self._module(layer)
            implied = leaf_layout(module) if next(module.children(), None) is None else None
            options = [implied] if implied else [Layout("NCHW"), Layout("NHWC")]
            return [x for x in options if x.fits(tuple(output.shape), self.input_size)]
        if output.ndim != 3:
            return []
        height, width = self.input_size
        found = []
        for n_prefix in range(min(MAX_PREFIX, output.shape[1] - 1) + 1):
            n_cells = output.shape[1] - n_prefix
            h = round((n_cells * height / width) ** 0.5)
            if h > 0 and n_cells % h == 0:
                layout = Layout("NLC", n_prefix, (h, n_cells // h))
                if abs(h * width - (n_cells // h) * height) < max(height, width) and h > 1:
                    found.append(layout)
        return found

    @torch.no_grad()
    def _check_alone(self, images: Images, together: Tensor) -> None:
        alone = torch.cat([self._output(image[None], self.spec.layer) for image in images])
        change = float((alone - together).abs().max())
        if change > BATCH_TOLERANCE * max(float(together.abs().max()), 1e-12):
            raise InputError(
                f"The map of a picture must not depend on the rest of its batch, but that of "
                f"{self.name!r} changes by {change:.3g}. Look for statistics of the batch."
            )

    @torch.no_grad()
    def _check_scores(self, images: Images) -> None:
        if not self.has_head:
            return
        scores: Any = self._run(self.preprocess(images))
        if not isinstance(scores, Tensor) or scores.ndim != 2 or len(scores) != len(images):
            shape = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise InputError(f"Class scores must be a tensor [b, k], but classify gives {shape}.")
        if self._labels is not None and len(self._labels) != scores.shape[1]:
            raise InputError(
                f"There must be one label per class, got {len(self._labels)} for "
                f"{scores.shape[1]} classes."
            )


def _agrees(layout: Layout, wanted: _Wanted) -> bool:
    return wanted.axes in (None, layout.axes) and (
        wanted.n_prefix is None or layout.axes != "NLC" or layout.n_prefix == wanted.n_prefix
    )
