"""The actor for Ray Data: what a row is never depends on its batch; with Ray, workers may die."""

from __future__ import annotations

import io
import json
import os
import secrets
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

import featinv_diffusion as fi
import featinv_diffusion.ray as fr
from featinv_diffusion.errors import InputError
from featinv_diffusion.images import to_pil
from tests import tiny

N = 5


def to_png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def column(values: list) -> np.ndarray:
    made = np.empty(len(values), dtype=object)
    made[:] = values
    return made


@pytest.fixture(scope="module")
def rows() -> dict[str, np.ndarray]:
    pictures = [to_png(one) for one in to_pil(tiny.make_images(N))]
    return {"id": column([f"a/{i}.png" for i in range(N)]), "image": column(pictures)}


@pytest.fixture(scope="module")
def options(saved_pipeline: Path) -> dict:
    return {"name": str(saved_pipeline), "steps": 1, "device": "cpu"}


@pytest.fixture(scope="module")
def actor(options) -> fr.Inverter:
    return fr.Inverter(**options)


@pytest.fixture(scope="module")
def whole(actor, rows) -> dict[str, np.ndarray]:
    return actor(rows)


def test_it_adds_what_sample_makes_of_the_same_names(actor, rows, whole):
    assert list(whole) == ["id", "image", "reconstruction", "cosine", "error"]
    pictures = [Image.open(io.BytesIO(one)) for one in rows["image"]]
    names = [f"{i}.png" for i in range(N)]
    made = fi.sample(actor.inverter, pictures, n_samples=1, names=names, batch_size=1)
    expected = [to_png(done.samples[0]) for done in made.reconstructions]
    assert whole["reconstruction"].tolist() == expected
    assert whole["cosine"].tolist() == [done.cosine[0] for done in made.reconstructions]
    assert set(whole["error"]) == {""}


def test_a_row_depends_on_its_id_and_the_seed_alone(actor, rows, whole):
    order = [3, 0]
    some = actor({name: values[order] for name, values in rows.items()})
    assert some["reconstruction"].tolist() == whole["reconstruction"][order].tolist()
    actor.seed = 1
    other = actor({name: values[order] for name, values in rows.items()})
    actor.seed = 0
    assert not set(other["reconstruction"]) & set(some["reconstruction"])


def test_features_arrays_structs_and_keys_of_tars_are_the_same(actor, rows, whole):
    pictures = [np.asarray(Image.open(io.BytesIO(one))) for one in rows["image"]]
    features = actor.inverter.encode(pictures).numpy()
    structs = column([{"bytes": one, "path": None} for one in rows["image"]])
    for given in (
        {"id": rows["id"], "features": features},
        {"id": rows["id"], "image": np.stack(pictures).copy()},
        {"id": rows["id"], "image": structs},
        {"__key__": rows["id"], "png": rows["image"]},
    ):
        assert actor(given)["reconstruction"].tolist() == whole["reconstruction"].tolist()


def test_a_row_that_cannot_be_used_says_why(actor, rows, whole):
    pictures = rows["image"].copy()
    pictures[1] = b"hello"
    found = actor({**rows, "image": pictures})
    assert found["reconstruction"][1] == b""
    assert np.isnan(found["cosine"][1])
    assert "1.png is not a picture" in found["error"][1]
    rest = [0, 2, 3, 4]
    assert found["reconstruction"][rest].tolist() == whole["reconstruction"][rest].tolist()
    bad = np.full((1, *actor.inverter.spec.grid), np.nan, dtype=np.float32)
    (error,) = actor({"id": rows["id"][:1], "features": bad[None]})["error"]
    assert "Features must have shape" in error


def test_columns_that_are_missing_are_named(actor, rows):
    with pytest.raises(InputError, match=r"the id of each row, in a column called id or __key__"):
        actor({"image": rows["image"]})
    with pytest.raises(InputError, match=r"pictures or features, in a column .* columns id\. "):
        actor({"id": rows["id"]})
    with pytest.raises(InputError, match="batch_size must be at least 1, got 0"):
        fr.Inverter(batch_size=0)
    with pytest.raises(InputError, match="kind must be parquet or webdataset, got 'csv'"):
        fr.write(None, "out", kind="csv")  # pyright: ignore[reportArgumentType]


# ---- with Ray ------------------------------------------------------------------------------------


class Dying(fr.Inverter):
    """Its process is killed once, at a batch on the way; `mark` tells that it was."""

    def __init__(self, mark: str, **options):
        super().__init__(**options)
        self.mark = Path(mark)

    def __call__(self, batch):
        if f"a/{N - 2}.png" in batch["id"] and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(batch)


@pytest.fixture
def ray(monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))  # else one is written to the home
    root = str(Path(fi.__file__).parents[1])
    ray.init(
        num_cpus=4,  # two for the workers, the others for reading and writing
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}},
    )
    yield ray
    ray.shutdown()


@pytest.mark.slow
def test_two_workers_one_of_them_killed_are_one_process(ray, options, rows, whole, tmp_path: Path):
    for i in range(N):
        one = {name: values[i : i + 1].tolist() for name, values in rows.items()}
        parquet.write_table(pa.table(one), tmp_path / f"photos-{i}.parquet")
    pictures = fr.read(f"file://{tmp_path}/photos-*.parquet").repartition(N)  # else one block
    mark = tmp_path / "killed"
    done = pictures.map_batches(
        Dying,
        fn_constructor_kwargs={**options, "mark": str(mark)},
        batch_size=2,
        concurrency=2,
    ).materialize()
    assert mark.exists()
    fr.write(done.drop_columns(["image"]), str(tmp_path / "table"))
    table = parquet.read_table(tmp_path / "table").sort_by("id").to_pydict()
    for name in ("id", "reconstruction", "cosine", "error"):
        assert table[name] == whole[name].tolist()
    fr.write(done, f"file://{tmp_path}/tars", kind="webdataset")
    again = fr.read(f"{tmp_path}/tars/*.tar").take_all()
    expected = zip(whole["id"], whole["reconstruction"], strict=True)
    assert {row["__key__"]: row["png"] for row in again} == {
        name.replace(".", "-"): picture for name, picture in expected
    }
    told = {row["id"]: row["cosine"] for row in (json.loads(row["json"]) for row in again)}
    assert told == dict(zip(whole["id"], whole["cosine"], strict=True))
    with pytest.raises(InputError, match=r"must be at .*none\.parquet, but nothing is there"):
        fr.read(f"{tmp_path}/none.parquet")
