"""A run killed by SIGKILL and started again ends with the bits of an uninterrupted one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from featinv_diffusion.seeds import derive_seed
from tests import tiny

ROOT = Path(__file__).parents[2]
N_STEPS = 9


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion folder, a backbone folder and a folder of images, all tiny."""
    folder = tmp_path_factory.mktemp("base")
    for name, build in (
        ("vae", tiny.make_vae),
        ("unet", tiny.make_unet),
        ("text_encoder", tiny.make_text_encoder),
        ("tokenizer", tiny.make_tokenizer),
        ("scheduler", tiny.make_scheduler),
        ("backbone", tiny.make_backbone),
    ):
        build().save_pretrained(str(folder / name))
    random = np.random.default_rng(0)
    for label in range(2):
        (folder / f"images/train/class{label}").mkdir(parents=True)
        for i in range(7):
            pixels = random.integers(0, 256, (72, 80, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"images/train/class{label}/{i}.png")
    return folder


def command(base: Path, output: Path, n_processes: int, extra: list[str]) -> list[str]:
    launcher = [sys.executable]
    if n_processes > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc_per_node", str(n_processes)]
        launcher += ["--master_port", str(29600 + os.getpid() % 300)]
    settings = {
        "data.root": base / "images",
        "data.size": 64,
        "data.held_back_per_class": 1,
        "data.num_workers": 1,
        "model.base": base,
        "model.backbone": base / "backbone",
        "model.feature_hidden_channels": 16,
        "model.statistics_images": 8,
        "optim.lr": 1e-3,
        "optim.batch_size": 2,
        "optim.gradient_accumulation_steps": 2 if n_processes == 1 else 1,
        "optim.epochs": 50,
        "optim.max_steps": N_STEPS,
        "optim.ema_decay": 0.9,
        "run.output": output,
        "run.checkpoint_every": 2,
        "run.validate_every": 1000,
        "run.n_validation_images": 2,
        "run.tracker": "none",
        "run.cpu": True,
        "validation.num_inference_steps": 1,
        "cache.folder": base / f"latents{n_processes}",
    }
    arguments = [f"{key}={value}" for key, value in settings.items()]
    return [*launcher, str(ROOT / "train/controlnet.py"), *arguments, *extra]


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
    }


def run(arguments: list[str]) -> str:
    done = subprocess.run(arguments, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def run_and_kill(arguments: list[str], log: Path, n_lines: int) -> None:
    """Starts a run and kills its whole process group once `n_lines` steps are logged."""
    process = subprocess.Popen(
        arguments,
        env=environment(),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 240
    while not (log.exists() and log.read_text().count("\n") >= n_lines):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def streamed(base: Path, folder: Path) -> list[str]:
    """Writes the images to tars, and returns the settings that stream them, each by a worker."""
    images = sorted((base / "images").rglob("*.png"))
    for shard in range(4):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for i, path in enumerate(images[shard::4]):
                tar.add(path, f"{i:04d}.png")
    more = ["data.streaming=true", "data.num_workers=2", "data.shuffle_buffer=2"]
    return [f"data.root={folder}/*.tar", "data.held_back_per_class=0", "cache.folder=null", *more]


@pytest.mark.parametrize(
    ("n_processes", "optimizer", "streams"),
    [
        pytest.param(1, "adamw", False, marks=pytest.mark.slow),
        (2, "adamw", False),
        pytest.param(1, "muon", False, marks=pytest.mark.slow),
        pytest.param(2, "adamw", True, marks=pytest.mark.slow),
    ],
)
def test_killed_run_ends_bit_identical(
    base: Path, tmp_path: Path, n_processes: int, optimizer: str, streams: bool
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    extra = [f"optim.optimizer={optimizer}", "run.channels_last=true"]
    extra += streamed(base, tmp_path) if streams else []
    printed = run(command(base, whole, n_processes, extra))
    assert f"world size {n_processes}" in printed
    print(f"world size {n_processes}")

    log = killed / "losses.jsonl"
    run_and_kill(command(base, killed, n_processes, extra), log, n_lines=5)
    assert 5 <= log.read_text().count("\n") < N_STEPS
    assert not (killed / "final").exists()
    resumed = run(command(base, killed, n_processes, extra))
    assert "Resumed from" in resumed

    assert log.read_text() == (whole / "losses.jsonl").read_text()
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(1, N_STEPS + 1))
    name = "final/controlnet/diffusion_pytorch_model.safetensors"
    expected, weights = load_file(whole / name), load_file(killed / name)
    assert expected.keys() == weights.keys()
    differing = [key for key in expected if not torch.equal(expected[key], weights[key])]
    assert differing == []
    initial = tiny.make_unet().state_dict()["conv_in.weight"]
    assert not torch.equal(weights["conv_in.weight"], initial), "the run did not train"


@pytest.mark.slow
def test_a_compiled_run_trains_alike_and_saves_under_the_same_names(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = tmp_path / "kernels"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(kernels))
    name = "final/controlnet/diffusion_pytorch_model.safetensors"
    weights = {}
    for compiled in ("false", "true"):
        extra = ["optim.max_steps=2", f"run.compile={compiled}"]
        run(command(base, tmp_path / compiled, 1, extra))
        assert any(kernels.rglob("*.so")) == (compiled == "true")
        weights[compiled] = load_file(tmp_path / compiled / name)
    plain, compiled = weights["false"], weights["true"]
    assert plain.keys() == compiled.keys()
    for key, value in plain.items():
        torch.testing.assert_close(compiled[key], value, atol=1e-4, rtol=1e-2)
    losses = [(tmp_path / c / "losses.jsonl").read_text() for c in ("false", "true")]
    first, second = ([json.loads(x)["loss"] for x in text.splitlines()] for text in losses)
    assert first == pytest.approx(second, rel=1e-4)


def test_checkpoints_rotate_and_record_their_origin(base: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    run(command(base, output, 1, ["optim.max_steps=5", "run.checkpoints_total_limit=2"]))
    names = sorted(path.name for path in (output / "checkpoints").iterdir())
    assert names == ["step-00000004", "step-00000005"]
    record = json.loads((output / "checkpoints/step-00000005/environment.json").read_text())
    assert record["n_processes"] == 1
    assert torch.__version__.startswith(record["versions"]["torch"].split("+")[0])
    changed = subprocess.run(
        command(base, output, 1, ["optim.max_steps=5", "optim.lr=0.5"]),
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert changed.returncode == 2
    assert "optim.lr: 0.001 → 0.5" in changed.stderr
    assert "Traceback" not in changed.stderr


@pytest.mark.slow
def test_elastic_resume_sees_the_rest_of_the_epoch_on_one_process(
    base: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    extra = ["optim.max_steps=4", "cache.folder=null"]
    run(command(base, output, 2, extra))
    for folder in ("final", "checkpoints/step-00000004"):
        shutil.rmtree(output / folder)  # as if it had been killed in the third step
    extra += ["optim.gradient_accumulation_steps=1"]
    arguments = command(base, output, 1, extra)
    refused = subprocess.run(
        arguments, env=environment(), capture_output=True, text=True, check=False
    )
    assert refused.returncode == 2
    assert "run.resume=elastic" in refused.stderr
    resumed = subprocess.run(
        [*arguments, "run.resume=elastic"],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert "does not equal an uninterrupted one" in resumed.stderr
    assert not (output / "checkpoints/partial-00000004").exists()

    # Twelve images, without the last of each class: 8 were seen by two processes, 4 by one.
    indices = torch.tensor([*range(6), *range(7, 13)])
    order = indices[torch.randperm(12, generator=torch.Generator().manual_seed(0))].tolist()
    seen = [order[0:4], order[4:8], order[8:10], order[10:12]]
    lines = (output / "losses.jsonl").read_text().splitlines()
    assert [json.loads(line)["order"] for line in lines] == [
        f"{derive_seed(*part):016x}" for part in seen
    ]
