"""How well a detector finds objects: of the surest query, and average precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torchvision.ops import box_convert, box_iou

from featinv_diffusion.data.boxes import import_pycocotools


def best_query_scores(
    scores: Float[Tensor, "b n k"],
    boxes: Float[Tensor, "b n 4"],
    targets: Sequence[Mapping[str, Tensor]],
) -> dict[str, float]:
    """Compares the query that is surest of any object with the object it overlaps most.

    Images without objects are left out.

    Args:
        scores: before softmax, no-object last.
        boxes, targets: (centre x, centre y, width, height) as shares of the image.

    Returns:
        `top1`, the share of right classes; `iou`, the mean overlap; `hit`, the share that is right
        and overlaps by more than half.
    """
    probability = scores.softmax(-1)[..., :-1]
    surest = probability.amax(-1).argmax(-1)
    rows: list[tuple[float, float]] = []
    for i, target in enumerate(targets):
        if not len(target["boxes"]):
            continue
        query = int(surest[i])
        overlap = box_iou(_to_edges(boxes[i, [query]]), _to_edges(target["boxes"]))
        best = int(overlap.argmax())
        is_right = probability[i, query].argmax() == target["class_labels"][best]
        rows.append((float(is_right), float(overlap[0, best])))
    right, iou = torch.tensor(rows).reshape(-1, 2).unbind(1)
    hit = (right > 0) & (iou > 0.5)
    return {
        "top1": float(right.mean()),
        "iou": float(iou.mean()),
        "hit": float(hit.float().mean()),
    }


def average_precision(
    scores: Float[Tensor, "b n k"],
    boxes: Float[Tensor, "b n 4"],
    targets: Sequence[Mapping[str, Tensor]],
    size: tuple[int, int],
) -> dict[str, float]:
    """COCO's average precision over IoU .5 … .95 (`ap`), and at .5 and .75, by pycocotools.

    Every query is a detection of its most probable class but no-object.

    Args:
        scores, boxes, targets: as in `best_query_scores`.
        size: (h, w) in pixels, for the measure of areas.

    Raises:
        InputError: pycocotools is not installed.
    """
    run = _evaluate(scores, boxes, targets, size)
    return {"ap": float(run.stats[0]), "ap50": float(run.stats[1]), "ap75": float(run.stats[2])}


def _evaluate(
    scores: Tensor, boxes: Tensor, targets: Sequence[Mapping[str, Tensor]], size: tuple[int, int]
) -> Any:
    """Returns the evaluation of pycocotools."""
    coco: Any = import_pycocotools("coco")
    evaluation: Any = import_pycocotools("cocoeval")
    scale = torch.tensor([size[1], size[0], size[1], size[0]], dtype=torch.float32)
    probability, label = scores.softmax(-1)[..., :-1].max(-1)
    truths: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for i, target in enumerate(targets):
        for box, k in zip(target["boxes"], target["class_labels"], strict=True):
            truths.append(_entry(i, int(k), box * scale) | {"id": len(truths) + 1, "iscrowd": 0})
        for j in range(scores.shape[1]):
            entry = _entry(i, int(label[i, j]), boxes[i, j] * scale)
            found.append(entry | {"score": float(probability[i, j])})
    return _run_coco(coco, evaluation, truths, found, len(targets), scores.shape[2] - 1)


def average_precision_by_class(
    scores: Float[Tensor, "b n k"],
    boxes: Float[Tensor, "b n 4"],
    targets: Sequence[Mapping[str, Tensor]],
    size: tuple[int, int],
) -> dict[int, float]:
    """As `average_precision`, the mean over IoU .5 … .95 of each class that has objects.

    Raises:
        InputError: pycocotools is not installed.
    """
    run = _evaluate(scores, boxes, targets, size)
    precision = run.eval["precision"][:, :, :, 0, -1]  # overlaps × recalls × classes
    present = {int(k) for target in targets for k in target["class_labels"]}
    return {k: float(precision[:, :, k].mean()) for k in sorted(present)}


def _to_edges(boxes: Tensor) -> Tensor:
    return box_convert(boxes, "cxcywh", "xyxy")


def _entry(image: int, label: int, box: Tensor) -> dict[str, Any]:
    x, y, width, height = (float(v) for v in box)
    return {
        "image_id": image,
        "category_id": label,
        "bbox": [x - width / 2, y - height / 2, width, height],
        "area": width * height,
    }


def _run_coco(
    coco: Any,
    evaluation: Any,
    truths: list[dict[str, Any]],
    found: list[dict[str, Any]],
    n_images: int,
    n_classes: int,
) -> Any:
    from contextlib import redirect_stdout
    from io import StringIO

    truth = coco.COCO()
    truth.dataset = {
        "images": [{"id": i} for i in range(n_images)],
        "annotations": truths,
        "categories": [{"id": k} for k in range(n_classes)],
    }
    with redirect_stdout(StringIO()):  # pycocotools prints its progress and a table
        truth.createIndex()
        run = evaluation.COCOeval(truth, truth.loadRes(found), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return run
