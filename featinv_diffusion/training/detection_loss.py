"""DETR's set prediction loss, from transformers' matcher and criterion."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from transformers.loss.loss_for_object_detection import HungarianMatcher, ImageLoss


class HungarianLoss(nn.Module):
    """Cross-entropy + 5 L1 + 2 (1 − GIoU) after matching queries with objects (Carion et al. 2020).

    Args:
        n_classes: without no-object.
        no_object: weight of that class in the cross-entropy.
    """

    weights = {"loss_ce": 1.0, "loss_bbox": 5.0, "loss_giou": 2.0}  # noqa: RUF012

    def __init__(self, n_classes: int, no_object: float = 0.1):
        super().__init__()
        matcher = HungarianMatcher(class_cost=1, bbox_cost=5, giou_cost=2)
        self.criterion = ImageLoss(matcher, n_classes, no_object, ["labels", "boxes"])

    def forward(
        self,
        scores: Float[Tensor, "b n k"],
        boxes: Float[Tensor, "b n 4"],
        targets: list[dict[str, Tensor]],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the weighted sum and its parts.

        Args:
            scores: before softmax, no-object last.
            boxes: (centre x, centre y, width, height) as shares of the image.
            targets: `class_labels` and `boxes` of each image.
        """
        predicted = {"logits": scores.float(), "pred_boxes": boxes.float()}
        parts = self.criterion(predicted, targets)
        total = sum((self.weights[name] * parts[name] for name in parts), scores.new_zeros(()))
        return total, {name.removeprefix("loss_"): value for name, value in parts.items()}
