"""Converts checkpoint files of the original ldm/cldm code to FeatInv pipelines, and back."""

from __future__ import annotations

import logging
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, PreTrainedModel

from featinv_diffusion.backbones import LAST, load_backbone, resolve_backbone
from featinv_diffusion.backbones.names import PUBLISHED, read_spec, recorded_name
from featinv_diffusion.diffusion.convert.config import (
    PIPELINE_SETTINGS,
    OriginalConfig,
    read_original_config,
    sd15_config,
    to_original_config,
)
from featinv_diffusion.diffusion.convert.weights import from_original, to_original
from featinv_diffusion.diffusion.featinv_pipeline import FeatInvPipeline
from featinv_diffusion.diffusion.folders import (
    TOKENIZER_FILES,
    check_backbone,
    load_backbone_component,
)
from featinv_diffusion.errors import InputError, choices_hint
from featinv_diffusion.files import check_absent, replacing, write_text
from featinv_diffusion.schema import dump_yaml
from featinv_diffusion.types import FeatureSpec

logger = logging.getLogger(__name__)

# ---- Checkpoint files, from which nothing but tensors is ever read -------------------------------

SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth")


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Reads the tensors of a `.safetensors`, `.ckpt`, `.pt` or `.pth` file.

    A PyTorch file may hold the tensors themselves or a dict with them under `state_dict`, as
    Lightning writes it.

    Raises:
        InputError: no such file, truncated, not a checkpoint, or pickled objects besides tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"A checkpoint must be a file, but {path} is not one.")
    check_suffix(path)
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping):
        raise InputError(
            f"{path} must hold a dict of tensors, but it holds a {type(content).__name__}."
        )
    tensors = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise InputError(f"{path} must hold the tensors of a model, but holds none.")
    return tensors


def write_checkpoint(target: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors as safetensors or as PyTorch's `{"state_dict": …}`, by the name's suffix.

    Raises:
        InputError: unknown suffix, `target` exists, or the disk refuses (full, read-only).
    """
    check_suffix(target)
    check_absent(target)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        with replacing(target) as partial:
            if target.suffix == ".safetensors":
                save_file(tensors, partial, metadata={"format": "pt"})
            else:
                torch.save({"state_dict": tensors}, partial)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise InputError(f"{target} could not be written: {error}.") from error


def check_suffix(path: Path) -> None:
    """Raises `InputError` unless the name ends in the suffix of a known format."""
    if path.suffix not in SUFFIXES:
        raise InputError(
            f"A checkpoint's name must end in one of {', '.join(SUFFIXES)}, got {path.name!r}."
        )


def _read_safetensors(path: Path) -> Mapping[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is truncated or no safetensors file: {error}.") from error


def _read_pickle(path: Path) -> Any:
    try:
        # Memory-mapped, so that an optimizer's state in the file costs nothing.
        mmap = zipfile.is_zipfile(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # whatever the reader raises is the fault of the file
        foreign = re.search(r"(?:GLOBAL|Unsupported class|global:?) ([\w.]+\.\w+)", str(error))
        if foreign:
            raise InputError(
                f"{path} must hold tensors only, but it holds a pickled object ({foreign[1]}), "
                "which could run code and is not loaded. If you trust the file, save its "
                "`state_dict` as safetensors and convert that."
            ) from error
        raise InputError(f"{path} is truncated or no PyTorch checkpoint.") from error


# ---- The CLIP tokenizer, which no checkpoint holds -----------------------------------------------

DEFAULT_TOKENIZER = "openai/clip-vit-large-patch14"
"""The tokenizer that the original code names."""

SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json")


def load_tokenizer(name: str, text_encoder: CLIPTextModel) -> CLIPTokenizer:
    """Loads the CLIP tokenizer that belongs to a text encoder.

    Args:
        name: a folder or Hub repository with the tokenizer's files in it or in its `tokenizer`.

    Raises:
        InputError: no tokenizer there, or not the text encoder's.
    """
    folder = Path(name) if Path(name).is_dir() else _download(name)
    folder = folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder
    # From a folder without these files transformers makes an empty tokenizer without a warning.
    if not any(all((folder / f).is_file() for f in files) for files in TOKENIZER_FILES):
        raise _not_found(name, "has no tokenizer.json, nor vocab.json with merges.txt")
    config = text_encoder.config
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    tokenizer.model_max_length = min(tokenizer.model_max_length, config.max_position_embeddings)
    if len(tokenizer) != config.vocab_size:
        raise InputError(
            f"The tokenizer must have the {config.vocab_size} tokens of the checkpoint's text "
            f"encoder, but {name!r} has {len(tokenizer)}. Pass the one it was trained with as "
            "--tokenizer."
        )
    return tokenizer


def _download(name: str) -> Path:
    files = [*SETTINGS_FILES, *(file for group in TOKENIZER_FILES for file in group)]
    patterns = [f"{folder}{file}" for folder in ("", "tokenizer/") for file in files]
    try:
        try:
            folder = snapshot_download(name, allow_patterns=patterns, local_files_only=True)
        except LocalEntryNotFoundError:
            folder = snapshot_download(name, allow_patterns=patterns)
    except (OSError, HFValidationError, HfHubHTTPError) as error:
        raise _not_found(name, f"cannot be loaded ({str(error).splitlines()[0]})") from error
    return Path(folder)


def _not_found(name: str, problem: str) -> InputError:
    return InputError(
        f"No checkpoint holds its tokenizer, and the folder or Hub repository {name!r} {problem}. "
        "Pass the tokenizer folder of any Stable Diffusion 1.x model as --tokenizer, or pass "
        "--no-tokenizer; the pipeline then takes prompt_embeds only."
    )


# ---- Pipelines -----------------------------------------------------------------------------------

DEFAULT_BACKBONE = PUBLISHED["convnext"]
# Fixed in the original code.
HINT_WIDTH, LATENT_SIZE = 512, 32


def read_original(
    checkpoint: str | Path,
    original_config: str | Path | None = None,
    *,
    tokenizer: str | None = DEFAULT_TOKENIZER,
    backbone: str | None = None,
    layer: str | None = None,
    pooled: bool | None = None,
    with_backbone: bool = True,
) -> FeatInvPipeline:
    """Builds a pipeline from an original checkpoint.

    Only the tokenizer and the weights of the backbone, which no checkpoint holds, may need a
    network. A backbone whose weights cannot be loaded is left out with a warning.

    Args:
        checkpoint: `.ckpt`, `.pt`, `.pth` or `.safetensors`.
        original_config: the YAML it was trained with; None is Stable Diffusion 1.x at 256 pixels.
        tokenizer: a folder or Hub repository; None leaves it out, and the pipeline then takes
            `prompt_embeds` only.
        backbone: whose features the ControlNet reads. None takes what a YAML of `write_original`
            says, else the paper's ConvNeXt; so do `layer` (else `last`) and `pooled` (else False),
            whether it reads average-pooled maps.

    Raises:
        InputError: a file that cannot be read, or parts that do not fit each other.
    """
    config = sd15_config() if original_config is None else read_original_config(original_config)
    settings = _pipeline_settings(config)
    tensors = read_checkpoint(checkpoint)
    spec = _feature_spec(config, backbone, layer)
    if pooled is None:
        pooled = bool(config.extras.get("feature_pooled", False))
    parts = from_original(tensors, config, spec, pooled=pooled)
    components = {
        "tokenizer": None if tokenizer is None else load_tokenizer(tokenizer, parts.text_encoder),
        "backbone": _load_backbone(spec) if with_backbone else None,
    }
    try:
        return FeatInvPipeline(**vars(parts), **components, **settings)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"The pipeline settings of the YAML must be valid, but: {error}"
        ) from error


def write_original(pipeline: FeatInvPipeline, checkpoint: str | Path) -> Path:
    """Writes a checkpoint in the original layout and, beside it, the YAML of its sizes.

    The tokenizer and the backbone stay behind: the original checkpoint has neither.

    Returns:
        The path of the YAML.

    Raises:
        InputError: a setting or weight that the original layout cannot hold, a file is there
            already, or the disk refuses.
    """
    checkpoint = Path(checkpoint)
    config_path = checkpoint.with_suffix(".yaml")
    check_suffix(checkpoint)
    check_absent(checkpoint)
    check_absent(config_path)
    tensors, config = to_original(pipeline)
    write_text(config_path, dump_yaml(to_original_config(config)))
    try:
        write_checkpoint(checkpoint, tensors)
    except BaseException:
        config_path.unlink()  # both or none
        raise
    _note_differences(pipeline, config)
    return config_path


def _feature_spec(config: OriginalConfig, backbone: str | None, layer: str | None) -> FeatureSpec:
    declared = config.extras.get("feature_spec") or {}
    named = recorded_name(declared["backbone"]) if "backbone" in declared else None
    chosen = resolve_backbone(backbone).name if backbone else named
    if declared and chosen == named:
        try:
            spec = read_spec(declared)
        except (TypeError, KeyError) as error:
            raise InputError(f"feature_spec of the YAML must be complete, but: {error}") from error
        if layer in (None, spec.layer):
            return spec
    return load_backbone(chosen or DEFAULT_BACKBONE, layer or LAST, pretrained=False).spec


def _load_backbone(spec: FeatureSpec) -> PreTrainedModel | None:
    try:
        model = load_backbone_component(spec.backbone)
    except InputError as error:
        logger.warning("The pipeline is without its backbone and takes features only. %s", error)
        return None
    if model is None:
        logger.warning(
            "The pipeline is without its backbone and takes features only: %s cannot travel in a "
            "pipeline folder.",
            spec.backbone,
        )
        return None
    check_backbone(model, spec)
    return model


def _pipeline_settings(config: OriginalConfig) -> dict[str, Any]:
    settings = dict(config.extras.get("pipeline") or {})
    for name in settings:
        if name not in PIPELINE_SETTINGS:
            hint = choices_hint(name, list(PIPELINE_SETTINGS))
            raise InputError(f"The original config has no pipeline setting {name!r}; {hint}")
    return settings


def _note_differences(pipeline: FeatInvPipeline, config: OriginalConfig) -> None:
    """Warns of sizes that are fixed in the original code and that differ here."""
    text_width = sd15_config().text_encoder["hidden_size"]
    sizes = (
        ("a hint block", pipeline.controlnet.config["feature_hidden_channels"], HINT_WIDTH),
        ("latents", config.unet["sample_size"], LATENT_SIZE),
        ("a text encoder", config.text_encoder["hidden_size"], text_width),
    )
    changes = [f"{what} of width {a}, not {b}" for what, a, b in sizes if a != b]
    if changes:
        logger.warning(
            "Some sizes are fixed in the original code, beside its YAML. Before it can load this "
            "checkpoint, it needs %s.",
            ", ".join(changes),
        )
