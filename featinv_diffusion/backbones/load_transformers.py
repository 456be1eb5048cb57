"""Vision models of transformers from a folder or Hub repository, and their processor's settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError
from transformers import PretrainedConfig, PreTrainedModel

from featinv_diffusion.errors import InputError

PROCESSOR_FILE = "preprocessor_config.json"
VISION_TOWERS = {"clip": "CLIPVisionModel", "siglip": "SiglipVisionModel"}
"""Models of image and text, by `config.model_type`, of which only the vision tower is loaded."""


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
        config = transformers.AutoConfig.from_pretrained(source)
        factory = _model_class(config)
        if pretrained:
            model = factory.from_pretrained(source, **model_kwargs)
        else:
            model = _build(factory, config, **model_kwargs)
        # A timm model carries its preprocessing in its configuration.
        return model, {} if config.model_type == "timm_wrapper" else _read_processor(source)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"{source!r} must be a folder or Hub repository of a vision model of transformers, "
            f"but loading it failed: {str(error).strip().splitlines()[0]}"
        ) from error


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
    """Reads `preprocessor_config.json`; empty where the folder or repository has none."""
    path = Path(source) / PROCESSOR_FILE
    if not Path(source).is_dir():
        try:
            path = Path(hf_hub_download(source, PROCESSOR_FILE))
        except LocalEntryNotFoundError:
            if try_to_load_from_cache(source, PROCESSOR_FILE) is not _CACHED_NO_EXIST:
                raise  # offline, and never asked for before
            return {}
        except EntryNotFoundError:
            return {}
    return json.loads(path.read_text()) if path.is_file() else {}
