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

from featinv_diffusion.backbones.transformers import find_tower
from featinv_diffusion.errors import InputError

CONFIG_FILE = "config.json"
PROCESSOR_FILE = "preprocessor_config.json"
WHOLE_PROCESSOR_FILE = "processor_config.json"
"""Where transformers 5 keeps the image processor of a model of image and text, nested."""

VISION_TOWERS = {
    "clip": "CLIPVisionModel",
    "internvl": "InternVLVisionModel",
    "sam": "SamVisionModel",
    "siglip": "SiglipVisionModel",
}
"""Larger models, by `config.model_type`, of which only the vision tower is loaded."""

UNREAD = ("pooler.", "head.", "embeddings.mask_token")
"""What a tower's last hidden state does not depend on, and checkpoints may therefore lack."""

KEY_MAPPINGS = {"internvl": {r"^(model\.)?vision_tower\.": ""}}
"""From the names of weights in a larger model to those in its tower, unless transformers knows."""

ELSEWHERE = {
    "intern_vit_6b": "its code is not part of transformers. timm has InternViT-300M under "
    "timm/vit_intern300m_patch14_448.ogvl_dist and .ogvl_2pt5",
    "siglip2": "NaFlex checkpoints read patches of varying grids instead of images. SigLIP2 of one "
    "resolution, such as hf/google/siglip2-base-patch16-256, is of the type siglip",
}
"""Types that cannot be loaded, and what can be loaded in their place."""


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
            f"but loading it failed: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
        ) from error


def _check_type(source: str) -> None:
    """Raises `InputError` for a type of `ELSEWHERE`, before any code is asked for."""
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
    """Loads weights; those that are read must all be there, for transformers leaves gaps random."""
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
    """Reads a file of a folder or repository; empty where that is known not to have it."""
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
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return _check_object(content, f"{name} of {source}")


def _check_object(content: Any, what: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise InputError(f"{what} must be a JSON object, but is a {type(content).__name__}.")
    return content
