"""Any timm model as a `Backbone`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_data_config
from timm.layers import AttentionPool2d, AttentionPoolLatent, AttentionPoolPrr, RotAttentionPool2d
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import Tensor, nn

from featinv_diffusion.backbones.base import LAST, Preprocessing
from featinv_diffusion.backbones.public_weights import load_packed, packed_weights
from featinv_diffusion.backbones.traced import Axes, LastLayer, Layout, TracedBackbone
from featinv_diffusion.errors import InputError, reason_of
from featinv_diffusion.files import read_torch

# ---- timm models by name -------------------------------------------------------------------------


def create_timm(timm_id: str, *, pretrained: bool, **model_kwargs: Any) -> nn.Module:
    """Returns a timm model; weights come from an installed package of `PACKED`, else from the Hub.

    Raises:
        InputError: no pretrained weights, or they can neither be found nor downloaded.
    """
    if pretrained and not {"pretrained_cfg", "pretrained_cfg_overlay"} & model_kwargs.keys():
        if (path := packed_weights(timm_id)) is not None:
            model = timm.create_model(timm_id, **model_kwargs)
            load_packed(model, timm_id, path)
            return model
        _check_has_weights(timm_id)
    try:
        return timm.create_model(timm_id, pretrained=pretrained, **model_kwargs)
    except (OSError, RuntimeError, EntryNotFoundError, SafetensorError) as error:
        if not pretrained:
            raise
        raise InputError(
            f"The weights of {timm_id!r} must be in the Hugging Face cache or be downloadable, "
            f"but loading them failed: {reason_of(error)}."
        ) from error


def _check_has_weights(timm_id: str) -> None:
    config = timm.get_pretrained_cfg(timm_id)  # None for a former name, which timm maps to today's
    if config is not None and not config.has_weights:
        near = get_close_matches(timm_id, timm.list_pretrained(), n=3, cutoff=0.5)
        raise InputError(
            f"timm must have pretrained weights for {timm_id!r}, but has none. "
            f"Choose one with weights ({', '.join(near)}), or pass pretrained=False."
        )


ATTENTION_POOLS = (AttentionPool2d, AttentionPoolLatent, AttentionPoolPrr, RotAttentionPool2d)
PATCH_POOLS = ("avg", "max", "avgmax")
"""timm's names of pools over tokens that leave out the prefix, unless `pool_include_prefix`."""


def load_weights(model: nn.Module, path: Path) -> None:
    """Loads all weights of a model from a file; nothing in the file is run.

    Args:
        path: safetensors, or what `torch.save` wrote of tensors alone, plain or as `state_dict`,
            `model` or `state_dict_ema` in a checkpoint of timm.

    Raises:
        InputError: another kind of file, or weights that are missing, left over or of other shapes.
    """
    if path.suffix == ".safetensors":
        try:
            found: Any = load_file(path)
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{path} must be a whole safetensors file: {reason_of(error)}."
            ) from None
    else:
        found = read_torch(path, "weights")
    for key in ("state_dict_ema", "state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
            break
    if not isinstance(found, dict) or not all(isinstance(v, torch.Tensor) for v in found.values()):
        raise InputError(f"{path} must hold a dict of tensors, but holds something else.")
    weights = {str(key).removeprefix("module."): value for key, value in found.items()}
    own = model.state_dict()
    wrong = sorted(own.keys() ^ weights.keys()) or [
        name for name in own if own[name].shape != weights[name].shape
    ]
    if wrong:
        raise InputError(
            f"{path} must hold the weights of the model, but {len(wrong)} tensors are missing, "
            f"left over or of other shapes, such as {', '.join(wrong[:3])}. Name the timm model "
            "that it was saved from."
        )
    model.load_state_dict(weights)


class TimmBackbone(TracedBackbone):
    """A timm model; `last` is the spatial part of its `forward_features`.

    Axes come from the model's `output_fmt` (NCHW where it has none), prefix tokens from its
    `num_prefix_tokens`, the grid of tokens from its `forward_intermediates`.

    Args:
        model: a timm classifier or feature extractor.
        name, layer: as in `Backbone`.
        input_size: (h, w); default the test size of the configuration.
        pretrained_cfg: timm's configuration of the weights; default the model's own.
        labels: default the ImageNet names where the number of classes says so.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str,
        layer: str = LAST,
        input_size: tuple[int, int] | None = None,
        pretrained_cfg: Mapping[str, Any] | None = None,
        labels: tuple[str, ...] | None = None,
    ):
        if not hasattr(model, "forward_features") or not hasattr(model, "forward_head"):
            raise InputError(
                f"{name!r} must be a timm model with forward_features and forward_head, "
                f"got a {type(model).__name__}. Create it without features_only."
            )
        preprocessing = read_preprocessing(model, pretrained_cfg)
        if input_size is not None:
            preprocessing = replace(preprocessing, size=input_size)
        self._given_labels = labels
        super().__init__(model, name=name, layer=layer, preprocessing=preprocessing)

    def _run(self, pixels: Tensor) -> Tensor:
        return self.model(pixels)

    def _run_last(self, pixels: Tensor) -> Tensor:
        if self._last.is_extracted:
            return self._forward_intermediates(pixels, intermediates_only=True)[-1]
        return self._timm.forward_features(pixels)

    def _run_last_and_head(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        if self._last.is_extracted:
            output, maps = self._forward_intermediates(pixels, intermediates_only=False)
            return maps[-1], self._timm.forward_head(output)
        output = self._timm.forward_features(pixels)
        return output, self._timm.forward_head(output)

    def _run_head(self, output: Tensor) -> Tensor:
        return self._timm.forward_head(output)

    @property
    def _timm(self) -> Any:
        return self.model  # timm's models share methods but no base class

    def _forward_intermediates(self, pixels: Tensor, intermediates_only: bool) -> Any:
        return self._timm.forward_intermediates(
            pixels, indices=1, output_fmt="NCHW", intermediates_only=intermediates_only
        )

    def _inspect(self, pixels: Tensor) -> LastLayer:
        output = self._timm.forward_features(pixels)
        scores = self._timm.forward_head(output)
        has_head = self._timm.num_classes > 0 and scores.ndim == 2
        shape = tuple(output.shape) if isinstance(output, Tensor) else ()
        layout = Layout(self._axes)
        if not layout.fits(shape, self.input_size):
            maps = self._declared_map(pixels)
            grid = (maps.shape[2], maps.shape[3])
            layout = Layout("NLC", getattr(self.model, "num_prefix_tokens", 0), grid)
            if not layout.fits(shape, self.input_size):
                shape = tuple(maps.shape)
                return LastLayer(Layout("NCHW"), shape, has_head, False, is_extracted=True)
        return LastLayer(layout, shape, has_head, has_head and self._pools(layout))

    def _declared_map(self, pixels: Tensor) -> Tensor:
        if not hasattr(self.model, "forward_intermediates"):
            raise InputError(
                f"The last layer of {self.name!r} must be a map or declare its grid through "
                f"forward_intermediates, but {type(self.model).__name__} does neither."
            )
        return self._forward_intermediates(pixels, intermediates_only=True)[-1]

    @property
    def _axes(self) -> Axes:
        return "NHWC" if getattr(self.model, "output_fmt", "NCHW") == "NHWC" else "NCHW"

    def _pools(self, layout: Layout) -> bool:
        """Whether the head averages (or takes the maximum of) the map and reads nothing else."""
        if any(isinstance(module, ATTENTION_POOLS) for module in self.model.modules()):
            return False
        if layout.n_prefix == 0:
            return True
        pool = getattr(self.model, "global_pool", None)
        return pool in PATCH_POOLS and not getattr(self.model, "pool_include_prefix", False)

    def _declared_layouts(self) -> list[Layout]:
        tokens = [self._last.layout] if self._last.layout.axes == "NLC" else []
        if isinstance(self.model, VisionTransformerSAM):  # channels first behind the neck alone
            return [Layout("NHWC")]
        return [Layout(self._axes), *tokens]

    def _class_names(self) -> tuple[str, ...] | None:
        subset = infer_imagenet_subset(self.model)
        if self._given_labels is not None or subset is None:
            return self._given_labels
        return tuple(ImageNetInfo(subset).label_descriptions())

    def _declared_stages(self) -> list[str]:
        return [info["module"] for info in getattr(self.model, "feature_info", [])]


def read_preprocessing(
    model: nn.Module, pretrained_cfg: Mapping[str, Any] | None = None
) -> Preprocessing:
    """Returns the preprocessing that a timm model was evaluated with, at its test size.

    A model that accepts one input size only, whatever its configuration says, gets that.
    """
    config = resolve_data_config(pretrained_cfg=pretrained_cfg, model=model, use_test_size=True)
    embedding: Any = getattr(model, "patch_embed", None)
    strict = getattr(embedding, "strict_img_size", False)
    size = embedding.img_size if strict else config["input_size"][-2:]
    return Preprocessing(
        (int(size[0]), int(size[1])),
        tuple(config["mean"]),
        tuple(config["std"]),
        config["interpolation"],
    )


def wrapper_settings(wrapper: Any) -> dict[str, Any]:
    """Returns the weights' configuration and labels that a timm wrapper of transformers holds."""
    config = wrapper.config
    return {
        "pretrained_cfg": getattr(config, "pretrained_cfg", None),
        "labels": class_names(config) if wrapper.timm_model.num_classes > 0 else None,
    }


def class_names(config: Any) -> tuple[str, ...] | None:
    """Returns the class names of a transformers configuration; None where it only has numbers."""
    names = tuple(str(config.id2label[i]) for i in range(config.num_labels))
    return None if names and names[0] == "LABEL_0" else names
