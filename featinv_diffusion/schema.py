"""Files that travel are data: read as JSON or YAML, held against a schema, and never evaluated.

A schema is a dataclass, a `TypedDict` or any other type that msgspec converts to; limits stand in
its annotations (`Annotated[int, Meta(ge=1)]`) or are checked by its `__post_init__`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import yaml

from featinv_diffusion.errors import InputError
from featinv_diffusion.files import what_is_at

T = TypeVar("T")

MAX_TEXT = 64 << 20
"""Bytes of a file of JSON or YAML; a larger one holds something else."""


def read_json(path: Path, kind: Any = Any, advice: str = "") -> Any:
    """Reads a JSON file and holds it against a schema.

    Args:
        kind: what it must hold.
        advice: what to do about a file that does not, a sentence.

    Raises:
        InputError: no such file, no JSON, or a value that the schema refuses; says which field,
            what must hold, and what was found.
    """
    return parse_json(read_text(path, advice), kind, str(path), advice)


def parse_json(text: str | bytes, kind: Any, source: str, advice: str = "") -> Any:
    """Reads JSON text; see `read_json`."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InputError(_join(f"{source} must hold JSON, but {reason}.", advice)) from None
    return convert(content, kind, source, advice)


def parse_yaml(text: str | bytes, source: str, advice: str = "") -> Any:
    """Reads YAML text of plain values.

    Raises:
        InputError: no YAML, tags of other programs, or aliases that repeat what they stand for.
    """
    try:
        for token in yaml.scan(text, Loader=yaml.SafeLoader):
            if isinstance(token, yaml.AliasToken):  # a few lines of them fill any memory
                raise InputError(_join(f"{source} must hold YAML without aliases (*).", advice))
        return yaml.load(text, Loader=yaml.SafeLoader)  # noqa: S506
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        reason = " ".join(str(error).split())
        raise InputError(
            _join(f"{source} must hold YAML, but does not: {reason}.", advice)
        ) from None


def convert(content: Any, kind: type[T] | Any, source: str, advice: str = "") -> T:
    """Holds plain values against a schema and returns them as it says.

    Raises:
        InputError: a value that it refuses.
    """
    try:
        return msgspec.convert(content, kind, strict=False)
    except (msgspec.ValidationError, RecursionError) as error:
        reason = str(error).replace("$.", "").replace(" - at `$`", "")
        raise InputError(_join(f"In {source}: {reason}.", advice)) from None


def read_text(path: Path, advice: str = "") -> str:
    """Reads a text file.

    Raises:
        InputError: no such file, one that cannot be read, or no text.
    """
    try:
        if not path.is_file():
            found = what_is_at(path)
            raise InputError(_join(f"{path} must be a file, but {found} is there.", advice))
        if path.stat().st_size > MAX_TEXT:
            raise InputError(_join(f"{path} must be a text file, but has over 64 MiB.", advice))
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise InputError(_join(f"{path} cannot be read as text: {error}.", advice)) from None


def _join(sentence: str, advice: str) -> str:
    return f"{sentence} {advice}" if advice else sentence
