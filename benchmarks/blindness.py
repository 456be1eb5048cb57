"""Planted blindness: what a backbone does not see must come out as invented.

    python benchmarks/blindness.py --data tiny-imagenet-200 --test validation.parquet

A sampler that was trained on what the whole backbone sees knows nothing of one that is blind, so
the posterior is taken without training: each cell of a sample is the patch of one of the 8 training
cells whose features are nearest, drawn at random. The features are those of the first stage of
tiny/convnext, whose cells see about 12 pixels, so that near in features is near in pixels: of the
whole picture, of the picture in grey, and of the picture without its upper left quadrant. Certainty
is calibrated on held-out training images and measured on validation images. Draws two photos.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from certainty import Judged, judge, to_plain, words
from pages import crops, table
from torch import Tensor, nn
from torch.nn import functional as F

from featinv_diffusion.backbones import Backbone, load_backbone, wrap_module
from featinv_diffusion.data.crops import split_held_back
from featinv_diffusion.data.selection import select_items
from featinv_diffusion.data.sets import ImageSet, open_images
from featinv_diffusion.features.pixel_operations import to_grey
from featinv_diffusion.figures import board as figures
from featinv_diffusion.figures.board import Board
from featinv_diffusion.images import center_square, to_tensor
from featinv_diffusion.inverters.base import Generators, Inverter
from featinv_diffusion.metrics.certainty import CertaintyModel
from featinv_diffusion.metrics.statistics import bootstrap_mean, bootstrap_statistic
from featinv_diffusion.runs.certainty import channel_scale, fit_certainty
from featinv_diffusion.runs.sampling import sample_each
from featinv_diffusion.seeds import derive_seed
from featinv_diffusion.settings import Selection
from featinv_diffusion.types import Features, Images

LAYER, K, N_SAMPLES, BATCH = "stages.0", 8, 8, 64
PARTS = ("luminance", "chroma", "cell_luminance", "cell_chroma")
HEADER = (
    "sees|part|upper left: determined|measured|lower right: determined|measured|coverage at .95"
)


def without_quadrant(images: Images) -> Images:
    h, w = (side // 2 for side in images.shape[2:])
    seen = torch.ones_like(images[:1, :1])
    seen[..., :h, :w] = 0
    return images * seen + 0.5 * (1 - seen)


SEES: dict[str, Callable[[Images], Images]] = {
    "all": lambda images: images,
    "grey only": to_grey,
    "three quadrants": without_quadrant,
}


class Blinded(nn.Module):
    """Features of what is left of the pictures."""

    def __init__(self, backbone: Backbone, blind: Callable[[Images], Images]):
        super().__init__()
        self.backbone, self.blind = backbone, blind

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone.features(self.blind(images))


class NeighbourInverter(Inverter):
    """Draws each cell of a picture from the k natural cells whose features are nearest.

    Args:
        maps, images: natural pictures and their features.
    """

    def __init__(self, backbone: Backbone, maps: Features, images: Images):
        self.backbone, self.spec, self.networks = backbone, backbone.spec, {}
        self.scale = channel_scale(maps)
        self.cells = self._to_cells(maps)
        self.norms = self.cells.square().sum(dim=1)
        side = images.shape[2] // maps.shape[2]
        patches = F.unfold(images, side, stride=side).transpose(1, 2)
        self.patches, self.size, self.side = patches.flatten(0, 1), images.shape[2:], side

    @property
    def is_deterministic(self) -> bool:
        return False

    def _to_cells(self, maps: Features) -> Tensor:
        return (maps / self.scale[:, None, None]).permute(0, 2, 3, 1).flatten(0, 2)

    def _invert(self, features: Features, generator: Generators) -> Images:
        assert isinstance(generator, Sequence)
        rows: list[Tensor] = []
        nearest = None
        for i, one in enumerate(generator):
            if nearest is None or not torch.equal(features[i], features[i - 1]):
                cells = self._to_cells(features[i : i + 1])
                distances = self.norms - 2 * cells @ self.cells.T
                nearest = distances.topk(K, largest=False).indices
            drawn = torch.randint(K, (len(nearest), 1), generator=one)
            rows.append(self.patches[nearest.gather(1, drawn)[:, 0]].T)
        return F.fold(torch.stack(rows), self.size, self.side, stride=self.side)


def read(images: ImageSet, indices: Sequence[int]) -> Images:
    return torch.cat([to_tensor(center_square(images.read(i), 64)) for i in indices])


@torch.no_grad()
def make_inverter(blind: Callable[[Images], Images], bank: Images, name: str) -> NeighbourInverter:
    backbone = wrap_module(
        Blinded(load_backbone("tiny/convnext", LAYER), blind),
        input_size=64,
        preprocess=lambda images: images,
        axes="NCHW",
        name=f"tiny/convnext that sees {name}",
    )
    maps = torch.cat([backbone.features(batch) for batch in bank.split(BATCH)])
    return NeighbourInverter(backbone, maps, bank)


@torch.no_grad()
def judge_all(inverter: Inverter, model: CertaintyModel, pictures: Images) -> list[Judged]:
    backbone = inverter.require_backbone()

    def drawn() -> Any:
        for i, image in enumerate(pictures.split(1)):
            maps = backbone.features(image)
            seeds = [derive_seed(i, j) for j in range(N_SAMPLES)]
            samples = sample_each(inverter, maps.expand(N_SAMPLES, -1, -1, -1), seeds)
            yield image, maps, samples, backbone.features(samples)

    return judge(model, drawn())


def inside(values: Tensor, is_blind: bool) -> Tensor:
    """Takes the upper left quadrant of a map, or the lower right one."""
    h, w = (side // 2 for side in values.shape)
    return values[:h, :w] if is_blind else values[h:, w:]


def measure(judged: list[Judged], part: str) -> dict[str, Any]:
    """Returns the determined and the measured share of both quadrants, and the coverage.

    Shares are of sums over all pictures, and may be below 0 where the mean of samples is worse than
    the mean of natural pictures.
    """
    found: dict[str, Any] = {}
    for name, is_blind in (("upper left", True), ("lower right", False)):
        columns: dict[str, list[float]] = {"expected": [], "made": [], "natural": []}
        for certainty, truth in judged:
            made = certainty.spread.distance(part, truth[part])
            values = (certainty.error[part].square(), made.square(), certainty.natural[part])
            for column, value in zip(columns.values(), values, strict=True):
                column.append(inside(value, is_blind).mean().item())
        found[name] = {
            label: bootstrap_statistic(columns, lambda m, key=key: 1 - m[key] / m["natural"])
            for label, key in (("determined", "expected"), ("measured", "made"))
        }
    held = [c.holds(part, truth[part], 0.95).double().mean().item() for c, truth in judged]
    return {**found, "coverage_0.95": bootstrap_mean(held)}


def draw(found: dict[str, list[Judged]], pictures: Images, path: Path) -> None:
    """Draws the photos, the mean of samples, and what is determined, for each of what is seen."""
    notes = ["Bright is determined by the features, dark is invented (share of natural variance)."]
    board = Board(
        len(pictures) * len(found), 4, "What a blind backbone leaves open", notes, right=0.8
    )
    figure = board.make()
    row = 0
    for i, picture in enumerate(pictures):
        for name, judged in found.items():
            certainty = judged[i][0]
            axes = [board.tile_axes(figure, row, column) for column in range(4)]
            figures.label(axes[0], f"sees {name}")
            figures.show_picture(axes[0], SEES[name](picture[None])[0])
            for one, part in zip(axes[1:3], ("luminance", "chroma"), strict=True):
                figures.label(one, {"luminance": "light", "chroma": "colour"}[part] + " determined")
                image = figures.show_map(one, certainty.determined(part), 0, 1)
                figures.caption(one, f"{certainty.share(part):.0%}")
            figures.label(axes[3], "original")
            figures.show_picture(axes[3], picture)
            figures.add_colour_bar(board, figure, row, image, "determined share")
            row += 1
    figures.write_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="Tiny-ImageNet-200 folder")
    parser.add_argument("--test", required=True, help="images that nothing was fitted on")
    parser.add_argument("--n-bank", type=int, default=300)
    parser.add_argument("--n-calibration", type=int, default=100)
    parser.add_argument("--n-images", type=int, default=60)
    parser.add_argument("--output", type=Path, default=Path("outputs/blindness"))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    training = open_images(arguments.data, "train", "configs/tiny/classes.txt")
    assert training.labels is not None
    fitted, _ = split_held_back(training.labels, 10)
    steps = np.linspace(0, len(fitted) - 1, arguments.n_bank).round().astype(int)
    bank = read(training, [fitted[i] for i in steps])
    items = select_items(
        training, Selection(n_images=arguments.n_calibration, held_back_per_class=10)
    )
    test = open_images(arguments.test, "validation")
    chosen = [i.index for i in select_items(test, Selection(n_images=arguments.n_images))]
    pictures = read(test, chosen)
    photos = torch.cat([to_tensor(photo) for _, photo in crops(1)])
    rows, results, shown = [], {}, {}
    for name, blind in SEES.items():
        inverter = make_inverter(blind, bank, name)
        calibration = fit_certainty(inverter, training, items, N_SAMPLES, BATCH)
        model = calibration.models[-1][1]
        judged = judge_all(inverter, model, pictures)
        shown[name] = judge_all(inverter, model, photos)
        results[name] = {part: measure(judged, part) for part in PARTS}
        for part, values in results[name].items():
            sides = [values[side] for side in ("upper left", "lower right")]
            cells = [words(side[key]) for side in sides for key in ("determined", "measured")]
            rows.append([name, part, *cells, f"{values['coverage_0.95'].value:.3f}"])
    print(table(HEADER, rows))
    (arguments.output / "metrics.json").write_text(json.dumps(results, default=to_plain, indent=2))
    draw(shown, photos, arguments.output / "blindness.png")


if __name__ == "__main__":
    main()
