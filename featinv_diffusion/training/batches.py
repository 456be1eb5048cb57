"""The batches of a training run; after a resume, the very ones that are left."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader, Sampler

from featinv_diffusion.data.crops import CropDataset
from featinv_diffusion.data.streams import (
    STATE,
    Place,
    StreamedBatches,
    StreamedCrops,
    read_place,
)
from featinv_diffusion.errors import InputError
from featinv_diffusion.training.checkpoint import Progress, StreamProgress


class EpochOrder(Sampler[int]):
    """A permutation of the data set that derives from (seed, epoch); begins with its item `start`.

    All processes share it, each taking its part of every batch, so that the order of the images
    does not depend on how many processes there are.
    """

    def __init__(self, n: int, seed: int):
        self.n, self.seed, self.epoch, self.start = n, seed, 0, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(torch.randperm(self.n, generator=generator).tolist()[self.start :])


class Epochs:
    """Batches of images that can be read in any order."""

    elsewhere = "goes on with the images of the epoch that it has not seen"

    def __init__(self, dataset: CropDataset, batch_size: int, accelerator: Accelerator):
        self.n_images = len(dataset)
        self.dataset, self.order = dataset, EpochOrder(len(dataset), dataset.seed)
        self.n_samples = batch_size * accelerator.num_processes
        loader = DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=self.order,
            drop_last=True,
            num_workers=dataset.config.num_workers,
            pin_memory=accelerator.device.type == "cuda",
        )
        self.loader: Any = accelerator.prepare(loader)

    def __len__(self) -> int:
        return len(self.loader)

    def read(self, progress: Progress) -> Iterator[dict[str, Any]]:
        """Yields batches without an end, and keeps their place in `progress`."""
        while True:
            self.loader.set_epoch(progress.epoch)
            self.order.start = progress.samples
            for batch in _read(self.loader):
                progress.samples += self.n_samples
                yield batch
            progress.epoch += 1
            progress.samples = 0

    def state(self) -> StreamProgress | None:
        """Returns None: `Progress` says it all."""
        return None

    def unreadable(self, index: int, n_unreadable: int) -> list[str]:
        """Where the images lie that were tried in vain."""
        return self.dataset.unreadable(index, n_unreadable)


class Stream:
    """Batches of this process's part of a stream, which several data workers may read."""

    elsewhere = "begins the next epoch of the stream"

    def __init__(self, source: StreamedCrops, batch_size: int, accelerator: Accelerator):
        self.rank, self.n_processes = accelerator.process_index, accelerator.num_processes
        self.source = source.of_process(self.rank, self.n_processes)
        self.batch_size, self.device = batch_size, accelerator.device
        self.n_workers = self.source.n_workers()
        self.places = [Place() for _ in range(max(1, self.n_workers))]
        self.turn = 0

    def read(self, progress: Progress) -> Iterator[dict[str, Any]]:
        """Yields batches without an end, and keeps the epoch in `progress`."""
        self._resume(progress)
        loader = DataLoader(
            StreamedBatches(self.source, self.batch_size, list(self.places), self.turn),
            batch_size=None,
            num_workers=self.n_workers,
            pin_memory=self.device.type == "cuda",
        )
        for batch in _read(loader):
            if not batch:
                continue
            self.places[self.turn] = read_place(batch.pop(STATE))
            self.turn = (self.turn + 1) % len(self.places)
            progress.epoch = min(place.epoch for place in self.places)
            progress.samples += self.batch_size * self.n_processes
            moved: Any = send_to_device(batch, self.device, non_blocking=True)
            yield moved

    def state(self) -> StreamProgress:
        """Returns what a checkpoint keeps of this process's part."""
        return StreamProgress(self.n_workers, self.turn, list(self.places))

    def _resume(self, progress: Progress) -> None:
        """Takes up the places of a checkpoint, with as many workers as it had."""
        kept = progress.stream
        if len(kept) == self.n_processes:
            own = kept[self.rank]
            self.n_workers, self.turn = own.n_workers, own.turn
            self.places = list(own.places)
        elif kept:  # of other processes, which had other parts
            found = [place for one in kept for place in one.places]
            next_epoch = 1 + max(place.epoch for place in found)
            number = max(place.number for place in found)
            self.places = [replace(p, epoch=next_epoch, number=number) for p in self.places]

    def unreadable(self, index: int, n_unreadable: int) -> list[str]:
        """Names the images before `index` that were left out."""
        n_parts = self.n_processes * len(self.places)
        return self.source.unreadable(index, n_unreadable, n_parts)


def _read(loader: Any) -> Iterator[dict[str, Any]]:
    """Yields the batches; what a data worker says is one sentence, without its traceback."""
    try:
        yield from loader
    except (InputError, OSError, MemoryError, RuntimeError) as error:
        text = str(error).strip()
        if "DataLoader worker" not in text:
            raise
        if isinstance(error, InputError):
            raise InputError(text.rpartition("InputError: ")[2]) from None
        raise InputError(
            f"A data worker ended: {text.splitlines()[-1]} Lower data.num_workers; 0 needs none."
        ) from None
