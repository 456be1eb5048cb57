"""Modular inversion against classical inversion, at the same number of steps.

Source: the follow-up "Understanding Transformer-based Vision Models through Inversion": modular
inversion trains one small module for each stage, classical inversion a whole network for each.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from featinv_diffusion.figures.board import draw_grid
from featinv_diffusion.inverters.blocks import InverseModule
from featinv_diffusion.inverters.chain import Chain
from featinv_diffusion.inverters.modular import ModularInverter
from featinv_diffusion.inverters.path import IMAGE, ForwardPath
from featinv_diffusion.metrics.statistics import bootstrap_difference, bootstrap_mean
from featinv_diffusion.papers.base import Answer, Finding, Request, cell
from featinv_diffusion.seeds import make_generator
from featinv_diffusion.studies.stages import open_modular
from featinv_diffusion.studies.study import to_dicts
from featinv_diffusion.types import Images

N_DEFAULT, EPOCHS, LEARNING_RATE = 600, 8, 1e-3
STATISTICS = ("input_mean", "input_std", "output_mean", "output_std", "position_table")
"""What the bundled modules know of the frozen model; all else is drawn anew."""


@dataclass(frozen=True, eq=False)
class Trained:
    """A way to invert a stage, after training.

    Args:
        n_parameters: that were trained for this stage.
        seconds: of its training.
    """

    chain: Chain
    n_parameters: int
    seconds: float


def make_modules(inverter: ModularInverter, stage: str) -> list[InverseModule]:
    """Returns the modules from a stage to the image with random weights.

    The statistics of the embeddings, which are no weights, are those of the bundled modules.
    """
    made = []
    for module in inverter.chain(stage).modules:
        fresh = type(module).from_config(module.config)
        assert isinstance(fresh, InverseModule)
        known = module.state_dict()
        fresh.load_state_dict({k: known[k] for k in STATISTICS if k in known}, strict=False)
        made.append(fresh.train())
    return made


def measure_cost(request: Request) -> Finding:
    """Trains modules on their own, and whole chains on pixels, for the stages of one model."""
    inverter = open_modular(request.settings.models("vit")[0])
    pictures = request.pictures(N_DEFAULT, max(inverter.path.input_size))
    n = max(1, len(pictures) // 2)
    fit, held = pictures.images[:n], pictures.images[n:]
    # Names of one stage may share a module; of these only those with a way of their own count.
    stages = [s for s in inverter.path.main_stages if s in inverter.inverses.chainable()]
    inner = [s for s in inverter.inverses.chainable() if s.startswith("blocks.")]
    stages = sorted({*stages, *inner}, key=list(inverter.path.specs).index)
    batch = min(request.settings.batch_size, n)
    torch_state = torch.get_rng_state()
    torch.manual_seed(request.settings.seed)
    try:
        modular = _train_modular(inverter, stages, fit, batch, request.settings.seed)
        classical = {
            stage: _train_chain(inverter, stage, fit, batch, request.settings.seed)
            for stage in stages
        }
    finally:
        torch.set_rng_state(torch_state)
    ways = {"modular": modular, "classical": classical}
    found = {
        way: {stage: _invert(inverter, one.chain, stage, held, batch) for stage, one in by.items()}
        for way, by in ways.items()
    }
    errors = {
        way: {s: (x - held).square().mean(dim=(1, 2, 3)) for s, x in by.items()}
        for way, by in found.items()
    }
    mse = {w: {s: bootstrap_mean(v) for s, v in by.items()} for w, by in errors.items()}
    gaps = {s: bootstrap_difference(errors["modular"][s], errors["classical"][s]) for s in stages}
    totals = {
        way: (sum(one.n_parameters for one in by.values()), sum(one.seconds for one in by.values()))
        for way, by in ways.items()
    }
    ratio = totals["classical"][1] / max(totals["modular"][1], 1e-9)
    listed = ", ".join(
        f"{s} {mse['modular'][s].value:.4f} and {mse['classical'][s].value:.4f}" for s in stages
    )
    answers = {
        "vit-cost": Answer(
            f"parameters {totals['modular'][0] / 1e6:.2f} M and "
            f"{totals['classical'][0] / 1e6:.2f} M, time of training 1 and {ratio:.1f}; MSE at "
            f"equal steps, modular and classical: {listed}",
            totals["modular"][0] < totals["classical"][0] and ratio > 1,
        )
    }
    rows = [
        [
            stage,
            *(f"{ways[w][stage].n_parameters / 1e6:.2f}" for w in ways),
            *(f"{ways[w][stage].seconds:.1f}" for w in ways),
            *(cell(mse[w][stage], 4) for w in ways),
            cell(gaps[stage], 4),
        ]
        for stage in stages
    ]
    header = (
        "stage",
        "M parameters, modular",
        "classical",
        "s of training, modular",
        "classical",
        "MSE, modular",
        "classical",
        "difference",
    )
    columns: dict[str, Images] = {"original": held}
    columns |= {f"{w}: {s}": x for w, by in found.items() for s, x in by.items()}
    note = f"{EPOCHS} epochs of {n} images from random weights, batches of {batch}."
    drawn = {"pictures.png": draw_grid(columns, "Modular and classical inversion", [note], 4)}
    metrics = {
        "mse": {w: to_dicts(by) for w, by in mse.items()},
        "parameters": {w: {s: one.n_parameters for s, one in by.items()} for w, by in ways.items()},
        "seconds": {w: {s: one.seconds for s, one in by.items()} for w, by in ways.items()},
        "epochs": EPOCHS,
        "n_fitted_on": n,
    }
    return Finding(answers, [("Cost", header, rows)], drawn, metrics, pictures.ids, [note])


def _train_modular(
    inverter: ModularInverter, stages: Sequence[str], images: Images, batch: int, seed: int
) -> dict[str, Trained]:
    """Trains each module against the embedding that it writes; chains share modules."""
    modules: dict[str, InverseModule] = {}
    spent: dict[str, float] = {}
    for stage in stages:
        for module in make_modules(inverter, stage):
            name = module.reads.layer
            if name not in modules:
                spent[name] = fit_modules(inverter.path, [module], images, batch, seed)
                modules[name] = module
    trained, seen = {}, set()
    for stage in stages:
        names = [module.reads.layer for module in inverter.chain(stage).modules]
        new = [name for name in names if name not in seen]
        seen |= set(new)
        chain = Chain([modules[name] for name in names], inverter.path)
        trained[stage] = Trained(
            chain, sum(_count(modules[name]) for name in new), sum(spent[name] for name in new)
        )
    return trained


def _train_chain(
    inverter: ModularInverter, stage: str, images: Images, batch: int, seed: int
) -> Trained:
    """Trains all modules of a chain together, on pixels alone."""
    modules = make_modules(inverter, stage)
    seconds = fit_modules(inverter.path, modules, images, batch, seed)
    return Trained(Chain(modules, inverter.path), sum(map(_count, modules)), seconds)


def fit_modules(
    path: ForwardPath,
    modules: Sequence[InverseModule],
    images: Images,
    batch: int,
    seed: int,
) -> float:
    """Trains modules in a row on the squared error of what the last one writes; returns seconds.

    On a CPU they are those that the process computed, which a busy machine does not lengthen.
    """
    clock = time.process_time if path.device.type == "cpu" else time.perf_counter
    last = modules[-1]
    reads, writes = modules[0].reads.layer, last.writes.layer
    parameters = [p for module in modules for p in module.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE)
    generator = make_generator(seed, "cost")
    begin = clock()
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(images), generator=generator).split(batch):
            with torch.no_grad():
                wanted = [reads] if writes == IMAGE else [reads, writes]
                found = path.embeddings(images[rows], wanted)
            state: Tensor = found[reads]
            for module in modules:
                state = module(state)
            target = images[rows] if writes == IMAGE else found[writes]
            scale = 1.0 if writes == IMAGE else float(target.var())
            loss = (state - target).square().mean() / max(scale, 1e-12)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
    return clock() - begin


@torch.no_grad()
def _invert(
    inverter: ModularInverter, chain: Chain, stage: str, images: Images, batch: int
) -> Images:
    parts = [
        chain.invert(inverter.path.embeddings(x, [stage])[stage]).cpu() for x in images.split(batch)
    ]
    return torch.cat(parts)


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
