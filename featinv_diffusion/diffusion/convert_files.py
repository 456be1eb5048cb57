"""Checkpoint files: tensors in, tensors out, and nothing but tensors is ever unpickled."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from featinv_diffusion.errors import InputError
from featinv_diffusion.files import check_absent, replacing

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
        raise InputError(f"{path} must hold a model's tensors, but there is none in it.")
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
            f"A checkpoint's name must end in one of {', '.join(SUFFIXES)}, but {path.name!r} came."
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
    except Exception as error:  # whatever the reader stumbles on is the file's fault
        foreign = re.search(r"(?:GLOBAL|Unsupported class|global:?) ([\w.]+\.\w+)", str(error))
        if foreign:
            raise InputError(
                f"{path} must hold tensors only, but it holds a pickled object ({foreign[1]}), "
                "which could run code and is not loaded. Where you trust the file, save its "
                "`state_dict` as safetensors and convert that."
            ) from error
        raise InputError(f"{path} is truncated or no PyTorch checkpoint.") from error
