"""Folders that diffusers wrote: the class inside, and a network with exactly its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from diffusers.models.modeling_utils import ModelMixin
from safetensors import SafetensorError

from featinv_diffusion.errors import InputError

Network = TypeVar("Network", bound=ModelMixin)

CONFIG = "config.json"
UNREADABLE = (
    OSError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    SafetensorError,
)
"""What the libraries raise for a file that is missing or damaged, or for impossible settings."""


def class_name(folder: Path) -> str | None:
    """Returns the class that a folder's config names; None without one.

    Raises:
        InputError: a config that is no JSON object.
    """
    path = folder / CONFIG
    if not path.is_file():
        return None
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} must be JSON, but cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object, got a {type(content).__name__}.")
    return content.get("_class_name")


def load_network(network_class: type[Network], name: str | Path, *, wanted: str) -> Network:
    """Loads a network in float32, with exactly the weights that its config asks for.

    Args:
        name: folder or Hub repository.
        wanted: what must be there, in words for the message.

    Raises:
        InputError: nothing there, files that cannot be downloaded or read, or weights that are
            missing or unexpected.
    """
    loader: Any = network_class
    try:
        network, found = loader.from_pretrained(
            name, use_safetensors=True, output_loading_info=True
        )
    except UNREADABLE as error:
        raise InputError(
            f"{name} must be {wanted}, but it could not be read: {first_line(error)}"
        ) from error
    for kind in ("missing", "unexpected"):
        if keys := found[f"{kind}_keys"]:
            raise InputError(
                f"{name} must be {wanted}, with the weights that its {CONFIG} asks for, but "
                f"{len(keys)} are {kind}, {min(keys)} among them."
            )
    return network.float()


def first_line(error: Exception) -> str:
    """Returns the first line of a library's message, or the error's name if it has no message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
