"""Frozen vision models under one interface."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from featinv_diffusion.backbones.base import LAST, Backbone, without_progress_bars
from featinv_diffusion.backbones.module import make_by_factory, wrap_module
from featinv_diffusion.backbones.names import (
    list_backbones,
    resolve_backbone,
    same_backbone,
)
from featinv_diffusion.backbones.timm import (
    TimmBackbone,
    create_timm,
    load_weights,
    wrapper_settings,
)
from featinv_diffusion.backbones.transformers import TransformersBackbone, load_transformers
from featinv_diffusion.trust import FACTORY, is_code_trusted

# ---- From a name, or a model in memory, to a `Backbone` ------------------------------------------


def load_backbone(
    name: str,
    layer: str = LAST,
    *,
    pretrained: bool = True,
    input_size: int | tuple[int, int] | None = None,
    trust_code: bool = False,
    **model_kwargs: Any,
) -> Backbone:
    """Loads a frozen backbone; weights are downloaded once, to the cache of the Hugging Face Hub.

    Args:
        name: see `list_backbones`; the backbone's own name is the canonical one, so `convnext`
            gives `tiny/convnext`. `ID@FILE` is a timm model with the weights of a file, and
            `FILE.py:FUNCTION` or `MODULE:FUNCTION` calls a function of yours, which runs its code.
        layer: `last` (before pooling) or a dotted module path, see `Backbone.layers`.
        pretrained: False leaves the weights random and, except for `hf/`, needs no network.
        input_size: (height, width) or side in pixels; default is the model's evaluation size.
        trust_code: whether a module that is found by its import name may be run; a file that is
            named by its path always may.
        **model_kwargs: for `timm.create_model`, or for `from_pretrained` of transformers.

    Raises:
        InputError: unknown name or layer, weights that cannot be loaded, size that does not fit,
            or a module that is not trusted.
    """
    if FACTORY.fullmatch(name):
        return make_by_factory(name, layer, trust_code=trust_code or is_code_trusted())
    return load_named_backbone(
        name, layer, pretrained=pretrained, input_size=input_size, **model_kwargs
    )


def load_named_backbone(
    name: str,
    layer: str = LAST,
    *,
    pretrained: bool = True,
    input_size: int | tuple[int, int] | None = None,
    **model_kwargs: Any,
) -> Backbone:
    """As `load_backbone`, of a name that may come from a file: runs no code of others."""
    found = resolve_backbone(name)
    processor = None
    with without_progress_bars():
        if found.checkpoint is not None:
            model = create_timm(found.target, pretrained=False, **model_kwargs)
            load_weights(model, found.checkpoint)
        elif found.source == "timm":
            model = create_timm(found.target, pretrained=pretrained, **model_kwargs)
        else:
            loaded = load_transformers(found.target, pretrained=pretrained, **model_kwargs)
            model, processor = loaded
    if input_size is not None:
        _resize_positions(model, _to_size(input_size))
    return wrap_model(
        model, name=found.name, layer=layer, input_size=input_size, processor=processor
    )


def wrap_model(
    model: nn.Module,
    *,
    name: str,
    layer: str = LAST,
    input_size: int | tuple[int, int] | None = None,
    processor: Mapping[str, Any] | None = None,
) -> Backbone:
    """Makes a backbone of a model in memory; the model itself is frozen.

    Args:
        model: a timm model, a `TimmWrapperForImageClassification` or `TimmWrapperModel`, or a
            vision model of transformers.
        name: name in specs and messages.
        layer: `last` or a dotted module path, inside the timm model where that is wrapped.
        input_size: (height, width) or side in pixels; default from the model's configuration.
        processor: settings of an image processor (`preprocessor_config.json`) for vision models of
            transformers; default by model type.

    Raises:
        InputError: a model of another kind, or one without this layer.
    """
    size = None if input_size is None else _to_size(input_size)
    if hasattr(model, "timm_model") or hasattr(model, "forward_features"):
        settings = wrapper_settings(model) if hasattr(model, "timm_model") else {}
        model = getattr(model, "timm_model", model)
        return TimmBackbone(model, name=name, layer=layer, input_size=size, **settings)
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


__all__ = [
    "LAST",
    "Backbone",
    "list_backbones",
    "load_backbone",
    "load_named_backbone",
    "resolve_backbone",
    "same_backbone",
    "wrap_model",
    "wrap_module",
]
