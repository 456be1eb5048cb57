"""Fitting an operator as features stream in: CPU seconds and peak memory, a planted rotation.

    OMP_NUM_THREADS=1 python benchmarks/operators.py

Features are random (seed 0), in float32 and in batches, as a backbone gives them; each case runs in
a process of its own, whose peak memory includes Python and PyTorch. Seconds of the CPU come first:
those of the wall, beside them, are longer where others use the machine. Prints, besides, how far
the rotation that was found lies from the planted one.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from featinv_diffusion.features.operator_methods import METHODS, PairMoments, solve
from featinv_diffusion.types import FeatureSpec

CASES = ((1024, 8, 192), (256, 32, 768))
"""(images, side of the grid, channels): 1,024 × 64 × 192 and 256 × 1,024 × 768."""
BATCH, NOISE = 8, 0.02


def make_batches(
    n_images: int, side: int, rotation: Tensor, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields pairs of maps, the second of which is the first one turned, with noise."""
    channels = len(rotation)
    for _ in range(0, n_images, BATCH):
        rows = torch.randn(BATCH, side, side, channels, generator=generator) / channels**0.5
        noise = NOISE * torch.randn(rows.shape, generator=generator) / channels**0.5
        yield rows.movedim(-1, 1), (rows @ rotation + noise).movedim(-1, 1)


def run_case(n_images: int, side: int, channels: int) -> dict[str, float]:
    """Returns what one case takes: seconds of the CPU and of the wall, and MiB at the peak."""
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(channels, channels, generator=generator)).Q
    moments, seconds, of_cpu = PairMoments(channels), 0.0, 0.0
    before = peak_memory()
    for features, others in make_batches(n_images, side, rotation, generator):
        began = time.perf_counter(), time.process_time()
        moments.update(features, others)
        seconds += time.perf_counter() - began[0]
        of_cpu += time.process_time() - began[1]
    row = {"sums, CPU s": of_cpu, "sums, wall s": seconds, "before, MiB": before}
    spec = FeatureSpec("random", "last", channels, (side, side))
    for method in METHODS:
        began = time.perf_counter(), time.process_time()
        operator = solve(moments, spec, "rotation", method)
        row[f"{method}, CPU s"] = time.process_time() - began[1]
        row[f"{method}, wall s"] = time.perf_counter() - began[0]
        if method == "orthogonal":
            row["error"] = (operator.matrix - rotation).norm().item() / channels**0.5
    return {**row, "peak, MiB": peak_memory()}


def peak_memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", type=int, help="run this one and print it as JSON")
    chosen = parser.parse_args().case
    if chosen is not None:
        print(json.dumps(run_case(*CASES[chosen])))
        return
    for number, (n_images, side, channels) in enumerate(CASES):
        command = [sys.executable, __file__, "--case", str(number)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        row = json.loads(done.stdout)
        if number == 0:
            print(f"| images × locations × channels | {' | '.join(row)} |")
            print("|---" * (1 + len(row)) + "|")
        cells = " | ".join(
            f"{value:.3g}" if value < 100 else f"{value:.0f}" for value in row.values()
        )
        print(f"| {n_images:,} × {side * side:,} × {channels} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
