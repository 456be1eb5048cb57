"""Objects recoloured one at a time: figures 6 to 8 and 13 of the DETR text, shape beside colour.

Source: "Inverting Visual Representations with Detection Transformers", section 4.3.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from torch import Tensor

from featinv_diffusion.backbones import load_backbone
from featinv_diffusion.errors import InputError
from featinv_diffusion.figures.board import draw_bars, draw_grid
from featinv_diffusion.metrics.colour import to_lab
from featinv_diffusion.metrics.detection import average_precision, average_precision_by_class
from featinv_diffusion.metrics.statistics import (
    Interval,
    bootstrap_difference,
    bootstrap_mean,
    bootstrap_statistic,
)
from featinv_diffusion.papers.base import Answer, Finding, Request, cell, percent
from featinv_diffusion.papers.stages import STAGES, detect, hits, open_detr
from featinv_diffusion.studies.stages import (
    COMPARED,
    FILTERS,
    GREY,
    NONE,
    PAIRWISE,
    PictureSet,
    measure_tradeoff,
    open_modular,
    pairwise_mse,
    recolour,
    reconstruct_stages,
)
from featinv_diffusion.studies.study import to_dicts
from featinv_diffusion.types import Images

MIN_SHARE = 96**2 / (640 * 480)
"""Share of the picture that an object has at least: 96² pixels of COCO's usual picture."""
N_CATEGORIES, N_FIGURES = 6, 4
CLASSIFIERS = ("tiny/resnet", "tiny/convnext", "tiny/swin", "tiny/vit")


def choose_objects(pictures: PictureSet) -> tuple[list[int], list[int], Bool[Tensor, "n h w"]]:
    """Returns rows, classes and masks: of each image the largest object that is large enough.

    Raises:
        InputError: pictures without boxes, or without one large object.
    """
    if pictures.masks is None or pictures.objects is None:
        raise InputError("Objects can be recoloured only in images with boxes; see --data.")
    rows, labels, masks = [], [], []
    for i, (found, target) in enumerate(zip(pictures.masks, pictures.objects, strict=True)):
        if len(found) == 0:
            continue
        shares = found.float().mean(dim=(1, 2))
        best = int(shares.argmax())
        if shares[best] >= MIN_SHARE:
            rows.append(i)
            labels.append(int(target["class_labels"][best]))
            masks.append(found[best])
    if not rows:
        raise InputError(
            f"An object must cover at least {MIN_SHARE:.0%} of its picture; none does."
        )
    return rows, labels, torch.stack(masks)


def measure_recolouring(request: Request) -> Finding:
    """Recolours one object of each picture, and measures reconstructions and detections."""
    inverter = open_detr(request)
    every = request.staged(inverter.path.input_size, boxed=True)
    rows, labels, masks = choose_objects(every)
    pictures = pick(every, rows)
    images = pictures.images
    stages = [s for s in STAGES if s in inverter.inverses.chainable()]
    versions = {name: recolour(images, masks, name) for name in FILTERS}
    made = {
        name: reconstruct_stages(inverter, x, stages, request.settings.batch_size)
        for name, x in versions.items()
    }
    table: dict[str, dict[str, Images]] = {"input": versions}
    table |= {stage: {name: made[name][stage] for name in FILTERS} for stage in stages}
    pairs = {
        place: pairwise_mse({name: row[name] for name in COMPARED}) for place, row in table.items()
    }
    light = {place: _light_share(row) for place, row in table.items()}
    found = {name: detect(inverter, x) for name, x in versions.items()}
    return _report(request, pictures, labels, table, pairs, light, found)


def pick(pictures: PictureSet, rows: Sequence[int]) -> PictureSet:
    """Returns some of the pictures, which have boxes."""
    assert pictures.objects is not None
    assert pictures.masks is not None
    return PictureSet(
        [pictures.ids[i] for i in rows],
        pictures.images[list(rows)],
        [pictures.objects[i] for i in rows],
        pictures.inside[list(rows)],
        [pictures.masks[i] for i in rows],
        pictures.class_names,
    )


def _light_share(versions: Mapping[str, Images]) -> dict[str, Tensor]:
    """Returns the pairwise MSE of each image, and the part of it that is along grey.

    The two parts, along (1, 1, 1) and across, add up to the MSE of RGB.
    """
    total, light = [], []
    for a, b in combinations([versions[name] for name in COMPARED], 2):
        difference = a - b
        total.append(difference.square().mean(dim=(1, 2, 3)))
        light.append(difference.mean(1).square().mean(dim=(1, 2)))
    return {"light": torch.stack(light).mean(0), "total": torch.stack(total).mean(0)}


def _share(columns: Mapping[str, Tensor]) -> Interval:
    return bootstrap_statistic(columns, lambda m: m["light"] / max(m["total"], 1e-12))


def _report(
    request: Request,
    pictures: PictureSet,
    labels: Sequence[int],
    table: Mapping[str, Mapping[str, Images]],
    pairs: Mapping[str, Tensor],
    light: Mapping[str, Mapping[str, Tensor]],
    found: Mapping[str, tuple[Tensor, Tensor]],
) -> Finding:
    differences = {place: bootstrap_mean(values) for place, values in pairs.items()}
    places = list(pairs)
    steps = {f"{b} − {a}": bootstrap_difference(pairs[b], pairs[a]) for a, b in pairwise(places)}
    shares = {place: _share(columns) for place, columns in light.items()}
    right = {name: hits(*one, pictures) for name, one in found.items()}
    hit = {name: bootstrap_mean(values) for name, values in right.items()}
    precision, by_class = _precisions(found, pictures)
    changed = [name for name in COMPARED if name != NONE]
    ratio = float(np.mean([precision[name] for name in changed]) / max(precision[NONE], 1e-12))
    tied = colour_bound(pictures, labels, right, changed)
    grey = classifiers_on_grey(pictures, request.settings.batch_size)
    falls = steps["backbone − input"].high < 0 and steps["encoder − backbone"].high < 0
    rises = steps["decoder − encoder"].low > 0
    listed = ", ".join(f"{k} {v.value:.4f}" for k, v in differences.items())
    colour = ", ".join(f"{v.value * (1 - shares[k].value):.4f}" for k, v in differences.items())
    path = f"pairwise MSE {listed}; its part across grey, in that order, {colour}"
    aps = ", ".join(f"{k} {v:.3f}" for k, v in precision.items())
    answers = {
        "detr-figure-6": Answer(f"AP {aps}; recoloured to unchanged {ratio:.2f}", ratio > 0.9),
        "detr-figure-7": Answer(path, falls),
        "detr-figure-8": Answer(path, falls and rises),
        "detr-figure-13": Answer(path, falls),
        "detr-shape": Answer(
            f"part along grey: encoder {cell(shares['encoder'], 2)}, "
            f"decoder {cell(shares['decoder'], 2)}",
            rises and shares["decoder"].low > shares["encoder"].high,
        ),
    }
    names = pictures.class_names
    tables = [
        (
            "Differences between versions",
            ("from", "pairwise MSE", "its part along grey"),
            [[k, cell(v, 5), cell(shares[k], 2)] for k, v in differences.items()],
        ),
        (
            "Detection by filter",
            ("filter", "AP", "hits"),
            [[k, f"{precision[k]:.3f}", percent(hit[k])] for k in FILTERS],
        ),
        (
            "AP by category",
            ("category", *FILTERS),
            [
                [names[k] if names else f"class {k}", *(f"{by_class[f][k]:.3f}" for f in FILTERS)]
                for k in _most(labels)
            ],
        ),
        (
            "Reasons that were tested",
            ("question", "answer"),
            [
                ["Classes of one colour lose more hits: rank correlation over classes", tied],
                *(
                    [f"Top-1 of {name} in colour, in grey", f"{a:.3f}, {b:.3f}"]
                    for name, (a, b) in grey.items()
                ),
            ],
        ),
    ]
    metrics = {
        "pairwise_mse": to_dicts(differences),
        "steps": to_dicts(steps),
        "part_along_grey": to_dicts(shares),
        "ap": precision,
        "ap_by_category": {f: {str(k): v for k, v in one.items()} for f, one in by_class.items()},
        "hit": to_dicts(hit),
        "classifiers": {name: list(values) for name, values in grey.items()},
        "colour_bound": tied,
    }
    drawn = {"pairwise_mse.png": draw_bars(differences, "Recoloured objects by stage", PAIRWISE)}
    return Finding(
        answers, tables, drawn | _pictures(pictures, labels, table), metrics, pictures.ids
    )


def _precisions(
    found: Mapping[str, tuple[Tensor, Tensor]], pictures: PictureSet
) -> tuple[dict[str, float], dict[str, dict[int, float]]]:
    """Returns AP, and AP by category, of each filter."""
    assert pictures.objects is not None
    size = (pictures.images.shape[-2], pictures.images.shape[-1])
    overall, by_class = {}, {}
    for name, (probability, boxes) in found.items():
        # Scores before softmax, with a no-object that takes the rest of the probability.
        rest = (1 - probability.sum(-1, keepdim=True)).clamp_min(1e-9)
        scores = torch.cat([probability.clamp_min(1e-9), rest], -1).log()
        overall[name] = average_precision(scores, boxes, pictures.objects, size)["ap"]
        by_class[name] = average_precision_by_class(scores, boxes, pictures.objects, size)
    return overall, by_class


def _most(labels: Sequence[int]) -> list[int]:
    """Returns the categories with the most objects."""
    return [k for k, _ in sorted(Counter(labels).items(), key=lambda x: (-x[1], x[0]))][
        :N_CATEGORIES
    ]


def mean_chroma(images: Images, masks: Bool[Tensor, "b height width"]) -> Float[Tensor, "b 2"]:
    """Returns the mean a* and b* in the masked pixels of each image."""
    weights = masks[:, None].to(images)
    ab = to_lab(images)[:, 1:]
    return (ab * weights).sum(dim=(2, 3)) / weights.sum(dim=(2, 3)).clamp_min(1)


def colour_bound(
    pictures: PictureSet,
    labels: Sequence[int],
    right: Mapping[str, Tensor],
    changed: Sequence[str],
) -> str:
    """Returns whether classes whose objects have one colour lose more hits when recoloured.

    One colour: length of the mean a* b* of a class by the mean length. Loss: hits of the unchanged
    minus those of the recoloured objects. Classes with fewer than 3 objects are left out.
    """
    from scipy.stats import spearmanr

    chroma = mean_chroma(pictures.images, pictures.inside)
    loss = right[NONE] - torch.stack([right[name] for name in changed]).mean(0)
    of_class = torch.tensor(labels)
    pairs = []
    for k, n in Counter(labels).items():
        if n >= 3:
            own = chroma[of_class == k]
            unity = own.mean(0).norm() / own.norm(dim=1).mean().clamp_min(1e-9)
            pairs.append((float(unity), float(loss[of_class == k].mean())))
    if len(pairs) < 3:
        return "too few classes"
    unities, losses = zip(*pairs, strict=True)
    test: Any = spearmanr(unities, losses)
    return f"{float(test.statistic):.2f} (p {float(test.pvalue):.3f}, {len(pairs)} classes)"


@torch.no_grad()
def classifiers_on_grey(pictures: PictureSet, batch_size: int) -> dict[str, tuple[float, float]]:
    """Returns the top-1 of the bundled classifiers on the pictures in colour and in grey.

    Classes are matched by name; without names of classes there is nothing to measure.
    """
    names, objects = pictures.class_names, pictures.objects
    if names is None or objects is None:
        return {}
    found = {}
    grey = recolour(pictures.images, pictures.inside, GREY)
    for name in CLASSIFIERS:
        backbone = load_backbone(name)
        known = [label.casefold() for label in backbone.labels or ()]
        wanted = [_index(known, names[int(t["class_labels"][0])]) for t in objects]
        if None in wanted:
            continue
        target = torch.tensor(wanted)
        shares = []
        for images in (pictures.images, grey):
            parts = [backbone.classify(batch).argmax(1) for batch in images.split(batch_size)]
            shares.append(float((torch.cat(parts) == target).float().mean()))
        found[name] = (shares[0], shares[1])
    return found


def _index(known: Sequence[str], name: str) -> int | None:
    return known.index(name.casefold()) if name.casefold() in known else None


def _pictures(
    pictures: PictureSet, labels: Sequence[int], table: Mapping[str, Mapping[str, Images]]
) -> dict[str, Figure]:
    """Draws the versions of some objects, of different categories, by stage."""
    firsts = list({k: i for i, k in reversed(list(enumerate(labels)))}.values())
    drawn = {}
    for place, i in enumerate(sorted(firsts)[:N_FIGURES]):
        name = pictures.class_names[labels[i]] if pictures.class_names else f"class {labels[i]}"
        columns = {n: torch.stack([row[n][i] for row in table.values()]) for n in FILTERS}
        note = f"Rows: {', '.join(table)}. Only the object is recoloured; grey is the whole image."
        drawn[f"colour-{place}.png"] = draw_grid(columns, f"Recoloured: {name}", [note])
    return drawn


# ---- Detectors that were tuned for reconstruction too --------------------------------------------


def measure_tuned(request: Request) -> Finding:
    """Measures detectors that were tuned with several λ, beside the one that was not."""
    names = request.settings.models("detr")
    if len(names) < 2:
        raise InputError(
            "This item compares detectors that were tuned with several λ, which are not bundled. "
            "Train them with configs/tiny/inverter-detr-tuned.yaml and name all as --model "
            "detr,FOLDER,FOLDER."
        )
    size = open_modular(names[0]).path.input_size
    pictures = request.staged(size, boxed=True)
    found = measure_tradeoff(names, pictures)
    rows = found.metrics["tradeoff"]
    tuned = [row for row in rows if row["weight"] is not None]
    errors = [row["mse"]["value"] for row in tuned]
    precisions = [row["ap"] for row in tuned]
    falls = errors == sorted(errors, reverse=True) and precisions[0] > precisions[-1]
    alone = next((row for row in rows if row["weight"] is None), rows[0])
    listed = ", ".join(
        f"λ {row['weight']:g}: MSE {row['mse']['value']:.4f}, AP {row['ap']:.3f}" for row in tuned
    )
    isolated = f"isolated modules: MSE {alone['mse']['value']:.4f}; {listed}"
    answers = {
        "detr-figure-4": Answer(isolated, falls and alone["mse"]["value"] > errors[-1]),
        "detr-figure-5": Answer(listed, falls),
    }
    cells = [
        [
            "isolated" if r["weight"] is None else f"{r['weight']:g}",
            f"{r['mse']['value']:.4f}",
            f"{r['ap']:.3f}",
        ]
        for r in rows
    ]
    tables = [("MSE and average precision by λ", ("λ", "MSE", "AP"), cells)]
    return Finding(answers, tables, found.figures, found.metrics, pictures.ids)
