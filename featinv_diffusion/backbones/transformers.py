"""Vision towers of transformers as a `Backbone`: one adapter, one line of facts per family."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError
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

from featinv_diffusion import schema
from featinv_diffusion.backbones.base import LAST, Preprocessing
from featinv_diffusion.backbones.timm import class_names
from featinv_diffusion.backbones.traced import Axes, LastLayer, Layout, TracedBackbone
from featinv_diffusion.errors import InputError, reason_of

Statistics = tuple[tuple[float, ...], tuple[float, ...]]
IMAGENET: Statistics = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
HALF: Statistics = (IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD)
CLIP: Statistics = (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)


@dataclass(frozen=True)
class Tower:
    """The attributes that the classes of a model type declare.

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
"""The towers by `config.model_type`."""

TOWER_ATTRIBUTES = ("vision_model", "vision_encoder", "vision_tower")
"""Attributes under which models of transformers keep the tower that they are built on."""

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
        f"got a {type(model).__name__}. Many other models are in timm under timm/<id>."
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
        raise InputError(f"{name} of an image processor must be three numbers, got {values!r}.")
    return tuple(values)


def _processor_size(size: Any) -> tuple[int, int] | None:
    """Reads every form of a size: {height, width}, {shortest_edge}, a number or a pair."""
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
            f"A size in pixels must be a positive whole number or two of them, got {value!r}."
        )
    return pair[0], pair[1]


# ---- Vision models of transformers from a folder or Hub repository -------------------------------

CONFIG_FILE = "config.json"
PROCESSOR_FILE = "preprocessor_config.json"
WHOLE_PROCESSOR_FILE = "processor_config.json"
"""The file in which transformers 5 nests the image processor of a model of images and text."""

VISION_TOWERS = {
    "clip": "CLIPVisionModel",
    "internvl": "InternVLVisionModel",
    "sam": "SamVisionModel",
    "siglip": "SiglipVisionModel",
}
"""Larger models, by `config.model_type`, of which only the vision tower is loaded."""

UNREAD = ("pooler.", "head.", "embeddings.mask_token")
"""Weights that the last hidden state does not depend on, so that checkpoints may lack them."""

KEY_MAPPINGS = {"internvl": {r"^(model\.)?vision_tower\.": ""}}
"""Names of weights in a larger model and in its tower, where transformers does not know them."""

ELSEWHERE = {
    "intern_vit_6b": "its code is not part of transformers. timm has InternViT-300M under "
    "timm/vit_intern300m_patch14_448.ogvl_dist and .ogvl_2pt5",
    "siglip2": "NaFlex checkpoints read patches of varying grids instead of images. SigLIP2 of one "
    "resolution, such as hf/google/siglip2-base-patch16-256, is of the type siglip",
}
"""Types that cannot be loaded, with what to load instead."""


def load_transformers(
    source: str, *, pretrained: bool, **model_kwargs: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Returns a model of a Hub repository or folder and its image processor's configuration.

    Weights are loaded as float32 unless `dtype` says otherwise; without `pretrained` they are
    random and only the configuration is read.

    Raises:
        InputError: nothing there, not downloadable, no vision model.
    """
    model_kwargs.setdefault("dtype", torch.float32)
    try:
        _check_type(source)
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
        factory = _model_class(config)
        if pretrained:
            model = _load(factory, source, config.model_type, **model_kwargs)
        else:
            model = _build(factory, config, **model_kwargs)
        # A timm model carries its preprocessing in its configuration.
        return model, {} if config.model_type == "timm_wrapper" else _read_processor(source)
    except InputError:
        raise
    except (OSError, ValueError, TypeError, LookupError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"{source!r} must be a folder or Hub repository of a vision model of transformers, "
            f"but loading it failed: {reason_of(error)}."
        ) from error


def _check_type(source: str) -> None:
    """Raises `InputError` for a type of `ELSEWHERE`, before its own code would be needed."""
    if Path(source).is_dir():
        _read_json(source, CONFIG_FILE)
    raw, _ = PretrainedConfig.get_config_dict(source)
    model_type = raw.get("model_type", "")
    if model_type in ELSEWHERE:
        raise InputError(
            f"{source!r} must be a vision model of transformers that reads images, but it is of "
            f"type {model_type!r}: {ELSEWHERE[model_type]}."
        )


def _load(factory: Any, source: str, model_type: str, **model_kwargs: Any) -> PreTrainedModel:
    """Loads weights, all of which must be there: transformers leaves missing ones random."""
    if model_type in KEY_MAPPINGS:
        model_kwargs["key_mapping"] = KEY_MAPPINGS[model_type]
    model, found = factory.from_pretrained(source, output_loading_info=True, **model_kwargs)
    missing = [key for key in sorted(found["missing_keys"]) if _is_read(model, key, source)]
    if missing:
        raise InputError(
            f"{source!r} must hold all weights of a {type(model).__name__}, "
            f"but {len(missing)} are missing, {missing[0]} among them."
        )
    return model


def _is_read(model: PreTrainedModel, key: str, source: str) -> bool:
    """Whether features or class scores depend on a weight; a timm model is read as a whole."""
    if hasattr(model, "timm_model"):
        return True
    tower = find_tower(model, source)
    prefix = next(name for name, module in model.named_modules() if module is tower)
    prefix += "." if prefix else ""
    if not key.startswith(prefix):
        return type(model).__name__.endswith("ForImageClassification")
    return not key.removeprefix(prefix).startswith(UNREAD)


def _model_class(config: PretrainedConfig) -> Any:
    if config.model_type == "timm_wrapper":
        name = "TimmWrapperForImageClassification" if config.num_labels else "TimmWrapperModel"
        return getattr(transformers, name)
    if any(name.endswith("ForImageClassification") for name in config.architectures or ()):
        return transformers.AutoModelForImageClassification
    if config.model_type in VISION_TOWERS:
        return getattr(transformers, VISION_TOWERS[config.model_type])
    return transformers.AutoModel


def _build(factory: Any, config: PretrainedConfig, **model_kwargs: Any) -> PreTrainedModel:
    if hasattr(factory, "from_config"):
        return factory.from_config(config, **model_kwargs)
    vision = factory.config_class is not type(config)
    return factory._from_config(config.vision_config if vision else config, **model_kwargs)


def _read_processor(source: str) -> dict[str, Any]:
    """Returns the settings of the image processor; empty where there is none."""
    settings = _read_json(source, PROCESSOR_FILE)
    if settings:
        return settings
    nested = _read_json(source, WHOLE_PROCESSOR_FILE).get("image_processor", {})
    return _check_object(nested, f"image_processor in {WHOLE_PROCESSOR_FILE} of {source}")


def _read_json(source: str, name: str) -> dict[str, Any]:
    """Reads a file of a folder or repository; empty where it is known to have none."""
    path = Path(source) / name
    if not Path(source).is_dir():
        try:
            path = Path(hf_hub_download(source, name))
        except LocalEntryNotFoundError:
            if try_to_load_from_cache(source, name) is not _CACHED_NO_EXIST:
                raise  # offline, and never asked for before
            return {}
        except EntryNotFoundError:
            return {}
    content = schema.read_json(path) if path.is_file() else {}
    return _check_object(content, f"{name} of {source}")


def _check_object(content: Any, what: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise InputError(f"{what} must be a JSON object, but is a {type(content).__name__}.")
    return content
