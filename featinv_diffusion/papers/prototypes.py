"""Whether decoded objects have their own colour or that of their class: figure 10 of the DETR text.

Source: "Inverting Visual Representations with Detection Transformers", sections 4.1 and 4.3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from featinv_diffusion.figures.board import draw_grid
from featinv_diffusion.inverters.modular import ModularInverter
from featinv_diffusion.metrics.statistics import Interval, bootstrap_statistic
from featinv_diffusion.papers.base import Answer, Finding, Request, cell
from featinv_diffusion.papers.recolouring import choose_objects, mean_chroma, pick
from featinv_diffusion.papers.stages import STAGES, open_detr
from featinv_diffusion.studies.stages import GREY, recolour, reconstruct_stages
from featinv_diffusion.studies.study import to_dicts


def measure_prototypes(request: Request) -> Finding:
    """Measures whether decoded objects have their own colour, or that of their class, by stage."""
    inverter: ModularInverter = open_detr(request)
    every = request.staged(inverter.path.input_size, boxed=True)
    rows, labels, masks = choose_objects(every)
    pictures = pick(every, rows)
    stages = [s for s in STAGES if s in inverter.inverses.chainable()]
    own = mean_chroma(pictures.images, masks)
    typical = leave_one_out(own, torch.tensor(labels))
    grey = recolour(pictures.images, masks, GREY)
    turned = recolour(pictures.images, masks, "+120")
    of_grey = reconstruct_stages(inverter, grey, stages, request.settings.batch_size)
    of_turned = reconstruct_stages(inverter, turned, stages, request.settings.batch_size)
    turned_own = mean_chroma(turned, masks)
    given: dict[str, Interval] = {}
    null: dict[str, Interval] = {}
    shares: dict[str, Interval] = {}
    shift = max(1, len(rows) // 2)
    for stage in stages:
        decoded = mean_chroma(of_grey[stage], masks)
        decoded = decoded - decoded.mean(0)
        centred = typical - typical.mean(0)
        given[stage] = _alignment(decoded, centred)
        null[stage] = _alignment(decoded, centred.roll(shift, 0))
        shares[stage] = _own_share(mean_chroma(of_turned[stage], masks), turned_own, typical)
    readable = readable_chroma(inverter, pictures.images, masks, request.settings.batch_size)
    at = [s for s in ("encoder", "decoder") if s in stages]
    beats = all(given[s].low > null[s].high for s in at)
    fades = shares["decoder"].high < shares["backbone"].low
    from_grey = ", ".join(f"{s} {given[s].value:.2f} (other class {null[s].value:.2f})" for s in at)
    kept = ", ".join(f"{s} {v.value:.2f}" for s, v in shares.items())
    read = ", ".join(f"{s} {v.value:.2f}" for s, v in readable.items())
    answers = {
        "detr-figure-10": Answer(f"colour of the class from grey: {from_grey}", beats),
        "detr-prototypes": Answer(
            f"weight of the turned object's own colour: {kept}; share of its chroma that is read "
            f"linearly from the states: {read}",
            fades and shares["encoder"].high < shares["backbone"].low,
        ),
    }
    tables = [
        (
            "Decoded colour",
            ("from", "grey: to the class's colour", "to another class's", "turned: own colour"),
            [[s, cell(given[s], 2), cell(null[s], 2), cell(shares[s], 2)] for s in stages],
        ),
        (
            "Chroma of the turned object that is read linearly from the model's states",
            ("state", "share of the variance"),
            [[s, cell(v, 2)] for s, v in readable.items()],
        ),
    ]
    columns = {"original": pictures.images, "grey": grey, **{f"grey, {s}": of_grey[s] for s in at}}
    columns |= {"turned": turned, **{f"turned, {s}": of_turned[s] for s in at}}
    note = "Hue of the object turned by 120°; grey is the whole image."
    drawn = {"prototypes.png": draw_grid(columns, "Colours that the stages give", [note])}
    metrics = {
        "from_grey": to_dicts(given),
        "from_grey_other_class": to_dicts(null),
        "own_colour": to_dicts(shares),
        "readable": to_dicts(readable),
    }
    return Finding(answers, tables, drawn, metrics, pictures.ids)


def leave_one_out(values: Float[Tensor, "n 2"], labels: Tensor) -> Float[Tensor, "n 2"]:
    """Returns the mean of the others of the same class; of all others where it has no other."""
    total, n = values.sum(0), len(values)
    means = []
    for i, k in enumerate(labels):
        same = labels == k
        if int(same.sum()) > 1:
            means.append((values[same].sum(0) - values[i]) / (int(same.sum()) - 1))
        else:
            means.append((total - values[i]) / max(n - 1, 1))
    return torch.stack(means)


def _alignment(a: Float[Tensor, "n 2"], b: Float[Tensor, "n 2"]) -> Interval:
    """Returns the correlation of centred colours over objects, a* and b* together."""
    columns = {
        "ab": (a * b).sum(1),
        "aa": a.square().sum(1),
        "bb": b.square().sum(1),
    }
    return bootstrap_statistic(columns, lambda m: m["ab"] / max(m["aa"] * m["bb"], 1e-18) ** 0.5)


def _own_share(
    decoded: Float[Tensor, "n 2"], own: Float[Tensor, "n 2"], typical: Float[Tensor, "n 2"]
) -> Interval:
    """Returns w of the least squares fit decoded ≈ typical + w (own − typical)."""
    direction = own - typical
    columns = {"xy": ((decoded - typical) * direction).sum(1), "xx": direction.square().sum(1)}
    return bootstrap_statistic(columns, lambda m: m["xy"] / max(m["xx"], 1e-12))


# ---- Whether it is the states or their inverses that lose a colour -------------------------------

TURNS = ("+120", "+240")
N_FOLDS, RIDGE = 5, 1e-2
"""Folds over objects, and the ridge as a share of the number of rows, of standardised columns."""


def readable_chroma(
    inverter: ModularInverter,
    images: Float[Tensor, "b 3 height width"],
    masks: Bool[Tensor, "b height width"],
    batch_size: int,
) -> dict[str, Interval]:
    """Returns how much of the turned objects' chroma ridge regression reads from the states.

    Maps are averaged over the cells of the object, queries over all of them. The share is of the
    variance of mean a* and b*, on objects that were not fitted on, which may be below 0. It needs
    no inverse, so that it says what the model has, not what its inverses draw.
    """
    states = [
        s for s in inverter.path.specs if s.split(".")[0] in ("backbone", "encoder", "decoder")
    ]
    states = [s for s in states if not s.endswith(".0")]  # the same as the stage before, or zero
    rows: dict[str, list[Tensor]] = {state: [] for state in states}
    chroma = []
    for turn in TURNS:
        turned = recolour(images, masks, turn)
        chroma.append(mean_chroma(turned, masks))
        for state, vectors in _vectors(inverter, turned, masks, states, batch_size).items():
            rows[state].append(vectors)
    target = torch.cat(chroma).double()
    fold = (torch.arange(len(images)) % N_FOLDS).repeat(len(TURNS))
    return {state: read_linearly(torch.cat(parts), target, fold) for state, parts in rows.items()}


@torch.no_grad()
def _vectors(
    inverter: ModularInverter,
    images: Float[Tensor, "b 3 height width"],
    masks: Bool[Tensor, "b height width"],
    states: Sequence[str],
    batch_size: int,
) -> dict[str, Float[Tensor, "b c"]]:
    parts: dict[str, list[Tensor]] = {state: [] for state in states}
    for batch, inside in zip(images.split(batch_size), masks.split(batch_size), strict=True):
        found = inverter.path.embeddings(batch.to(inverter.path.device), list(states))
        for state, x in found.items():
            if x.ndim == 3:
                parts[state].append(x.mean(1).cpu())
                continue
            weights = F.adaptive_avg_pool2d(inside[:, None].to(x), (x.shape[2], x.shape[3]))
            total = weights.sum(dim=(2, 3)).clamp_min(1e-9)
            parts[state].append(((x * weights).sum(dim=(2, 3)) / total).cpu())
    return {state: torch.cat(one).double() for state, one in parts.items()}


def read_linearly(x: Float[Tensor, "n c"], y: Float[Tensor, "n 2"], fold: Tensor) -> Interval:
    """Returns 1 − error / variance over the rows, each predicted by a fit on other folds."""
    error, null = torch.zeros(len(x)), torch.zeros(len(x))
    for k in range(N_FOLDS):
        fit, held = fold != k, fold == k
        if not bool(fit.any()) or not bool(held.any()):
            continue
        mean, std = x[fit].mean(0), x[fit].std(0, correction=0).clamp_min(1e-9)
        a, b, centre = (x[fit] - mean) / std, (x[held] - mean) / std, y[fit].mean(0)
        ridge = RIDGE * len(a) * torch.eye(a.shape[1], dtype=a.dtype)
        weight = torch.linalg.solve(a.T @ a + ridge, a.T @ (y[fit] - centre))
        error[held] = (centre + b @ weight - y[held]).square().sum(1).float()
        null[held] = (centre - y[held]).square().sum(1).float()
    columns = {"error": error, "null": null}
    return bootstrap_statistic(columns, lambda m: 1 - m["error"] / max(m["null"], 1e-12))
