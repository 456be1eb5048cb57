"""Whether certainty keeps its word: coverage of its intervals, and rank correlation with the error.

    OMP_NUM_THREADS=1 python benchmarks/certainty.py --data validation.parquet --n-images 300

Judges samples of held-out pictures by the calibration in the pipeline, and compares with the true
pixels and the true features of cells. Shares and correlations are means over pictures with 95 %
intervals. Samples are kept in the output folder, so that a run goes on where it was stopped. Images
must be others than those of calibration. Prints tables and writes JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pages import crops, table
from scipy.stats import spearmanr
from torch import Tensor

from featinv_diffusion.data.selection import Item, select_items
from featinv_diffusion.data.sets import ImageSet, open_images
from featinv_diffusion.images import center_square, to_tensor, write_png
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.inverters.open import load_inverter
from featinv_diffusion.metrics.certainty import LEVELS, PARTS, Certainty, to_parts
from featinv_diffusion.metrics.statistics import Interval, bootstrap_mean
from featinv_diffusion.runs.certainty import CertaintyModel, open_certainty
from featinv_diffusion.runs.samples import sample
from featinv_diffusion.runs.sampling import sample_maps
from featinv_diffusion.seeds import derive_seed
from featinv_diffusion.settings import Selection
from featinv_diffusion.types import Features, Images

Judged = tuple[Certainty, dict[str, Tensor]]
BATCH = 8


@torch.no_grad()
def samples_of(
    inverter: Inverter, images: ImageSet, item: Item, n_samples: int, folder: Path
) -> tuple[Images, Features, Images, Features]:
    """Returns a picture, its map, its samples and their maps; samples are read where they lie."""
    backbone, kept = inverter.require_backbone(), folder / f"{item.index}.npz"
    square = to_tensor(center_square(images.read(item.index), max(backbone.input_size)))
    maps = backbone.features(square.to(backbone.device))
    if not kept.is_file():
        seeds = [derive_seed(0, images.noise_name(item.index), j) for j in range(n_samples)]
        batches = sample_maps(inverter, ((maps[0], seed) for seed in seeds), BATCH)
        made = torch.cat([batch.images for batch in batches])
        np.savez(folder / "part.npz", images=(made * 255).round().byte().numpy())
        (folder / "part.npz").replace(kept)
    drawn = torch.from_numpy(np.load(kept)["images"][:n_samples]).float() / 255
    return square, maps.cpu(), drawn, backbone.features(drawn.to(backbone.device)).cpu()


def judge(
    model: CertaintyModel, pictures: Iterator[tuple[Images, Features, Images, Features]]
) -> list[Judged]:
    """Returns the certainty of each picture beside the truth."""
    found = []
    for image, maps, drawn, seen in pictures:
        truth = {part: values[0] for part, values in to_parts(image, maps, model.scale).items()}
        found.append((model.judge(drawn, seen), truth))
    return found


def measure(judged: list[Judged], part: str) -> dict[str, Interval | float]:
    """Returns coverage, rank correlations, and expected beside measured error of a part.

    `rank_all_if_normal` is `rank_all` with normal errors of just the expected sizes: even then it
    is below 1, for one error says little about the size that was to be expected.
    """
    error = [certainty.error[part].flatten() for certainty, _ in judged]
    made = [c.spread.distance(part, truth[part]).flatten() for c, truth in judged]
    spread = [c.spread.variance[part].flatten() for c, _ in judged]
    squares = torch.stack(made).square()
    natural = torch.stack([c.natural[part].flatten() for c, _ in judged])
    found: dict[str, Interval | float] = {
        f"coverage_{level:g}": bootstrap_mean(
            [c.holds(part, truth[part], level).double().mean().item() for c, truth in judged]
        )
        for level in LEVELS
    }
    pairs = list(zip(error, made, strict=True))
    every = torch.cat(error)
    noise = torch.randn(judged[0][1][part].shape[0], len(every), dtype=every.dtype).square()
    return {
        **found,
        "rank_within": bootstrap_mean([spearmanr(u, e).statistic for u, e in pairs]),
        "rank_all": spearmanr(every, torch.cat(made)).statistic,
        "rank_all_if_normal": spearmanr(every, every * noise.mean(dim=0).sqrt()).statistic,
        "rank_pictures": spearmanr(
            torch.stack(error).square().mean(dim=1), squares.mean(dim=1)
        ).statistic,
        "rank_all_of_spread": spearmanr(torch.cat(spread), torch.cat(made)).statistic,
        "expected_error": torch.stack(error).square().mean().sqrt().item(),
        "measured_error": squares.mean().sqrt().item(),
        "spread_alone": (torch.stack(spread).mean() / judged[0][0].n_samples).sqrt().item(),
        "determined_share": bootstrap_mean([c.share(part) for c, _ in judged]),
        "measured_share": 1 - (squares.sum() / natural.sum()).item(),
    }


def words(value: Interval | float) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value.value:.3f} [{value.low:.3f}, {value.high:.3f}]"


def print_tables(found: dict[str, dict[str, Interval | float]]) -> None:
    coverage = [f"coverage_{level:g}" for level in LEVELS]
    ranks = ["rank_all", "rank_all_if_normal", "rank_all_of_spread", "rank_within", "rank_pictures"]
    errors = ["expected_error", "measured_error", "spread_alone"]
    shares = ["determined_share", "measured_share"]
    for names in (coverage, ranks, errors, shares):
        rows = [[part, *(words(values[name]) for name in names)] for part, values in found.items()]
        print(table("|".join(["part", *names]), rows), end="\n\n")


def to_plain(value: Any) -> Any:
    return vars(value) if isinstance(value, Interval) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="images that nothing was fitted on")
    parser.add_argument("--pipeline", default="tiny/convnext")
    parser.add_argument("--quality", default="standard")
    parser.add_argument("--n-images", type=int, default=300)
    parser.add_argument("--n-samples", type=int, default=4)
    parser.add_argument("--figure", type=Path, help="draw crops of two photos there, and stop")
    parser.add_argument("--output", type=Path, default=Path("outputs/certainty"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    inverter = load_inverter(arguments.pipeline, quality=arguments.quality)
    if arguments.figure is not None:
        maps = inverter.encode([photo for _, photo in crops(1)])
        names = [name for name, _ in crops(1)]
        drawn = sample(inverter, maps, names=names, n_samples=arguments.n_samples, certainty=True)
        write_png(drawn.figure(), arguments.figure)
        return
    found = open_certainty(inverter)
    model = found.model_for(arguments.n_samples)
    assert model is not None, found.note(arguments.n_samples)
    images = open_images(arguments.data, "validation")
    items = select_items(images, Selection(n_images=arguments.n_images))
    folder = arguments.output / f"{arguments.pipeline.replace('/', '_')}-{arguments.quality}"
    folder.mkdir(parents=True, exist_ok=True)
    pictures = (samples_of(inverter, images, item, model.n_samples, folder) for item in items)
    judged = judge(model, pictures)
    measured = {part: measure(judged, part) for part in PARTS}
    print(
        f"{len(judged)} pictures, {model.n_samples} samples of quality {arguments.quality};", end=""
    )
    print(f" calibrated on {model.n_images} other pictures.\n")
    print_tables(measured)
    (folder / "metrics.json").write_text(json.dumps(measured, default=to_plain, indent=2))


if __name__ == "__main__":
    main()
