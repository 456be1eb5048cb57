"""CPU seconds to encode one map with a sparse autoencoder: its own codes, none solved anew.

    python benchmarks/sae_speed.py

64 cells of 768 channels and 1,024 latents, on one thread; the median of 20 runs after a first.
Beside it the elastic net over the same directions, which is what directions without an encoder
need (`DirectionConcepts(encoding="sparse")`, one run on 4 cells, scaled up).
"""

from __future__ import annotations

import statistics
import time

import torch

from featinv_diffusion.concepts import DirectionConcepts, SAEConcepts, SparseAutoencoder

CHANNELS, LATENTS, SIDE, LIMIT = 768, 1024, 8, 0.05


def measure(run, repeats: int = 20) -> float:
    """Returns the median CPU seconds of a run."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds[1:] or seconds)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(LATENTS, CHANNELS), dim=1)
    weights = {"encoder.0.weight": rows, "decoder": rows, "pre_bias": torch.zeros(CHANNELS)}
    features = torch.randn(1, CHANNELS, SIDE, SIDE)
    for name, settings in {
        "ReLU": {"activation": "relu"},
        "TopK 32": {"activation": "top_k", "k": 32},
        "TopK 32, normalised cells": {"activation": "top_k", "k": 32, "normalise": "layer_norm"},
    }.items():
        concepts = SAEConcepts.of(SparseAutoencoder(weights, settings))
        seconds = measure(lambda concepts=concepts: concepts.encode(features))
        verdict = "ok" if seconds < LIMIT else "too slow"
        print(f"{name}: {seconds:.4f} CPU s for {SIDE**2} cells × {LATENTS} latents ({verdict})")
    solved = DirectionConcepts(rows, encoding="sparse", positive=True)
    seconds = measure(lambda: solved.encode(features[..., :2, :2]), repeats=0) * SIDE**2 / 4
    print(f"Elastic net over the same directions: about {seconds:.0f} CPU s")


if __name__ == "__main__":
    main()
