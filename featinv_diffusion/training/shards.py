"""Arrays over the images of a data set, in shards that are written whole, by any machine.

    FOLDER/cache.json                 what the arrays belong to
    FOLDER/shards/00012.safetensors   the rows of some images, always the same ones

A shard is written beside its place and renamed, so that processes of several machines that share
a folder, or none at all but it, can fill one cache; what is killed costs one shard of each process.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import safe_open
from torch import Tensor

from featinv_diffusion.errors import InputError
from featinv_diffusion.files import write_tensors, write_text

SHARD_BYTES = 2**24
"""Size of a shard, about: half a second of encoding on a GPU, and few files."""
FORMAT = "featinv cache 1"
Layout = dict[str, tuple[tuple[int, ...], Any]]


class ShardedArrays:
    """Arrays whose first axis is the images of a data set.

    Args:
        layout: shape of one image's row, and type, of each array.
        n: images.
        what: how messages call the contents, `Latent cache`.
        advice: what frees disk space.
        multiple: images that one shard must hold together.
    """

    def __init__(
        self,
        folder: Path,
        layout: Layout,
        n: int,
        fingerprint: str,
        what: str,
        advice: str,
        multiple: int = 1,
    ):
        self.folder, self.layout, self.n, self.fingerprint = folder, layout, n, fingerprint
        self.what, self.advice = what, advice
        self.rows = multiple * max(1, SHARD_BYTES // self.row_bytes // multiple)

    @property
    def row_bytes(self) -> int:
        """Of one image."""
        return sum(
            int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in self.layout.values()
        )

    @property
    def n_bytes(self) -> int:
        """Of all images."""
        return self.n * self.row_bytes

    @property
    def marker(self) -> Path:
        return self.folder / "cache.json"

    def __str__(self) -> str:
        return f"{self.what} in {self.folder}: {self.n_bytes / 2**30:.2f} GiB"

    def path(self, number: int) -> Path:
        """Returns where a shard lies."""
        return self.folder / "shards" / f"{number:05d}.safetensors"

    def range(self, number: int) -> range:
        """Returns the images of a shard."""
        return range(number * self.rows, min((number + 1) * self.rows, self.n))

    def missing(self) -> list[int]:
        """Returns the shards that nobody has written."""
        numbers = range(-(-self.n // self.rows))
        return [number for number in numbers if not self.path(number).is_file()]

    def write(self, number: int, arrays: Mapping[str, Tensor]) -> None:
        """Writes a shard, unless another process was faster; its rows are the same.

        Raises:
            InputError: the disk refuses.
        """
        if not self.path(number).is_file():
            write_tensors(self.path(number), arrays, {}, FORMAT)

    def share(self, accelerator: Accelerator) -> list[int]:
        """Begins the cache where it is not there; returns the shards that this process must fill.

        Raises:
            InputError: a folder that holds something else, or a disk without room.
        """
        if accelerator.is_main_process:
            self._begin()
        accelerator.wait_for_everyone()
        missing = self.missing()  # before the first one is written
        accelerator.wait_for_everyone()
        return missing[accelerator.process_index :: accelerator.num_processes]

    def finish(self, accelerator: Accelerator) -> None:
        """Waits for all processes.

        Raises:
            InputError: shards of other processes are not there.
        """
        accelerator.wait_for_everyone()
        if missing := self.missing():
            raise InputError(
                f"{self.folder} must hold what all processes wrote, but {len(missing)} shards are "
                "not there. All machines must share this folder: set another cache.folder."
            )

    def _begin(self) -> None:
        if self.marker.exists():
            found = json.loads(self.marker.read_text())["fingerprint"]
            if found != self.fingerprint:
                raise InputError(
                    f"{self.folder} holds latents of other data, crops or another VAE, or those of "
                    "an earlier version. Delete it or set another cache.folder."
                )
            return
        check_room([self])
        self.path(0).parent.mkdir(parents=True, exist_ok=True)
        write_text(self.marker, json.dumps({"fingerprint": self.fingerprint}))


class Rows:
    """Reads rows of a filled cache; shards are mapped when they are first needed."""

    def __init__(self, cache: ShardedArrays):
        self.cache = cache
        self._files: dict[int, Any] = {}

    def read(self, name: str, position: int, crop: int | None = None) -> np.ndarray:
        """Returns the row of an image, or of one of its crops."""
        number, row = divmod(position, self.cache.rows)
        if number not in self._files:
            self._files[number] = safe_open(self.cache.path(number), framework="np")
        found = self._files[number].get_slice(name)
        if crop is None:
            return np.asarray(found[row : row + 1][0])
        return found[row : row + 1, crop : crop + 1][0, 0]


def join_rows(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Returns the rows of several batches as one."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def check_room(caches: Sequence[ShardedArrays]) -> None:
    """Raises `InputError` where the disk has no room for all that is not yet there."""
    new = [cache for cache in caches if not cache.marker.exists()]
    if not new:
        return
    folder = new[0].folder
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free, needed = shutil.disk_usage(existing).free, sum(cache.n_bytes for cache in new)
    if free < needed:
        names = " and ".join(cache.what[0].lower() + cache.what[1:] for cache in new)
        verb = "needs" if len(new) == 1 else "need"
        raise InputError(
            f"The {names} {verb} {needed / 2**30:.1f} GiB in {folder}, but "
            f"{free / 2**30:.1f} GiB are free. {new[-1].advice}"
        )
