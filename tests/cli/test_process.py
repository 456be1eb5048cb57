"""The process of `featinv`: what it imports, and how it ends."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

import featinv_diffusion

ROOT = Path(featinv_diffusion.__file__).parents[1]
PLOTS_AND_TABLES = ["matplotlib", "pandas", "pyarrow", "sklearn", "datasets", "peft"]


def python(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **environment},
        timeout=300,
    )


def absent(wanted: list[str], *command: object) -> set[str]:
    """Returns which modules a command has imported of those that it should not."""
    code = (
        "import json, sys\nfrom featinv_diffusion.cli import main\n"
        f"sys.argv = ['featinv', *{[str(word) for word in command]}]\n"
        "try: main()\nexcept SystemExit as stop: assert not stop.code\n"
        f"print(json.dumps(sorted(set({wanted}) & set(sys.modules))))"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_sample_of_the_builtin_photo_imports_what_it_needs(tmp_path: Path):
    """One test for two promises, since a process takes seconds to start."""
    out = tmp_path / "out"
    options = ("--n-samples", 1, "--steps", 1, "--output", out)
    assert absent(PLOTS_AND_TABLES, "sample", *options) == set()
    assert (out / "grid.png").is_file()


def test_encode_does_without_diffusers(tmp_path: Path):
    unused = [*PLOTS_AND_TABLES, "diffusers"]
    assert absent(unused, "encode", "--output", tmp_path / "maps.safetensors") == set()


# ---- The end -------------------------------------------------------------------------------------

PROGRAM = """
import atexit, os, sys, threading, time
from featinv_diffusion.cli import process

leave = os._exit

def tell(code):
    print("at once", flush=True)
    leave(code)

os._exit = tell
atexit.register(print, "at exit")
{before}

def program():
    print("done", end=" ")
    sys.exit({code})

process.run(program)
"""


def end(code: object = 0, before: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    return python("-c", PROGRAM.format(code=repr(code), before=before), **environment)


@pytest.mark.parametrize("code", [None, 0])
def test_a_process_does_what_was_registered_and_leaves_at_once(code: int | None):
    done = end(code)
    assert (done.returncode, done.stdout) == (0, "done at exit\nat once\n")


@pytest.mark.parametrize("code", [1, 2, 130, 143])
def test_a_process_that_failed_ends_as_always(code: int):
    done = end(code)
    assert (done.returncode, done.stdout) == (code, "done at exit\n")


@pytest.mark.parametrize(
    "before",
    [
        "threading.Thread(target=lambda: (time.sleep(.3), print('thread', end=' '))).start()",
        "sys.setprofile(lambda *_: None)",
        "sys.modules['tensorboard'] = sys",
    ],
)
def test_a_process_with_work_left_ends_as_always(before: str):
    done = end(0, before)
    assert done.returncode == 0
    assert "at exit" in done.stdout
    assert "at once" not in done.stdout
    assert ("thread" in done.stdout) == ("Thread" in before)


def test_one_of_several_processes_ends_as_always():
    assert end(WORLD_SIZE="2").stdout == "done at exit\n"


def test_a_sentence_as_the_code_is_told_by_python():
    done = end("a sentence")
    assert (done.returncode, done.stderr) == (1, "a sentence\n")


def test_the_collector_goes_on_as_always_once_nothing_is_imported():
    code = (
        "import gc\nfrom featinv_diffusion.cli import process\nnormal = gc.get_threshold()\n"
        "process.collect_seldom_at_start()\nassert gc.get_threshold() > normal\n"
        "kept = [[] for _ in range(200_000)]\nassert gc.get_threshold() == normal\n"
        "assert gc.get_freeze_count() > 0 and not gc.callbacks"
    )
    assert python("-c", code).stderr == ""


def test_importing_a_public_name_leaves_the_collector_as_it_was():
    code = (
        "import gc; gc.set_threshold(123, 4, 5); import featinv_diffusion as fi; fi.InputError\n"
        "assert gc.get_threshold() == (123, 4, 5)"
    )
    assert python("-c", code).stderr == ""


# ---- Memory --------------------------------------------------------------------------------------

TENSORS = """
import resource
import numpy as np
from featinv_diffusion.cli import process

{before}
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    blocks = [np.ones(3 * 2**20) for _ in range(4)]  # 24 MiB each
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left alone")
def test_memory_that_tensors_free_is_used_again():
    environment = {name: value for name, value in os.environ.items() if "MALLOC_" not in name}
    faults = [
        int(
            subprocess.run(
                [sys.executable, "-c", TENSORS.format(before=before)],
                capture_output=True,
                text=True,
                check=True,
                env={**environment, "PYTHONPATH": str(ROOT)},
            ).stdout
        )
        for before in ("", "process.keep_freed_memory()")
    ]
    assert faults[1] < faults[0] / 2, faults
