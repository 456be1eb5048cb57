"""Whether objects are found without colour, and why not: a claim of the DETR text.

Source: "Inverting Visual Representations with Detection Transformers", section 4.1.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from featinv_diffusion.class_embedding.probes import fit_probes
from featinv_diffusion.errors import InputError
from featinv_diffusion.figures.board import draw_bars
from featinv_diffusion.inverters.modular import ModularInverter
from featinv_diffusion.metrics.statistics import (
    bootstrap_difference,
    bootstrap_mean,
    bootstrap_statistic,
)
from featinv_diffusion.papers.base import Answer, Finding, Request, cell, percent
from featinv_diffusion.papers.recolouring import classifiers_on_grey
from featinv_diffusion.papers.stages import detect, hits, open_detr
from featinv_diffusion.studies.stages import GREY, PictureSet, recolour
from featinv_diffusion.studies.study import to_dicts
from featinv_diffusion.types import Images

COLOUR = "colour"


def measure_grey(request: Request) -> Finding:
    """Measures detection with and without colour, and what of the loss a new head regains."""
    inverter = open_detr(request)
    pictures = request.staged(inverter.path.input_size, boxed=True)
    grey = recolour(pictures.images, pictures.inside, GREY)
    versions = {COLOUR: pictures.images, GREY: grey}
    right = {name: hits(*detect(inverter, x), pictures) for name, x in versions.items()}
    hit = {name: bootstrap_mean(values) for name, values in right.items()}
    ratio = bootstrap_statistic(right, lambda m: m[GREY] / max(m[COLOUR], 1e-12))
    classifiers = classifiers_on_grey(pictures, request.settings.batch_size)
    heads = heads_on_grey(inverter, pictures, versions, request.settings.batch_size)
    top1 = {name: bootstrap_mean(values) for name, values in heads.items()}
    regained = bootstrap_difference(heads[_name(GREY, GREY)], heads[_name(COLOUR, GREY)])
    lost = bootstrap_difference(heads[_name(COLOUR, COLOUR)], heads[_name(GREY, GREY)])
    kept = ", ".join(f"{name} {a:.2f} to {b:.2f}" for name, (a, b) in classifiers.items())
    listed = ", ".join(f"{name} {100 * v.value:.1f} %" for name, v in top1.items())
    answer = Answer(
        f"hits {percent(hit[COLOUR])} in colour, {percent(hit[GREY])} in grey; ratio "
        f"{cell(ratio, 2)}; top-1 of classifiers, colour to grey: {kept or '–'}; top-1 of new "
        f"heads on the backbone's map, {listed}: fitted on grey they regain {percent(regained)}",
        ratio.high > 0.95,
    )
    rows = [[name, percent(v)] for name, v in hit.items()]
    reasons = [
        *(
            [f"top-1 of {name} in colour, in grey", f"{a:.3f}, {b:.3f}"]
            for name, (a, b) in classifiers.items()
        ),
        *([f"top-1 of a head, {name}", percent(v)] for name, v in top1.items()),
        ["regained by a head that is fitted on grey", percent(regained)],
        ["still lost to colour", percent(lost)],
    ]
    note = (
        "Heads are ridge classifiers of the mean of the backbone's map, fitted on every other "
        "image and measured on the rest."
    )
    metrics = {
        "hit": to_dicts(hit),
        "grey_to_colour": to_dicts({"ratio": ratio})["ratio"],
        "classifiers": {name: list(values) for name, values in classifiers.items()},
        "heads": to_dicts(top1),
        "regained": to_dicts({"d": regained})["d"],
        "still_lost": to_dicts({"d": lost})["d"],
    }
    drawn = {"heads.png": draw_bars(top1, "Heads on the backbone's map", "top-1, 95 % interval")}
    tables = [
        ("Objects hit", ("images", "share"), rows),
        ("Reasons that were tested", ("question", "answer"), reasons),
    ]
    return Finding({"detr-grey": answer}, tables, drawn, metrics, pictures.ids, [note])


def _name(fitted: str, measured: str) -> str:
    return f"{fitted} on {measured}"


def heads_on_grey(
    inverter: ModularInverter, pictures: PictureSet, versions: dict[str, Images], batch_size: int
) -> dict[str, Float[Tensor, " held"]]:
    """Returns whether heads name the class of each held-out image, by what they saw in the fit.

    If heads that are fitted on grey pictures do better on grey ones than those fitted on colours,
    the backbone's map holds the classes without colour, and it is the training that expects it.

    Raises:
        InputError: fewer than four images with an object.
    """
    objects = pictures.objects or []
    rows = [i for i, target in enumerate(objects) if len(target["class_labels"])]
    if len(rows) < 4:
        raise InputError(
            f"Heads need at least 4 images with an object, got {len(rows)}. Take more."
        )
    labels = torch.tensor([int(objects[i]["class_labels"][0]) for i in rows])
    fit, held = torch.arange(0, len(rows), 2), torch.arange(1, len(rows), 2)
    vectors = {n: _pooled(inverter, x[rows], batch_size) for n, x in versions.items()}
    found = {}
    for fitted, measured in ((COLOUR, COLOUR), (COLOUR, GREY), (GREY, GREY)):
        x = vectors[fitted][fit]
        mean, std = x.mean(0), x.std(0, correction=0).clamp_min(1e-6)
        head = fit_probes(((x - mean) / std)[:, None], labels[fit], int(labels.max()) + 1, len(fit))
        scores = head.predict(((vectors[measured][held] - mean) / std)[:, None])[:, 0]
        found[_name(fitted, measured)] = (scores.argmax(1) == labels[held]).float()
    return found


@torch.no_grad()
def _pooled(inverter: ModularInverter, images: Images, batch_size: int) -> Float[Tensor, "b c"]:
    path = inverter.path
    parts = [
        path.embeddings(x.to(path.device), ["backbone"])["backbone"].mean(dim=(2, 3)).cpu()
        for x in images.split(batch_size)
    ]
    return torch.cat(parts)
