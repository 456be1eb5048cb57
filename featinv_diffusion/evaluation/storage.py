"""What an evaluation keeps on disk while it runs, and reads back at its end.

OUTPUT/run.json                    settings and a digest of the images; guards a resumed run
OUTPUT/shards/00012/features.npz   vectors for distances of distributions, where asked for
OUTPUT/shards/00012/rows.parquet   one row per image, written last: the shard is done; its metadata
                                   list what failed, for which it is done again by a repeated run
OUTPUT/images/*.png                reconstructions, where asked for
OUTPUT/per_image.parquet, metrics.json, metrics.md
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from featinv_diffusion.evaluation.result import ShardResult
from featinv_diffusion.evaluation.selection import Item
from featinv_diffusion.files import replacing
from featinv_diffusion.shards import RUN

SHARDS, ROWS, FEATURES = "shards", "rows.parquet", "features.npz"
PER_IMAGE = "per_image.parquet"
RECONSTRUCTED, ORIGINAL = "reconstructed", "original"
_FAILURES, _PARTIAL = b"failures", b"partial_failures"


@dataclass(frozen=True)
class Shard:
    """A slice of the items and its folder."""

    folder: Path
    items: tuple[Item, ...]

    @property
    def is_done(self) -> bool:
        """Whether it was measured and nothing failed."""
        path = self.folder / ROWS
        return path.is_file() and not any(_read_failures(pq.read_schema(path)))


@dataclass(frozen=True)
class Rows:
    """The rows of all shards in the order of the items.

    Args:
        table: of `per_image.parquet`.
        failures: images that could not be measured.
        partial_failures: figures of single images that could not be.
    """

    table: pa.Table
    ids: list[str]
    digests: list[str]
    columns: dict[str, np.ndarray]
    failures: list[dict[str, str]]
    partial_failures: list[dict[str, str]]


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
    for name in (ROWS, FEATURES):  # of a time before, when something failed
        (shard.folder / name).unlink(missing_ok=True)
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
    failed = {_FAILURES: result.failures, _PARTIAL: result.partial_failures}
    table = table.replace_schema_metadata({k: json.dumps(v).encode() for k, v in failed.items()})
    with replacing(shard.folder / ROWS) as partial:
        pq.write_table(table, partial)


def merge_rows(shards: Sequence[Shard]) -> Rows:
    """Joins the rows of finished shards."""
    tables = [pq.read_table(shard.folder / ROWS) for shard in shards]
    failed = [_read_failures(table.schema) for table in tables]
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
    return Rows(
        table=joined,
        ids=joined["id"].to_pylist(),
        digests=joined["original_sha256"].to_pylist(),
        columns=columns,
        failures=[failure for whole, _ in failed for failure in whole],
        partial_failures=[failure for _, partial in failed for failure in partial],
    )


def write_rows(rows: Rows, output: Path) -> None:
    """Writes `per_image.parquet`."""
    with replacing(output / PER_IMAGE) as partial:
        pq.write_table(rows.table, partial)


def discard_run(output: Path) -> None:
    """Removes what a run left that measured nothing, and the folder where nothing else is in it."""
    shutil.rmtree(output / SHARDS, ignore_errors=True)
    (output / RUN).unlink(missing_ok=True)
    if output.is_dir() and not any(output.iterdir()):
        output.rmdir()


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


def _read_failures(schema: pa.Schema) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Returns the images that failed, and the figures of single images that did."""
    kept = schema.metadata or {}
    whole, partial = (json.loads(kept.get(key, b"[]")) for key in (_FAILURES, _PARTIAL))
    return whole, partial
