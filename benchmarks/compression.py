"""Agreement against the number of principal components of the map that are kept.

    OMP_NUM_THREADS=1 python benchmarks/compression.py --data validation.parquet \\
        --training tiny-imagenet-200 --n-images 200

The papers invert maps that hold fewer numbers than the picture; the tiny maps hold more. Here a map
is cut to k principal components before it is inverted: of its cells (k channels of every cell), or
of whole maps (k numbers for all of it). Axes are those of training images, agreement is with the
uncut map and with the original picture. Writes JSON and a chart with 95 % intervals over images;
the same call again goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from pages import table
from torch import Tensor

from featinv_diffusion import load_backbone, load_inverter
from featinv_diffusion.backbones import Backbone
from featinv_diffusion.data.selection import Item, select_items
from featinv_diffusion.data.sets import open_images
from featinv_diffusion.evaluation.evaluator import noise_of
from featinv_diffusion.images import center_square, to_tensor
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.metrics import feature_cosine
from featinv_diffusion.metrics.features import centred_cosine, psnr
from featinv_diffusion.metrics.statistics import bootstrap_mean
from featinv_diffusion.runs.sampling import batched
from featinv_diffusion.settings import Selection

OUTSIDE = "tf_efficientnet_lite0"
CELLS, MAPS = "cells", "whole maps"
KEPT = {CELLS: (256, 64, 32, 16, 8, 4, 1), MAPS: (1000, 300)}
PAPER = 1 / 3
"""Numbers of the map by numbers of the picture, of ConvNeXt (1024×9×9) and Swin (1024×12×12)."""
BATCH = 16

Cut = Callable[[Tensor], Tensor]


def read(data: str, split: str, n_images: int, size: int) -> tuple[Tensor, list[Item]]:
    images = open_images(data, split, None)
    items = select_items(images, Selection(n_images=n_images), 0)
    return to_tensor([center_square(images.read(item.index), size) for item in items]), items


@torch.no_grad()
def fit_axes(maps: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns (mean, axes as rows by falling variance) of the cells and of whole maps."""
    found = {}
    for name, rows in ((CELLS, maps.movedim(1, 3).flatten(0, 2)), (MAPS, maps.flatten(1))):
        mean = rows.mean(dim=0)
        centred = (rows - mean).double()
        if len(centred) > centred.shape[1]:
            axes = torch.linalg.eigh(centred.T @ centred).eigenvectors.T
        else:  # no more axes than maps: from the products of maps with each other
            variance, weights = torch.linalg.eigh(centred @ centred.T)
            axes = (weights.T @ centred)[variance > 1e-9 * variance[-1]]
            axes = axes / axes.norm(dim=1, keepdim=True)
        found[name] = mean, axes.flip(0).float()
    return found


def make_cut(kind: str, mean: Tensor, axes: Tensor) -> Cut:
    def cut(maps: Tensor) -> Tensor:
        rows = maps.movedim(1, 3) if kind == CELLS else maps.flatten(1)
        kept = (rows - mean) @ axes.T @ axes + mean
        return kept.movedim(3, 1) if kind == CELLS else kept.view_as(maps)

    return cut


@torch.no_grad()
def see(eye: Backbone, images: Tensor) -> Tensor:
    return torch.cat([eye.features(batch) for batch in images.split(BATCH)])


@torch.no_grad()
def invert(inverter: Inverter, maps: Tensor, items: Sequence[Item]) -> Tensor:
    """Returns the pictures of maps, rounded to 8 bits."""
    made = [
        inverter.invert(maps[rows], generator=noise_of(items[i] for i in rows))
        for rows in batched(range(len(items)), BATCH)
    ]
    return (torch.cat(made) * 255).round() / 255


def draw(results: dict[str, dict[str, dict[str, list[float]]]], n_pixels: int, path: Path) -> None:
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots(1, 2)
    for one, name in zip(axes, ("centred cosine", "outside eye"), strict=True):
        for kind, points in results.items():
            numbers = sorted(points, key=int)
            means = [bootstrap_mean(points[n][name]) for n in numbers]
            error = [[m.value - m.low for m in means], [m.high - m.value for m in means]]
            x = [int(n) for n in numbers]
            one.errorbar(
                x, [m.value for m in means], error, marker="o", label=f"components of {kind}"
            )
        for x, text in ((n_pixels, "the picture's"), (PAPER * n_pixels, "the papers' share")):
            one.axvline(x, color="0.6", linestyle="--")
            place = {"transform": one.get_xaxis_transform(), "rotation": 90, "ha": "right"}
            one.text(x, 0.03, text, fontsize=7, **place)
        one.set_xscale("log")
        one.set_xlabel("numbers of the map that are kept")
        one.set_title(name if name != "outside eye" else "cosine, outside eye")
    axes[1].legend(loc="upper left")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--training", required=True)
    parser.add_argument("--n-images", type=int, default=200)
    parser.add_argument("--n-training", type=int, default=2000)
    parser.add_argument("--pipeline", default="tiny/convnext")
    parser.add_argument("--output", type=Path, default=Path("outputs/compression"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    inverter = load_inverter(options.pipeline, device="cpu")
    own, outside = inverter.require_backbone(), load_backbone(OUTSIDE)
    size = own.input_size[0]
    training, _ = read(options.training, "train", options.n_training, size)
    with torch.no_grad():
        axes = fit_axes(torch.cat([own.features(x) for x in training.split(64)]))
    images, items = read(options.data, "validation", options.n_images, size)
    maps, before = see(own, images), see(outside, images)
    natural = maps.mean(dim=(0, 2, 3))[:, None, None]
    n_cells = inverter.spec.grid[0] * inverter.spec.grid[1]
    made_of = f"{Path(options.pipeline).name}-{options.n_images}-{options.n_training}"
    done = options.output / f"{made_of}.json"
    results: dict[str, dict[str, dict[str, list[float]]]] = {kind: {} for kind in KEPT}
    if done.exists():
        results |= json.loads(done.read_text())
    rows = []
    for kind, k in ((kind, k) for kind, counts in KEPT.items() for k in counts):
        numbers = k * (n_cells if kind == CELLS else 1)
        if str(numbers) not in results[kind]:
            mean, directions = axes[kind]
            cut = make_cut(kind, mean, directions[:k])
            made = invert(inverter, cut(maps), items)
            columns = {
                "centred cosine": centred_cosine(maps, see(own, made), natural),
                "of the cut map itself": centred_cosine(maps, cut(maps), natural),
                "outside eye": feature_cosine(before, see(outside, made)),
                "PSNR": psnr(made, images),
            }
            results[kind][str(numbers)] = {n: v.double().tolist() for n, v in columns.items()}
            done.write_text(json.dumps(results))
        found = map(bootstrap_mean, results[kind][str(numbers)].values())
        cells = [f"{m.value:.3f} [{m.low:.3f}, {m.high:.3f}]" for m in found]
        share = f"{numbers / images[0].numel():.2f}"
        rows.append([f"{k} of {kind}", f"{numbers:,}", share, *cells])
        print(*rows[-1], sep=" | ", flush=True)
    names = next(iter(next(iter(results.values())).values()))
    print(table("|".join(["components kept", "numbers", "of the picture's", *names]), rows))
    draw(results, images[0].numel(), options.output / "compression.png")


if __name__ == "__main__":
    main()
