"""Training images that are read in passing: streams of `datasets`, in parts that can be resumed.

A stream is divided among the processes by `split_dataset_by_node` and, within a process, among its
data workers, by the files that the data set consists of.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from copy import copy, deepcopy
from dataclasses import asdict, dataclass, replace
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, default_collate, get_worker_info

from featinv_diffusion.data.containers import find_columns, load_hub, to_content
from featinv_diffusion.data.crops import DataConfig, make_item, to_images
from featinv_diffusion.data.places import expand, suffix_of
from featinv_diffusion.errors import InputError
from featinv_diffusion.images import decode_image, without_notes
from featinv_diffusion.schema import parse_json
from featinv_diffusion.seeds import make_generator
from featinv_diffusion.settings import Number

STATE = "stream_state"
"""Key of a batch: the place of its worker after it, as JSON."""


@dataclass
class Place:
    """How far one data worker has read its part of a stream.

    Args:
        epoch: how often it has read all of it.
        block: state of the data set before the block of rows that are shuffled together; None at
            the beginning of the epoch.
        n_blocks: blocks of this epoch before that one.
        used: rows of the block, in their shuffled order, that were used.
        number: rows that were used since the beginning of the run.
    """

    epoch: Number = 0
    block: dict[str, Any] | None = None
    n_blocks: Number = 0
    used: Number = 0
    number: Number = 0


class StreamedCrops(IterableDataset):
    """The items of `CropDataset` from a stream of `datasets`, for one epoch.

    Rows are shuffled in blocks of `shuffle_buffer`, not in a sliding buffer: a resumed run reads
    one block again, and goes on with the very row that would have come. `index` counts the rows
    of all parts, also those that cannot be read, which are left out; the first `n_skipped` of the
    stream, and copies of them, are left to validation.
    """

    def __init__(self, config: DataConfig, seed: int, n_skipped: int = 0):
        self.config, self.seed = config, seed
        self.stream = _open_stream(config)
        columns = self.stream.column_names or list(next(iter(self.stream)))
        self.columns = find_columns(columns, str(config.root))
        self.held = list(self.stream.take(n_skipped)) if n_skipped else []
        self.held_digests = {_digest(self._content(row)) for row in self.held}
        self.rank, self.n_processes = 0, 1

    def of_process(self, rank: int, n_processes: int) -> StreamedCrops:
        """Returns the part of one of several processes."""
        if n_processes == 1:
            return self
        from datasets.distributed import split_dataset_by_node

        part = copy(self)
        part.stream = split_dataset_by_node(self.stream, rank=rank, world_size=n_processes)
        part.rank, part.n_processes = rank, n_processes
        return part

    def n_workers(self) -> int:
        """Returns how many data workers can share this part: one for each of its files at most."""
        return min(self.config.num_workers, self.stream.num_shards)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (item for item, _ in self.read(Place()) if item is not None)

    def read(self, place: Place) -> Iterator[tuple[dict[str, Any] | None, Place]]:
        """Yields items from a place to the end of its epoch, each with the place behind it.

        Last of all come None and the beginning of the next epoch.

        Raises:
            InputError: an image that cannot be read, where `on_bad_image` is `error`.
        """
        info = get_worker_info()
        worker, n_workers = (info.id, info.num_workers) if info else (0, 1)
        part, n_parts = self.rank * n_workers + worker, self.n_processes * n_workers
        stream = deepcopy(self.stream)  # workers share the number of the epoch of one
        stream.set_epoch(1 + place.epoch)  # it orders the files; 0 leaves them as they are
        if place.block is not None:
            stream.load_state_dict(place.block)
        rows, block, number = iter(stream), place.block, place.number
        used, n_unreadable = place.used, 0
        for n_blocks in count(place.n_blocks):
            shuffled = list(islice(rows, self.config.shuffle_buffer))
            if not shuffled:
                break
            generator = make_generator(self.seed, "block", place.epoch, part, n_blocks)
            order = torch.randperm(len(shuffled), generator=generator).tolist()
            for n_used in range(used + 1, len(order) + 1):
                row = shuffled[order[n_used - 1]]
                content = self._content(row)
                if self.held_digests and _digest(content) in self.held_digests:
                    continue
                index, number = number * n_parts + part, number + 1
                item = self._to_item(row, content, place.epoch, index)
                if item is None:
                    n_unreadable += 1
                    continue
                after = Place(place.epoch, block, n_blocks, n_used, number)
                yield {**item, "n_unreadable": n_unreadable}, after
                n_unreadable = 0
            block, used = stream.state_dict(), 0
        yield None, Place(place.epoch + 1, number=number)

    def held_back_images(self) -> Tensor:
        """Central crops of the skipped images as `Images`.

        Raises:
            InputError: none of them can be read.
        """
        config = replace(self.config, crop="center")
        items = [
            self._to_item(row, self._content(row), 0, i, config) for i, row in enumerate(self.held)
        ]
        pixels = [item["pixels"] for item in items if item is not None]
        if not pixels:
            raise InputError(f"{self.config.root} must begin with images that can be read.")
        return to_images(torch.stack(pixels))

    def unreadable(self, index: int, n_unreadable: int, n_parts: int = 1) -> list[str]:
        """Names the images before `index` in its part that were left out."""
        numbers = range(index - n_unreadable * n_parts, index, n_parts)
        return [f"{self.config.root}, image {i} of the stream" for i in numbers]

    def _content(self, row: dict[str, Any]) -> bytes:
        content = to_content(row[self.columns[0]])
        return content if isinstance(content, bytes) else b""

    def _to_item(
        self,
        row: dict[str, Any],
        content: bytes,
        epoch: int,
        index: int,
        config: DataConfig | None = None,
    ) -> dict[str, Any] | None:
        """Returns an item; None where its image cannot be read."""
        config, label_column = config or self.config, self.columns[1]
        try:
            with without_notes():
                image = decode_image(content, f"{config.root}, image {index}")
        except InputError:
            if config.on_bad_image == "error":
                raise
            return None
        item, _ = make_item(image, config, self.seed, epoch, index)
        return {**item, "label": row[label_column] if label_column else 0}


class StreamedBatches(IterableDataset):
    """Batches of a stream without an end; each worker makes whole ones, in turn with the others.

    Each batch holds under `STATE` the place of its worker behind it. A stream that is read by
    several processes and workers ends for each at another time, so that each begins its next epoch
    by itself. Some last images of a part and the first of its next epoch may share a batch.

    Args:
        source: the part of this process.
        places: of each worker, to go on from; none begins anew.
        first: the worker whose turn it is; those before it give an empty batch first.
    """

    def __init__(self, source: StreamedCrops, batch_size: int, places: list[Place], first: int = 0):
        self.source, self.batch_size = source, batch_size
        self.places, self.first = places, first

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker = info.id if info else 0
        if worker < self.first:
            yield {}
        place = self.places[worker] if self.places else Place()
        items: list[dict[str, Any]] = []
        for item, after in self._items(place):
            items.append(item)
            if len(items) == self.batch_size:
                yield {**default_collate(items), STATE: json.dumps(asdict(after))}
                items = []

    def _items(self, place: Place) -> Iterator[tuple[dict[str, Any], Place]]:
        """Yields items, epoch after epoch.

        Raises:
            InputError: a whole epoch without any.
        """
        while True:
            n_items, begins_anew, after = 0, place.block is None and not place.used, place
            for item, after in self.source.read(place):
                if item is not None:
                    n_items += 1
                    yield item, after
            place = after
            if begins_anew and not n_items:
                raise InputError(
                    f"{self.source.config.root} must hold, in each of its files, images that can "
                    "be read and that validation does not take, but one part holds none. Give more "
                    "images, or lower run.n_validation_images or data.num_workers."
                )


def read_place(text: str) -> Place:
    """Reads the place that a batch holds."""
    return parse_json(text, Place, "the place in a stream")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _open_stream(config: DataConfig) -> Any:
    root = str(config.root)
    for suffix, builder in ((".parquet", "parquet"), (".tar", "webdataset")):
        if suffix_of(root) == suffix:
            files = expand(root) or root
            return load_hub(builder, data_files=files, split="train", streaming=True)
    return load_hub(root, split=config.split, streaming=True)
