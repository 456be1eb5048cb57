"""What a DETR's stages keep: figures 1 to 3, 11 and 12, background, errors, one-hot.

Source: "Inverting Visual Representations with Detection Transformers", section 4.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor
from torchvision.ops import box_convert, box_iou

from featinv_diffusion.errors import InputError
from featinv_diffusion.figures import board as figures
from featinv_diffusion.figures.board import Board, draw_bars
from featinv_diffusion.inverters.detr import DetrPath
from featinv_diffusion.inverters.modular import ModularInverter
from featinv_diffusion.metrics.statistics import (
    Interval,
    bootstrap_difference,
    bootstrap_mean,
    bootstrap_statistic,
)
from featinv_diffusion.papers.base import Answer, Finding, Request, cell, percent
from featinv_diffusion.studies.stages import (
    AVERAGE,
    GREY,
    MSE,
    PictureSet,
    open_modular,
    recolour,
    reconstruct_stages,
    stage_mse,
)
from featinv_diffusion.studies.study import to_dicts
from featinv_diffusion.types import Images

STAGES = ("backbone", "encoder", "decoder", "prediction", "detection")
N_SHOWN = 3
"""Pictures of a figure in colour, and as many grey ones."""


def open_detr(request: Request) -> ModularInverter:
    """Opens the DETR that was asked for, or the bundled one.

    Raises:
        InputError: no DETR.
    """
    inverter = open_modular(request.settings.models("detr")[0])
    if not isinstance(inverter.path, DetrPath):
        raise InputError(f"This item needs a DETR and its inverses, got {inverter.path.name}.")
    return inverter


@torch.no_grad()
def detect(
    inverter: ModularInverter, images: Images, batch_size: int = 32
) -> tuple[Float[Tensor, "b n k"], Float[Tensor, "b n 4"]]:
    """Returns class probabilities without no-object, and boxes, of each query."""
    path = inverter.path
    assert isinstance(path, DetrPath)
    parts = [
        path.embeddings(batch.to(path.device), ["prediction"])["prediction"].cpu()
        for batch in images.split(batch_size)
    ]
    scores, boxes = path.split(torch.cat(parts))
    return scores.softmax(-1)[..., :-1], boxes


def hits(
    probability: Float[Tensor, "b n k"], boxes: Float[Tensor, "b n 4"], pictures: PictureSet
) -> Float[Tensor, " b"]:
    """Returns whether the surest query has the class of an object that it covers by half, as 0, 1.

    Images without objects count 0.
    """
    surest = probability.amax(-1).argmax(-1)
    found = torch.zeros(len(boxes))
    for i, target in enumerate(pictures.objects or []):
        if len(target["boxes"]):
            box = boxes[i, surest[i]][None]
            overlap = box_iou(to_edges(box), to_edges(target["boxes"]))[0]
            best = int(overlap.argmax())
            is_right = probability[i, surest[i]].argmax() == target["class_labels"][best]
            found[i] = float(is_right and overlap[best] > 0.5)
    return found


def to_edges(boxes: Float[Tensor, "n 4"]) -> Float[Tensor, "n 4"]:
    """Returns (left, top, right, bottom) of (centre x, centre y, width, height)."""
    return box_convert(boxes, "cxcywh", "xyxy")


def kept(found: Images, images: Images, where: Bool[Tensor, "b height width"]) -> dict[str, Tensor]:
    """Returns the squared errors of each image in some pixels, and those of the average image."""
    guess = images.mean(0, keepdim=True)
    weights = where[:, None].float()
    some = weights.sum(dim=(1, 2, 3)) > 0
    error = ((found - images).square() * weights).sum(dim=(1, 2, 3))[some]
    null = ((guess - images).square() * weights).sum(dim=(1, 2, 3))[some]
    return {"error": error, "null": null}


def share_kept(columns: Mapping[str, Tensor]) -> Interval:
    """Returns 1 − error / null over all images.

    1 is all, 0 no more than the average image says, below 0 is worse.
    """
    return bootstrap_statistic(columns, lambda m: 1 - m["error"] / max(m["null"], 1e-12))


def measure_detr_stages(request: Request) -> Finding:
    """Measures what each stage of a DETR keeps of objects, background and colour."""
    inverter = open_detr(request)
    pictures = request.staged(inverter.path.input_size, boxed=True)
    images, inside = pictures.images, pictures.inside
    stages = [s for s in STAGES if s in inverter.inverses.chainable()]
    grey = recolour(images, inside, GREY)
    found = reconstruct_stages(inverter, images, stages, request.settings.batch_size)
    of_grey = reconstruct_stages(inverter, grey, stages, request.settings.batch_size)
    errors = stage_mse(found, images)
    mse = {name: bootstrap_mean(values) for name, values in errors.items()}
    rises = {f"{b} − {a}": bootstrap_difference(errors[b], errors[a]) for a, b in pairwise(stages)}
    regions = _regions(found, images, inside)
    seen = {name: detect(inverter, x) for name, x in (("colour", images), (GREY, grey))}
    right = {name: hits(*one, pictures) for name, one in seen.items()}
    hit = {name: bootstrap_mean(values) for name, values in right.items()}
    outcomes = _by_outcome(found, images, inside, right["colour"] > 0)
    exact = _exactness(inverter, images[:8])
    title = f"From the stages of {inverter.path.name}"
    note = "Orange: true boxes. Blue: the surest query, with its class. Grey pictures below."
    drawn = {
        "stages.png": _draw(pictures, images, grey, found, of_grey, seen, title, note),
        "stage_mse.png": draw_bars(
            {s: mse[s] for s in stages}, title, MSE, (AVERAGE, mse[AVERAGE])
        ),
    }
    answers = _answers(stages, mse, rises, regions, hit, outcomes, exact)
    tables = [
        ("MSE by stage", ("from", "MSE"), [[n, cell(v, 4)] for n, v in mse.items()]),
        ("Rise from one stage to the next", ("stages", "MSE"), _cells(rises, 4)),
        (
            "Share kept, beyond the average image",
            ("from", "objects", "background", "objects found", "objects missed"),
            [
                [
                    s,
                    *(cell(regions[k][s]) for k in regions),
                    *(cell(outcomes[k][s]) for k in outcomes),
                ]
                for s in stages
            ],
        ),
        ("Objects hit", ("images", "share"), [[n, percent(v)] for n, v in hit.items()]),
    ]
    metrics = {
        "stage_mse": to_dicts(mse),
        "rises": to_dicts(rises),
        "kept": {k: to_dicts(v) for k, v in regions.items()},
        "kept_by_outcome": {k: to_dicts(v) for k, v in outcomes.items()},
        "hit": to_dicts(hit),
        "max_difference": exact,
    }
    return Finding(answers, tables, drawn, metrics, pictures.ids)


def _cells(values: Mapping[str, Interval], digits: int) -> list[list[str]]:
    return [[name, cell(value, digits)] for name, value in values.items()]


def _regions(
    found: Mapping[str, Images], images: Images, inside: Tensor
) -> dict[str, dict[str, Interval]]:
    """Returns the share kept of objects, and of the background, by stage."""
    places = {"objects": inside, "background": ~inside}
    return {
        name: {stage: share_kept(kept(x, images, where)) for stage, x in found.items()}
        for name, where in places.items()
    }


def _by_outcome(
    found: Mapping[str, Images], images: Images, inside: Tensor, right: Tensor
) -> dict[str, dict[str, Interval]]:
    """Returns the share kept of objects that were found, and that were missed."""
    result: dict[str, dict[str, Interval]] = {}
    for name, rows in (("found", right), ("missed", ~right)):
        chosen = inside & rows[:, None, None]
        if not bool(chosen.any()):
            result[name] = dict.fromkeys(found, Interval(0.0, 0.0, 0.0, 0))
            continue
        result[name] = {s: share_kept(kept(x, images, chosen)) for s, x in found.items()}
    return result


@torch.no_grad()
def _exactness(inverter: ModularInverter, images: Images) -> float:
    """Returns the largest difference between the stages in a row and the model's own output."""
    path: Any = inverter.path
    pixels = path.preprocess(images.to(path.device))
    state = pixels
    for stage in ("backbone", "encoder", "decoder", "prediction"):
        state = path.advance(stage, state)[stage]
    own = path.model(pixels)
    whole = torch.cat([own.logits, own.pred_boxes], -1)
    return float((state - whole).abs().max())


def _answers(
    stages: list[str],
    mse: Mapping[str, Interval],
    rises: Mapping[str, Interval],
    regions: Mapping[str, Mapping[str, Interval]],
    hit: Mapping[str, Interval],
    outcomes: Mapping[str, Mapping[str, Interval]],
    exact: float,
) -> dict[str, Answer]:
    listed = ", ".join(f"{s} {mse[s].value:.4f}" for s in stages)
    first, second = rises["encoder − backbone"], rises["decoder − encoder"]
    largest = second.low > max(first.high, 0)
    ordered = largest and first.low > 0
    objects, background = regions["objects"], regions["background"]
    both = "objects {:.2f}, background {:.2f}"
    encoder = both.format(objects["encoder"].value, background["encoder"].value)
    decoder = both.format(objects["decoder"].value, background["decoder"].value)
    removed = objects["decoder"].low > background["decoder"].high
    found, missed = outcomes["found"], outcomes["missed"]
    outcome = "found {:.2f}, missed {:.2f}"
    before = outcome.format(found["encoder"].value, missed["encoder"].value)
    after = outcome.format(found["decoder"].value, missed["decoder"].value)
    drops = found["decoder"].low > missed["decoder"].high
    one_hot = rises["detection − prediction"]
    worse = one_hot.low > 0 and mse["detection"].low > mse[AVERAGE].high
    grey = f"hits {percent(hit['colour'])} in colour, {percent(hit[GREY])} in grey"
    return {
        "detr-figure-1": Answer(
            f"largest difference of the stages in a row to the model: {exact:.1e}", exact < 1e-5
        ),
        "detr-figure-2": Answer(f"MSE {listed}; {grey}", ordered),
        "detr-figure-3": Answer(f"MSE {listed}, average image {mse[AVERAGE].value:.4f}", ordered),
        "detr-figure-12": Answer(f"MSE {listed}", ordered),
        "detr-background": Answer(
            f"share kept after the encoder: {encoder}; after the decoder: {decoder}", removed
        ),
        "detr-errors": Answer(
            f"share kept of objects after the encoder: {before}; after the decoder: {after}",
            drops,
        ),
        "detr-one-hot": Answer(
            f"MSE of prediction {mse['prediction'].value:.4f}, of one-hot detections "
            f"{mse['detection'].value:.4f}, of the average image {mse[AVERAGE].value:.4f}",
            worse,
        ),
    }


# ---- Figures with boxes --------------------------------------------------------------------------


def _draw(
    pictures: PictureSet,
    images: Images,
    grey: Images,
    found: Mapping[str, Images],
    of_grey: Mapping[str, Images],
    seen: Mapping[str, tuple[Tensor, Tensor]],
    title: str,
    note: str,
) -> Figure:
    """Draws truth, prediction and the picture from each stage, in colour and below in grey."""
    n = min(N_SHOWN, len(images))
    columns = ["truth", "detected", *found]
    board = Board(2 * n, len(columns), title, [note], headers="first", caption=0.16, tile=0.95)
    figure = board.make()
    for row in range(2 * n):
        i, name = (row % n) * len(images) // n, "colour" if row < n else GREY
        inputs, made = (images, found) if row < n else (grey, of_grey)
        tiles = [inputs[i], inputs[i], *(x[i] for x in made.values())]
        for column, tile in enumerate(tiles):
            axes = board.tile_axes(figure, row, column)
            figures.show_picture(axes, tile)
            if row == 0:
                figures.label(axes, columns[column])
            if column < 2:
                _draw_boxes(axes, pictures, i, seen[name], truth=column == 0)
    return figure


def _draw_boxes(
    axes: Any, pictures: PictureSet, i: int, seen: tuple[Tensor, Tensor], *, truth: bool
) -> None:
    probability, boxes = seen
    assert pictures.objects is not None
    target = pictures.objects[i]
    if truth:
        edges, labels = to_edges(target["boxes"]), target["class_labels"].tolist()
    else:
        query = int(probability[i].amax(-1).argmax())
        edges, labels = to_edges(boxes[i, query][None]), [int(probability[i, query].argmax())]
    colour = figures.ORANGE if truth else figures.BLUE
    for left, top, right, bottom in edges.tolist():
        size = (right - left, bottom - top)
        axes.add_patch(Rectangle((left, top), *size, fill=False, color=colour, linewidth=1.3))
    names = pictures.class_names
    words = [names[k] if names and k < len(names) else f"class {k}" for k in labels]
    figures.caption(axes, figures.short_name(words[0], 18) if words else "", color=figures.GREY)
