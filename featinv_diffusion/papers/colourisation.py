"""Colourisation by linear operators, and why it fails here: figure 8 of the SigLIP text.

Source: "Image Reconstruction as a Tool for Feature Analysis", sections 4.2.3 and 5.4.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from featinv_diffusion.features.operator_methods import PairMoments, least_squares
from featinv_diffusion.features.pixel_operations import make_operation
from featinv_diffusion.inverters.open import load_inverter
from featinv_diffusion.metrics.statistics import Interval
from featinv_diffusion.papers.base import Answer, Finding, Request, cell
from featinv_diffusion.papers.operators import (
    HEADER,
    N_DEFAULT,
    NOTE,
    Edit,
    Halves,
    by_matrix,
    draw_edits,
    halve,
    moments_of,
    place,
    to_table,
    unit_rows,
)
from featinv_diffusion.studies.study import to_dicts
from featinv_diffusion.types import Features

SCALES = (2.0, 3.0)
KEPT = (8, 32)


def measure_colourisation(request: Request) -> Finding:
    """Colourises grey images in as many ways as might explain why it fails."""
    names = request.settings.models("siglip2", "siglip")
    size = request.settings.batch_size
    sections: dict[str, dict[str, dict[str, Interval]]] = {}
    explained: dict[str, float] = {}
    drawn: dict[str, Figure] = {}
    ids: list[str] = []
    for name in names:
        inverter = load_inverter(name, device=request.settings.device)
        pictures = request.pictures(N_DEFAULT, max(inverter.require_backbone().picture_size))
        ids = pictures.ids
        halves = halve(inverter, pictures, make_operation("colourise"), size)
        edits = ways_to_colourise(halves, inverter.spec.channels)
        if name != names[0]:
            edits = {k: edits[k] for k in ("linear, as published", "edit × 2")}
        sections[name] = place(inverter, halves, edits, size)
        explained[name] = explained_share(halves, edits["linear, as published"])
        if name == names[0]:
            shown = ("linear, as published", "with the image's mean", "edit × 2")
            drawn["pictures.png"] = draw_edits(
                inverter, halves, {k: edits[k] for k in shown}, size, "colourisation"
            )
    first = sections[names[0]]
    plain, best = (
        first["linear, as published"],
        min(first.items(), key=lambda one: one[1]["position"].value),
    )
    answers = {
        "siglip-figure-8": Answer(
            f"position {cell(plain['position'], 2)}, chroma {plain['chroma'].value:.2f} of the "
            f"true; the best of {len(first)} ways ({best[0]}) {cell(best[1]['position'], 2)}; of "
            f"what colour changes in the features {100 * explained[names[0]]:.0f} % follow "
            f"from the grey ones; edit × 2: chroma {first['edit × 2']['chroma'].value:.2f}, "
            f"position {first['edit × 2']['position'].value:.2f}",
            best[1]["position"].high < 0.5,
        )
    }
    tables = [
        (f"Ways to colourise, {name}", HEADER, to_table(one)) for name, one in sections.items()
    ]
    metrics = {
        "ways": {n: {k: to_dicts(v) for k, v in one.items()} for n, one in sections.items()},
        "explained": explained,
    }
    return Finding(answers, tables, drawn, metrics, ids, [NOTE])


def ways_to_colourise(halves: Halves, channels: int) -> dict[str, Edit]:
    """Returns the ways by name: data, ridge, rank, means, context and scale of the edit."""
    n = len(halves.before["fit"])
    moments = moments_of(halves, channels)
    plain = least_squares(moments.xx, moments.xy, 1e-6).matrix
    edits: dict[str, Edit] = {"linear, as published": by_matrix(plain)}
    for part in (8, 2):
        few = n // part
        if few * halves.before["fit"].shape[2] ** 2 >= channels:
            some = moments_of(halves, channels, few)
            matrix = least_squares(some.xx, some.xy, 1e-6).matrix
            edits[f"fitted on 1/{part} of the images"] = by_matrix(matrix)
    for ridge in (1e-2, 1.0):
        edits[f"ridge {ridge:g}"] = by_matrix(least_squares(moments.xx, moments.xy, ridge).matrix)
    for k in (k for k in KEPT if k < channels):
        edits[f"rank {k}"] = by_matrix(reduce_rank(moments, plain, k))
    edits["affine: with both means"] = fit_affine(halves, context=False)
    edits["with the image's mean"] = fit_affine(halves, context=True)
    for scale in SCALES:
        edits[f"edit × {scale:g}"] = _scaled(plain, scale)
    return edits


def _scaled(matrix: Tensor, scale: float) -> Edit:
    identity = torch.eye(len(matrix), dtype=matrix.dtype)
    return by_matrix(identity + scale * (matrix - identity))


def reduce_rank(moments: PairMoments, matrix: Float[Tensor, "c c"], k: int) -> Float[Tensor, "c c"]:
    """Returns I + the part of Q − I along the k directions in which it changes the features most.

    That is reduced-rank regression of Y − X on X (Izenman 1975) with Q's own fit.
    """
    identity = torch.eye(len(matrix), dtype=matrix.dtype)
    change = matrix - identity
    _, vectors = torch.linalg.eigh(change.T @ moments.xx @ change)
    kept = vectors[:, -k:]
    return identity + change @ kept @ kept.T


def fit_affine(halves: Halves, *, context: bool, ridge: float = 1e-3) -> Edit:
    """Fits Y from X with a constant, and with `context` from the mean of the image's cells too."""
    x, y = design(halves.before["fit"], context), unit_rows(halves.after["fit"])
    gram = x.T @ x
    weight = ridge * gram.trace() / len(gram)
    matrix = torch.linalg.solve(gram + weight * torch.eye(len(gram), dtype=gram.dtype), x.T @ y)

    def edit(features: Features) -> Features:
        made = design(features, context) @ matrix
        made = made / made.norm(dim=1, keepdim=True).clamp_min(1e-12)
        b, c, h, w = features.shape
        maps = made.reshape(b, h, w, c).movedim(-1, 1).to(features.dtype)
        return maps * features.norm(dim=1, keepdim=True)

    return edit


def design(features: Features, context: bool) -> Float[Tensor, "n d"]:
    """Returns the unit vectors of the locations beside a one, and the mean of their image."""
    rows = unit_rows(features)
    parts = [rows, torch.ones(len(rows), 1, dtype=rows.dtype)]
    if context:
        cells = features.shape[2] * features.shape[3]
        means = rows.unflatten(0, (-1, cells)).mean(1)
        parts.append(means.repeat_interleave(cells, 0))
    return torch.cat(parts, dim=1)


def explained_share(halves: Halves, edit: Edit) -> float:
    """Returns how much of Y − X an edit of X explains on held-out images, 1 all, 0 nothing."""
    true = unit_rows(halves.after["held"])
    before = unit_rows(halves.before["held"])
    left = true - unit_rows(edit(halves.before["held"]))
    return float(1 - left.square().sum() / (true - before).square().sum().clamp_min(1e-30))
