"""How well the scope score tells natural feature maps from others, and whether its p-values hold.

    OMP_NUM_THREADS=1 python benchmarks/scope.py --data validation.parquet --figure scope.png

Prints, for each way to make a map that is not natural, the AUROC of natural maps against such maps
with its 95 % interval, and the share that p < 0.05 flags; draws the p-values of natural maps
against the uniform distribution. Images must be others than those of calibration.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from featinv_diffusion.backbones import Backbone
from featinv_diffusion.data.sets import ImageSet, open_images
from featinv_diffusion.features import interpolate, paste, permute_cells
from featinv_diffusion.features.natural_maps import LEVEL, NaturalMaps
from featinv_diffusion.figures.board import BLUE, GREY, INK, ORANGE, write_figure
from featinv_diffusion.images import center_square, to_tensor
from featinv_diffusion.inverters.open import load_inverter
from featinv_diffusion.metrics.statistics import Interval, bootstrap_statistic
from featinv_diffusion.runs.scope import open_scope
from featinv_diffusion.types import Features, Images

BATCH = 64


def edited_maps(maps: Features, generator: torch.Generator) -> Iterator[tuple[str, Features]]:
    """Yields maps that no image gives; each is mixed or joined with the next one."""
    other = maps.roll(-1, 0)
    h, w = maps.shape[2:]
    right = (torch.arange(w) >= w // 2).expand(h, w)
    checks = (torch.arange(h)[:, None] + torch.arange(w)) % 2 == 0
    box = torch.zeros(h, w, dtype=torch.bool)
    box[h // 4 : h - h // 4, w // 4 : w - w // 4] = True
    yield "cells permuted", permute_cells(maps, generator)
    yield "0.5 A + 0.5 B", interpolate(maps, other, 0.5)
    yield "0.75 A + 0.25 B", interpolate(maps, other, 0.75)
    yield "1.5 A − 0.5 B", interpolate(maps, other, 1.5)
    yield "right half of B", paste(maps, other, right)
    yield "every second cell of B", paste(maps, other, checks)
    yield "middle of B", paste(maps, other, box)
    yield "noise, moments of all cells", like_all(maps, generator)
    yield "noise, moments of each map", like_each(maps, generator)
    yield "0.5 A", 0.5 * maps
    yield "mean of A everywhere", maps.mean(dim=(2, 3), keepdim=True).expand_as(maps)
    yield "zeros", torch.zeros_like(maps)


def like_all(maps: Features, generator: torch.Generator) -> Features:
    """Independent cells with the mean and covariance of all cells."""
    cells = maps.permute(0, 2, 3, 1).flatten(0, 2)
    variance, axes = torch.linalg.eigh(torch.cov(cells.T).double())
    root = (axes * variance.clamp(min=0).sqrt()).float()
    drawn = torch.randn(cells.shape, generator=generator) @ root.T + cells.mean(dim=0)
    return drawn.unflatten(0, (len(maps), *maps.shape[2:])).permute(0, 3, 1, 2)


def like_each(maps: Features, generator: torch.Generator) -> Features:
    """Independent values with the mean and deviation of each channel of each map."""
    noise = torch.randn(maps.shape, generator=generator)
    deviation = maps.std(dim=(2, 3), keepdim=True, unbiased=False)
    return maps.mean(dim=(2, 3), keepdim=True) + deviation * noise


def foreign_images(images: Images, generator: torch.Generator) -> Iterator[tuple[str, Images]]:
    """Yields images such as the backbone was not made for."""
    n, _, height, width = images.shape
    pixels = images.flatten(2)
    order = torch.rand(n, 1, height * width, generator=generator).argsort(dim=2)
    side = height // 4
    tiles = F.unfold(images, side, stride=side)
    shuffled = tiles[:, :, torch.randperm(tiles.shape[2], generator=generator)]
    angle = torch.rand(n, 1, 1, 1, generator=generator) * np.pi
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    frequency = 0.2 + torch.rand(n, 1, 1, 1, generator=generator)
    wave = torch.sin(frequency * (angle.cos() * x + angle.sin() * y))
    yield "images of noise", torch.rand(images.shape, generator=generator)
    yield "gratings", (0.5 + 0.5 * wave).expand_as(images)
    yield "pixels shuffled", pixels.gather(2, order.expand_as(pixels)).view_as(images)
    yield "16 tiles shuffled", F.fold(shuffled, (height, width), side, stride=side)
    yield "colours inverted", 1 - images
    yield "blurred to 4 × 4", F.interpolate(F.avg_pool2d(images, side), (height, width))


@torch.no_grad()
def look(backbone: Backbone, images: Images) -> Features:
    return torch.cat([backbone.features(batch).cpu() for batch in images.split(BATCH)])


def read(images: ImageSet, n_images: int, size: int) -> Images:
    """Reads images at even steps, so that all classes come."""
    chosen = np.linspace(0, len(images) - 1, min(n_images, len(images))).round().astype(int)
    squares = [center_square(images.read(int(i)), size) for i in chosen]
    return torch.cat([to_tensor(square) for square in squares])


def auroc(natural: Tensor, others: Tensor) -> Interval:
    """Chance that another map scores higher than a natural one, with a bootstrap interval.

    Images are drawn anew; the figure of a draw is linear in the placements of both sides (DeLong,
    DeLong and Clarke-Pearson 1988).
    """
    wins = (others[:, None] > natural).double() + 0.5 * (others[:, None] == natural)
    placements = {"others": wins.mean(dim=1), "natural": wins.mean(dim=0)}
    value = wins.mean().item()
    return bootstrap_statistic(placements, lambda means: means["others"] + means["natural"] - value)


def print_row(kind: str, maps: Features, natural: Tensor, statistics: NaturalMaps) -> None:
    distances = statistics.density.distance(maps)
    found = auroc(natural, distances)
    flagged = (statistics.calibration.of_maps(distances) < LEVEL).double().mean().item()
    interval = f"{found.value:.3f} | {found.low:.3f} … {found.high:.3f}"
    print(f"| {kind} | {interval} | {flagged:.1%} |", flush=True)


def draw_calibration(p_values: Tensor, n_calibration: int, backbone: str) -> Figure:
    """Draws the share of natural maps at or below each p-value, with the band of chance, which is
    that of these maps and of those of calibration."""
    n, ordered = len(p_values), p_values.sort().values.numpy()
    levels = np.linspace(0, 1, 201)
    band = 1.96 * np.sqrt(levels * (1 - levels) * (1 / n + 1 / n_calibration))
    share = np.searchsorted(ordered, levels, side="right") / n
    figure = Figure(figsize=(3.4, 3.4), layout="constrained")
    axes = figure.add_subplot()
    axes.fill_between(levels, levels - band, levels + band, color=GREY, alpha=0.25, lw=0)
    axes.plot(levels, levels, color=GREY, lw=0.8)
    axes.plot(levels, share, color=BLUE, lw=1.4)
    axes.axvline(LEVEL, color=ORANGE, lw=0.8)
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xlabel="p-value", title=backbone)
    axes.set_ylabel(f"share of {n} natural maps at or below", color=INK)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="images that nothing was fitted on")
    parser.add_argument("--pipeline", default="tiny/convnext")
    parser.add_argument("--n-images", type=int, default=1000)
    parser.add_argument("--figure", type=Path, default=Path("outputs/scope.png"))
    arguments = parser.parse_args()
    inverter = load_inverter(arguments.pipeline)
    statistics, backbone = open_scope(inverter).natural, inverter.require_backbone()
    assert statistics is not None, "the pipeline has no statistics; fit them with featinv scope"
    images = open_images(arguments.data, "validation")
    pixels = read(images, arguments.n_images, max(backbone.input_size)).to(backbone.device)
    maps = look(backbone, pixels)
    natural = statistics.density.distance(maps)
    p_values = statistics.calibration.of_maps(natural)
    levels = ", ".join(
        f"{(p_values < a).double().mean():.3f} < {a}" for a in (0.01, 0.05, 0.1, 0.5)
    )
    print(f"{len(maps)} natural maps of {statistics.spec}; shares of p-values: {levels}.\n")
    print("| maps | AUROC | 95 % interval | p < 0.05 |\n|---|---|---|---|")
    generator = torch.Generator().manual_seed(0)
    for kind, edited in edited_maps(maps, generator):
        print_row(kind, edited, natural, statistics)
    for kind, foreign in foreign_images(pixels.cpu(), generator):
        print_row(kind, look(backbone, foreign.to(backbone.device)), natural, statistics)
    with mpl.rc_context({"font.size": 8}):
        n_calibration = len(statistics.calibration.distances)
        figure = draw_calibration(p_values, n_calibration, statistics.spec.backbone)
        write_figure(figure, arguments.figure)


if __name__ == "__main__":
    main()
