"""States within stages: figures 9 and 14 of the DETR text, and how alike layers are.

Source: "Inverting Visual Representations with Detection Transformers", section 4.4; centred kernel
alignment: Kornblith et al. 2019, equation 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from featinv_diffusion.figures import board as figures
from featinv_diffusion.figures.board import TEXT, plain_figure
from featinv_diffusion.inverters.modular import ModularInverter
from featinv_diffusion.metrics.statistics import Interval, bootstrap_difference, bootstrap_mean
from featinv_diffusion.papers.base import Answer, Finding, Request, cell
from featinv_diffusion.papers.stages import open_detr
from featinv_diffusion.studies.stages import (
    AVERAGE,
    PictureSet,
    invert_states,
    matching_states,
    stage_mse,
)
from featinv_diffusion.studies.study import to_dicts
from featinv_diffusion.types import Images

MAX_ROWS = 4096
"""Cells or queries of which layers are compared."""


def measure_layers_of_detr(request: Request) -> Finding:
    """Measures states through the inverses that fit them, and how alike states are."""
    inverter = open_detr(request)
    pictures = request.staged(inverter.path.input_size)
    rows: list[list[str]] = []
    drawn: dict[str, Figure] = {}
    metrics: dict[str, Any] = {}
    moved: list[str] = []
    others_worse: list[Interval] = []
    for stage in ("backbone", "encoder", "decoder"):
        if stage not in inverter.inverses.chainable():
            continue
        states = matching_states(inverter, stage)
        found = invert_states(inverter, pictures.images, stage, states, request.settings.batch_size)
        errors = stage_mse(found, pictures.images)
        mse = {name: bootstrap_mean(values) for name, values in errors.items()}
        metrics[stage] = to_dicts(mse)
        rows += [[f"{stage}⁻¹", name, cell(mse[name], 4)] for name in (*states, AVERAGE)]
        others = [name for name in states if name != stage]
        worse = [bootstrap_difference(errors[name], errors[stage]) for name in others]
        others_worse += worse
        moved += [f"{stage}⁻¹ {mse[stage].value:.3f}"]
        drawn[f"layers-{stage}.png"] = figures.draw_grid(
            {"original": pictures.images, **found},
            f"States of {inverter.path.name} through the inverse of {stage!r}",
            [f"Of {len(pictures)} images."],
            n_rows=4,
        )
    alike = {
        name: compare_layers(inverter, pictures, states, request.settings.batch_size)
        for name, states in _families(inverter).items()
    }
    for name, (states, kernel, cosine) in alike.items():
        drawn[f"alike-{name}.png"] = _draw(name, states, kernel, cosine)
        metrics[f"alike_{name}"] = {
            "states": states,
            "cka": kernel.tolist(),
            "cosine": cosine.tolist(),
        }
    gradual = all(_is_gradual(kernel) for _, kernel, _ in alike.values())
    steps = [
        f"{name} {min(_neighbours(kernel)):.2f} … {max(_neighbours(kernel)):.2f}, ends "
        f"{float(kernel[0, -1]):.2f}"
        for name, (_, kernel, _) in alike.items()
    ]
    best = all(one.value > 0 for one in others_worse)
    sentence = (
        f"MSE at the own state {', '.join(moved)}; of {len(others_worse)} other states "
        f"{sum(one.value > 0 for one in others_worse)} are worse, "
        f"{sum(one.low > 0 for one in others_worse)} of them beyond the interval"
    )
    answers = {
        "detr-figure-9": Answer(sentence, best),
        "detr-figure-14": Answer(sentence, best),
        "detr-layer-correlation": Answer(f"CKA of neighbours: {'; '.join(steps)}", gradual),
    }
    tables: list[Any] = [("MSE of states", ("inverse", "state", "MSE"), rows)]
    for name, (states, kernel, cosine) in alike.items():
        for what, values in (("CKA", kernel), ("Cosine of the same cell", cosine)):
            tables.append(
                (
                    f"{what}, {name}",
                    ("state", *states),
                    [
                        [s, *(f"{v:.2f}" for v in row)]
                        for s, row in zip(states, values, strict=True)
                    ],
                )
            )
    return Finding(answers, tables, drawn, metrics, pictures.ids)


def _families(inverter: ModularInverter) -> dict[str, list[str]]:
    """Returns the states that may be compared, those of the encoder and of the decoder."""
    return {
        "encoder": matching_states(inverter, "encoder"),
        "decoder": [s for s in matching_states(inverter, "decoder") if s != "decoder.0"],
    }


@torch.no_grad()
def compare_layers(
    inverter: ModularInverter, pictures: PictureSet, states: Sequence[str], batch_size: int
) -> tuple[list[str], Float[Tensor, "n n"], Float[Tensor, "n n"]]:
    """Returns the states, their linear CKA, and the mean cosine of the same cell or query."""
    parts: dict[str, list[Tensor]] = {state: [] for state in states}
    per_image = max(1, MAX_ROWS // len(pictures))
    for batch in pictures.images.split(batch_size):
        found = inverter.path.embeddings(batch.to(inverter.path.device), list(states))
        for state in states:
            parts[state].append(_cells(found[state], per_image).cpu())
    vectors = [torch.cat(parts[state]).double() for state in states]
    kernel = torch.tensor([[linear_cka(a, b) for b in vectors] for a in vectors])
    cosine = torch.tensor(
        [[float(torch.cosine_similarity(a, b, dim=1).mean()) for b in vectors] for a in vectors]
    )
    return list(states), kernel, cosine


def _cells(state: Tensor, n: int) -> Float[Tensor, "rows c"]:
    """Returns the first cells of each image, spread over it."""
    sequence = state.flatten(2).transpose(1, 2) if state.ndim == 4 else state
    places = torch.linspace(0, sequence.shape[1] - 1, min(n, sequence.shape[1])).long()
    return sequence[:, places].flatten(0, 1)


def linear_cka(a: Float[Tensor, "n c"], b: Float[Tensor, "n d"]) -> float:
    """Returns ‖AᵀB‖² / (‖AᵀA‖ ‖BᵀB‖) of centred columns, in [0, 1].

    It is 1 for two sets that differ by a rotation and a factor, and 0 for one that is constant.
    """
    a, b = a - a.mean(0), b - b.mean(0)
    norms = (a.T @ a).norm() * (b.T @ b).norm()
    return float((a.T @ b).norm() ** 2 / norms) if norms > 0 else 0.0


def _neighbours(kernel: Tensor) -> list[float]:
    return kernel.diagonal(1).tolist()


def _is_gradual(kernel: Tensor) -> bool:
    """Whether every two neighbours are more alike than the first and the last."""
    return len(kernel) < 3 or min(_neighbours(kernel)) > float(kernel[0, -1])


def _draw(name: str, states: Sequence[str], kernel: Tensor, cosine: Tensor) -> Figure:
    """Draws both matrices side by side."""
    figure, axes = plain_figure(6.4, 3.2)
    axes.remove()
    for place, (title, values) in enumerate({"CKA": kernel, "cosine": cosine}.items(), start=1):
        panel = figure.add_subplot(1, 2, place)
        image = panel.imshow(values.numpy(), cmap=figures.HEAT, vmin=0, vmax=1)
        panel.set_xticks(range(len(states)), states, rotation=60, fontsize=TEXT)
        panel.set_yticks(range(len(states)), states, fontsize=TEXT)
        panel.set_title(f"{title}, {name}", fontsize=TEXT)
        for i, row in enumerate(values.tolist()):
            for j, value in enumerate(row):
                colour = "black" if value > 0.6 else "white"
                panel.text(j, i, f"{value:.2f}", ha="center", va="center", size=6, color=colour)
        figure.colorbar(image, ax=panel, shrink=0.7)
    return figure


# ---- Contextual shape: figure 11 -----------------------------------------------------------------


def shape_correlation(
    found: Images, others: Float[Tensor, "b 3 height width"]
) -> Float[Tensor, " b"]:
    """Returns the correlation over pixels of lightness, the mean of R, G and B, in [-1, 1]."""
    a, b = found.mean(1).flatten(1), others.mean(1).flatten(1)
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp_min(1e-9)


def show(value: Interval) -> str:
    """Returns an interval with two digits."""
    return cell(value, 2)
