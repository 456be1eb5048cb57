"""The pictures that the page knows: samples, which stay, and the last uploads."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from threading import Lock

from PIL import Image

from featinv_diffusion.data.sets import open_pictures
from featinv_diffusion.errors import InputError
from featinv_diffusion.images import (
    SUFFIXES,
    builtin_photo,
    center_square,
    decode_image,
    picture_id,
    without_notes,
)

MAX_BYTES = 20 << 20
MAX_PIXELS = 50_000_000
MAX_UPLOADS, MAX_KEPT_BYTES = 64, 256 << 20
MAX_SAMPLES = 48
THUMBNAIL = 160
BUILTIN = ("flower.jpg", "china.jpg")


@dataclass(frozen=True, eq=False)
class Stored:
    """A picture file.

    Args:
        key: what a link calls it.
        name: its file name, on which the noise of its samples depends.
        content: the file, byte for byte.
        label: the class that it is known to be of; None where none is known.
    """

    key: str
    name: str
    content: bytes
    label: str | None = None
    is_sample: bool = False

    def decode(self) -> Image.Image:
        """Returns the picture as every command reads it."""
        with without_notes():
            return decode_image(self.content, self.name, MAX_PIXELS)

    def thumbnail(self) -> bytes:
        """Returns the centre square as a PNG."""
        file = BytesIO()
        center_square(self.decode(), THUMBNAIL).save(file, format="PNG")
        return file.getvalue()


class Pictures:
    """All pictures of a server, in memory; nothing is written to the disk.

    Args:
        folder: sample pictures of the user's own: a folder whose folders are classes, or which
            holds pictures. None takes the two photos that scikit-learn ships.

    Raises:
        InputError: no such folder, or no pictures in it.
    """

    def __init__(self, folder: str | Path | None = None):
        samples = _builtin() if folder is None else _of_folder(folder)
        self.samples = {one.key: one for one in samples}
        self._uploads: OrderedDict[str, Stored] = OrderedDict()
        self._lock = Lock()

    def add(self, content: bytes, name: str) -> Stored:
        """Keeps an upload, and forgets the oldest where there are too many.

        Raises:
            InputError: too many bytes or pixels, or no picture.
        """
        if len(content) > MAX_BYTES:
            raise InputError(too_large(len(content)))
        decode_image(content, _last_part(name) or "The upload", MAX_PIXELS)
        name = _clean(name)
        digest = hashlib.sha256(name.encode() + b"\0" + content).hexdigest()
        stored = Stored(digest[:32], name, content)
        with self._lock:
            self._uploads[stored.key] = stored
            self._uploads.move_to_end(stored.key)
            while len(self._uploads) > MAX_UPLOADS or self._n_bytes() > MAX_KEPT_BYTES:
                self._uploads.popitem(last=False)
        return stored

    def get(self, key: str) -> Stored:
        """Returns a picture.

        Raises:
            InputError: it is not, or not any more, here.
        """
        if (found := self.samples.get(key)) is not None:
            return found
        with self._lock:
            if (found := self._uploads.get(key)) is not None:
                self._uploads.move_to_end(key)
                return found
        raise InputError(
            "The picture of this link is not on this server, which keeps the last "
            f"{MAX_UPLOADS} uploads until it stops. Upload it again, under the same name."
        )

    def _n_bytes(self) -> int:
        return sum(len(one.content) for one in self._uploads.values())


def too_large(n_bytes: int) -> str:
    """Returns the sentence about a file of too many bytes."""
    return (
        f"A picture's file must have at most {MAX_BYTES >> 20} MiB, but this one has "
        f"{n_bytes / 2**20:.0f}. Make the picture smaller first."
    )


def _clean(name: str) -> str:
    """Returns the last part of a file name, which is safe as a name in any folder."""
    name = "".join(c for c in _last_part(name) if c not in '<>:"|?*').strip(" .-")
    stem, dot, suffix = name.rpartition(".")
    if not dot or f".{suffix.lower()}" not in SUFFIXES:
        stem, suffix = name, "png"
    return picture_id(f"{stem[:80] or 'picture'}.{suffix}")


def _last_part(name: str) -> str:
    name = unicodedata.normalize("NFC", name).replace("\\", "/").rpartition("/")[2]
    return "".join(c for c in name if c.isprintable())


def _builtin() -> Iterator[Stored]:
    for name in BUILTIN:
        path = builtin_photo(name)
        yield Stored(path.stem, name, path.read_bytes(), path.stem, is_sample=True)


def _of_folder(folder: str | Path) -> Iterator[Stored]:
    found = open_pictures([folder])
    for location in found.locations[:MAX_SAMPLES]:
        path = Path(location)
        if not path.is_file():
            raise InputError(f"Sample pictures must be files in a folder, got {location}.")
        content = path.read_bytes()
        if len(content) > MAX_BYTES:
            continue
        label = None if path.parent == Path(folder).absolute() else path.parent.name
        key = hashlib.sha256(location.encode()).hexdigest()[:12]
        yield Stored(key, _clean(path.name), content, label, is_sample=True)
