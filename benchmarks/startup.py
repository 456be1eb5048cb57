"""Seconds from a command to its result: fresh processes, and what they spend on starting.

    OMP_NUM_THREADS=1 python benchmarks/startup.py --runs 5 --against CHECKOUT

`--against` runs the same with the package of another checkout, in turns with this one, so that what
else the machine does meets both. CPU seconds are those of the process and its children, user and
system. A first run of each, which writes bytecode, is not counted. The table holds medians, the
JSON also the least of each, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from featinv_diffusion.images import builtin_photo

IMPORT = "import featinv_diffusion as fi; fi.load_inverter"
TASKS = {
    "import torch": ["-c", "import torch"],
    "import diffusers, transformers, timm": [
        "-c",
        "import timm; from transformers import PreTrainedModel; from diffusers import UNet2DModel",
    ],
    "import, load_inverter imported": ["-c", IMPORT],
    "load_inverter('tiny/convnext')": ["-c", f"{IMPORT}('tiny/convnext')"],
    "featinv encode PHOTO": ["-m", "featinv_diffusion", "encode", "PHOTO", "-o", "OUT/a.npy"],
    "featinv sample PHOTO": ["-m", "featinv_diffusion", "sample", "PHOTO", "-o", "OUT"],
}
HERE = Path(__file__).parents[1]


def run_once(arguments: Sequence[str], checkout: Path) -> tuple[float, float]:
    """Returns (wall, CPU) seconds of a fresh Python with the package of a checkout."""
    with tempfile.TemporaryDirectory() as folder:
        named = {"PHOTO": str(builtin_photo())}
        command = [named.get(a, a.replace("OUT", f"{folder}/out")) for a in arguments]
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=folder,  # `python -m` looks there first
            env={**os.environ, "PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.DEVNULL,
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command} failed with {process.returncode}")
    return wall, usage.ru_utime + usage.ru_stime


def measure(
    tasks: Sequence[str], checkouts: Sequence[Path], n_runs: int
) -> dict[str, list[dict[str, float]]]:
    """Returns for each task what each checkout took; they take turns."""
    found = {}
    for task in tasks:
        seconds: list[list[tuple[float, float]]] = [[] for _ in checkouts]
        for _ in range(n_runs + 1):
            for done, checkout in zip(seconds, checkouts, strict=True):
                done.append(run_once(TASKS[task], checkout))
        found[task] = [summarise(counted) for _, *counted in seconds]
        print(to_row(task, found[task]), flush=True)
    return found


def summarise(seconds: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Returns medians and minima of (wall, CPU) seconds."""
    wall, cpu = zip(*seconds, strict=True)
    medians = {"wall": statistics.median(wall), "cpu": statistics.median(cpu)}
    return {**medians, "least_wall": min(wall), "least_cpu": min(cpu)}


def to_row(task: str, medians: Sequence[dict[str, float]]) -> str:
    """Returns a row of the table; the ratio is this checkout over the other."""
    cells = [f"{m[kind]:.1f}" for kind in ("cpu", "wall") for m in reversed(medians)]
    if len(medians) > 1:
        cells.append(f"{medians[0]['cpu'] / medians[1]['cpu']:.2f}")
    return f"| {task} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds that fresh processes take.")
    parser.add_argument("--runs", type=int, default=5, help="after the first")
    parser.add_argument("--against", type=Path, help="another checkout of the repository")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--json", type=Path, help="file for the numbers")
    given = parser.parse_args()
    checkouts = [HERE, *([given.against.resolve()] if given.against else [])]
    names = ["there, ", "here, "] if given.against else [""]
    heads = [f"{name}{kind} s" for kind in ("CPU", "wall") for name in names]
    heads += ["CPU ratio"] if given.against else []
    print(f"| fresh process | {' | '.join(heads)} |\n|---|{'---|' * len(heads)}")
    found = measure(given.tasks, checkouts, given.runs)
    if given.json:
        given.json.write_text(json.dumps({"runs": given.runs, "tasks": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
