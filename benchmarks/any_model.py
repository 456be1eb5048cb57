"""Inverters without training beside trained ones: who agrees with the pictures, and what they cost.

    OMP_NUM_THREADS=1 python benchmarks/any_model.py --data validation.parquet --n-images 100

Prints a table: cosine that the own backbone and two others see, each beside that of another image,
and CPU seconds per picture, on the same pictures for all; draws what each makes of crops of photos.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from pages import crops, interval, table

from featinv_diffusion import evaluate, load_inverter
from featinv_diffusion.figures.grid import GridRow, make_grid
from featinv_diffusion.images import write_png
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.runs.samples import sample

OTHERS = ("tiny/resnet", "tiny/vit")
INVERTERS: dict[str, dict[str, Any]] = {
    "optimise": {"name": "optimise"},
    "optimise, pixels": {"name": "optimise", "parametrise": "pixels"},
    "guided": {"name": "guided"},
    "FeatInv": {"name": "tiny/convnext"},
    "optimise, of siglip2": {"name": "optimise", "backbone": "tiny/siglip2"},
    "reconstructor, of siglip2": {"name": "siglip2"},
}
"""Of tiny/convnext where no other backbone is named."""


class Timed:
    """Adds up the CPU seconds of an inverter and the pictures that it made."""

    def __init__(self, inverter: Inverter):
        self.invert, self.seconds, self.n = inverter.invert, 0.0, 0
        vars(inverter)["invert"] = self

    def __call__(self, features: Any, **given: Any) -> Any:
        began = time.process_time()
        images = self.invert(features, **given)
        self.seconds += time.process_time() - began
        self.n += len(images)
        return images


def cell(cosine: dict[str, Any]) -> str:
    """Returns a cosine with its interval, and that of another image."""
    return f"{interval(cosine, 2)} ({cosine['nulls']['other_image']['value']:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--n-images", type=int, default=100)
    parser.add_argument("--figure", type=Path, default=Path("any-model.png"))
    options = parser.parse_args()
    shown = [crop for _, crop in crops(2)]
    rows, made = [], {}
    for title, opened in INVERTERS.items():
        inverter = load_inverter(device="cpu", **opened)
        timed = Timed(inverter)
        found = evaluate(
            inverter,
            options.data,
            n_images=options.n_images,
            n_null_images=0,
            evaluated_by=OTHERS,
        ).metrics
        seen = [found, *(found["evaluated_by"][name] for name in OTHERS)]
        rows.append(
            [
                title,
                *(cell(one["cosine"]) for one in seen),
                f"{timed.seconds / timed.n:.1f}",
            ]
        )
        print(*rows[-1], sep=" | ", flush=True)
        made[title] = sample(inverter, shown, n_samples=1)
    print(f"\n{options.n_images} images.\n")
    others = "|".join(OTHERS)
    print(table(f"inverter|own backbone (another image)|{others}|CPU s per picture", rows))
    grid = [
        GridRow(
            picture,
            "",
            [made[title].reconstructions[i].samples[0] for title in INVERTERS],
            [f"{made[title].cosine[i, 0]:.2f}" for title in INVERTERS],
        )
        for i, picture in enumerate(shown)
    ]
    write_png(make_grid(grid, min_tile=128, headers=list(INVERTERS)), options.figure)


if __name__ == "__main__":
    main()
