"""Growth: pictures n × workers p → seconds of the wall, of the CPU, and peak memory.

    OMP_NUM_THREADS=1 python benchmarks/scale.py
    OMP_NUM_THREADS=1 python benchmarks/scale.py --pictures 1000,10000 --workers 1,2,4

Pictures of noise (seed 0, 96×72 pixels) go through `featinv sample` with the bundled pipeline, one
sample each, one step, as p workers at once that never talk; then `featinv merge` joins them. Each
is a process of its own, whose figures are those that the system counts, models and Python included.
CPU seconds are summed over the workers, the peak is that of the largest. Seconds of the wall depend
on who else uses the machine. Checks that the samples of all p of one n are equal, bit for bit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

FEATINV = [sys.executable, "-m", "featinv_diffusion"]
OPTIONS = ["--steps", "1", "--n-samples", "1", "--quiet", "--device", "cpu"]


@dataclass(frozen=True)
class Cost:
    """Of one or several processes.

    Args:
        wall, cpu: seconds.
        peak: MiB of the largest process.
    """

    wall: float
    cpu: float
    peak: float


def run_at_once(commands: Sequence[Sequence[str]]) -> Cost:
    """Starts all commands together and waits for them."""
    begin = time.perf_counter()
    silent = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    started = [
        os.posix_spawn(sys.executable, [*words], os.environ, file_actions=silent)
        for words in commands
    ]
    cpu = peak = 0.0
    for process in started:
        _, status, used = os.wait4(process, 0)
        if code := os.waitstatus_to_exitcode(status):
            sys.exit(f"A worker ended with {code}.")
        cpu += used.ru_utime + used.ru_stime
        peak = max(peak, used.ru_maxrss / 1024)
    return Cost(time.perf_counter() - begin, cpu, peak)


def write_pictures(folder: Path, n: int) -> None:
    """Writes n pictures of noise; the first ones are the same for any n."""
    folder.mkdir()
    for i in range(n):
        pixels = np.random.default_rng([0, i]).integers(0, 256, (72, 96, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:06d}.png")


def digest(output: Path) -> str:
    """Returns the digest of all samples, by name."""
    content = hashlib.sha256()
    for entry in json.loads((output / "manifest.json").read_text())["images"]:
        for name in entry["outputs"]:
            content.update(name.encode() + (output / name).read_bytes())
    return content.hexdigest()


def measure(photos: Path, output: Path, n_workers: int) -> tuple[Cost, Cost]:
    """Returns the costs of the workers and of joining what they did."""
    words = [*FEATINV, "sample", str(photos), *OPTIONS, "--output", str(output)]
    shares = [[*words, "--worker", f"{i}/{n_workers}"] for i in range(n_workers)]
    return run_at_once(shares), run_at_once([[*FEATINV, "merge", str(output), "--quiet"]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", default="100,300,1000")
    parser.add_argument("--workers", default="1,2")
    options = parser.parse_args()
    sizes = [int(word) for word in options.pictures.split(",")]
    processes = [int(word) for word in options.workers.split(",")]
    print("| pictures | workers | wall, s | CPU, s | peak, MiB | merge: wall, s | peak, MiB |")
    print("|---|---|---|---|---|---|---|")
    for n in sizes:
        with TemporaryDirectory() as folder:
            photos = Path(folder, "photos")
            write_pictures(photos, n)
            found = set()
            for p in processes:
                work, join = measure(photos, Path(folder, f"out-{p}"), p)
                found.add(digest(Path(folder, f"out-{p}")))
                print(
                    f"| {n:,} | {p} | {work.wall:.1f} | {work.cpu:.1f} | {work.peak:.0f} | "
                    f"{join.wall:.1f} | {join.peak:.0f} |",
                    flush=True,
                )
        if len(found) != 1:
            sys.exit(f"The samples of {n} pictures depend on the number of workers.")


if __name__ == "__main__":
    main()
