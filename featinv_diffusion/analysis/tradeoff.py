"""Reconstruction against detection of detectors that were tuned for both, by λ.

Source: "Inverting DETR" (modular inversion), section 4.2 and figure 5.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from featinv_diffusion.analysis.picture_set import PictureSet
from featinv_diffusion.analysis.stages import reconstruct_stages
from featinv_diffusion.errors import InputError
from featinv_diffusion.inverters.detr_path import DetrPath
from featinv_diffusion.inverters.modular import TUNING, ModularInverter
from featinv_diffusion.metrics.detection import average_precision, best_query_scores

ISOLATED = "isolated"
"""The inverter whose modules were trained on their own, on the detector as it came."""


@dataclass(frozen=True, eq=False)
class Tradeoff:
    """One detector and its inverter.

    Args:
        weight: λ, the share of reconstruction; None for `ISOLATED`.
        mse: per image, in [0, 1].
        scores: of `best_query_scores` and `average_precision`.
    """

    weight: float | None
    mse: Float[Tensor, " b"]
    scores: dict[str, float]
    reconstructions: Float[Tensor, "b 3 h w"]

    @property
    def name(self) -> str:
        return ISOLATED if self.weight is None else f"λ = {self.weight:g}"


def measure_tradeoff(
    inverter: ModularInverter,
    pictures: PictureSet,
    weight: float | None,
    stage: str = "decoder",
    batch_size: int = 32,
) -> Tradeoff:
    """Measures one detector on pictures with boxes.

    Raises:
        InputError: no DETR, no boxes, or pycocotools is not installed.
    """
    found = reconstruct_stages(inverter, pictures.images, [stage], batch_size)[stage]
    mse = (found - pictures.images).square().mean(dim=(1, 2, 3))
    scores = detection_scores(inverter, pictures, pictures.images, batch_size)
    return Tradeoff(weight, mse, scores, found)


@torch.no_grad()
def detection_scores(
    inverter: ModularInverter,
    pictures: PictureSet,
    images: Float[Tensor, "b 3 h w"],
    batch_size: int = 32,
) -> dict[str, float]:
    """Returns how well the objects of the pictures are found in images of them."""
    path = inverter.path
    if not isinstance(path, DetrPath) or pictures.objects is None:
        raise InputError("Detection needs a DETR and pictures with boxes, see --data and --split.")
    parts = [
        path.embeddings(batch.to(path.device), ["prediction"])["prediction"].cpu()
        for batch in images.split(batch_size)
    ]
    predicted = path.split(torch.cat(parts))
    size = (images.shape[-2], images.shape[-1])
    precision = average_precision(*predicted, pictures.objects, size)
    return best_query_scores(*predicted, pictures.objects) | precision


def read_weight(folder: str) -> float | None:
    """Returns λ of an inverter in a folder; None where it was not tuned end to end."""
    path = Path(folder).expanduser().parent / TUNING
    return json.loads(path.read_text())["reconstruction_weight"] if path.is_file() else None
