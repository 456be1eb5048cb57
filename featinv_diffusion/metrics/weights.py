"""Weight files of metrics: where they are looked for, and what to say where they are not."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

import torch

from featinv_diffusion.errors import InputError


def find_weights(url: str, path: str | Path | None, *, what: str, option: str) -> Path:
    """Returns the file given, or the one that torch.hub has cached; never downloads.

    Args:
        url: where the file comes from; its last part is its name in the cache.
        path: the file that the user named.
        what: whose weights they are, for the message.
        option: how a user names the file.

    Raises:
        InputError: the file is not there.
    """
    name = url.rpartition("/")[2]
    found = Path(path) if path is not None else Path(torch.hub.get_dir()) / "checkpoints" / name
    if not found.is_file():
        raise InputError(
            f"The weights of {what} must be in a file, but there is none at {found}. "
            f"Download {url} to that place, or name the file with {option}."
        )
    return found


def read_weights(path: Path, *, what: str) -> dict[str, Any]:
    """Reads a state dict without running code from the file.

    Raises:
        InputError: the file holds something else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(
            f"{path} must hold the weights of {what}, but cannot be read: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error
    if not isinstance(state, dict):
        raise InputError(
            f"{path} must hold the weights of {what}, but holds a {type(state).__name__}."
        )
    return state


def file_sha256(path: Path) -> str:
    """Returns the hash of a file's bytes in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
