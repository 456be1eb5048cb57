"""Trains a small DETR on the stages of a trained classifier; all decoder layers are supervised.

accelerate launch -m train.tiny_family.detector --config FILE key=value
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import DetrForObjectDetection, TimmWrapperForImageClassification

from featinv_diffusion.cli.train import run_recipe
from featinv_diffusion.config import to_yaml
from featinv_diffusion.data.boxes import BoxDataset, open_boxed_images, targets_of
from featinv_diffusion.data.crops import DataConfig, split_held_back, to_images
from featinv_diffusion.inverters.detr import DetrPath, load_detr, make_detr
from featinv_diffusion.metrics.detection import best_query_scores
from featinv_diffusion.seeds import derive_seed
from featinv_diffusion.settings import Depth, NotNegative, Seed, Size, check
from featinv_diffusion.training.config import OptimConfig, RunConfig
from featinv_diffusion.training.entry import load_component, stack_items
from featinv_diffusion.training.inverter import HungarianLoss, held_back_config
from featinv_diffusion.training.loop import fit, make_accelerator


@dataclass(frozen=True)
class DetectorModelConfig:
    """Sizes of the transformer, and the classifier whose stages it stands on.

    Args:
        classifier: folder of a trained timm wrapper.
        train_backbone: train its convolutions too; its batch norms are fixed either way.
        max_boxes: targets that are kept of an image.
    """

    classifier: str = ""
    train_backbone: bool = False
    d_model: Size = 128
    encoder_layers: Depth = 3
    decoder_layers: Depth = 3
    n_heads: Size = 4
    feedforward: Size = 256
    n_queries: Size = 8
    no_object: NotNegative = 0.1
    max_boxes: Size = 100

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class DetectorConfig:
    seed: Seed = 0
    data: DataConfig = field(default_factory=DataConfig)
    model: DetectorModelConfig = field(default_factory=DetectorModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        check(self)


class _Predictions(nn.Module):
    """DETR's predictions of every decoder layer as one forward pass."""

    def __init__(self, path: DetrPath, train_backbone: bool):
        super().__init__()
        self.path = path
        path.requires_grad_(True)
        detr: Any = path.model.model
        detr.backbone.requires_grad_(train_backbone)
        self.layers = [f"decoder.{i + 1}" for i in range(path.model.config.decoder_layers)]

    def forward(self, images: Tensor) -> list[Tensor]:
        states = self.path.embeddings(images, self.layers)
        return [self.path.advance("prediction", states[x])["prediction"] for x in self.layers]


class DetectorTask:
    """The Hungarian loss, summed over decoder layers.

    Args:
        validation: items of a `BoxDataset`, stacked.
    """

    def __init__(
        self, path: DetrPath, config: DetectorModelConfig, validation: Mapping[str, Tensor]
    ):
        self.module: nn.Module = _Predictions(path, config.train_backbone)
        self.path, self.validation = path, validation
        self.criterion = HungarianLoss(path.n_classes, config.no_object)

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        self.criterion.to(device)

    def loss(self, module: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        targets = targets_of(batch["boxes"], batch["box_labels"])
        layers = module(to_images(batch["pixels"]))
        results = [self.criterion(*self.path.split(x), targets) for x in layers]
        return torch.stack([total for total, _ in results]).sum(), results[-1][1]

    def validate(self, module: nn.Module) -> tuple[dict[str, float], dict[str, Image.Image]]:
        device = next(module.parameters()).device
        images = to_images(self.validation["pixels"])
        prediction = torch.cat([module(x.to(device))[-1].float().cpu() for x in images.split(64)])
        targets = targets_of(self.validation["boxes"], self.validation["box_labels"])
        return best_query_scores(*self.path.split(prediction), targets), {}

    def save(self, module: nn.Module, folder: Path) -> None:
        whole: Any = module
        whole.path.model.save_pretrained(folder / "detector")

    def load(self, module: nn.Module, folder: Path) -> None:
        whole: Any = module
        whole.path.model.load_state_dict(load_detr(str(folder / "detector")).state_dict())


def make_detector(config: DetectorModelConfig, class_names: list[str]) -> DetrForObjectDetection:
    """Builds a DETR with new transformer layers."""
    return make_detr(
        load_component(TimmWrapperForImageClassification, config.classifier),
        class_names,
        d_model=config.d_model,
        encoder_layers=config.encoder_layers,
        decoder_layers=config.decoder_layers,
        encoder_attention_heads=config.n_heads,
        decoder_attention_heads=config.n_heads,
        encoder_ffn_dim=config.feedforward,
        decoder_ffn_dim=config.feedforward,
        num_queries=config.n_queries,
    )


def train_detector(config: DetectorConfig) -> Path:
    """Trains to the end and returns the folder that holds `detector/`."""
    accelerator = make_accelerator(config.optim, config.run)
    torch.manual_seed(derive_seed(config.seed, "initial weights"))
    images = open_boxed_images(config.data)
    model = make_detector(config.model, images.class_names or [])
    size = (config.data.size, config.data.size)
    path = DetrPath(model, name="detr", input_size=size)
    kept, held = split_held_back(images.labels or [], config.data.held_back_per_class)
    n_boxes = config.model.max_boxes
    train = BoxDataset(images, kept, config.data, config.seed, n_boxes)
    held_config = held_back_config(config.data)
    validation = BoxDataset(images, held, held_config, config.seed, n_boxes)
    task = DetectorTask(path, config.model, stack_items(validation, 1000))
    return fit(task, train, accelerator, config.optim, config.run, to_yaml(config))


if __name__ == "__main__":
    run_recipe(DetectorConfig, train_detector, __doc__)
