"""Files behind local paths and fsspec URLs alike: what is there, its bytes, pictures of a folder."""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from glob import glob, has_magic
from pathlib import Path
from typing import Any

import fsspec
from PIL import Image

from featinv_diffusion.errors import InputError
from featinv_diffusion.images import SUFFIXES, decode_image, read_image


def to_place(given: str | Path) -> str:
    """Returns a local path, with `~` and `file://` resolved, or an fsspec URL, as text."""
    text = str(given)
    if isinstance(given, Path):  # which has taken a slash from a URL
        text = re.sub(r"^([a-z][a-z0-9+.-]+):/(?=[^/])", r"\1://", text)
    text = text.removeprefix("file://")
    return text if is_url(text) else str(Path(text).expanduser())


def is_url(place: str) -> bool:
    return "://" in place


def absolute(place: str) -> str:
    """Returns the place as it can be found again from any working directory."""
    return place if is_url(place) else os.path.abspath(place)


def suffix_of(name: str) -> str:
    """Returns the suffix in lower case, with its dot."""
    return posixpath.splitext(name)[1].lower()


def is_hidden(name: str) -> bool:
    """Whether any part of a relative path is hidden, or an archive's copy of a Mac's metadata."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def is_folder(place: str) -> bool:
    with reaching(place):
        return _remote(place, "isdir") if is_url(place) else os.path.isdir(place)


def exists(place: str) -> bool:
    with reaching(place):
        return _remote(place, "exists") if is_url(place) else os.path.exists(place)


def open_binary(place: str) -> Any:
    """Opens a file for reading, closed by a `with` block."""
    return fsspec.open(place, "rb").open() if is_url(place) else open(place, "rb")


def read_bytes(place: str, start: int | None = None, end: int | None = None) -> bytes:
    """Reads a file, or the bytes `start` to `end` of it.

    Raises:
        InputError: the file cannot be read.
    """
    with reaching(place):
        if is_url(place):
            return _remote(place, "cat_file", start=start, end=end)
        with open(place, "rb") as file:
            file.seek(start or 0)
            return file.read(-1 if end is None else end - (start or 0))


def read_picture(place: str) -> Image.Image:
    """Reads a picture file as `read_image` does.

    Raises:
        InputError: no such file, or no picture that can be read.
    """
    return decode_image(read_bytes(place), place) if is_url(place) else read_image(place)


def fingerprint(places: Iterable[str]) -> str:
    """Hashes names, sizes and times of change, which a file that is replaced does not keep."""
    digest = hashlib.sha256()
    for place in places:
        name = place.rpartition("/")[2].encode(errors="surrogateescape")
        if is_url(place):
            with reaching(place):
                digest.update(name + b"\0" + _remote(place, "ukey").encode() + b"\n")
        else:
            stat = os.stat(place)
            digest.update(name + f"\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def children(folder: str) -> tuple[list[str], list[str]]:
    """Returns the names of the folders and of the files in a folder, sorted, without hidden ones."""
    with reaching(folder):
        if is_url(folder):
            entries = [
                (posixpath.basename(x["name"].rstrip("/")), x["type"] == "directory")
                for x in _remote(folder, "ls", detail=True)
            ]
        else:
            entries = [(x.name, x.is_dir()) for x in os.scandir(folder)]
    visible = sorted(entry for entry in entries if not is_hidden(entry[0]))
    return [n for n, is_dir in visible if is_dir], [n for n, is_dir in visible if not is_dir]


def expand(pattern: str) -> list[str] | None:
    """Returns the files of a pattern with `{000..003}`, `{a,b}`, `*` or `?`; None without any.

    Raises:
        InputError: no file has such a name.
    """
    names = _expand_braces(pattern)
    if names == [pattern] and not has_magic(pattern):
        return None
    found: list[str] = []
    for name in names:
        if not has_magic(name):
            found.append(name)
        elif is_url(name):
            with reaching(name):
                fs, path = fsspec.core.url_to_fs(name)
                found += sorted(fs.unstrip_protocol(x) for x in fs.glob(path))
        else:
            found += sorted(glob(name, recursive=True))
    if not found:
        raise InputError(f"Files must exist for the pattern {pattern}, but there are none.")
    return found


def _expand_braces(pattern: str) -> list[str]:
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found is None:
        return [pattern]
    choices = found[1].split(",")
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", found[1]):
        first, last = numbers.groups()
        choices = [f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1)]
    before, after = pattern[: found.start()], pattern[found.end() :]
    return [name for choice in choices for name in _expand_braces(before + choice + after)]


# ---- The pictures below a folder, and what was left out --------------------------------------


@dataclass
class LeftOut:
    """How many files were left out, and why."""

    hidden: int = 0
    repeated: int = 0
    suffixes: Counter[str] = field(default_factory=Counter)

    def add(self, other: LeftOut) -> None:
        self.hidden += other.hidden
        self.repeated += other.repeated
        self.suffixes += other.suffixes

    def notes(self) -> tuple[str, ...]:
        """Returns one sentence, or nothing where nothing was left out."""
        other = ", ".join(sorted(suffix or "none" for suffix in self.suffixes)[:5])
        parts = [(self.hidden, "hidden"), (self.repeated, "given more than once")]
        parts.append((self.suffixes.total(), f"with another suffix ({other})"))
        total = sum(count for count, _ in parts)
        reasons = ", ".join(f"{count} {reason}" for count, reason in parts if count)
        return (f"Left out {total} {'file' if total == 1 else 'files'}: {reasons}.",) * (total > 0)


@dataclass(frozen=True)
class Listing:
    """The pictures below a folder.

    Args:
        names: paths relative to the folder, with forward slashes, sorted.
        has_links: whether any of them was reached through a symbolic link.
    """

    folder: str
    names: list[str]
    left_out: LeftOut
    has_links: bool = False


def list_pictures(folder: str | Path) -> Listing:
    """Lists the pictures below a folder by suffix; hidden files and folders are skipped.

    Links to folders are followed. A hidden folder counts as one file that is left out.

    Raises:
        InputError: no such folder, or no picture in it.
    """
    place = to_place(folder)
    if not is_folder(place):
        raise InputError(f"A folder of pictures must exist at {place}, but there is none.")
    left_out, names, has_links = LeftOut(), [], False
    for name, is_linked in _walk(place):
        if is_hidden(name):
            left_out.hidden += 1
        elif suffix_of(name) not in SUFFIXES:
            left_out.suffixes[suffix_of(name)] += 1
        else:
            names.append(name)
            has_links |= is_linked
    if not names:
        raise InputError(f"{place} holds no picture; looked for {', '.join(SUFFIXES)}.")
    return Listing(place, sorted(names), left_out, has_links)


def has_pictures(folder: str) -> bool:
    """Whether there is any picture below a folder."""
    return any(suffix_of(name) in SUFFIXES and not is_hidden(name) for name, _ in _walk(folder))


def _walk(folder: str) -> Iterator[tuple[str, bool]]:
    """Yields the relative path of each file and whether a link led there."""
    if not is_url(folder):
        yield from _walk_local(folder, "", False, ())
        return
    with reaching(folder):
        fs, root = fsspec.core.url_to_fs(folder)
        names = [name.removeprefix(root).lstrip("/") for name in fs.find(root)]
    yield from ((name, False) for name in names)


def _walk_local(
    root: str, name: str, is_linked: bool, above: tuple[str, ...]
) -> Iterator[tuple[str, bool]]:
    """Yields a hidden folder as one file, and does not enter a folder that is above itself."""
    here = os.path.realpath(os.path.join(root, name))
    if here in above:
        return
    try:
        entries = list(os.scandir(os.path.join(root, name)))
    except PermissionError:
        return
    for entry in entries:
        inner, linked = f"{name}{entry.name}", is_linked or entry.is_symlink()
        if entry.is_file() or is_hidden(entry.name):
            yield inner, linked
        elif entry.is_dir():
            yield from _walk_local(root, f"{inner}/", linked, (*above, here))


def _remote(place: str, method: str, **options: Any) -> Any:
    fs, path = fsspec.core.url_to_fs(place)
    return getattr(fs, method)(path, **options)


@contextmanager
def reaching(place: str) -> Iterator[None]:
    """Turns whatever a file system raises into an `InputError`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # each remote file system has errors of its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{place} cannot be read: {reason}") from error
