"""`concepts.safetensors`: the tensors of a dictionary and, as JSON in the header, all the rest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from featinv_diffusion.errors import InputError
from featinv_diffusion.files import replacing
from featinv_diffusion.types import FeatureSpec

FORMAT = "featinv-concepts/1"


def write_concepts(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Writes a file, whole or not at all.

    Raises:
        InputError: the disk refuses.
    """
    metadata = {"format": FORMAT, "concepts": json.dumps(header)}
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        with replacing(path) as partial:
            save_file(whole, partial, metadata=metadata)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} could not be written: {error}.") from error


def read_concepts(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads tensors and header.

    Raises:
        InputError: no such file, a damaged one, or one that holds something else.
    """
    if not path.is_file():
        raise InputError(f"A file of concepts must be there, but {path} is not. Fit one first.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path} must be a whole safetensors file, but it is truncated or something else "
            f"({error})."
        ) from None
    if metadata.get("format") != FORMAT:
        raise InputError(
            f"{path} must hold concepts in the format {FORMAT!r}, "
            f"but its header says {metadata.get('format')!r}. Fit them again."
        )
    return tensors, json.loads(metadata["concepts"])


def spec_to_json(spec: FeatureSpec | None) -> dict[str, Any] | None:
    return None if spec is None else asdict(spec)


def spec_from_json(fields: Mapping[str, Any] | None) -> FeatureSpec | None:
    return None if fields is None else FeatureSpec(**{**fields, "grid": tuple(fields["grid"])})
