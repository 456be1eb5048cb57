"""What a unit keeps, and how units are joined."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from featinv_diffusion.data.selection import Item
from featinv_diffusion.evaluation.evaluator import Measured
from featinv_diffusion.evaluation.storage import merge_rows, read_features, write_unit
from featinv_diffusion.processes import Alone
from featinv_diffusion.runs.units import Unit, make_units, run_units


def items(n: int) -> list[Item]:
    return [Item(i, f"image{i}", None if i == 1 else i, 2**62 + i, False) for i in range(n)]


def make(output: Path, n: int = 4) -> list[Unit[Item]]:
    return make_units(items(n), 2, output, {})


def keep(done: Measured, unit: Unit[Item]) -> None:
    run_units([unit], lambda unit: write_unit(done, unit), Alone())


def result(members, **columns) -> Measured:
    return Measured(
        list(members),
        digests=[item.id[::-1] for item in members],
        columns={name: np.array(values, dtype=np.float64) for name, values in columns.items()},
    )


def test_joined_rows_keep_their_order_and_lack_nothing_but_values(tmp_path: Path):
    first, second = units = make(tmp_path)
    late = result(second.items[1:], cosine=[0.5], prior_only_cosine=[0.25])
    late.failures.append({"id": "image2", "error": "broken"})
    keep(late, second)
    assert not first.is_done
    keep(result(first.items, cosine=[0.1, np.nan]), first)
    rows = merge_rows(units)
    assert rows.ids == ["image0", "image1", "image3"]
    assert rows.digests == ["0egami", "1egami", "3egami"]
    assert rows.failures == [{"id": "image2", "error": "broken"}]
    np.testing.assert_array_equal(rows.columns["cosine"], [0.1, np.nan, 0.5])
    np.testing.assert_array_equal(rows.columns["prior_only_cosine"], [np.nan, np.nan, 0.25])
    table = rows.table
    assert table["label"].to_pylist() == [0, None, 3]
    assert table["seed"].to_pylist()[0] == 2**62
    assert table["prior_only_cosine"].null_count == 0


def test_a_unit_of_failures_alone_joins_the_others(tmp_path: Path):
    first, second = units = make(tmp_path)
    failed = Measured([], failures=[{"id": i.id, "error": "no"} for i in first.items])
    keep(failed, first)
    keep(result(second.items, cosine=[0.5, 0.25]), second)
    rows = merge_rows(units)
    assert rows.ids == ["image2", "image3"]
    assert [f["id"] for f in rows.failures] == ["image0", "image1"]
    assert list(rows.columns) == ["cosine"]


def test_vectors_are_read_back_unit_by_unit(tmp_path: Path):
    units = make(tmp_path)
    for number, unit in enumerate(units):
        done = result(unit.items)
        done.reconstructed["inception"] = np.full((2, 3), number, dtype=np.float32)
        done.original["inception"] = np.full((2, 3), number + 10, dtype=np.float32)
        keep(done, unit)
    parts = list(read_features(units, "original", "inception"))
    assert [ids for ids, _ in parts] == [["image0", "image1"], ["image2", "image3"]]
    assert [float(vectors.mean()) for _, vectors in parts] == [10, 11]


def test_an_interrupted_write_leaves_no_done_unit(tmp_path: Path, monkeypatch):
    (unit,) = make(tmp_path, 2)

    def broken(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", broken)
    with pytest.raises(OSError, match=r"rows\.parquet"):
        keep(result(unit.items, cosine=[1, 1]), unit)
    assert not unit.is_done
    assert not [path for path in unit.folder.iterdir()]


@pytest.mark.parametrize("kind", ["failures", "partial_failures"])
def test_a_unit_with_failures_is_done_again_and_keeps_nothing_of_before(tmp_path, kind: str):
    (unit,) = make(tmp_path, 2)
    before = result(unit.items, cosine=[0.5, 0.25])
    before.reconstructed["inception"] = np.zeros((2, 3), dtype=np.float32)
    getattr(before, kind).append({"id": "image1", "error": "NaN"})
    keep(before, unit)
    assert not unit.is_done
    assert getattr(merge_rows([unit]), kind) == [{"id": "image1", "error": "NaN"}]
    keep(result(unit.items, cosine=[0.5, 0.25]), unit)
    assert unit.is_done
    assert not list(read_features([unit], "reconstructed", "inception"))
