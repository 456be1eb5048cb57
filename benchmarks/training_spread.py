"""How much figures differ between trainings that differ in nothing but the seed.

    OMP_NUM_THREADS=1 python benchmarks/training_spread.py --data validation.parquet \\
        --pipeline tiny/resnet --controlnets seed-0/final/controlnet seed-1/final/controlnet ...

The ControlNets take the place of the pipeline's own, on the same images with the same noise. The
interval over images says how another choice of images would move a figure; the spread over
trainings, which it does not contain, how another training would.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from pages import table
from quality import OUTSIDE, measure, words

from featinv_diffusion import load_backbone, load_inverter
from featinv_diffusion.data.selection import select_items
from featinv_diffusion.data.sets import open_images
from featinv_diffusion.diffusion.featinv_controlnet import FeatureControlNet
from featinv_diffusion.images import center_square, to_tensor
from featinv_diffusion.inverters import DiffusionInverter
from featinv_diffusion.settings import Selection

SHOWN = {"own": 3, OUTSIDE: 3, f"{OUTSIDE} top-5": 3, "PSNR": 2, "edges": 3}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--pipeline", default="tiny/resnet")
    parser.add_argument("--controlnets", type=Path, nargs="+", required=True)
    parser.add_argument("--n-images", type=int, default=300)
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    images = open_images(options.data, "validation", None)
    items = select_items(images, Selection(n_images=options.n_images), 0)
    squares = to_tensor([center_square(images.read(item.index), 64) for item in items])
    eyes = {OUTSIDE: load_backbone(OUTSIDE)}
    rows, means = [], []
    for folder in options.controlnets:
        inverter = load_inverter(options.pipeline, device="cpu", steps=options.steps)
        assert isinstance(inverter, DiffusionInverter)
        controlnet = FeatureControlNet.from_pretrained(folder)
        inverter.pipeline.register_modules(controlnet=controlnet.eval().requires_grad_(False))
        found = measure(inverter, squares, items, eyes)
        means.append([found[name].mean() for name in SHOWN])
        rows.append([f"training {len(rows) + 1}", *(words(found[k], d) for k, d in SHOWN.items())])
        print(*rows[-1], sep=" | ", flush=True)
    spread = np.std(means, axis=0, ddof=1)
    cells = (f"{s:.{digits + 1}f}" for s, digits in zip(spread, SHOWN.values(), strict=True))
    rows.append(["standard deviation over trainings", *cells])
    print(table("|".join(["", *SHOWN]), rows))


if __name__ == "__main__":
    main()
