"""`concepts.safetensors`: the tensors of a dictionary and, as JSON in the header, all the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from featinv_diffusion.errors import InputError
from featinv_diffusion.tensors import read_tensors, write_tensors
from featinv_diffusion.types import FeatureSpec

FORMAT = "featinv-concepts/1"


def write_concepts(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Writes a file, whole or not at all.

    Raises:
        InputError: the disk refuses.
    """
    write_tensors(path, tensors, header, FORMAT)


def read_concepts(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads tensors and header.

    Raises:
        InputError: no such file, a damaged one, or one that holds something else.
    """
    if not path.is_file():
        raise InputError(f"A file of concepts must be there, but {path} is not. Fit one first.")
    return read_tensors(path, FORMAT, "Fit the concepts again.")


def read_directions(path: str | Path) -> tuple[Tensor, Tensor | None]:
    """Reads a matrix of directions from elsewhere, and the offset that it may come with.

    Args:
        path: `.npy` with one matrix `[k, c]`, or `.safetensors` with `directions` and perhaps
            `offset`, or with a single matrix of whatever name.

    Raises:
        InputError: no such file, another format, or no matrix that is clearly meant.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"A file of directions must be there, but {path} is not.")
    tensors = _read_tensors(path)
    matrices = [name for name, tensor in tensors.items() if tensor.ndim == 2]
    name = "directions" if "directions" in matrices else matrices[0] if matrices else ""
    if name != "directions" and len(matrices) != 1:
        raise InputError(
            f"{path} must hold a matrix named directions, or one matrix alone, "
            f"but holds {', '.join(sorted(tensors)) or 'nothing'}."
        )
    offset = tensors.get("offset")
    if tensors[name].is_complex():
        raise InputError(f"{path} must hold real numbers, but holds complex ones.")
    return tensors[name].float(), None if offset is None else offset.float()


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".npy":
            return {"directions": torch.from_numpy(np.load(path, allow_pickle=False))}
        if path.suffix == ".safetensors":
            return load_file(path)
    except (EOFError, OSError, ValueError, TypeError, SafetensorError) as error:
        raise InputError(f"{path} must hold directions, but cannot be read: {error}.") from error
    raise InputError(f"Directions must be a .npy or .safetensors file, but {path} came.")


def spec_to_json(spec: FeatureSpec | None) -> dict[str, Any] | None:
    return None if spec is None else asdict(spec)


def spec_from_json(fields: Mapping[str, Any] | None) -> FeatureSpec | None:
    return None if fields is None else FeatureSpec(**{**fields, "grid": tuple(fields["grid"])})
