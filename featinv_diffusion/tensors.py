"""Named tensors and a JSON header in one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from featinv_diffusion.errors import InputError
from featinv_diffusion.files import replacing


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any], file_format: str
) -> None:
    """Writes a file, whole or not at all.

    Raises:
        InputError: the disk refuses.
    """
    metadata = {"format": file_format, "header": json.dumps(header, sort_keys=True)}
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        with replacing(path) as partial:
            save_file(whole, partial, metadata=metadata)
            partial.chmod(0o644)  # safetensors makes files that only their owner can read
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} could not be written: {error}.") from error


def read_tensors(
    path: Path, file_format: str, advice: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what `write_tensors` wrote in this format.

    Args:
        advice: what to do about a file that is no such one, a sentence.

    Raises:
        InputError: no such file, a damaged one, or one that holds something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path} must be a whole safetensors file, but it is truncated or something else "
            f"({error}). {advice}"
        ) from None
    if metadata.get("format") != file_format or "header" not in metadata:
        raise InputError(
            f"{path} must be in the format {file_format!r}, but its header says "
            f"{metadata.get('format')!r}. {advice}"
        )
    return tensors, json.loads(metadata["header"])
