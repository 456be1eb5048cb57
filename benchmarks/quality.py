"""What steps and refinement buy: the chart behind the presets of `--quality`.

    OMP_NUM_THREADS=1 python benchmarks/quality.py --data validation.parquet --n-images 200

The same images and noise for every setting, batch by batch, on one device. Per setting: cosine of
the own backbone, cosine and matches of the outside eye (extra `real`; not for its own member) and
of other bundled backbones, PSNR, edge energy as a share of the original's, CPU seconds per picture.
Intervals are 95 % over images; differences are paired with today's default, ten steps without
refinement. Writes JSON and a chart, and draws crops of two photos by every setting.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from pages import crops, table
from torch import Tensor

from featinv_diffusion import load_backbone, load_inverter
from featinv_diffusion.backbones import Backbone
from featinv_diffusion.data.selection import Item, select_items
from featinv_diffusion.data.sets import open_images
from featinv_diffusion.evaluation.evaluator import noise_of
from featinv_diffusion.figures.grid import GridRow, make_grid
from featinv_diffusion.images import center_square, to_pil, to_tensor, write_png
from featinv_diffusion.inverters import DiffusionInverter
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.metrics import feature_cosine, top_k_match
from featinv_diffusion.metrics.features import psnr
from featinv_diffusion.metrics.statistics import bootstrap_mean
from featinv_diffusion.runs.sampling import batched
from featinv_diffusion.seeds import derive_seed
from featinv_diffusion.settings import Selection

OUTSIDE, BEFORE = "tf_efficientnet_lite0", "10"
SETTINGS: dict[str, dict[str, Any]] = {
    "published": {"quality": "published"},
    "10": {"steps": 10},
    "6": {"steps": 6},
    "4": {"steps": 4},
    "2": {"steps": 2},
    "2 + 2": {"steps": 2, "refine": 2},
    "4 + 2": {"steps": 4, "refine": 2},
    "10 + 2": {"steps": 10, "refine": 2},
    "6 + 2": {"steps": 6, "refine": 2},
    "6 + 3": {"steps": 6, "refine": 3},
    "6 + 10": {"steps": 6, "refine": 10},
    "5 (4)": {"steps": 5, "refine": 4, "refine_at": "steps"},
    "6 (3)": {"steps": 6, "refine": 3, "refine_at": "steps"},
    "6 (4)": {"steps": 6, "refine": 4, "refine_at": "steps"},
    "6 (6)": {"steps": 6, "refine": 6, "refine_at": "steps"},
    "8 (3)": {"steps": 8, "refine": 3, "refine_at": "steps"},
    "10 (4)": {"steps": 10, "refine": 4, "refine_at": "steps"},
    "10 (6)": {"steps": 10, "refine": 6, "refine_at": "steps"},
    "6 trailing": {"steps": 6, "changes": {"timestep_spacing": "trailing"}},
    "6 Karras": {"steps": 6, "changes": {"use_karras_sigmas": True}},
    "6 of order 3": {"steps": 6, "changes": {"solver_order": 3}},
    "6 of UniPC": {"steps": 6, "scheduler": "unipc"},
    "50 of DDIM": {"steps": 50, "scheduler": "ddim"},
}
"""Denoising steps + steps of refinement at the end, or (in how many of the last steps).

`changes` are those of the scheduler's configuration.
"""
BATCH = 8


def open_setting(pipeline: str, name: str) -> Inverter:
    """Returns the pipeline with a setting."""
    options = dict(SETTINGS[name])
    changes = options.pop("changes", {})
    inverter = load_inverter(pipeline, device="cpu", **options)
    assert isinstance(inverter, DiffusionInverter)
    scheduler = inverter.pipeline.scheduler
    inverter.pipeline.scheduler = type(scheduler).from_config(scheduler.config, **changes)
    return inverter


def edges(images: Tensor) -> Tensor:
    """Returns the mean squared difference of neighbouring pixels of each image."""
    across, down = images.diff(dim=-1).square(), images.diff(dim=-2).square()
    return across.mean((1, 2, 3)) + down.mean((1, 2, 3))


@torch.no_grad()
def measure(
    inverter: Inverter, images: Tensor, items: list[Item], eyes: dict[str, Backbone]
) -> dict[str, Tensor]:
    """Returns one value per image under each name; `seconds` are those of sampling alone."""
    own = inverter.require_backbone()
    features = own.features(images)
    began = time.process_time()
    made = inverter.invert(features, generator=noise_of(items))
    seconds = (time.process_time() - began) / len(items)
    made = torch.round(made * 255) / 255
    values = {
        "own": feature_cosine(features, own.features(made)),
        "PSNR": psnr(made, images),
        "edges": edges(made) / edges(images),
        "seconds": torch.full((len(items),), seconds),
    }
    for name, eye in eyes.items():
        (wanted, scores), (seen, again) = map(eye.features_and_logits, (images, made))
        values[name] = feature_cosine(wanted, seen)
        if scores is not None and again is not None:
            values[f"{name} top-1"] = top_k_match(scores, again, 1).float()
            values[f"{name} top-5"] = top_k_match(scores, again, 5).float()
    return values


def words(values: np.ndarray, digits: int) -> str:
    """Returns the mean with its interval."""
    found = bootstrap_mean(values)
    return f"{found.value:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


def draw(results: dict[str, dict[str, np.ndarray]], eye: str, path: Path) -> None:
    """Draws what the own backbone and `eye` see against seconds."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    seen = "outside eye" if eye == OUTSIDE else f"cosine, seen by {eye}"
    for one, name, title in zip(axes, ("own", eye), ("own cosine", seen), strict=True):
        for label, columns in results.items():
            x, y = columns["seconds"].mean(), columns[name].mean()
            one.plot(x, y, "o", color="tab:orange" if set(label) & set("+(") else "tab:blue")
            one.annotate(label, (x, y), textcoords="offset points", xytext=(4, 4), fontsize=8)
        one.set_xscale("log")
        one.margins(x=0.3)
        one.set_xlabel("CPU seconds per picture")
        one.set_title(title)
    figure.savefig(path, dpi=120)


def show(inverters: dict[str, Inverter], path: Path) -> None:
    """Draws crops of two photos by every setting."""
    rows = []
    for name, crop in crops(3):
        made = []
        for inverter in inverters.values():
            generator = [torch.Generator().manual_seed(derive_seed(0, name, 0))]
            features = inverter.require_backbone().features(to_tensor([crop]))
            made += to_pil(inverter.invert(features, generator=generator))
        rows.append(GridRow(crop, "", made, [""] * len(made)))
    write_png(make_grid(rows, min_tile=96, headers=list(inverters)), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--n-images", type=int, default=200)
    parser.add_argument("--pipeline", default="tiny/convnext")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--other", nargs="+", default=["tiny/resnet"], metavar="BACKBONE")
    parser.add_argument("--output", type=Path, default=Path("outputs/quality"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    images = open_images(options.data, "validation", None)
    items = select_items(images, Selection(n_images=options.n_images), 0)
    squares = to_tensor([center_square(images.read(item.index), 64) for item in items])
    inverters = {name: open_setting(options.pipeline, name) for name in options.settings}
    own = next(iter(inverters.values())).require_backbone().name
    names = [name for name in (OUTSIDE, *options.other) if name != own]
    eyes = {name: load_backbone(name) for name in names}
    # Batch by batch, so that all settings meet the same load of the machine.
    found: dict[str, dict[str, list[Tensor]]] = {name: {} for name in inverters}
    for rows in batched(range(len(items)), BATCH):
        for name, inverter in inverters.items():
            values = measure(inverter, squares[rows], [items[i] for i in rows], eyes)
            for key, column in values.items():
                found[name].setdefault(key, []).append(column.cpu())
        print(f"{rows[-1] + 1} of {len(items)} images", file=sys.stderr, flush=True)
    results = {
        name: {key: torch.cat(parts).double().numpy() for key, parts in columns.items()}
        for name, columns in found.items()
    }
    (options.output / "quality.json").write_text(
        json.dumps({n: {k: v.tolist() for k, v in one.items()} for n, one in results.items()})
    )
    shown = ["own", *(f"{e}{m}" for e in eyes for m in ("", " top-1", " top-5")), "PSNR", "edges"]
    digits = {"PSNR": 2}
    table_rows = [
        [name, *(words(one[k], digits.get(k, 3)) for k in shown), f"{one['seconds'].mean():.3f}"]
        for name, one in results.items()
    ]
    print(f"\n{options.n_images} images.\n")
    print(table("|".join(["setting", *shown, "CPU s"]), table_rows))
    print("\nPaired differences to ten steps:\n")
    print(
        table(
            "|".join(["setting", *shown, "time, ratio"]),
            [
                [
                    name,
                    *(words(one[key] - results[BEFORE][key], 3) for key in shown),
                    f"{one['seconds'].sum() / results[BEFORE]['seconds'].sum():.2f}",
                ]
                for name, one in results.items()
                if BEFORE in results and name != BEFORE
            ],
        )
    )
    draw(results, names[0], options.output / "quality.png")
    show(inverters, options.output / "pictures.png")


if __name__ == "__main__":
    main()
