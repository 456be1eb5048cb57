"""Trains the small timm classifiers of the tiny family, stored as transformers' timm wrapper."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

from featinv_diffusion.config import to_yaml
from featinv_diffusion.data import DataConfig, load_records, read_class_titles, to_images
from featinv_diffusion.training.config import OptimConfig, RunConfig
from featinv_diffusion.training.entry import make_datasets, stack_images
from featinv_diffusion.training.loop import fit, make_accelerator


@dataclass(frozen=True)
class ClassifierModelConfig:
    """A timm architecture; `arguments` go to `timm.create_model`."""

    architecture: str = "convnext_atto"
    arguments: dict[str, Any] = field(default_factory=dict)
    label_smoothing: float = 0.1


@dataclass(frozen=True)
class ClassifierConfig:
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    model: ClassifierModelConfig = field(default_factory=ClassifierModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)


class ClassifierTask:
    """Cross-entropy with label smoothing on normalised pixels."""

    def __init__(
        self,
        wrapper: TimmWrapperForImageClassification,
        label_smoothing: float,
        validation: tuple[Tensor, Tensor],
    ):
        self.wrapper, self.label_smoothing, self.validation = wrapper, label_smoothing, validation
        self.module: nn.Module = wrapper.timm_model
        statistics = wrapper.config.pretrained_cfg
        self.mean = torch.tensor(statistics["mean"])[:, None, None]
        self.std = torch.tensor(statistics["std"])[:, None, None]

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        self.mean, self.std = self.mean.to(device), self.std.to(device)

    def loss(self, module: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        logits = module((to_images(batch["pixels"]) - self.mean) / self.std)
        loss = F.cross_entropy(logits.float(), batch["label"], label_smoothing=self.label_smoothing)
        return loss, {"accuracy": (logits.argmax(1) == batch["label"]).float().mean()}

    def validate(self, module: nn.Module) -> tuple[dict[str, float], dict[str, Image.Image]]:
        images, labels = self.validation
        parameter = next(module.parameters())
        logits = torch.cat(
            [
                module((x.to(parameter.device) - self.mean) / self.std).cpu()
                for x in images.split(250)
            ]
        )
        top5 = logits.topk(min(5, logits.shape[1])).indices
        return {
            "top1": float((top5[:, 0] == labels).float().mean()),
            "top5": float((top5 == labels[:, None]).any(1).float().mean()),
        }, {}

    def save(self, module: nn.Module, folder: Path) -> None:
        self.wrapper.save_pretrained(folder / "classifier")

    def load(self, module: nn.Module, folder: Path) -> None:
        loaded = TimmWrapperForImageClassification.from_pretrained(folder / "classifier")
        module.load_state_dict(loaded.timm_model.state_dict())


def make_classifier(
    config: ClassifierModelConfig, class_names: list[str], size: int
) -> TimmWrapperForImageClassification:
    """Builds the wrapper with preprocessing statistics of ImageNet and readable class names."""
    make_config: Any = TimmWrapperConfig
    return TimmWrapperForImageClassification(
        make_config(
            architecture=config.architecture,
            num_labels=len(class_names),
            id2label=dict(enumerate(class_names)),
            label2id={name: i for i, name in enumerate(class_names)},
            model_args=config.arguments,
            pretrained_cfg={
                "architecture": config.architecture,
                "input_size": (3, size, size),
                "mean": (0.485, 0.456, 0.406),
                "std": (0.229, 0.224, 0.225),
                "interpolation": "bicubic",
                "crop_pct": 1.0,
                "num_classes": len(class_names),
            },
        )
    )


def train_classifier(config: ClassifierConfig) -> Path:
    """Trains to the end and returns the folder that holds `classifier/`."""
    accelerator = make_accelerator(config.optim, config.run, config.seed)
    torch.manual_seed(config.seed)
    records = load_records(config.data)
    train, held = make_datasets(records, config.data, config.seed)
    titles = read_class_titles(config.data.classes)
    names = [titles.get(name, name) for name in records.class_names]
    wrapper = make_classifier(config.model, names, config.data.size)
    task = ClassifierTask(wrapper, config.model.label_smoothing, stack_images(held))
    return fit(task, train, accelerator, config.optim, config.run, to_yaml(config))
