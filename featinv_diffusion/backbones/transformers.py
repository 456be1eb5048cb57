"""Vision towers of transformers as a `Backbone`: one adapter, one line of facts per family."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from timm.data import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from featinv_diffusion.backbones.base import LAST
from featinv_diffusion.backbones.layout import Axes, Layout
from featinv_diffusion.backbones.preprocessing import Preprocessing
from featinv_diffusion.backbones.timm import class_names
from featinv_diffusion.backbones.traced import LastLayer, TracedBackbone
from featinv_diffusion.errors import InputError

Statistics = tuple[tuple[float, ...], tuple[float, ...]]
IMAGENET: Statistics = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
HALF: Statistics = (IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD)
CLIP: Statistics = (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)


@dataclass(frozen=True)
class Tower:
    """What the classes of a model type declare.

    Args:
        n_prefix: number of class, distillation and register tokens before the patches.
        statistics: (mean, std) where the model comes without an image processor's configuration.
        interpolation: likewise.
        asks_to_interpolate: whether other input sizes need `interpolate_pos_encoding=True`.
        last_axes: of the last hidden state.
        block_axes: of what the blocks hand on.
    """

    n_prefix: Callable[[PretrainedConfig], int]
    statistics: Statistics
    interpolation: str = "bicubic"
    asks_to_interpolate: bool = True
    last_axes: Axes = "NLC"
    block_axes: Axes = "NLC"


TOWERS: dict[str, Tower] = {
    "clip_vision_model": Tower(lambda c: 1, CLIP),
    "deit": Tower(lambda c: 2, IMAGENET),
    "dinov2": Tower(lambda c: 1, IMAGENET, asks_to_interpolate=False),
    "dinov2_with_registers": Tower(
        lambda c: 1 + c.num_register_tokens, IMAGENET, asks_to_interpolate=False
    ),
    "dinov3_vit": Tower(
        lambda c: 1 + c.num_register_tokens, IMAGENET, "bilinear", asks_to_interpolate=False
    ),
    "ijepa": Tower(lambda c: 0, HALF, "bilinear"),
    "internvl_vision": Tower(lambda c: 1, IMAGENET, asks_to_interpolate=False),
    "sam_vision_model": Tower(
        lambda c: 0,
        IMAGENET,
        "bilinear",
        asks_to_interpolate=False,
        last_axes="NCHW",
        block_axes="NHWC",
    ),
    "siglip_vision_model": Tower(lambda c: 0, HALF),
    "vit": Tower(lambda c: 1, HALF, "bilinear"),
}
"""By `config.model_type`."""

TOWER_ATTRIBUTES = ("vision_model", "vision_encoder", "vision_tower")
"""Where models of transformers keep the tower that they are built on."""

MEAN_POOLED = (
    "CLIPForImageClassification",
    "IJepaForImageClassification",
    "SiglipForImageClassification",
)
"""Classes whose `classifier` reads the mean of the patch tokens and nothing else."""

PILLOW_RESAMPLING = {2: "bilinear", 3: "bicubic"}


class TransformersBackbone(TracedBackbone):
    """A vision tower of transformers, with its classification head where it has one.

    `last` is the `last_hidden_state` of the tower without its prefix tokens. Of SAM that is the map
    behind the neck, all that its decoder sees; `layers.11` of its base model is the one before.

    Args:
        model: a vision model, a model for image classification, or a larger model, of which the
            vision tower is used.
        name, layer: as in `Backbone`.
        input_size: (h, w); default the size of the processor or of the model.
        processor: settings of the image processor, empty where there are none.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str,
        layer: str = LAST,
        input_size: tuple[int, int] | None = None,
        processor: Mapping[str, Any],
    ):
        tower = find_tower(model, name)
        model = model if _classifies(model) else tower
        preprocessing = read_preprocessing(tower.config, processor)
        if input_size is not None:
            preprocessing = replace(preprocessing, size=input_size)
        super().__init__(model, name=name, layer=layer, preprocessing=preprocessing)

    @property
    def tower(self) -> PreTrainedModel:
        """The part of the model whose output is the last hidden state."""
        return find_tower(self.model, self.name)

    @property
    def _config(self) -> Any:
        return self.tower.config

    @property
    def _hf(self) -> Any:
        return self.model

    def _run(self, pixels: Tensor) -> Tensor:
        output = self._call(self.model, pixels)
        return output.logits if _classifies(self.model) else output.last_hidden_state

    def _run_last(self, pixels: Tensor) -> Tensor:
        return self._call(self.tower, pixels).last_hidden_state

    def _run_last_and_head(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        states: list[Tensor] = []
        handle = self.tower.register_forward_hook(
            lambda _module, _inputs, output: states.append(output.last_hidden_state)
        )
        try:
            scores = self._run(pixels)
        finally:
            handle.remove()
        return states[0], scores

    def _run_head(self, output: Tensor) -> Tensor:
        return self._hf.classifier(output[:, self._last.layout.n_prefix :].mean(dim=1))

    def _call(self, module: nn.Module, pixels: Tensor) -> Any:
        config = self._config
        if TOWERS[config.model_type].asks_to_interpolate and self.input_size != _image_size(config):
            return module(pixels, interpolate_pos_encoding=True)
        return module(pixels)

    def _inspect(self, pixels: Tensor) -> LastLayer:
        layout = self._find_layout()
        shape = tuple(self._run_last(pixels).shape)
        if not layout.fits(shape, self.input_size):
            raise InputError(
                f"The last hidden state of {self.name!r} must hold {layout.n_prefix} prefix tokens "
                f"and a grid of {layout.grid[0]}×{layout.grid[1]}, but holds {shape[1]} tokens."
            )
        has_head = _classifies(self.model) and self._hf.config.num_labels > 0
        return LastLayer(
            layout, shape, has_head, has_head and type(self.model).__name__ in MEAN_POOLED
        )

    def _find_layout(self) -> Layout:
        config = self._config
        tower = TOWERS[config.model_type]
        if tower.last_axes != "NLC":
            return Layout(tower.last_axes)
        patch = _pair(config.patch_size)
        grid = (self.input_size[0] // patch[0], self.input_size[1] // patch[1])
        return Layout("NLC", tower.n_prefix(config), grid)

    def _declared_layouts(self) -> list[Layout]:
        axes = TOWERS[self._config.model_type].block_axes
        return [self._last.layout if axes == "NLC" else Layout(axes)]

    def _class_names(self) -> tuple[str, ...] | None:
        return class_names(self._hf.config)


def find_tower(model: nn.Module, name: str) -> PreTrainedModel:
    """Returns the vision tower inside a model of transformers, which may be the model itself.

    Raises:
        InputError: its type is not in `TOWERS`.
    """
    base = getattr(model, getattr(model, "base_model_prefix", ""), None)
    parts = [getattr(owner, name, None) for owner in (model, base) for name in TOWER_ATTRIBUTES]
    for candidate in (*parts, base if _classifies(model) else None, model):
        if isinstance(candidate, PreTrainedModel) and _model_type(candidate) in TOWERS:
            return candidate
    raise InputError(
        f"{name!r} must be a vision tower of one of the types {', '.join(TOWERS)}, "
        f"but a {type(model).__name__} came. Many other models are in timm under timm/<id>."
    )


def _classifies(model: nn.Module) -> bool:
    return type(model).__name__.endswith("ForImageClassification")


def _model_type(model: PreTrainedModel) -> str:
    config: Any = model.config
    return config.model_type


def read_preprocessing(config: PretrainedConfig, processor: Mapping[str, Any]) -> Preprocessing:
    """Returns the preprocessing of an image processor's configuration.

    What it does not say comes from the model: `config.image_size`, and mean, std and interpolation
    of the model type in `TOWERS`. Crops become a squash to the crop's size, and so does SAM's way
    (longest edge resized, the rest padded with zeros): no cell of the map is of padding.

    Raises:
        InputError: values of another form.
    """
    tower = TOWERS[config.model_type]
    mean, std = tower.statistics
    resample = processor.get("resample")
    size = processor.get("crop_size") if processor.get("do_center_crop") else processor.get("size")
    if processor.get("do_normalize", True) is False:
        mean, std = (0.0,) * 3, (1.0,) * 3
    else:
        mean, std = processor.get("image_mean") or mean, processor.get("image_std") or std
    return Preprocessing(
        _processor_size(size) or _image_size(config),
        _read_statistics("image_mean", mean),
        _read_statistics("image_std", std),
        tower.interpolation if resample is None else _interpolation(resample),
    )


def _interpolation(resample: Any) -> str:
    is_number = isinstance(resample, int)
    return PILLOW_RESAMPLING.get(resample, str(resample)) if is_number else str(resample)


def _read_statistics(name: str, values: Any) -> tuple[float, ...]:
    is_row = isinstance(values, Sequence) and len(values) == 3
    if not is_row or not all(isinstance(value, int | float) for value in values):
        raise InputError(
            f"{name} of an image processor must be three numbers, but {values!r} came."
        )
    return tuple(values)


def _processor_size(size: Any) -> tuple[int, int] | None:
    """Reads today's and yesterday's forms: {height, width}, {shortest_edge}, a number, a pair."""
    if isinstance(size, Mapping):
        is_pair = "height" in size
        size = (size["height"], size.get("width")) if is_pair else size.get("shortest_edge")
    return None if size is None else _pair(size)


def _image_size(config: PretrainedConfig) -> tuple[int, int]:
    return _pair(config.image_size)


def _pair(value: Any) -> tuple[int, int]:
    """Reads a side or (h, w) in pixels."""
    pair = (value, value) if isinstance(value, int) else value
    is_pair = isinstance(pair, Sequence) and len(pair) == 2
    if not is_pair or not all(isinstance(side, int) and side > 0 for side in pair):
        raise InputError(
            f"A size in pixels must be a positive whole number or two of them, but {value!r} came."
        )
    return pair[0], pair[1]
