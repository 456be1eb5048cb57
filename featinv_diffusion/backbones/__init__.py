"""Frozen vision models under one interface: `load_backbone`, `wrap_model`, `list_backbones`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from featinv_diffusion.backbones.base import LAST, Backbone

__all__ = [
    "LAST",
    "SHORT_NAMES",
    "Backbone",
    "list_backbones",
    "load_backbone",
    "wrap_model",
]

SHORT_NAMES = {
    "convnext": "timm/convnext_base.fb_in22k_ft_in1k",
    "resnet": "timm/resnet50.tv_in1k",
    "swin": "timm/swinv2_base_window12to24_192to384.ms_in22k_ft_in1k",
    "vit": "timm/vit_base_patch16_224.augreg2_in21k_ft_in1k",
}
"""The three models of the paper and a ViT, as the timm ids of their weights."""

_ASSETS = Path(__file__).parents[1] / "assets"


def list_backbones() -> list[str]:
    """Returns the short names and the bundled tiny models; timm ids and `hf/…` work besides."""
    bundled = [path.parent.relative_to(_ASSETS).as_posix() for path in _ASSETS.glob("*/*/backbone")]
    return [*SHORT_NAMES, *sorted(bundled)]


def load_backbone(
    name: str,
    layer: str = LAST,
    *,
    pretrained: bool = True,
    input_size: int | tuple[int, int] | None = None,
    **model_kwargs: Any,
) -> Backbone:
    """Loads a frozen backbone; weights are downloaded once, to the cache of the Hugging Face Hub.

    Args:
        name: a name of `list_backbones`, a timm id with or without `timm/`, or `hf/` followed by a
            folder or Hub repository of transformers.
        layer: `last` (before pooling) or a dotted module path, see `Backbone.layers`.
        pretrained: False leaves the weights random and, except for `hf/`, needs no network.
        input_size: (h, w) or side in pixels; default is the size the model was evaluated at.
        **model_kwargs: for `timm.create_model`, or for `from_pretrained` of transformers.

    Raises:
        InputError: unknown name or layer, weights that cannot be loaded, size that does not fit.
    """
    target = f"hf/{_ASSETS / name / 'backbone'}" if name in list_backbones() else name
    target = SHORT_NAMES.get(name, target)
    processor = None
    if target.startswith("hf/"):
        from featinv_diffusion.backbones.transformers import load_transformers

        model, processor = load_transformers(target[3:], pretrained=pretrained, **model_kwargs)
    else:
        from featinv_diffusion.backbones.timm import check_timm_id, create_timm

        timm_id = target.removeprefix("timm/")
        check_timm_id(timm_id, list_backbones())
        model = create_timm(timm_id, pretrained=pretrained, **model_kwargs)
    if input_size is not None:
        _resize_positions(model, _to_size(input_size))
    return wrap_model(model, name=name, layer=layer, input_size=input_size, processor=processor)


def wrap_model(
    model: nn.Module,
    *,
    name: str,
    layer: str = LAST,
    input_size: int | tuple[int, int] | None = None,
    processor: Mapping[str, Any] | None = None,
) -> Backbone:
    """Makes a backbone of a model in memory, which is frozen in place.

    Args:
        model: a timm model, a `TimmWrapperForImageClassification` or `TimmWrapperModel`, or a
            vision model of transformers.
        name: what specs and messages call it.
        layer: `last` or a dotted module path; inside the timm model where that is wrapped.
        input_size: (h, w) or side in pixels; default from the model's configuration.
        processor: the settings of an image processor (`preprocessor_config.json`), for vision
            models of transformers; default by model type.

    Raises:
        InputError: a model of another kind, or without this layer.
    """
    size = None if input_size is None else _to_size(input_size)
    if hasattr(model, "timm_model") or hasattr(model, "forward_features"):
        from featinv_diffusion.backbones.timm import TimmBackbone, wrapper_settings

        settings = wrapper_settings(model) if hasattr(model, "timm_model") else {}
        model = getattr(model, "timm_model", model)
        return TimmBackbone(model, name=name, layer=layer, input_size=size, **settings)
    from featinv_diffusion.backbones.transformers import TransformersBackbone

    return TransformersBackbone(
        model, name=name, layer=layer, input_size=size, processor=processor or {}
    )


def _to_size(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _resize_positions(model: nn.Module, size: tuple[int, int]) -> None:
    """Resamples the position embedding of a timm model that holds one; others need nothing."""
    model = getattr(model, "timm_model", model)
    if hasattr(model, "set_input_size"):
        model.set_input_size(img_size=size)  # pyright: ignore[reportCallIssue]
