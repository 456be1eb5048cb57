"""Files and folders that are whole or absent."""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from featinv_diffusion import schema
from featinv_diffusion.errors import InputError, reason_of

if TYPE_CHECKING:
    from torch import Tensor


PARTIAL = ".part"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path` and moves it there once the block succeeds.

    The folder is made where it is missing. The content is on the disk before the name is, so that
    a loss of power leaves the old file or the new one. A block that fails leaves `path` as it was
    and nothing beside it; a killed process may leave the temporary file, whose name starts with a
    dot, cannot be guessed, and ends in `.part`. An `OSError` of writing names `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    partial = None
    try:
        partial = _make_partial(path)
        yield partial
        flush_to_disk(partial)
        os.replace(partial, path)
        flush_one(path.parent)
    except OSError as error:
        if error.filename is None or str(error.filename) == str(partial):
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)


def _make_partial(path: Path) -> Path:
    """Makes an empty file of a random name, which follows no link and replaces nothing."""
    handle, name = tempfile.mkstemp(prefix=_partial_prefix(path), suffix=PARTIAL, dir=path.parent)
    os.close(handle)
    os.chmod(name, 0o666 & ~_umask())  # mkstemp's own permissions are for one user only
    return Path(name)


def _partial_prefix(path: Path) -> str:
    return f".{path.name[:100]}."  # a long name must leave room for what is added to it


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def flush_to_disk(path: Path) -> None:
    """Waits until a file or folder is on the disk, with everything below a folder."""
    for inner in path.rglob("*") if path.is_dir() else ():
        if inner.is_file() and not inner.is_symlink():
            flush_one(inner)
    for inner in path.rglob("*") if path.is_dir() else ():
        if inner.is_dir() and not inner.is_symlink():
            flush_one(inner)
    flush_one(path)


def flush_one(path: Path) -> None:
    """Waits until a file, or which names a folder holds, is on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows has no handle of a folder to flush
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system without fsync
            raise
    finally:
        os.close(handle)


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
        with holding(target):
            check_absent(target)  # another process may have made it meanwhile
            staging = Path(
                tempfile.mkdtemp(prefix=_partial_prefix(target), suffix=PARTIAL, dir=target.parent)
            )
            inner = staging / target.name  # mkdtemp's own permissions are for one user only
            inner.mkdir()
            yield inner
            flush_to_disk(inner)
            os.replace(inner, target)
            flush_one(target.parent)
            staging.rmdir()
    except (OSError, SafetensorError) as error:
        raise InputError(f"{target} could not be written: {error}.") from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def holding(target: Path, part: tuple[int, int] | None = None) -> Iterator[None]:
    """Keeps other processes from writing to a folder or file while the block runs.

    The lock lies in a folder that exists, else beside the target. It is free again when its
    process ends, however that happens. What a killed process left half-written for this target
    is removed first. A process may hold a target several times.

    Args:
        part: (i, N) of a process that writes a part of a folder beside others of the same N, each
            with an i of its own.

    Raises:
        InputError: another process holds it; says which.
    """
    folder, stem = (target, "") if target.is_dir() else (target.parent, f".{target.name[:100]}")
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{stem}.lock" + ("" if part is None else f"-{part[0]}-of-{part[1]}")
    path, owner = folder / name, folder / f"{name}-owner"
    if path.is_symlink():  # it would be made, and emptied, where somebody else's link leads
        raise InputError(f"{path} must be a lock of this program, but is a link. Remove it.")
    lock = FileLock(path, timeout=_BRIEFLY, is_singleton=True)
    try:
        lock.acquire()
    except Timeout:
        raise _held(target, path) from None
    try:
        if lock.lock_counter == 1:
            _refuse_beside(target, folder, stem, part)
            if part is None:
                _remove_partials(folder, target)
            write_text(owner, f" ({os.getpid()} on {platform.node()})")
        yield
    finally:
        if lock.lock_counter == 1:
            owner.unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        lock.release()


_BRIEFLY = 0.2
"""Seconds, for which another process may hold a lock only to look whether it is free."""


def _refuse_beside(target: Path, folder: Path, stem: str, part: tuple[int, int] | None) -> None:
    """Raises `InputError` where a lock is held that goes with no other.

    Each process first takes its own lock and then looks at others', so that of two that start at
    once at least one is refused.
    """
    of_part = re.compile(re.escape(stem) + r"\.lock-[0-9]+-of-(?P<n>[0-9]+)")
    for path in sorted(folder.iterdir()):
        found = of_part.fullmatch(path.name)
        if found is None and (part is None or path.name != f"{stem}.lock"):
            continue
        if found is not None and part is not None and int(found["n"]) == part[1]:
            continue
        if path.is_symlink() or not path.exists():
            continue
        other = FileLock(path, timeout=_BRIEFLY)
        try:
            other.acquire()
        except Timeout:
            raise _held(target, path) from None
        other.release()


def _held(target: Path, path: Path) -> InputError:
    found = re.search(r"\.lock-([0-9]+)-of-([0-9]+)$", path.name)
    who = "another process" if found is None else f"worker {found[1]}/{found[2]}"
    owner = _read_owner(path.with_name(f"{path.name}-owner"))
    return InputError(
        f"{target} is being written by {who}{owner}. Wait until it is done, or use another output."
    )


def _read_owner(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")[:200]
    except OSError:
        return ""


def _remove_partials(folder: Path, target: Path) -> None:
    """Removes what killed writers of a folder, or of one file or folder, left in `folder`."""
    beginning = "." if folder == target else _partial_prefix(target)
    for path in folder.iterdir():
        if path.name.startswith(beginning) and path.name.endswith(PARTIAL):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


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
            _sort_metadata(partial)
            partial.chmod(0o644)  # safetensors makes files that only their owner can read
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} could not be written: {error}.") from error


def _sort_metadata(path: Path) -> None:
    """Sorts the metadata of a safetensors file, which the library writes in a random order.

    So the same content gives the same bytes. The JSON keeps its length, with which the file begins.
    """
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        if len(text) == length:
            file.seek(8)
            file.write(text)


def read_tensors(
    path: Path, file_format: str, advice: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what `write_tensors` wrote in this format.

    Args:
        advice: what to do about a file that is no such one, a sentence.

    Raises:
        InputError: no such file, a damaged one, or one that holds something else.
    """
    if path.exists() and not path.is_file():  # a pipe would wait for ever
        raise InputError(f"{path} must be a plain file, but is something else. {advice}")
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
    header = schema.parse_json(metadata["header"], dict[str, Any], f"{path} (its header)", advice)
    return tensors, header


def read_torch(path: Path, what: str) -> Any:
    """Reads what `torch.save` wrote of tensors and plain values; nothing in the file is run.

    Args:
        what: the file must hold, in words.

    Raises:
        InputError: a damaged file, or one that holds other objects.
    """
    import torch  # which options must not wait for

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file makes the reader raise
        raise InputError(
            f"{path} must hold {what} and nothing else, but cannot be read: {reason_of(error)}."
        ) from error


def expand_path(name: str | Path) -> Path:
    """Returns a path whose `~` is the home folder.

    Raises:
        InputError: `~name` of a user that this machine does not have.
    """
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise InputError(f"The path {str(name)!r} leads nowhere: {error}") from error
