"""Files and folders that are whole or absent."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from featinv_diffusion.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path` and moves it there once the block succeeds.

    The folder is made where it is missing. A block that fails leaves `path` as it was and nothing
    beside it; a killed process may leave the temporary file, whose name starts with a dot and ends
    in `.part`. An `OSError` of writing names `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        if error.filename is None or str(error.filename) == str(partial):
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yields an empty folder that becomes `target` when the block succeeds, and vanishes otherwise.

    Raises:
        InputError: `target` exists, or the disk refuses (full, read-only).
    """
    check_absent(target)
    staging = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        inner = staging / target.name  # mkdtemp's own permissions are for one user only
        inner.mkdir()
        yield inner
        os.replace(inner, target)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{target} could not be written: {error}.") from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def check_absent(target: Path) -> None:
    """Raises `InputError` where `target` exists: nothing is overwritten."""
    if target.exists():
        raise InputError(f"{target} must not exist yet, but it does. Remove it or name another.")


# ---- Named tensors and a JSON header in one safetensors file -------------------------------------


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any], file_format: str
) -> None:
    """Writes a file, whole or not at all.

    Raises:
        InputError: the disk refuses.
    """
    from safetensors.torch import save_file  # imports torch, which options must not wait for

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


def expand_path(name: str | Path) -> Path:
    """Returns a path whose `~` is the home folder.

    Raises:
        InputError: `~name` of a user that this machine does not have.
    """
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise InputError(f"The path {str(name)!r} leads nowhere: {error}") from error
