"""`sample/reconstruct.py`: any number of processes, killed at any moment, the same pictures."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from pyarrow import parquet
from safetensors.torch import load_file, save_file

import featinv_diffusion
from featinv_diffusion.images import read_image
from tests import tiny

ROOT = Path(featinv_diffusion.__file__).parents[1]
SCRIPT = ROOT / "sample" / "reconstruct.py"
N_IMAGES, SHARD_SIZE = 7, 2


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large") / "photos"
    for i, image in enumerate(tiny.make_images(N_IMAGES)):
        path = folder / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image.permute(1, 2, 0) * 255).byte().numpy()).save(path)
    return folder


@pytest.fixture
def arguments(photos: Path, saved_pipeline: Path) -> list[str]:
    options = {"pipeline": saved_pipeline, "steps": 2, "n-samples": 2, "batch-size": 3}
    options |= {"shard-size": SHARD_SIZE}
    return [str(photos), *(str(x) for k, v in options.items() for x in (f"--{k}", v))]


def environment(**extra: str) -> dict[str, str]:
    """No GPU, the package of this folder, and one thread in every process, as torchrun sets."""
    held = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    fixed = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return held | fixed | extra


def launch(arguments: list[str], output: Path, n_processes: int = 1) -> str:
    command = [sys.executable, str(SCRIPT)]
    if n_processes > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone"]
        command = [sys.executable, *torchrun, f"--nproc_per_node={n_processes}", str(SCRIPT)]
    done = subprocess.run(
        [*command, *arguments, "--output", str(output)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_here(monkeypatch, arguments: list[str], output: Path, *, use_cpu: str = "true") -> int:
    """Runs the script in this process; returns its exit code."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", use_cpu)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments, "--output", str(output)])
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    return 0


def pictures(output: Path) -> dict[str, bytes]:
    return {p.relative_to(output).as_posix(): p.read_bytes() for p in output.rglob("*.png")}


def load(output: Path) -> dict:
    return json.loads((output / "manifest.json").read_text())


@pytest.fixture(scope="module")
def whole(photos: Path, saved_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process writes that nobody disturbs."""
    output = tmp_path_factory.mktemp("whole") / "out"
    options = {"pipeline": saved_pipeline, "steps": 2, "n-samples": 2, "batch-size": 3}
    options |= {"shard-size": SHARD_SIZE}
    listed = [str(x) for k, v in options.items() for x in (f"--{k}", v)]
    said = launch([str(photos), *listed], output)
    assert "Shards: 4, done before: 0. Processes: 1." in said
    return output


def test_the_manifest_covers_every_image_in_order(whole: Path):
    manifest = load(whole)
    ids = [Path(entry["input"]).name for entry in manifest["images"]]
    assert ids == ["0.png", "2.png", "4.png", "6.png", "1.png", "3.png", "5.png"]
    names = [name for entry in manifest["images"] for name in entry["outputs"]]
    assert len(set(names)) == 2 * N_IMAGES
    assert names[0] == "shards/00000/class0/0_0.png"
    assert set(pictures(whole)) == {*names, "grid.png"}
    assert manifest["failures"] == []
    assert read_image(whole / "grid.png").height > N_IMAGES * 192


@pytest.mark.slow
def test_two_processes_write_the_same_bits(arguments, whole: Path, tmp_path: Path):
    said = launch(arguments, tmp_path / "two", n_processes=2)
    assert "Processes: 2." in said
    assert pictures(tmp_path / "two") == pictures(whole)
    assert load(tmp_path / "two") == load(whole)


def test_a_killed_run_goes_on_and_ends_the_same(arguments, whole: Path, tmp_path: Path):
    output = tmp_path / "killed"
    command = [sys.executable, str(SCRIPT), *arguments, "--output", str(output)]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL)
    first = output / "shards" / "00000" / "unit.json"
    wait_for(lambda: first.is_file() and not (output / "manifest.json").exists(), process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    n_done = len(list(output.glob("shards/*/unit.json")))
    assert 1 <= n_done < 4
    written = first.stat().st_mtime_ns
    # What a kill between two writes leaves: a shard that is not completed, and half a file in it.
    (output / "shards" / "00003").mkdir(exist_ok=True)
    (output / "shards" / "00003" / ".class1_3.png.99.part").write_bytes(b"half")
    said = launch(arguments, output)
    assert f"Shards: 4, done before: {n_done}." in said
    assert first.stat().st_mtime_ns == written
    assert pictures(output) == pictures(whole)
    assert load(output) == load(whole)
    assert not list(output.rglob("*.part"))


def wait_for(condition, process: subprocess.Popen) -> None:
    end = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.002)


def test_a_deterministic_inverter_gives_one_picture_each(monkeypatch, photos, tmp_path: Path):
    output = tmp_path / "vit"
    arguments = [str(photos), "--inverter", "vit", "--stage", "blocks.2", "--n-samples", "3"]
    assert run_here(monkeypatch, arguments, output) == 0
    manifest = load(output)
    assert [len(entry["outputs"]) for entry in manifest["images"]] == [1] * N_IMAGES
    assert manifest["backbone"] == "tiny/vit"
    assert manifest["layer"] == "blocks.2"


def test_a_table_is_read_as_a_folder_is(monkeypatch, arguments, photos: Path, tmp_path: Path):
    files = sorted(photos.glob("class0/*.png"))[:2]
    rows = [{"image": {"bytes": path.read_bytes(), "path": path.name}} for path in files]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "some.parquet")
    output = tmp_path / "out"
    assert run_here(monkeypatch, [str(tmp_path / "some.parquet"), *arguments[1:]], output) == 0
    inputs = [entry["input"] for entry in load(output)["images"]]
    assert inputs == [f"{tmp_path}/some.parquet:{row}" for row in range(2)]
    assert read_image(output / "grid.png").height > 2 * 64


def test_a_finished_run_is_not_sampled_again(monkeypatch, capsys, arguments, whole: Path):
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*_*.png")}
    monkeypatch.chdir(whole)
    assert run_here(monkeypatch, arguments, whole) == 0
    assert "Shards: 4, done before: 4." in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in whole.rglob("*_*.png")}


def test_other_settings_may_not_join_a_run(monkeypatch, capsys, arguments, whole: Path):
    before = pictures(whole)
    assert run_here(monkeypatch, [*arguments, "--seed", "1"], whole) == 2
    assert "seed: 0 → 1" in capsys.readouterr().err
    assert pictures(whole) == before


def test_other_images_may_not_join_a_run(monkeypatch, capsys, arguments, photos, whole: Path):
    only = [str(photos / "class0"), *arguments[1:]]
    assert run_here(monkeypatch, only, whole) == 2
    assert "n_images: 7 → 4" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["weights", "picture"])
def test_other_weights_or_contents_may_not_join_a_run(
    monkeypatch, capsys, photos: Path, saved_pipeline: Path, tmp_path: Path, what: str
):
    folder, pictures = tmp_path / "pipeline", tmp_path / "some"
    shutil.copytree(saved_pipeline, folder)
    shutil.copytree(photos / "class1", pictures)
    arguments = [str(pictures), "--pipeline", str(folder), "--steps", "1"]
    assert run_here(monkeypatch, arguments, tmp_path / "out") == 0
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    if what == "weights":
        weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
        state = load_file(weights)
        state["decoder.conv_out.bias"][0] += 1e-3
        save_file(state, weights)
    else:
        Image.new("RGB", (64, 64), "red").save(pictures / "1.png")
    assert run_here(monkeypatch, arguments, tmp_path / "out") == 2
    key = {"weights": "pipeline_sha256", "picture": "data_fingerprint"}[what]
    assert f"({key}: " in capsys.readouterr().err
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before


def test_bad_pictures_are_listed_and_the_rest_is_finished(
    monkeypatch, capsys, arguments, photos: Path, tmp_path: Path
):
    some = tmp_path / "some"
    some.mkdir()
    for path in sorted(photos.glob("class0/*.png")):
        (some / path.name).write_bytes(path.read_bytes())
    (some / "2.png").write_text("hello")
    assert run_here(monkeypatch, [str(some), *arguments[1:]], tmp_path / "out") == 1
    manifest = load(tmp_path / "out")
    assert [Path(e["input"]).name for e in manifest["images"]] == ["0.png", "4.png", "6.png"]
    assert [Path(f["input"]).name for f in manifest["failures"]] == ["2.png"]
    assert "2.png is not a picture" in capsys.readouterr().err


def test_nothing_but_bad_pictures(monkeypatch, capsys, arguments, tmp_path: Path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").touch()
    assert run_here(monkeypatch, [str(tmp_path / "bad"), *arguments[1:]], tmp_path / "out") == 2
    assert "a.png" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_processes_that_do_not_form_a_group_are_refused(
    monkeypatch, capsys, arguments, tmp_path: Path
):
    """As torchrun on a machine without GPUs, where ACCELERATE_USE_CPU was forgotten."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run_here(monkeypatch, arguments, tmp_path / "out", use_cpu="false") == 2
    said = capsys.readouterr().err
    assert "2 processes were launched, but accelerate formed a group of 1" in said
    assert "ACCELERATE_USE_CPU=true" in said
