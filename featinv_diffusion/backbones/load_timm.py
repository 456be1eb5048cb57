"""timm models by name: weights from the cache or the Hub, and errors that say what to do."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import timm
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError
from torch import nn

from featinv_diffusion.errors import InputError


def create_timm(timm_id: str, *, pretrained: bool, **model_kwargs: Any) -> nn.Module:
    """Returns a timm model.

    Raises:
        InputError: no pretrained weights, or they can neither be found nor downloaded.
    """
    if pretrained and not {"pretrained_cfg", "pretrained_cfg_overlay"} & model_kwargs.keys():
        _check_has_weights(timm_id)
    try:
        return timm.create_model(timm_id, pretrained=pretrained, **model_kwargs)
    except (OSError, RuntimeError, EntryNotFoundError, SafetensorError) as error:
        if not pretrained:
            raise
        raise InputError(
            f"The weights of {timm_id!r} must be in the Hugging Face cache or be downloadable, "
            f"but loading them failed: {str(error).strip().splitlines()[0]}"
        ) from error


def check_timm_id(timm_id: str, other_names: Sequence[str]) -> None:
    """Raises `InputError` with the nearest names unless timm has this model and tag of weights.

    Args:
        other_names: what would have been valid besides, for the nearest names.
    """
    stem, _, tag = timm_id.partition(".")
    tagged = timm.list_pretrained(f"{stem}.*")
    if timm.is_model(stem) and (not tag or timm_id in tagged):
        return
    names = [*other_names, *timm.list_models(), *timm.list_pretrained()]
    near = (tag and tagged) or get_close_matches(timm_id, names, n=4, cutoff=0.5)
    nearest = f" Nearest names: {', '.join(near)}." if near else ""
    slash = f" A folder or repository of transformers is hf/{timm_id}." if "/" in timm_id else ""
    raise InputError(
        f"A backbone must be one of {', '.join(other_names)}, a timm id or hf/<folder or "
        f"repository>, but {timm_id!r} came.{nearest}{slash}"
    )


def _check_has_weights(timm_id: str) -> None:
    config = timm.get_pretrained_cfg(timm_id)  # None for a former name, which timm maps to today's
    if config is not None and not config.has_weights:
        near = get_close_matches(timm_id, timm.list_pretrained(), n=3, cutoff=0.5)
        raise InputError(
            f"timm must have pretrained weights for {timm_id!r}, but has none. "
            f"Choose one with weights ({', '.join(near)}), or pass pretrained=False."
        )
