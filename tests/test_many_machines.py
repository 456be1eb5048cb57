"""The examples for many machines: a job array that is queued again, and launches of accelerate."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

import featinv_diffusion

CONFIGS = Path(featinv_diffusion.__file__).parents[1] / "configs"
WORKER = """#!/bin/bash
trap 'echo stopped >> said; exit 143' TERM
echo "$@" >> said
[ -n "$QUICK" ] && exit $QUICK
for i in {1..1000}; do sleep 0.05; done
"""


@pytest.fixture
def job(tmp_path: Path):
    """Starts the script as Slurm does; its worker and `scontrol` only note what they are told."""
    for name, text in (("featinv", WORKER), ("scontrol", '#!/bin/bash\necho "$@" >> said\n')):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def start(**more: str) -> subprocess.Popen:
        array = {"SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "3"}
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        command = ["bash", str(CONFIGS / "slurm" / "array.sbatch"), "sample", "a b", "-o", "out"]
        environment = {**os.environ, "PATH": path, **array, **more}
        return subprocess.Popen(command, cwd=tmp_path, env=environment)

    return start


def said(folder: Path) -> list[str]:
    path = folder / "said"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize("code", [0, 1, 2])
def test_a_task_ends_as_its_worker_does(job, tmp_path: Path, code: int):
    assert job(QUICK=str(code)).wait(30) == code
    assert said(tmp_path) == ["sample a b -o out"]


def test_a_task_whose_time_is_up_stops_its_worker_and_is_queued_again(job, tmp_path: Path):
    task = job()
    end = time.monotonic() + 60
    while not said(tmp_path):
        assert time.monotonic() < end
        time.sleep(0.01)
    task.send_signal(signal.SIGUSR1)
    assert task.wait(30) == 0
    assert said(tmp_path) == ["sample a b -o out", "stopped", "requeue 17_3"]


@pytest.mark.parametrize("path", sorted((CONFIGS / "accelerate").glob("*.yaml")), ids=str)
def test_accelerate_reads_its_configs(path: Path):
    config = load_config_from_file(str(path))
    assert config.distributed_type == "MULTI_GPU"
    assert config.num_processes % config.num_machines == 0
