"""How well the scope score tells natural feature maps from others, and whether its p-values hold.

    OMP_NUM_THREADS=1 python benchmarks/scope.py --data validation.parquet --figure scope.png

Prints, for each way to make another map, the AUROC of natural maps against such maps with its 95 %
interval, and the share that p < 0.05 flags; of the map alone, and for `--n-joined` maps joined with
their reconstruction. Draws the p-values of natural maps against the uniform distribution. Images
must be others than those of calibration.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import gaussian_blur

from featinv_diffusion.backbones import Backbone
from featinv_diffusion.data.sets import ImageSet, open_images
from featinv_diffusion.features import interpolate, paste, permute_cells
from featinv_diffusion.features.natural_maps import LEVEL, NaturalMaps
from featinv_diffusion.figures.board import BLUE, GREY, INK, ORANGE, write_figure
from featinv_diffusion.images import center_square, to_tensor
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.inverters.open import load_inverter
from featinv_diffusion.metrics import feature_cosine
from featinv_diffusion.metrics.statistics import Interval, bootstrap_statistic
from featinv_diffusion.runs.sampling import sample_each
from featinv_diffusion.runs.scope import open_scope
from featinv_diffusion.seeds import derive_seed
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


def other_images(images: Images) -> Iterator[tuple[str, Images]]:
    """Yields images that people look at too, but that are no sharp photos."""
    size = images.shape[2:]
    yield "line drawings", line_drawings(images)
    for sigma in (0.7, 1.0):
        yield f"blurred, σ = {sigma:g} pixels", gaussian_blur(images, [7, 7], [sigma] * 2)
    for factor in (2, 4):
        small = F.avg_pool2d(images, factor)
        large = F.interpolate(small, size, mode="bilinear", align_corners=False)
        yield f"upscaled {factor} times", large


def line_drawings(images: Images) -> Images:
    """Draws the edges, black on white: the darker, the steeper the brightness is there."""
    across = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 8  # Sobel's
    grey = F.pad(images.mean(dim=1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    steepness = F.conv2d(grey, torch.stack([across, across.T])[:, None]).norm(dim=1, keepdim=True)
    black = steepness.flatten(1).quantile(0.9, dim=1).clamp(min=1e-3)
    return (1 - (steepness / black[:, None, None, None]).clamp(max=1)).expand_as(images)


def adversarial(backbone: Backbone, images: Images, radius: float = 2 / 255) -> Images:
    """Moves images away from their predicted class, by at most `radius` in each value.

    Four steps of projected gradient ascent on the cross-entropy (Madry et al. 2018).
    """
    with torch.no_grad():
        predicted = backbone.classify(images).argmax(dim=1)
    moved = images
    for _ in range(4):
        moved = moved.detach().requires_grad_()
        loss = F.cross_entropy(backbone.classify(moved), predicted)
        (gradient,) = torch.autograd.grad(loss, moved)
        moved = moved.detach() + radius / 2 * gradient.sign()
        moved = (images + (moved - images).clamp(-radius, radius)).clamp(0, 1)
    return moved


def steered(backbone: Backbone, maps: Features, targets: Tensor) -> Features:
    """Adds the same vector to all cells, just long enough that the target becomes the class.

    The direction is the gradient of the target's logit minus that of the class.
    """
    with torch.no_grad():
        classes = backbone.logits(maps).argmax(dim=1)
    added = torch.zeros(*maps.shape[:2], 1, 1, requires_grad=True)
    logits = backbone.logits(maps + added)
    rows = torch.arange(len(maps))
    (logits[rows, targets] - logits[rows, classes]).sum().backward()
    assert added.grad is not None
    direction = F.normalize(added.grad, dim=1)

    @torch.no_grad()
    def reached(length: Tensor) -> Tensor:
        found = backbone.logits(maps + length * direction).argmax(dim=1) == targets
        return found[:, None, None, None]

    high = torch.full((len(maps), 1, 1, 1), 2.0**-6)
    for _ in range(20):  # the shortest power of two that reaches it, for farther ones may not
        high = torch.where(reached(high), high, 2 * high)
    low = high / 2
    for _ in range(8):
        middle = (low + high) / 2
        there = reached(middle)
        low, high = torch.where(there, low, middle), torch.where(there, middle, high)
    return maps + high * direction


def blind_spots(
    backbone: Backbone, images: Images, maps: Features, generator: torch.Generator
) -> Iterator[tuple[str, Features]]:
    """Yields maps with small changes that matter: of the class, or of one cell."""
    moved = torch.cat([adversarial(backbone, batch) for batch in images.split(BATCH)])
    before, after = (classes_of(backbone, x) for x in (images, moved))
    flipped = (before != after).double().mean()
    yield f"adversarial images, 2/255 ({flipped:.0%} flip)", look(backbone, moved)
    with torch.no_grad():
        logits = torch.cat([backbone.logits(batch) for batch in maps.split(BATCH)])
    runner_up = logits.topk(2, dim=1).indices[:, 1]
    steps = torch.randint(1, logits.shape[1], (len(maps),), generator=generator)
    drawn = (logits.argmax(dim=1) + steps) % logits.shape[1]
    for name, targets in (("the second class", runner_up), ("a random class", drawn)):
        parts = zip(maps.split(BATCH), targets.split(BATCH), strict=True)
        moved = torch.cat([steered(backbone, *x) for x in parts])
        with torch.no_grad():
            flipped = backbone.logits(moved).argmax(dim=1) == targets
        yield f"steered until {name} wins ({flipped.double().mean():.0%} flip)", moved
    one = torch.zeros(len(maps), *maps.shape[2:], dtype=torch.bool)
    cells = torch.randint(one[0].numel(), (len(maps), 1), generator=generator)
    one.flatten(1).scatter_(1, cells, True)
    yield "one cell of B", paste(maps, maps.roll(-1, 0), one)


@torch.no_grad()
def classes_of(backbone: Backbone, images: Images) -> Tensor:
    return torch.cat([backbone.classify(batch).argmax(dim=1) for batch in images.split(BATCH)])


@torch.no_grad()
def look(backbone: Backbone, images: Images) -> Features:
    return torch.cat([backbone.features(batch).cpu() for batch in images.split(BATCH)])


def read(images: ImageSet, n_images: int, size: int, *, choosing: bool) -> Images:
    """Reads images at even steps, so that all classes come.

    Args:
        choosing: those on which the figures of a map were chosen, else as many of the others.
    """
    chosen = at_even_steps(np.arange(len(images)), n_images)
    if not choosing:
        chosen = at_even_steps(np.setdiff1d(np.arange(len(images)), chosen), n_images)
    squares = [center_square(images.read(int(i)), size) for i in chosen]
    return torch.cat([to_tensor(square) for square in squares])


def at_even_steps(indices: np.ndarray, n: int) -> np.ndarray:
    return indices[np.linspace(0, len(indices) - 1, min(n, len(indices))).round().astype(int)]


def auroc(natural: Tensor, others: Tensor) -> Interval:
    """Chance that another map scores higher than a natural one, with a bootstrap interval.

    Images are drawn anew; the figure of a draw is linear in the placements of both sides (DeLong,
    DeLong and Clarke-Pearson 1988).
    """
    wins = (others[:, None] > natural).double() + 0.5 * (others[:, None] == natural)
    placements = {"others": wins.mean(dim=1), "natural": wins.mean(dim=0)}
    value = wins.mean().item()
    return bootstrap_statistic(placements, lambda means: means["others"] + means["natural"] - value)


@dataclass(frozen=True, eq=False)
class Table:
    """Prints a row for each kind of maps.

    Args:
        natural: the natural maps.
        n_joined: how many maps of each kind are reconstructed too.
    """

    inverter: Inverter
    statistics: NaturalMaps
    natural: Features
    n_joined: int

    @cached_property
    def of_natural(self) -> list[tuple[Tensor, Tensor]]:
        return self._scores(self.natural)

    def print_head(self) -> None:
        names = ["maps", "AUROC", "p < 0.05", "AUROC, joined", "p < 0.05, joined"]
        print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")

    def print_row(self, kind: str, maps: Features) -> None:
        cells = [kind]
        for (natural, _), (scores, p_values) in zip(
            self.of_natural, self._scores(maps), strict=True
        ):
            found = auroc(natural, scores)
            cells.append(f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]")
            cells.append(f"{(p_values < LEVEL).double().mean().item():.1%}")
        print(f"| {' | '.join(cells)} |", flush=True)

    def _scores(self, maps: Features) -> list[tuple[Tensor, Tensor]]:
        """Returns scores, more for less natural, and p-values: of the maps alone, some joined."""
        calibration = self.statistics.calibration
        distances = self.statistics.density.distance(maps)
        found = [(distances, calibration.of_maps(distances))]
        if some := self.n_joined:
            cosines = self._cosines(maps[:some])
            joined = calibration.of_reconstructions(distances[:some], cosines)
            found.append((-joined, joined))
        return found

    @torch.no_grad()
    def _cosines(self, maps: Features) -> Tensor:
        backbone, found = self.inverter.require_backbone(), []
        for number, batch in enumerate(maps.split(BATCH)):
            seeds = [derive_seed(1, f"{number}-{i}", 0) for i in range(len(batch))]
            images = sample_each(self.inverter, batch, seeds)
            found.append(feature_cosine(batch, backbone.features(images)).cpu())
        return torch.cat(found)


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
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xlabel="scope p", title=backbone)
    axes.set_ylabel(f"share of {n} natural maps at or below", color=INK)
    return figure


def shares(p_values: Tensor) -> str:
    return ", ".join(f"{(p_values < a).double().mean():.3f} < {a}" for a in (0.01, 0.05, 0.1, 0.5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="images that nothing was fitted on")
    parser.add_argument("--pipeline", default="tiny/convnext")
    parser.add_argument("--n-images", type=int, default=1000)
    parser.add_argument(
        "--choosing", action="store_true", help="take the images that the figures were chosen on"
    )
    parser.add_argument(
        "--n-joined", type=int, default=300, help="maps of each kind to reconstruct"
    )
    parser.add_argument("--figure", type=Path, default=Path("outputs/scope.png"))
    arguments = parser.parse_args()
    inverter = load_inverter(arguments.pipeline)
    scope, backbone = open_scope(inverter), inverter.require_backbone()
    backbone.requires_grad_(False)
    statistics = scope.natural
    assert statistics is not None, "the pipeline has no statistics; fit them with featinv scope"
    assert scope.uses_cosines or not arguments.n_joined, "calibrate reconstructions, or join none"
    images = open_images(arguments.data, "validation")
    size = max(backbone.input_size)
    pixels = read(images, arguments.n_images, size, choosing=arguments.choosing)
    maps = look(backbone, pixels)
    table = Table(inverter, statistics, maps, arguments.n_joined)
    p_values = table.of_natural[0][1]
    print(f"{len(maps)} natural maps of {statistics.spec}")
    for name, (_, found) in zip(("map alone", "joined"), table.of_natural, strict=False):
        print(f"Shares of {len(found)} p-values, {name}: {shares(found)}.")
    print()
    table.print_head()
    generator = torch.Generator().manual_seed(0)
    for kind, edited in edited_maps(maps, generator):
        table.print_row(kind, edited)
    for kind, foreign in chain(foreign_images(pixels, generator), other_images(pixels)):
        table.print_row(kind, look(backbone, foreign))
    for kind, changed in blind_spots(backbone, pixels, maps, generator):
        table.print_row(kind, changed)
    with mpl.rc_context({"font.size": 8}):
        n_calibration = len(statistics.calibration.distances)
        figure = draw_calibration(p_values, n_calibration, statistics.spec.backbone)
        write_figure(figure, arguments.figure)


if __name__ == "__main__":
    main()
