"""Streams in parts: every image once an epoch, none of validation's, and a resume that is exact."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet
from torch.utils.data import DataLoader

from featinv_diffusion.data.crops import DataConfig
from featinv_diffusion.data.streams import (
    STATE,
    Place,
    StreamedBatches,
    StreamedCrops,
    read_place,
)
from featinv_diffusion.errors import InputError

pytest.importorskip("datasets")
N_FILES, N_ROWS, N_HELD, N_PROCESSES, BATCH = 4, 7, 3, 2, 2
SIDE = 4


def png(grey: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((SIDE, SIDE, 3), grey, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, contents: list[bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for i, content in enumerate(contents):
            member = tarfile.TarInfo(f"{i:04d}.png")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def write_parquet(path: Path, contents: list[bytes]) -> None:
    rows = [{"image": {"bytes": content, "path": None}} for content in contents]
    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)


KINDS: dict[str, Callable[[Path, list[bytes]], None]] = {
    "tar": write_tar,
    "parquet": write_parquet,
}


def open_stream(folder: Path, kind: str, **options: Any) -> StreamedCrops:
    """Returns a stream of pictures whose grey value is their number."""
    for file in range(N_FILES):
        contents = [png(file * N_ROWS + row) for row in range(N_ROWS)]
        KINDS[kind](folder / f"{file}.{kind}", contents)
    more = {"size": SIDE, "streaming": True, "crop": "center", "shuffle_buffer": 4, **options}
    config = DataConfig(root=str(folder / f"*.{kind}"), **more)
    return StreamedCrops(config, 0, n_skipped=N_HELD)


Start = tuple[list[Place], int]


def read(part: StreamedCrops, n_batches: int, start: Start | None = None):
    """Returns the pictures of so many batches with their indices, and where the next one begins."""
    n_workers = part.n_workers()
    places, turn = start or ([Place()] * max(1, n_workers), 0)
    places, found = list(places), []
    batches = StreamedBatches(part, BATCH, list(places), turn)
    for batch in DataLoader(batches, batch_size=None, num_workers=n_workers):
        if batch:
            places[turn] = read_place(batch[STATE])
            turn = (turn + 1) % len(places)
            pictures = batch["pixels"][:, 0, 0, 0].tolist()
            found += zip(pictures, batch["index"].tolist(), strict=True)
            if len(found) == BATCH * n_batches:
                break
    return found, (places, turn)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_stream_goes_on_with_the_very_image(
    tmp_path: Path, kind: str, num_workers: int
) -> None:
    stream = open_stream(tmp_path, kind, num_workers=num_workers)
    n_batches, indices = 12, []  # of two images, so that an epoch ends within
    for rank in range(N_PROCESSES):
        part = stream.of_process(rank, N_PROCESSES)
        assert part.n_workers() == num_workers
        whole, _ = read(part, n_batches)
        indices += [index for _, index in whole]
        for cut in (1, 3, 7, 8) if num_workers == 0 else (7,):
            first, place = read(part, cut)
            assert first + read(part, n_batches - cut, place)[0] == whole
    assert len(set(indices)) == len(indices)  # no two crops of one seed


def test_all_parts_together_are_the_stream_once(tmp_path: Path) -> None:
    stream = open_stream(tmp_path, "tar", num_workers=0)
    parts = [stream.of_process(rank, 3) for rank in range(3)]  # four files: every third image
    epochs = []
    for epoch in (0, 1):
        read = [item for part in parts for item, _ in part.read(Place(epoch)) if item is not None]
        epochs.append([int(item["pixels"][0, 0, 0]) for item in read])
        assert sorted(epochs[-1]) == list(range(N_HELD, N_FILES * N_ROWS))
    assert epochs[0] != epochs[1] != sorted(epochs[0])
    held = stream.held_back_images()[:, 0, 0, 0] * 255
    assert held.round().int().tolist() == list(range(N_HELD))
    alone = [int(item["pixels"][0, 0, 0]) for item in stream]
    assert alone != sorted(alone) == list(range(N_HELD, N_FILES * N_ROWS))


def test_a_part_without_an_image_is_refused(tmp_path: Path) -> None:
    stream = open_stream(tmp_path, "tar", num_workers=2)
    write_tar(tmp_path / "1.tar", [b"broken"])
    write_tar(tmp_path / "3.tar", [b"broken"])
    with pytest.raises(InputError, match="one part holds none"):
        read(stream.of_process(1, 2), 5)
    numbered = stream.unreadable(9, 2, n_parts=4)
    assert [name.rpartition(", ")[2] for name in numbered] == [
        "image 1 of the stream",
        "image 5 of the stream",
    ]
