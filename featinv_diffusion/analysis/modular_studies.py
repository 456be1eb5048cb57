"""`stages`, `layers`, `colour` and `tradeoff`: each writes figures and returns its figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featinv_diffusion.analysis.colour import COMPARED, FILTERS, pairwise_mse, recolour
from featinv_diffusion.analysis.intermediate import invert_states, matching_states
from featinv_diffusion.analysis.modular_figures import write_bars, write_grid, write_tradeoff
from featinv_diffusion.analysis.picture_set import PictureSet
from featinv_diffusion.analysis.stages import (
    AVERAGE,
    invert_patch_embedding,
    reconstruct_stages,
    stage_mse,
)
from featinv_diffusion.analysis.tradeoff import (
    detection_scores,
    measure_tradeoff,
    read_weight,
)
from featinv_diffusion.errors import InputError
from featinv_diffusion.inverters.detr_path import DetrPath
from featinv_diffusion.inverters.modular import ModularInverter, load_modular
from featinv_diffusion.inverters.vit_path import VitPath
from featinv_diffusion.metrics.statistics import bootstrap_mean

MSE = "MSE of pixels in [0, 1], 95 % interval"
PAIRWISE = "MSE between two versions, 95 % interval"

Study = Callable[[Sequence[str], PictureSet, Path], dict[str, Any]]


def study_stages(names: Sequence[str], pictures: PictureSet, folder: Path) -> dict[str, Any]:
    """MSE of the reconstruction from every stage that has an inverse, beside the average image."""
    inverter = _only(names)
    stages = [s for s in inverter.path.specs if s in inverter.inverses.chainable()]
    found = reconstruct_stages(inverter, pictures.images, stages)
    intervals = {name: bootstrap_mean(v) for name, v in stage_mse(found, pictures.images).items()}
    baseline = (AVERAGE, intervals[AVERAGE])
    bars = {stage: intervals[stage] for stage in stages}
    title = f"Reconstruction from the stages of {inverter.path.name}"
    write_bars(bars, folder / "stage_mse.png", title, MSE, baseline)
    notes = [_note(pictures)]
    columns = {"original": pictures.images, **found}
    write_grid(columns, folder / "stages.png", title, notes)
    metrics: dict[str, Any] = {"stage_mse": _to_dicts(intervals)}
    if isinstance(inverter.path, VitPath) and inverter.path.embeds_linearly:
        few = pictures.images[:8]
        metrics["patch_embedding"] = invert_patch_embedding(inverter.path, few)
    return metrics


def study_layers(names: Sequence[str], pictures: PictureSet, folder: Path) -> dict[str, Any]:
    """States within the stages through every inverse whose shape they have."""
    inverter = _only(names)
    metrics: dict[str, Any] = {}
    for stage in inverter.inverses.chainable():
        states = matching_states(inverter, stage)
        if len(states) < 2:
            continue
        found = invert_states(inverter, pictures.images, stage, states)
        errors = stage_mse(found, pictures.images)
        metrics[stage] = _to_dicts({name: bootstrap_mean(v) for name, v in errors.items()})
        title = f"States of {inverter.path.name} through the inverse of {stage!r}"
        columns = {"original": pictures.images, **found}
        write_grid(columns, folder / f"layers-{stage}.png", title, [_note(pictures)], n_rows=4)
    return {"layer_mse": metrics}


def study_colour(names: Sequence[str], pictures: PictureSet, folder: Path) -> dict[str, Any]:
    """Differences between recoloured versions, in the input and from each stage."""
    inverter = _only(names)
    stages = [s for s in inverter.path.main_stages if s in inverter.inverses.chainable()]
    versions = {name: recolour(pictures.images, pictures.inside, name) for name in FILTERS}
    found = {name: reconstruct_stages(inverter, v, stages) for name, v in versions.items()}
    table: dict[str, dict[str, Tensor]] = {"input": versions}
    table |= {stage: {name: found[name][stage] for name in FILTERS} for stage in stages}
    intervals = {
        stage: bootstrap_mean(pairwise_mse({name: row[name] for name in COMPARED}))
        for stage, row in table.items()
    }
    title = f"Recoloured objects through {inverter.path.name}"
    write_bars(intervals, folder / "pairwise_mse.png", title, PAIRWISE)
    for i in range(min(4, len(pictures))):
        rows = {name: _column(table, name, i) for name in FILTERS}
        note = "Rows: input, " + ", ".join(stages) + "."
        write_grid(rows, folder / f"colour-{i}.png", title, [note])
    metrics: dict[str, Any] = {"pairwise_mse": _to_dicts(intervals)}
    if isinstance(inverter.path, DetrPath) and pictures.objects is not None:
        metrics["detection"] = {
            name: detection_scores(inverter, pictures, v) for name, v in versions.items()
        }
    return metrics


def study_tradeoff(names: Sequence[str], pictures: PictureSet, folder: Path) -> dict[str, Any]:
    """MSE and average precision of detectors that were tuned with several λ."""
    points = [measure_tradeoff(load_modular(n), pictures, read_weight(n)) for n in names]
    points.sort(key=lambda point: -1.0 if point.weight is None else point.weight)
    mse = [bootstrap_mean(point.mse) for point in points]
    labels = [point.name for point in points]
    write_tradeoff(labels, mse, [p.scores["ap"] for p in points], folder / "tradeoff.png")
    columns = {"original": pictures.images}
    columns |= {point.name: point.reconstructions for point in points}
    title = "Reconstructions from the decoder of detectors tuned for both"
    write_grid(columns, folder / "reconstructions.png", title, [_note(pictures)])
    rows = [
        {"weight": point.weight, "mse": asdict(value), **point.scores}
        for point, value in zip(points, mse, strict=True)
    ]
    return {"tradeoff": rows}


STUDIES: dict[str, Study] = {
    "stages": study_stages,
    "layers": study_layers,
    "colour": study_colour,
    "tradeoff": study_tradeoff,
}
"""By the name on the command line; each takes inverters, pictures and a folder for figures."""


def _only(names: Sequence[str]) -> ModularInverter:
    if len(names) != 1:
        raise InputError(f"This analysis takes one --inverter, but {len(names)} came.")
    return load_modular(names[0])


def _to_dicts(intervals: dict[str, Any]) -> dict[str, Any]:
    return {name: asdict(interval) for name, interval in intervals.items()}


def _column(table: dict[str, dict[str, Tensor]], name: str, i: int) -> Tensor:
    return torch.stack([row[name][i] for row in table.values()])


def _note(pictures: PictureSet) -> str:
    height, width = pictures.images.shape[-2:]
    return f"Of {len(pictures)} images at {height}×{width} pixels."
