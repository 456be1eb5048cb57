"""What a shard keeps, and how shards are joined."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from featinv_diffusion.data.selection import Item
from featinv_diffusion.evaluation.evaluator import ShardResult
from featinv_diffusion.evaluation.run import (
    discard_run,
    make_shards,
    merge_rows,
    read_features,
    write_rows,
    write_shard,
)


def items(n: int) -> list[Item]:
    return [Item(i, f"image{i}", None if i == 1 else i, 2**62 + i, False) for i in range(n)]


def result(members, **columns) -> ShardResult:
    return ShardResult(
        list(members),
        digests=[item.id[::-1] for item in members],
        columns={name: np.array(values, dtype=np.float64) for name, values in columns.items()},
    )


def test_no_shard_holds_a_single_image_beside_others(tmp_path: Path):
    assert [len(s.items) for s in make_shards(items(7), 3, tmp_path)] == [3, 4]
    assert [len(s.items) for s in make_shards(items(8), 3, tmp_path)] == [3, 3, 2]
    assert [len(s.items) for s in make_shards(items(1), 3, tmp_path)] == [1]
    assert [s.folder.name for s in make_shards(items(4), 2, tmp_path)] == ["00000", "00001"]


def test_joined_rows_keep_their_order_and_lack_nothing_but_values(tmp_path: Path):
    first, second = shards = make_shards(items(4), 2, tmp_path)
    late = result(second.items[1:], cosine=[0.5], prior_only_cosine=[0.25])
    late.failures.append({"id": "image2", "error": "broken"})
    write_shard(late, second)
    assert not first.is_done
    write_shard(result(first.items, cosine=[0.1, np.nan]), first)
    rows = merge_rows(shards)
    write_rows(rows, tmp_path)
    assert rows.ids == ["image0", "image1", "image3"]
    assert rows.digests == ["0egami", "1egami", "3egami"]
    assert rows.failures == [{"id": "image2", "error": "broken"}]
    np.testing.assert_array_equal(rows.columns["cosine"], [0.1, np.nan, 0.5])
    np.testing.assert_array_equal(rows.columns["prior_only_cosine"], [np.nan, np.nan, 0.25])
    table = pq.read_table(tmp_path / "per_image.parquet")
    assert table["label"].to_pylist() == [0, None, 3]
    assert table["seed"].to_pylist()[0] == 2**62
    assert table["prior_only_cosine"].null_count == 0


def test_a_shard_of_failures_alone_joins_the_others(tmp_path: Path):
    first, second = shards = make_shards(items(4), 2, tmp_path)
    failed = ShardResult([], failures=[{"id": i.id, "error": "no"} for i in first.items])
    write_shard(failed, first)
    write_shard(result(second.items, cosine=[0.5, 0.25]), second)
    rows = merge_rows(shards)
    assert rows.ids == ["image2", "image3"]
    assert [f["id"] for f in rows.failures] == ["image0", "image1"]
    assert list(rows.columns) == ["cosine"]


def test_vectors_are_read_back_shard_by_shard(tmp_path: Path):
    shards = make_shards(items(4), 2, tmp_path)
    for number, shard in enumerate(shards):
        done = result(shard.items)
        done.reconstructed["inception"] = np.full((2, 3), number, dtype=np.float32)
        done.original["inception"] = np.full((2, 3), number + 10, dtype=np.float32)
        write_shard(done, shard)
    parts = list(read_features(shards, "original", "inception"))
    assert [ids for ids, _ in parts] == [["image0", "image1"], ["image2", "image3"]]
    assert [float(vectors.mean()) for _, vectors in parts] == [10, 11]


def test_an_interrupted_write_leaves_no_done_shard(tmp_path: Path, monkeypatch):
    (shard,) = make_shards(items(2), 2, tmp_path)

    def broken(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", broken)
    with pytest.raises(OSError, match=r"rows\.parquet"):
        write_shard(result(shard.items, cosine=[1, 1]), shard)
    assert not shard.is_done
    assert not list(shard.folder.iterdir())


@pytest.mark.parametrize("kind", ["failures", "partial_failures"])
def test_a_shard_with_failures_is_done_again_and_keeps_nothing_of_before(tmp_path, kind: str):
    (shard,) = make_shards(items(2), 2, tmp_path)
    before = result(shard.items, cosine=[0.5, 0.25])
    before.reconstructed["inception"] = np.zeros((2, 3), dtype=np.float32)
    getattr(before, kind).append({"id": "image1", "error": "NaN"})
    write_shard(before, shard)
    assert not shard.is_done
    assert getattr(merge_rows([shard]), kind) == [{"id": "image1", "error": "NaN"}]
    write_shard(result(shard.items, cosine=[0.5, 0.25]), shard)
    assert shard.is_done
    assert not list(read_features([shard], "reconstructed", "inception"))


def test_a_run_that_measured_nothing_leaves_nothing_of_its_own(tmp_path: Path):
    output = tmp_path / "out"
    for other in (False, True):
        write_shard(ShardResult([]), make_shards(items(2), 2, output)[0])
        (output / "run.json").write_text("{}")
        if other:
            (output / "mine.txt").touch()
        discard_run(output)
        assert output.exists() == other
    assert [path.name for path in output.iterdir()] == ["mine.txt"]
