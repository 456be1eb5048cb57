"""Detection scores of hand-made detections."""

from __future__ import annotations

import pytest
import torch

from featinv_diffusion.metrics.detection import average_precision, best_query_scores

SQUARE = [0.5, 0.5, 0.4, 0.4]


def logits(*classes: tuple[int, float]) -> torch.Tensor:
    """Scores of 3 classes and no-object (3) where each query has its probability for its class."""
    rows = torch.full((len(classes), 4), 1e-6)
    for row, (label, probability) in zip(rows, classes, strict=True):
        row[label] = probability
        row[3] += 1 - probability
    return rows.log()[None]


def test_the_surest_query_is_compared() -> None:
    scores = logits((0, 0.3), (2, 0.8))
    boxes = torch.tensor([[SQUARE, [0.5, 0.6, 0.4, 0.4]]])
    found = best_query_scores(
        scores, boxes, [{"boxes": torch.tensor([SQUARE]), "class_labels": torch.tensor([2])}]
    )
    # shifted by a quarter of its side: 0.3·0.4 in common, 2·0.16 − 0.12 in all
    assert found == pytest.approx({"top1": 1.0, "iou": 0.12 / 0.2, "hit": 1.0})


def test_a_wrong_class_is_no_hit_and_images_without_objects_do_not_count() -> None:
    scores = torch.cat([logits((1, 0.9)), logits((1, 0.9))])
    boxes = torch.tensor([[SQUARE], [SQUARE]])
    targets = [
        {"boxes": torch.tensor([SQUARE]), "class_labels": torch.tensor([2])},
        {"boxes": torch.zeros(0, 4), "class_labels": torch.zeros(0, dtype=torch.long)},
    ]
    found = best_query_scores(scores, boxes, targets)
    assert found == pytest.approx({"top1": 0.0, "iou": 1.0, "hit": 0.0})


def test_average_precision_of_right_detections_is_one_and_of_half_of_them_a_half() -> None:
    pytest.importorskip("pycocotools")
    target = {"boxes": torch.tensor([SQUARE]), "class_labels": torch.tensor([1])}
    scores = torch.cat([logits((1, 0.9))] * 2)
    boxes = torch.tensor([[SQUARE], [SQUARE]])
    assert average_precision(scores, boxes, [target] * 2, (64, 64))["ap"] == pytest.approx(1.0)
    boxes[1] = torch.tensor([0.1, 0.1, 0.1, 0.1])
    # one of two objects is found, by the detection that comes first: precision 1 up to recall 1/2
    found = average_precision(scores, boxes, [target] * 2, (64, 64))
    assert found["ap"] == pytest.approx(51 / 101, abs=0.01)
    assert found["ap50"] == pytest.approx(51 / 101, abs=0.01)
