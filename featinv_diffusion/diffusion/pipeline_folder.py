"""What a saved pipeline folder must hold, checked before anything is loaded from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from featinv_diffusion.errors import InputError

INDEX = "model_index.json"
CLASS_NAME = "FeatInvPipeline"
SCOPE_FILE = "scope.safetensors"
"""Statistics of natural maps, see `features.natural_maps`; a pipeline may be without."""

TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))


def check_pipeline_folder(folder: Path) -> None:
    """Raises `InputError` unless the folder is a FeatInv pipeline, all there and whole."""
    if not folder.is_dir():
        raise InputError(f"A pipeline must be a folder, but there is none at {folder}.")
    index = read_json(folder / INDEX)
    name = index.get("_class_name")
    name = name[-1] if isinstance(name, list) else name
    if name != CLASS_NAME:
        raise InputError(
            f"{folder} must hold a {CLASS_NAME}, but its {INDEX} names a {name}. To make one of a "
            "Stable Diffusion folder: featinv export OUT --controlnet FOLDER --base FOLDER."
        )
    for component, entry in index.items():
        is_component = isinstance(entry, list) and not component.startswith("_")
        if is_component and len(entry) == 2 and entry[0] is not None:
            check_component(folder / component, entry[0])
    if (folder / SCOPE_FILE).exists():
        check_safetensors(folder / SCOPE_FILE)


def check_component(folder: Path, library: str) -> None:
    """Raises `InputError` unless one component's files are there and whole.

    Args:
        library: `transformers`, `diffusers` or the name of a shipped module; it decides how the
            weight files are named.
    """
    if folder.name == "scheduler":
        read_json(folder / "scheduler_config.json")
    elif folder.name == "tokenizer":
        if not any(all((folder / f).is_file() for f in files) for files in TOKENIZER_FILES):
            raise InputError(f"{folder / 'tokenizer.json'} is missing. Restore the file.")
    else:
        read_json(folder / "config.json")
        stem = "model" if library == "transformers" else "diffusion_pytorch_model"
        for path in _weight_files(folder, stem):
            check_safetensors(path)


def check_safetensors(path: Path) -> None:
    """Raises `InputError` unless the file is there and as long as its header says."""
    if not path.is_file():
        raise InputError(f"{path} is missing. Restore the file, or save the model again.")
    try:
        with safe_open(path, framework="pt") as tensors:
            tensors.keys()
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path} must be a whole safetensors file, but it is truncated or something else "
            f"({error}). Copy or save it again."
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        InputError: no such file, or something else in it.
    """
    if not path.is_file():
        raise InputError(f"{path} is missing. Restore the file, or save the model again.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(f"{path} must hold JSON, but cannot be read: {error}.") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object, but holds a {type(content).__name__}.")
    return content


def _weight_files(folder: Path, stem: str) -> list[Path]:
    index = folder / f"{stem}.safetensors.index.json"
    if not index.is_file():
        return [folder / f"{stem}.safetensors"]
    weights = read_json(index).get("weight_map", {})
    return [folder / name for name in sorted(set(weights.values()))]
