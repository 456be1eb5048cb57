"""What a step of refinement costs at full size: gradients through SD's decoder and ConvNeXt-B.

    OMP_NUM_THREADS=1 python benchmarks/refine_full_size.py

Random weights in the shapes of Stable Diffusion 1.x and ConvNeXt-B, 256 px, float32, batch 1. Each
row is a process of its own: seconds of one step, and the peak of memory less what it held before.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from pages import table
from torch.nn import functional as F

import featinv_diffusion
from featinv_diffusion.backbones import load_backbone

CONFIG = Path(featinv_diffusion.__file__).parent / "assets/sd15/vae/config.json"
LATENTS = (1, 4, 32, 32)
ROWS = {
    "decoding and looking, no gradients": [],
    "one step": ["gradient"],
    "one step, `pipe.vae.enable_gradient_checkpointing()`": ["gradient", "keep"],
}


def peak() -> float:
    """Returns the peak of this process in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def run(gradient: bool, checkpoints: bool) -> dict[str, float]:
    """Returns seconds and GiB of one step, or of decoding and looking alone."""
    torch.manual_seed(0)
    vae = AutoencoderKL.from_config(json.loads(CONFIG.read_text())).eval().requires_grad_(False)
    backbone = load_backbone("convnext_base.fb_in22k_ft_in1k", pretrained=False)
    if checkpoints:
        vae.enable_gradient_checkpointing()
    latents = torch.randn(LATENTS, requires_grad=gradient)
    target = torch.randn(1, backbone.spec.channels, *backbone.spec.grid)
    before, began = peak(), time.process_time()
    with torch.set_grad_enabled(gradient):
        pixels = (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
        seen = backbone.features(pixels)
        loss = (1 - F.cosine_similarity(seen, target, dim=1).mean((1, 2))).sum()
    if gradient:
        torch.autograd.grad(loss, latents)
    return {"seconds": time.process_time() - began, "gib": peak() - before, "before": before}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--row", nargs="*", choices=("gradient", "keep"), help="in this process")
    row = parser.parse_args().row
    if row is not None:
        print(json.dumps(run("gradient" in row, "keep" in row)))
        return
    found = []
    for name, words in ROWS.items():
        command = [sys.executable, __file__, "--row", *words]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        one = json.loads(done.stdout.splitlines()[-1])
        found.append([name, *(f"{one[key]:.1f}" for key in ("seconds", "gib", "before"))])
    print(table("|CPU s|GiB more|GiB before, weights and libraries", found))


if __name__ == "__main__":
    main()
