"""Whether decoded objects have their own colour or that of their class: figure 10 of the DETR text.

Source: "Inverting Visual Representations with Detection Transformers", sections 4.1 and 4.3.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

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
    at = [s for s in ("encoder", "decoder") if s in stages]
    beats = all(given[s].low > null[s].high for s in at)
    fades = shares["decoder"].high < shares["backbone"].low
    from_grey = ", ".join(f"{s} {given[s].value:.2f} (other class {null[s].value:.2f})" for s in at)
    kept = ", ".join(f"{s} {v.value:.2f}" for s, v in shares.items())
    answers = {
        "detr-figure-10": Answer(f"colour of the class from grey: {from_grey}", beats),
        "detr-prototypes": Answer(
            f"weight of the turned object's own colour: {kept}",
            fades and shares["encoder"].high < shares["backbone"].low,
        ),
    }
    tables = [
        (
            "Decoded colour",
            ("from", "grey: to the class's colour", "to another class's", "turned: own colour"),
            [[s, cell(given[s], 2), cell(null[s], 2), cell(shares[s], 2)] for s in stages],
        )
    ]
    columns = {"original": pictures.images, "grey": grey, **{f"grey, {s}": of_grey[s] for s in at}}
    columns |= {"turned": turned, **{f"turned, {s}": of_turned[s] for s in at}}
    note = "Hue of the object turned by 120°; grey is the whole image."
    drawn = {"prototypes.png": draw_grid(columns, "Colours that the stages give", [note])}
    metrics = {
        "from_grey": to_dicts(given),
        "from_grey_other_class": to_dicts(null),
        "own_colour": to_dicts(shares),
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
