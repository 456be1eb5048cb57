"""Fine-tunes DETR and its inverse modules end to end for reconstruction and detection."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from featinv_diffusion.boxes import BoxDataset, load_box_records, targets_of
from featinv_diffusion.config import to_yaml
from featinv_diffusion.data import to_images
from featinv_diffusion.errors import InputError
from featinv_diffusion.files import write_text
from featinv_diffusion.inverters.detr_model import load_detr
from featinv_diffusion.inverters.detr_path import DetrPath
from featinv_diffusion.inverters.modular import TUNING, InverseSet
from featinv_diffusion.inverters.path import IMAGE
from featinv_diffusion.metrics.detection import best_query_scores
from featinv_diffusion.metrics.pixels import psnr
from featinv_diffusion.training.detection_loss import HungarianLoss
from featinv_diffusion.training.inverter import (
    InverterConfig,
    TuningConfig,
    draw_rows,
    held_back_config,
    resize,
    split_images,
    squared_error,
)
from featinv_diffusion.training.inverter_modules import load_training_path
from featinv_diffusion.training.loop import fit, make_accelerator


class _EndToEnd(nn.Module):
    """DETR and the inverses of its stages as one forward pass, all of it trainable.

    DETR stays in evaluation mode: no dropout, fixed batch norms.
    """

    def __init__(self, path: DetrPath, inverses: InverseSet, stage: str):
        super().__init__()
        self.path, self.inverses = path, inverses
        self.chain = inverses.chain(stage, path)
        path.requires_grad_(True)
        used = {id(p) for module in self.chain.modules for p in module.parameters()}
        for parameter in inverses.parameters():
            parameter.requires_grad_(id(parameter) in used)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Returns reconstructions and predictions of a batch of images."""
        stage = self.chain.spec.layer
        found = self.path.embeddings(images, {stage, "prediction"})
        return self.chain(found[stage]), found["prediction"]


class TuningTask:
    """λ MSE of normalised pixels + (1 − λ) Hungarian loss of the last decoder layer.

    Args:
        validation: items of a `BoxDataset`, stacked.
    """

    def __init__(
        self,
        path: DetrPath,
        inverses: InverseSet,
        config: TuningConfig,
        validation: Mapping[str, Tensor],
        n_pictures: int = 16,
    ):
        self.module: nn.Module = _EndToEnd(path, inverses, config.stage)
        self.path, self.config = path, config
        self.validation, self.n_pictures = validation, n_pictures
        self.detection = HungarianLoss(path.n_classes)

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        self.detection.to(device)

    def loss(self, module: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        images = to_images(batch["pixels"])
        reconstructed, prediction = module(images)
        truth = resize(images, self.path.input_size)
        mse = squared_error(self.path, IMAGE, reconstructed, truth).mean()
        targets = targets_of(batch["boxes"], batch["box_labels"])
        hungarian, parts = self.detection(*self.path.split(prediction), targets)
        weight = self.config.reconstruction_weight
        return weight * mse + (1 - weight) * hungarian, {"mse": mse, "hungarian": hungarian} | parts

    def validate(self, module: nn.Module) -> tuple[dict[str, float], dict[str, Image.Image]]:
        device = next(module.parameters()).device
        images = to_images(self.validation["pixels"])
        results = [module(x.to(device)) for x in images.split(64)]
        reconstructed = torch.cat([x for x, _ in results]).float().cpu().clamp(0, 1)
        prediction = torch.cat([x for _, x in results]).float().cpu()
        truth = resize(images, self.path.input_size)
        targets = targets_of(self.validation["boxes"], self.validation["box_labels"])
        scalars = {
            "mse": float((reconstructed - truth).square().mean()),
            "psnr": float(psnr(reconstructed, truth).mean()),
            **best_query_scores(*self.path.split(prediction), targets),
        }
        pairs = torch.stack([truth, reconstructed], 1)[: self.n_pictures]
        return scalars, {"reconstructions": draw_rows(pairs)}

    def save(self, module: nn.Module, folder: Path) -> None:
        whole: Any = module
        whole.path.model.save_pretrained(folder / "detector")
        whole.inverses.save_pretrained(folder / "inverter")
        text = json.dumps({"reconstruction_weight": self.config.reconstruction_weight})
        write_text(folder / TUNING, text + "\n")

    def load(self, module: nn.Module, folder: Path) -> None:
        whole: Any = module
        whole.path.model.load_state_dict(load_detr(str(folder / "detector")).state_dict())
        inverses = InverseSet.from_pretrained(folder / "inverter")
        whole.inverses.load_state_dict(inverses.state_dict())


def tune_inverter(config: InverterConfig) -> Path:
    """Fine-tunes to the end and returns the folder that holds `detector/` and `inverter/`."""
    accelerator = make_accelerator(config.optim, config.run, config.seed)
    path = load_training_path(config.model)
    if not isinstance(path, DetrPath):
        raise InputError(f"Fine-tuning is for DETR, but {path.name!r} is of family {path.family}.")
    inverses = InverseSet.from_pretrained(str(config.tuning.inverter))
    records = load_box_records(config.data)
    kept, held = split_images(records, config.data)
    train = BoxDataset(records, kept, config.data, config.seed)
    validation = BoxDataset(records, held, held_back_config(config.data), config.seed)
    task = TuningTask(
        path, inverses, config.tuning, stack_items(validation, 250), config.run.n_validation_images
    )
    return fit(task, train, accelerator, config.optim, config.run, to_yaml(config))


def stack_items(dataset: BoxDataset, n: int) -> dict[str, Tensor]:
    """Stacks n items that are spread evenly over a data set, tensors only.

    Raises:
        InputError: the data set is empty.
    """
    if not len(dataset):
        raise InputError("Validation images are needed: set data.held_back_per_class to 1 or more.")
    positions = torch.linspace(0, len(dataset) - 1, min(n, len(dataset))).round().long().tolist()
    items = [dataset[i] for i in positions]
    return {
        name: torch.stack([x[name] for x in items]) for name in ("pixels", "boxes", "box_labels")
    }
