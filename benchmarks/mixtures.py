"""What mixing two feature maps costs: cosines by weight, and how local a pasted region stays.

    python benchmarks/mixtures.py --data validation.parquet --n-pairs 100

Pairs are random images of different classes; one sample of each map, all maps of a pair with the
same noise. Prints two markdown tables; intervals are 95 % bootstrap intervals over pairs.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np
import torch

from featinv_diffusion.data.selection import Item, select_items
from featinv_diffusion.data.sets import open_images
from featinv_diffusion.evaluation.settings import EvaluationSettings
from featinv_diffusion.features import box_mask
from featinv_diffusion.images import center_square, to_tensor
from featinv_diffusion.inverters.open import open_inverter
from featinv_diffusion.metrics import feature_cosine
from featinv_diffusion.metrics.statistics import bootstrap_mean
from featinv_diffusion.runs.sampling import backbone_of
from featinv_diffusion.settings import SampleSettings
from featinv_diffusion.studies.composition import compose
from featinv_diffusion.studies.interpolation import sample_mixtures
from featinv_diffusion.types import Features

WEIGHTS = (0.0, 0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9, 1.0)
BOX = (0.25, 0.25, 0.75, 0.75)


def draw_pairs(items: list[Item], n: int, seed: int) -> Iterator[tuple[Item, Item]]:
    """Yields pairs of images of different classes; no image comes twice."""
    order = np.random.default_rng(seed).permutation(len(items))
    left = [items[i] for i in order]
    for _ in range(n):
        first = left.pop()
        second = next(i for i in reversed(left) if i.label != first.label)
        left.remove(second)
        yield first, second


def interval(values: list[float]) -> str:
    mean = bootstrap_mean(np.array(values))
    return f"{mean.value:.3f} [{mean.low:.3f}, {mean.high:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--pipeline", default="tiny/convnext")
    parser.add_argument("--n-pairs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    settings = EvaluationSettings(data=arguments.data)
    images = open_images(arguments.data, settings.split, None)
    inverter, _ = open_inverter(SampleSettings(pipeline=arguments.pipeline))
    backbone = backbone_of(inverter)

    @torch.no_grad()
    def encode(item: Item) -> Features:
        square = center_square(images.read(item.index), max(backbone.input_size))
        return backbone.features(to_tensor(square).to(backbone.device))

    mask = box_mask(BOX, backbone.spec.grid)
    cosines: list[list[float]] = []
    natural: list[float] = []
    inside: list[float] = []
    outside: list[float] = []
    pasted: list[float] = []
    unpasted: list[float] = []
    pairs = list(
        draw_pairs(select_items(images, settings.chosen), arguments.n_pairs, arguments.seed)
    )
    for first, second in pairs:
        maps = encode(first), encode(second)
        natural.append(float(feature_cosine(*maps)))
        weights = [(weight, 1 - weight) for weight in WEIGHTS]
        cosines.append(sample_mixtures(inverter, maps, weights, [first.seed]).cosine[:, 0].tolist())
        composed = compose(inverter, *maps, mask, [first.seed])
        assert composed.change_inside is not None
        assert composed.change_outside is not None
        inside += composed.change_inside
        outside += composed.change_outside
        pasted += composed.cosine.tolist()
        unpasted += composed.cosine_before.tolist()

    table = np.array(cosines)
    ends = table[:, [0, -1]].mean(axis=1, keepdims=True)
    print(f"{arguments.pipeline}, {len(pairs)} pairs; cosine of the two maps {interval(natural)}\n")
    print("| weight of A | cosine to the mixed map | less than at the ends by |\n|---|---|---|")
    for weight, column, drop in zip(WEIGHTS, table.T, (ends - table).T, strict=True):
        print(f"| {weight:g} | {interval(column.tolist())} | {interval(drop.tolist())} |")
    lowest = np.array(WEIGHTS)[table.argmin(axis=1)]
    middle = (np.abs(lowest - 0.5) <= 0.1).astype(float).tolist()
    print(f"\nLowest at a weight of 0.4 … 0.6 for {interval(middle)} of the pairs.\n")
    share = [i / (i + o) for i, o in zip(inside, outside, strict=True)]
    print("| cells of B in the box " + ",".join(map(str, BOX)) + " | |\n|---|---|")
    print(f"| mean absolute change of RGB inside | {interval(inside)} |")
    print(f"| outside | {interval(outside)} |")
    print(f"| inside / (inside + outside), per pixel | {interval(share)} |")
    print(f"| cosine to the composed map | {interval(pasted)} |")
    print(f"| cosine of A's sample to A's map | {interval(unpasted)} |")


if __name__ == "__main__":
    main()
