"""Strength and guidance of each backbone, and the choice: appendix A.2 of FeatInv."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from featinv_diffusion.figures import board as figures
from featinv_diffusion.figures.board import TEXT, plain_figure
from featinv_diffusion.metrics import top_k_match
from featinv_diffusion.papers.base import Answer, Finding, Request
from featinv_diffusion.papers.reconstruction import (
    MEMBERS,
    POOLED,
    correlation,
    draw_samples,
    features_of,
    open_pipeline,
    scores_of,
    short,
)

N_GRID = 24
STRENGTHS, SCALES = (0.5, 1.0, 1.5), (1.0, 2.0, 3.0, 5.0)


def measure_settings(request: Request) -> Finding:
    """Measures match and cosine over strength and guidance for each backbone, and chooses."""
    names = request.settings.models(*(n for n in MEMBERS if POOLED not in n))
    pictures = request.pictures(N_GRID, 64)
    size = request.settings.batch_size
    found: dict[str, dict[tuple[float, float], dict[str, float]]] = {}
    for name in names:
        found[name] = {}
        plain = open_pipeline(name, request.settings.device)
        backbone = plain.require_backbone()
        features = features_of(backbone, pictures.images, size)
        truth = scores_of(backbone, pictures.images, size)
        for strength in STRENGTHS:
            for scale in SCALES:
                plain.strength, plain.guidance_scale = strength, scale
                images, cosine = draw_samples(plain, features, pictures.seeds, size)
                seen = scores_of(backbone, images, size)
                found[name][strength, scale] = {
                    "cosine": float(cosine.mean()),
                    "top5": float(top_k_match(truth, seen, 5).float().mean()),
                    "top1": float(top_k_match(truth, seen, 1).float().mean()),
                }
    chosen = {name: max(grid, key=lambda key: _rank(grid[key])) for name, grid in found.items()}
    common = max(
        found[names[0]],
        key=lambda key: tuple(sum(_rank(found[n][key])[i] for n in names) for i in (0, 1)),
    )
    lost = max(found[n][chosen[n]]["top5"] - found[n][common]["top5"] for n in names)
    ties = {
        name: correlation(
            torch.tensor([one["top1"] for one in grid.values()]),
            torch.tensor([one["cosine"] for one in grid.values()]),
        )
        for name, grid in found.items()
    }
    best = ", ".join(f"{short(n)} strength {s:g}, guidance {g:g}" for n, (s, g) in chosen.items())
    tied = ", ".join(f"{short(n)} {v:.2f}" for n, v in ties.items() if v is not None)
    known = [v for v in ties.values() if v is not None]
    answers = {
        "featinv-a2-strength-guidance": Answer(
            f"best match: {best}; the common {common[0]:g}, {common[1]:g} loses at most "
            f"{100 * lost:.0f} points of top-5; match and cosine over settings, r: {tied or '–'}",
            lost <= 0.1 and bool(known) and min(known) > 0.5,
        )
    }
    tables: list[Any] = [
        (
            f"{short(name)}: top-1 match / cosine by strength (rows) and guidance",
            ("strength", *(f"{g:g}" for g in SCALES)),
            [
                [
                    f"{s:g}",
                    *(
                        f"{100 * grid[s, g]['top1']:.0f} % / {grid[s, g]['cosine']:.3f}"
                        for g in SCALES
                    ),
                ]
                for s in STRENGTHS
            ],
        )
        for name, grid in found.items()
    ]
    metrics = {
        name: [{"strength": s, "guidance": g, **one} for (s, g), one in grid.items()]
        for name, grid in found.items()
    }
    drawn = {"match.png": _draw_grids(found)}
    return Finding(answers, tables, drawn, {"grid": metrics}, pictures.ids)


def _rank(one: Mapping[str, float]) -> tuple[float, float]:
    """Settings are chosen by the match of classes, as published, then by the cosine."""
    return one["top1"], one["cosine"]


def _draw_grids(found: Mapping[str, Mapping[tuple[float, float], Mapping[str, float]]]) -> Figure:
    figure, axes = plain_figure(2.6 * len(found), 2.4)
    axes.remove()
    for place, (name, grid) in enumerate(found.items(), start=1):
        panel = figure.add_subplot(1, len(found), place)
        values = np.array([[grid[s, g]["top1"] for g in SCALES] for s in STRENGTHS])
        panel.imshow(values, cmap=figures.HEAT, vmin=0, vmax=1)
        panel.set_xticks(range(len(SCALES)), [f"{g:g}" for g in SCALES], fontsize=TEXT)
        panel.set_yticks(range(len(STRENGTHS)), [f"{s:g}" for s in STRENGTHS], fontsize=TEXT)
        panel.set_title(f"{short(name)}: top-1 match", fontsize=TEXT)
        panel.set_xlabel("guidance", fontsize=TEXT)
        panel.set_ylabel("strength", fontsize=TEXT)
        for i, j in np.ndindex(values.shape):
            colour = "black" if values[i, j] > 0.6 else "white"
            panel.text(j, i, f"{values[i, j]:.2f}", ha="center", va="center", size=6, color=colour)
    return figure
