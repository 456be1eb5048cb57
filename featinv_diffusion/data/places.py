"""Files behind local paths and fsspec URLs: what is there, its bytes, a folder's pictures."""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from glob import has_magic
from pathlib import Path
from typing import Any

import fsspec
from PIL import Image

from featinv_diffusion.errors import InputError, what_is_at
from featinv_diffusion.images import SUFFIXES, decode_image, read_image
from featinv_diffusion.schema import MAX_TEXT


def to_place(given: str | Path) -> str:
    """Returns a local path, with `~` and `file://` resolved, or an fsspec URL, as text."""
    text = str(given)
    if isinstance(given, Path):  # which has taken a slash from a URL
        text = re.sub(r"^([a-z][a-z0-9+.-]+):/(?=[^/])", r"\1://", text)
    text = text.removeprefix("file://")
    return text if is_url(text) else str(Path(text).expanduser())


def join(folder: str, name: str) -> str:
    """Returns the place of a relative path, as `pathlib` spells it."""
    return name if folder == "." else posixpath.join(folder, name)


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
    with reaching(place) as (files, path):
        return files.isdir(path)


def exists(place: str) -> bool:
    with reaching(place) as (files, path):
        return files.exists(path)


@contextmanager
def open_binary(place: str) -> Iterator[Any]:
    """Opens a file for reading."""
    with reaching(place) as (files, path):
        stream = files.open(path)
    with stream:
        yield stream


def read_bytes(place: str, start: int | None = None, end: int | None = None) -> bytes:
    """Reads a file, or the bytes `start` to `end` of it.

    Raises:
        InputError: the file cannot be read.
    """
    with reaching(place) as (files, path):
        return files.cat_file(path, start=start, end=end)


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
        if is_url(place):
            with reaching(place) as (files, path):
                state = files.ukey(path)
        else:
            found = os.stat(place)
            state = f"{found.st_size}\0{found.st_mtime_ns}"
        name = place.rpartition("/")[2]
        digest.update(f"{name}\0{state}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def children(folder: str) -> tuple[list[str], list[str]]:
    """Returns the names of the folders and of the files in a folder, sorted; no hidden ones."""
    with reaching(folder) as (files, path):
        names = [entry["name"] for entry in files.ls(path, detail=True)]
        found = {posixpath.basename(name): files.isdir(name) for name in names}
    visible = sorted(name for name in found if not is_hidden(name))
    return [n for n in visible if found[n]], [n for n in visible if not found[n]]


def expand(pattern: str) -> list[str] | None:
    """Returns the files of a pattern with `{000..003}`, `{a,b}`, `*` or `?`; None without any."""
    names = _expand_braces(pattern)
    if names == [pattern] and not has_magic(pattern):
        return None
    found: list[str] = []
    for name in names:
        with reaching(name) as (files, path):
            matching = sorted(files.glob(path)) if has_magic(name) else []
        found += [files.unstrip_protocol(x) if is_url(name) else x for x in matching] or [name]
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


# ---- The pictures below a folder, and what was left out ------------------------------------------


@dataclass
class LeftOut:
    """How many files were left out, and why."""

    hidden: int = 0
    repeated: int = 0
    made: int = 0
    suffixes: Counter[str] = field(default_factory=Counter)

    def add(self, other: LeftOut) -> None:
        self.hidden += other.hidden
        self.repeated += other.repeated
        self.made += other.made
        self.suffixes += other.suffixes

    def notes(self) -> tuple[str, ...]:
        """Returns one sentence, or nothing where nothing was left out."""
        other = ", ".join(sorted(suffix or "none" for suffix in self.suffixes)[:5])
        parts = [(self.hidden, "hidden"), (self.repeated, "given more than once")]
        parts.append((self.made, "that runs of featinv made"))
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

    Links to folders are followed. A hidden folder counts as one file that is left out. Pictures
    that runs of this program made are left out where there are others.

    Raises:
        InputError: no such folder, or no picture in it.
    """
    place = to_place(folder)
    if not is_folder(place):
        found = "nothing" if is_url(place) else what_is_at(place)
        raise InputError(f"A folder of pictures must exist at {place}, but there is {found}.")
    left_out, names, manifests, has_links = LeftOut(), [], [], False
    for name, is_linked in _walk(place):
        if is_hidden(name):
            left_out.hidden += 1
        elif suffix_of(name) not in SUFFIXES:
            left_out.suffixes[suffix_of(name)] += 1
            manifests += [name] if is_manifest(name) else []
        else:
            names.append(name)
            has_links |= is_linked
    made = made_by_runs(place, manifests) if manifests else set()
    if (others := [name for name in names if name not in made]) and len(others) < len(names):
        left_out.made += len(names) - len(others)
        names = others
    if not names:
        raise InputError(f"{place} holds no picture; looked for {', '.join(SUFFIXES)}.")
    return Listing(place, sorted(names), left_out, has_links)


TABLES = ("interpolate", "compose", "variability", "viz", "per_image")
"""Names of the tables that runs of this program write, without their suffix."""


def is_manifest(name: str) -> bool:
    """Whether a file may be the manifest of a run, by its name."""
    return posixpath.basename(name) == "manifest.json" or name.endswith(".manifest.json")


def made_by_runs(folder: str, names: Iterable[str]) -> set[str]:
    """Returns the files that the manifests among `names` list, relative to `folder`."""
    made: set[str] = set()
    for name in filter(is_manifest, names):
        try:
            content = json.loads(read_bytes(join(folder, name), 0, MAX_TEXT))
        except (InputError, ValueError, RecursionError):  # somebody else's, which lists nothing
            continue
        if isinstance(content, dict) and "version" in content:
            stem = posixpath.basename(name).removesuffix(".manifest.json")
            of_run = [content.get("figure"), "grid.png", f"{stem}.parquet", *_outputs(content)]
            made |= {
                posixpath.join(posixpath.dirname(name), made)
                for made in of_run
                if isinstance(made, str)
            }
    return made


def _outputs(content: dict[str, Any]) -> list[Any]:
    images = content.get("images")
    entries = [content, *(images if isinstance(images, list) else [])]
    lists = [entry.get("outputs") for entry in entries if isinstance(entry, dict)]
    return [name for names in lists if isinstance(names, list) for name in names]


def has_pictures(folder: str) -> bool:
    """Whether there is any picture below a folder."""
    return any(suffix_of(name) in SUFFIXES and not is_hidden(name) for name, _ in _walk(folder))


def _walk(folder: str) -> Iterator[tuple[str, bool]]:
    """Yields the relative path of each file and whether a link led there."""
    if not is_url(folder):
        yield from _walk_local(folder, "", False, ())
        return
    with reaching(folder) as (files, root):
        found = files.find(root)
    yield from ((name.removeprefix(root).lstrip("/"), False) for name in found)


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


@contextmanager
def reaching(place: str) -> Iterator[tuple[Any, str]]:
    """Yields the file system of a place and its path there.

    Raises:
        InputError: whatever the file system raises.
    """
    try:
        yield fsspec.core.url_to_fs(place)
    except Exception as error:  # each remote file system has errors of its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{place} cannot be read: {reason}") from error
