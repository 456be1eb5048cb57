"""What an evaluation keeps on disk while it runs, and reads back at its end.

OUTPUT/run.json                    settings and a digest of the images; guards a resumed run
OUTPUT/shards/00012/features.npz   vectors for distances of distributions, where asked for
OUTPUT/shards/00012/rows.parquet   one row per image, written last: the shard is done
OUTPUT/images/*.png                reconstructions, where asked for
OUTPUT/per_image.parquet, metrics.json, metrics.md
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from featinv_diffusion.evaluation.evaluator import ShardResult
from featinv_diffusion.evaluation.selection import Item
from featinv_diffusion.files import replacing

SHARDS, ROWS, FEATURES = "shards", "rows.parquet", "features.npz"
PER_IMAGE = "per_image.parquet"
RECONSTRUCTED, ORIGINAL = "reconstructed", "original"
_FAILURES = b"failures"


@dataclass(frozen=True)
class Shard:
    """A slice of the items and its folder."""

    folder: Path
    items: tuple[Item, ...]

    @property
    def is_done(self) -> bool:
        return (self.folder / ROWS).is_file()


@dataclass(frozen=True)
class Rows:
    """The rows of all shards in the order of the items."""

    ids: list[str]
    digests: list[str]
    columns: dict[str, np.ndarray]
    failures: list[dict[str, str]]


def make_shards(items: Sequence[Item], size: int, output: Path) -> list[Shard]:
    """Cuts the items into slices of `size`; a single last one joins the slice before it."""
    firsts = list(range(0, len(items), size))
    if len(firsts) > 1 and len(items) - firsts[-1] == 1:
        firsts.pop()
    ends = [*firsts[1:], len(items)]
    return [
        Shard(output / SHARDS / f"{number:05d}", tuple(items[first:end]))
        for number, (first, end) in enumerate(zip(firsts, ends, strict=True))
    ]


def write_shard(result: ShardResult, shard: Shard) -> None:
    """Writes a shard; it is done once its rows are there."""
    if result.reconstructed:
        arrays = {f"{RECONSTRUCTED}/{name}": v for name, v in result.reconstructed.items()}
        arrays |= {f"{ORIGINAL}/{name}": v for name, v in result.original.items()}
        with replacing(shard.folder / FEATURES) as partial, partial.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
    table = pa.table(
        {
            "id": pa.array([item.id for item in result.items], pa.string()),
            "label": pa.array([item.label for item in result.items], pa.int64()),
            "seed": pa.array([item.seed for item in result.items], pa.int64()),
            "original_sha256": pa.array(result.digests, pa.string()),
            **{name: pa.array(values, pa.float64()) for name, values in result.columns.items()},
        }
    )
    table = table.replace_schema_metadata({_FAILURES: json.dumps(result.failures).encode()})
    with replacing(shard.folder / ROWS) as partial:
        pq.write_table(table, partial)


def merge_rows(shards: Sequence[Shard], output: Path) -> Rows:
    """Joins the rows of finished shards and writes `per_image.parquet`."""
    tables = [pq.read_table(shard.folder / ROWS) for shard in shards]
    failures = [f for t in tables for f in json.loads((t.schema.metadata or {})[_FAILURES])]
    joined = pa.concat_tables(
        [table.replace_schema_metadata(None) for table in tables], promote_options="default"
    )
    columns = {
        name: joined[name].to_numpy().astype(np.float64)
        for name in joined.column_names
        if pa.types.is_float64(joined.schema.field(name).type)
    }
    for name, values in columns.items():  # a shard without a figure leaves nulls
        place = joined.column_names.index(name)
        joined = joined.set_column(place, name, pa.array(values, pa.float64()))
    with replacing(output / PER_IMAGE) as partial:
        pq.write_table(joined, partial)
    ids, digests = (joined[name].to_pylist() for name in ("id", "original_sha256"))
    return Rows(ids, digests, columns, failures)


def read_features(
    shards: Sequence[Shard], side: str, name: str
) -> Iterator[tuple[list[str], np.ndarray]]:
    """Yields the ids and vectors `[n, d]` of each shard that an extractor gave of one side."""
    for shard in shards:
        path = shard.folder / FEATURES
        if path.is_file():
            ids = pq.read_table(shard.folder / ROWS, columns=["id"])["id"].to_pylist()
            with np.load(path) as arrays:
                yield ids, arrays[f"{side}/{name}"]
