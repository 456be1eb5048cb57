"""Workers that never talk, two of them stopped on the way, and `featinv merge`: one process's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState, GradientState
from filelock import FileLock
from PIL import Image

import featinv_diffusion
from featinv_diffusion.backbones import load_backbone, names
from featinv_diffusion.cli import exits
from featinv_diffusion.images import to_pil
from featinv_diffusion.runs import many, units
from featinv_diffusion.studies import operators
from featinv_diffusion.studies.operators import fit_operator
from tests import tiny
from tests.cli.conftest import Featinv, Outcome

ROOT = Path(featinv_diffusion.__file__).parents[1]
N_PICTURES, N_WORKERS = 10, 4
COMMANDS = {
    "sample": ("sample", "PHOTOS", "--steps", 1, "--n-samples", 2, "--batch-size", 4),
    "encode": ("encode", "PHOTOS"),
    "evaluate": (
        *("evaluate", "--data", "PHOTOS", "--steps", 1, "--shard-size", 2, "--batch-size", 2),
        *("--n-null-images", 2, "--save-images"),
    ),
}
STUDIES = {
    "concepts": ("concepts", "PHOTOS", "--batch-size", 2),
    "operator fit": (
        *("operator", "fit", "--backbone", "tiny/convnext", "--operation", "swap"),
        *("--data", "PHOTOS", "--n-images", N_PICTURES, "--batch-size", 1),
    ),
    "operator apply": (
        *("operator", "apply", *(f"PHOTOS/{i}.png" for i in range(N_PICTURES // 2))),
        *("--operator", "SWAP", "--inverter", "diffusion", "--steps", 1),
    ),
    "operator analyze": (
        *("operator", "analyze", "--data", "PHOTOS", "--operator", "SWAP", "--inverter"),
        *("diffusion", "--steps", 1, "--n-images", N_PICTURES, "--batch-size", 2),
    ),
    "analyze encoders": (
        *("analyze", "encoders", "--data", "PHOTOS", "--batch-size", 2),
        *("--inverter", "diffusion,diffusion:PIPELINE", "--scorers", "BACKBONE"),
    ),
}
OF_FILES = ("encode", "concepts", "operator fit")


@pytest.fixture(autouse=True)
def _fresh_accelerator(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, image in enumerate(tiny.make_images(N_PICTURES)):
        pixels = (image.permute(1, 2, 0) * 255).byte().numpy()
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def swap(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An operator of the bundled pipeline's features, fitted on other pictures."""
    model = load_backbone(f"hf/{family / 'tiny/convnext/backbone'}")
    path = tmp_path_factory.mktemp("swap") / "swap.safetensors"
    fit_operator(model, to_pil(tiny.make_images(N_PICTURES + 2)[N_PICTURES:]), "swap").save(path)
    return path


@pytest.fixture
def run(
    featinv: Featinv,
    photos: Path,
    family: Path,
    swap: Path,
    saved_pipeline: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """Runs one of `COMMANDS` as a worker or alone; units are small, so that all have some."""
    monkeypatch.setattr(many, "LEAST_UNIT", 1)
    monkeypatch.setattr(many, "ENCODED_UNIT", 2)
    monkeypatch.setattr(operators, "FIT_BATCHES", 2)
    monkeypatch.setattr(names, "ASSETS", family)
    backbone = f"hf/{family / 'tiny/convnext/backbone'}"
    places = {"PHOTOS": photos, "SWAP": swap, "PIPELINE": saved_pipeline, "BACKBONE": backbone}

    def start(name: str, output: str, worker: int | str | None = None, n: int = N_WORKERS):
        words = [str(word) for word in {**COMMANDS, **STUDIES}[name]]
        for place, path in places.items():
            words = [word.replace(place, str(path)) for word in words]
        share = [] if worker is None else ["--worker", f"{worker}/{n}"]
        return featinv(*words, "--output", output, *share)

    return start


def stop_after(monkeypatch: pytest.MonkeyPatch, n_units: int):
    """Lets a run be stopped, as by a signal, before it completes a unit after so many."""
    write, left = units.write_text, iter(range(n_units))

    def stop(path: Path, text: str) -> None:
        if path.name == units.DONE and next(left, None) is None:
            raise exits.Stopped(exits.TERMINATED)
        write(path, text)

    monkeypatch.setattr(units, "write_text", stop)


def output_of(name: str, stem: str) -> str:
    return f"{stem}.safetensors" if name in OF_FILES else stem


def files(output: Path, *, shards: bool) -> dict[str, bytes]:
    """Returns what a run wrote; the note of a call, which workers leave, is left out."""
    if output.is_file():
        return {"": output.read_bytes()}
    found = {p.relative_to(output).as_posix(): p for p in output.rglob("*") if p.is_file()}
    kept = (name for name in found if not name.startswith("shards") and name != "run.json")
    listed = sorted(found.keys() - {"shards/call.json"}) if shards else sorted(kept)
    return {name: found[name].read_bytes() for name in listed}


@pytest.mark.parametrize("name", COMMANDS)
def test_an_array_with_two_stopped_workers_is_one_process(run, featinv, name: str, monkeypatch):
    shared, alone = output_of(name, "out"), Path(output_of(name, "alone"))
    assert run(name, shared).code == 0
    Path(shared).rename(alone)
    for i in range(N_WORKERS):
        with monkeypatch.context() as patch:
            if i in (0, 2):
                stop_after(patch, n_units=1 if i == 0 else 0)
            done: Outcome = run(name, shared, i)
            assert done.code == (143 if i in (0, 2) else 0), done.err
    early = featinv("merge", shared)
    assert early.code == 2
    assert "2 of 5 units are not done yet, those of worker 0/4, 2/4." in early.err
    written = [Path(shared, file) for file in ("grid.png", "manifest.json", "metrics.json")]
    assert not any(path.exists() for path in (*written, Path("out.safetensors")))
    for i in (2, 0):
        done = run(name, shared, i)
        assert done.code == 0, done.err
    assert "of all 5 units 5 are." in done.out
    assert f"All workers are done: featinv merge {shared}" in done.out
    merged = featinv("merge", shared)
    assert merged.code == 0, merged.err
    assert "Wrote" in merged.out
    as_evaluated = name == "evaluate"  # also by one process, in units
    assert files(Path(shared), shards=as_evaluated) == files(alone, shards=as_evaluated)
    assert not list(Path().rglob(".*"))  # no locks, nothing half-written


SLOW = ("operator apply", "operator analyze", "analyze encoders")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in STUDIES]
)
def test_a_study_by_two_workers_is_that_of_one_process(run, featinv, name: str, monkeypatch):
    shared = output_of(name, "out")
    one = run(name, shared)
    assert one.code == 0, one.err
    alone = files(Path(), shards=True)
    for path in Path().iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with monkeypatch.context() as patch:
        stop_after(patch, n_units=1)
        assert run(name, shared, 0, n=2).code == 143
    for i in (1, 0):
        done: Outcome = run(name, shared, i, n=2)
        assert done.code == 0, done.err
    assert "of all 5 units 5 are." in done.out
    merged = featinv("merge", shared)
    assert merged.code == 0, merged.err
    assert merged.out.splitlines()[:-1] == one.out.splitlines()[:-1]
    if name in OF_FILES:
        shutil.rmtree(f"{shared}.units")
    else:
        shutil.rmtree(f"{shared}/shards")
        Path(shared, "run.json").unlink()
    assert files(Path(), shards=True) == alone
    assert not list(Path().rglob(".*"))


@pytest.mark.slow
def test_four_processes_two_of_them_killed_are_one(
    photos: Path, saved_pipeline: Path, tmp_path: Path
):
    """SIGKILL leaves locks, half a unit and half-written files, as the loss of a machine does."""
    options = ["--steps", "40", "--n-samples", "2", "--batch-size", "2", "--output", "out"]
    options += ["--pipeline", str(saved_pipeline)]
    command = [sys.executable, "-m", "featinv_diffusion", "sample", str(photos), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def start(folder: Path, *more: str) -> subprocess.Popen:
        folder.mkdir(exist_ok=True)
        where: Any = {"cwd": folder, "env": environment, "stdout": subprocess.DEVNULL}
        return subprocess.Popen([*command, *more], **where)

    shared, alone = tmp_path / "shared", tmp_path / "alone"
    workers = [start(shared, "--worker", f"{i}/4") for i in range(4)]
    first = {0: "0_0.png", 2: "8_0.png"}  # of the four pictures, and the two, of their units
    try:
        while first:
            for i in [i for i, name in first.items() if (shared / "out" / name).exists()]:
                workers[i].kill()
                del first[i]
            assert all(workers[i].poll() is None for i in first)
            time.sleep(0.01)
        assert [worker.wait(300) for worker in workers] == [-9, 0, -9, 0]
        merge = [sys.executable, "-m", "featinv_diffusion", "merge", "out"]
        run_merge = partial(subprocess.run, merge, cwd=shared, env=environment, timeout=300)
        assert run_merge().returncode == 2
        for i in (0, 2):
            assert start(shared, "--worker", f"{i}/4").wait(300) == 0
        assert run_merge().returncode == 0
        assert start(alone).wait(300) == 0
    finally:
        for worker in workers:
            worker.kill()
    assert files(shared / "out", shards=False) == files(alone / "out", shards=False)


# ---- what is refused -----------------------------------------------------------------------------


@contextmanager
def held(output: Path, name: str) -> Iterator[None]:
    """Holds a lock as another process does."""
    output.mkdir(exist_ok=True)
    with FileLock(output / name):
        (output / f"{name}-owner").write_text(" (17 on another)")
        yield


@pytest.mark.parametrize(
    ("lock", "worker", "who"),
    [
        (".lock", 1, "another process"),  # a whole run, or a merge
        (".lock-1-of-4", 1, "worker 1/4"),
        (".lock-1-of-3", 2, "worker 1/3"),  # of an array that divides the units otherwise
        (".lock-1-of-4", None, "worker 1/4"),
        (".lock-2-of-4", 1, None),
    ],
)
def test_workers_share_a_folder_with_each_other_alone(run, lock: str, worker, who: str | None):
    with held(Path("out"), lock):
        done = run("sample", "out", worker)
    if who is None:
        assert done.code == 0, done.err
        return
    assert done.code == 2
    assert f"out is being written by {who} (17 on another). Wait until it is done" in done.err
    assert not list(Path("out").glob("[!.]*"))


def test_a_merge_waits_for_workers_and_needs_some(run, featinv: Featinv, photos: Path):
    assert run("encode", "out.npy", 0, n=1).code == 0
    with held(Path("out.npy.units"), ".lock-0-of-2"):
        done = featinv("merge", "out.npy")
    assert (done.code, "written by worker 0/2" in done.err) == (2, True)
    done = featinv("merge", photos)
    assert done.code == 2
    assert "must be what workers write to, but none has begun there" in done.err
    call = Path("out.npy.units", "shards", "call.json")
    call.write_text(call.read_text().replace('"encode"', '"decode"'))
    done = featinv("merge", "out.npy")
    assert (done.code, "units of 'decode', which this version cannot join" in done.err) == (2, True)
    call.write_text(call.read_text().replace("decode", "encode").replace("tiny/convnext", "a.py:f"))
    done = featinv("merge", "out.npy")
    assert (done.code, "names the code 'a.py:f'" in done.err) == (2, True)
    assert not Path("out.npy").exists()


def test_a_worker_says_what_failed(run, featinv: Featinv, photos: Path):
    (photos / "3.png").write_text("hello")
    done = run("sample", "out", 1)
    assert done.code == 1
    assert "3.png is not a picture" in done.err
    assert "of all 5 units 1 are." in done.out
    assert [run("sample", "out", i).code for i in (0, 2, 3)] == [0, 0, 0]
    merged = featinv("merge", "out")
    assert merged.code == 1  # as one process
    manifest = json.loads(Path("out", "manifest.json").read_text())
    assert len(manifest["images"]) == N_PICTURES - 1
    assert [Path(failed["input"]).name for failed in manifest["failures"]] == ["3.png"]


@pytest.mark.parametrize("name", ["stages", "layers", "colour", "tradeoff"])
def test_what_is_not_divided_says_so(featinv: Featinv, name: str):
    done = featinv("analyze", name, "--worker", "0/2")
    assert (done.code, f"`analyze {name}` takes seconds" in done.err) == (2, True)


def test_parts_of_other_pictures_are_refused(run, photos: Path):
    assert run("concepts", "out.safetensors", 0).code == 0
    (photos / "9.png").unlink()
    done = run("concepts", "out.safetensors", 1)
    assert done.code == 2
    assert "holds a run with other settings, weights or images" in done.err


def test_workers_share_no_maps(featinv: Featinv, run):
    assert run("encode", "maps.npy").code == 0
    done = featinv("sample", "maps.npy", "--worker", "0/2")
    assert (done.code, "Workers share pictures, but maps.npy holds" in done.err) == (2, True)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_worker_of_no_number_is_refused_at_once(run, name: str):
    done = run(name, output_of(name, "out"), 4)
    assert done.code == 2
    assert "--worker must be i/N with i from 0 to N-1, such as 0/4" in done.err
    assert not any(Path().iterdir())
