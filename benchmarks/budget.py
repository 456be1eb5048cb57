"""What minutes buy for a backbone that the trunk never saw: agreement against time, start by start.

    OMP_NUM_THREADS=1 python benchmarks/budget.py --data tiny-imagenet-200

Each run has a schedule of its own to the end of its steps, so a point is what so many minutes buy,
not what a longer run had by then. Latents and features of the few training pictures are read once
for all runs of a seed, and that time is counted in each, as are loading, statistics, the regression
(`imitation`) and the steps. Runs that are done are not run again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from pages import table

from featinv_diffusion.figures.board import BLUE, GREEN, GREY, ORANGE, PURPLE, write_figure
from featinv_diffusion.files import write_text
from featinv_diffusion.training.config import NewBackboneSettings
from featinv_diffusion.training.controlnet import (
    ControlNetCacheConfig,
    ControlNetConfig,
    load_frozen_parts,
    train_controlnet,
)
from featinv_diffusion.training.imitation import ImitationConfig
from featinv_diffusion.training.new_backbone import (
    EPOCHS,
    assemble_new,
    evaluate_new,
    make_config,
)

SHOWN = {
    "cosine": "cosine",
    "cosine_of_another_image": "another image",
    "normalised": "of the way to 1",
    "centred_cosine": "centred cosine",
}


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Args:
        warm: from the trunk's weights, else from the UNet's, as published.
        imitates: whether the head is fitted to the trunk's own first.
        trained: key of `TRAINED`.
    """

    name: str
    warm: bool
    imitates: bool
    trained: str
    colour: str


STARTS = (
    Start("cold", False, False, "thawed", GREY),
    Start("warm", True, False, "thawed", GREEN),
    Start("regression, trunk frozen", True, True, "frozen", BLUE),
    Start("regression, trunk adapted", True, True, "adapted", PURPLE),
    Start("regression, trunk thawed", True, True, "thawed", ORANGE),
)


def configure(
    options: argparse.Namespace, start: Start, n_steps: int, seed: int, folder: Path
) -> ControlNetConfig:
    settings = NewBackboneSettings(
        data=options.data,
        trunk=options.trunk,
        trunk_is=start.trained,
        n_evaluated=options.n_evaluated,
        seed=seed,
    )
    config = make_config(options.backbone, settings, folder)
    warm = config.model.warm_start if start.warm else None
    n_imitated = options.n_imitated
    if options.n_imitated_per_step:
        n_imitated = min(n_imitated, options.n_imitated_per_step * n_steps)
    return replace(
        config,
        data=replace(config.data, hflip=False, num_workers=0, train_per_class=options.n_per_class),
        model=replace(config.model, warm_start=warm, statistics_images=256),
        imitation=ImitationConfig(
            options.trunk if start.imitates else None, n_imitated, options.imitation_epochs
        ),
        cache=ControlNetCacheConfig(str(options.output / f"latents-{seed}"), 1, features=True),
        optim=replace(
            config.optim,
            lr=options.lr or config.optim.lr,
            batch_size=options.batch_size or config.optim.batch_size,
            max_steps=n_steps,
            warmup_steps=n_steps // 10,
        ),
        run=replace(
            config.run,
            n_validation_images=2,
            validate_every=10**6,
            checkpoint_every=10**6,
            tracker="none",
        ),
    )


def read_once(options: argparse.Namespace, seed: int) -> float:
    """Fills the cache of a seed and returns the minutes; of an earlier call, those of then."""
    record = options.output / f"latents-{seed}" / "minutes.json"
    if not record.is_file():
        began = time.process_time()
        folder = options.output / f"cache-of-{seed}"
        train_controlnet(configure(options, STARTS[0], 1, seed, folder))
        write_text(record, json.dumps((time.process_time() - began) / 60))
    return json.loads(record.read_text())


def train_once(
    options: argparse.Namespace, start: Start, n_steps: int, seed: int, reading: float
) -> dict[str, float]:
    """Trains, evaluates and keeps the figures; returns them.

    Args:
        reading: minutes of `read_once`.
    """
    folder = options.output / f"{start.name.replace(' ', '-').replace(',', '')}-{n_steps}-{seed}"
    record = folder / "figures.json"
    if record.is_file():
        return json.loads(record.read_text())
    shutil.rmtree(folder, ignore_errors=True)
    config = configure(options, start, n_steps, seed, folder)
    began = time.process_time()
    final = train_controlnet(config)
    minutes = (time.process_time() - began) / 60
    pipeline = assemble_new(options.backbone, config, final, options.trunk)
    settings = NewBackboneSettings(n_evaluated=options.n_evaluated)  # the same noise for all
    figures = evaluate_new(pipeline, load_frozen_parts(config.model).backbone, config, settings)
    figures |= {
        "minutes": reading + minutes,
        "normalised": normalised(figures["cosine"], figures["cosine_of_another_image"]),
    }
    write_text(record, json.dumps(figures, indent=2) + "\n")
    return figures


def normalised(own: float, other: float) -> float:
    return (own - other) / (1 - other)


def draw(found: dict[tuple[str, int], list[dict[str, float]]], path: Path) -> None:
    figure = Figure(figsize=(5.2, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for start in STARTS:
        rows = [runs for (name, _), runs in sorted(found.items()) if name == start.name]
        x = [mean(run["minutes"] for run in runs) for runs in rows]
        y = [mean(run["normalised"] for run in runs) for runs in rows]
        axes.plot(x, y, "o-", color=start.colour, ms=3, lw=1.2, label=start.name)
        for runs in rows:
            points = [(run["minutes"], run["normalised"]) for run in runs]
            axes.plot(*zip(*points, strict=True), ".", color=start.colour, ms=3, alpha=0.5)
    axes.axhline(0, color=GREY, lw=0.8, ls=":")
    axes.set(xlabel="CPU minutes", ylabel="agreement, another image = 0")
    axes.legend(frameon=False, fontsize=7)
    write_figure(figure, path)


def spread(runs: Sequence[dict[str, float]], key: str, digits: int) -> str:
    values = [run[key] for run in runs]
    around = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{around}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", required=True, help="folder with train/CLASS/...")
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--trunk", default=NewBackboneSettings().trunk)
    parser.add_argument("--steps", type=int, nargs="+", default=[15, 60])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--n-per-class", type=int, default=12)
    parser.add_argument("--n-imitated", type=int, default=2400)
    parser.add_argument(
        "--n-imitated-per-step",
        type=int,
        help="fits the head of a short run to fewer images, so many for each step",
    )
    parser.add_argument("--imitation-epochs", type=int, default=EPOCHS)
    parser.add_argument(
        "--lr", type=float, help="learning rate; that of new-backbone where none is given"
    )
    parser.add_argument(
        "--batch-size", type=int, help="images per step; that of new-backbone where none is given"
    )
    names = [start.name for start in STARTS]
    parser.add_argument("--starts", nargs="+", choices=names, default=names)
    parser.add_argument("--n-evaluated", type=int, default=64)
    parser.add_argument("--output", type=Path, default=Path("outputs/budget"))
    parser.add_argument("--figure", type=Path, default=Path("outputs/budget/budget.png"))
    options = parser.parse_args()
    found: dict[tuple[str, int], list[dict[str, float]]] = defaultdict(list)
    for seed in range(options.seeds):
        reading = read_once(options, seed)
        for n_steps in options.steps:
            for start in (one for one in STARTS if one.name in options.starts):
                figures = train_once(options, start, n_steps, seed, reading)
                found[start.name, n_steps].append(figures)
        rows = [
            [name, str(n), spread(runs, "minutes", 1)] + [spread(runs, key, 3) for key in SHOWN]
            for (name, n), runs in found.items()
        ]
        print(table(f"start|steps|CPU minutes|{'|'.join(SHOWN.values())}", rows), flush=True)
        draw(found, options.figure)


if __name__ == "__main__":
    with mpl.rc_context({"font.size": 8}), torch.random.fork_rng():
        main()
