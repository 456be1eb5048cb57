"""Trains the small timm classifiers of the tiny family, stored as transformers' timm wrapper.

accelerate launch -m train.tiny_family.classifier --config FILE key=value
"""

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

from featinv_diffusion.cli.train import run_recipe
from featinv_diffusion.config import to_yaml
from featinv_diffusion.data.crops import DataConfig, open_training_images, to_images
from featinv_diffusion.errors import InputError
from featinv_diffusion.settings import Positive, Probability, Seed, check
from featinv_diffusion.training.config import OptimConfig, RunConfig
from featinv_diffusion.training.entry import load_component, make_datasets, stack_images
from featinv_diffusion.training.loop import fit, make_accelerator


@dataclass(frozen=True)
class ClassifierModelConfig:
    """A timm architecture; `arguments` go to `timm.create_model`.

    Args:
        init: folder of a trained classifier of this architecture whose weights to begin with.
        teacher: folder of a trained classifier whose class probabilities are the targets too.
        teacher_weight: share of the distillation loss; the rest is the labels' cross-entropy.
        temperature: of the softmax of both in the distillation loss.
    """

    architecture: str = "convnext_atto"
    arguments: dict[str, Any] = field(default_factory=dict)
    label_smoothing: Probability = 0.1
    init: str | None = None
    teacher: str | None = None
    teacher_weight: Probability = 0.5
    temperature: Positive = 2.0

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class ClassifierConfig:
    seed: Seed = 0
    data: DataConfig = field(default_factory=DataConfig)
    model: ClassifierModelConfig = field(default_factory=ClassifierModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        check(self)


class ClassifierTask:
    """Cross-entropy with label smoothing on normalised pixels, and distillation from a teacher."""

    def __init__(
        self,
        wrapper: TimmWrapperForImageClassification,
        config: ClassifierModelConfig,
        validation: tuple[Tensor, Tensor],
    ):
        self.wrapper, self.config, self.validation = wrapper, config, validation
        self.teacher: nn.Module | None = _load_teacher(wrapper, config.teacher)
        self.module: nn.Module = wrapper.timm_model
        statistics = wrapper.config.pretrained_cfg
        self.mean = torch.tensor(statistics["mean"])[:, None, None]
        self.std = torch.tensor(statistics["std"])[:, None, None]

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        if self.teacher is not None:
            self.teacher.to(device)

    def loss(self, module: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        pixels = (to_images(batch["pixels"]) - self.mean) / self.std
        logits = module(pixels).float()
        smoothing = self.config.label_smoothing
        loss = F.cross_entropy(logits, batch["label"], label_smoothing=smoothing)
        scalars = {"accuracy": (logits.argmax(1) == batch["label"]).float().mean()}
        if self.teacher is not None:
            with torch.no_grad():
                wanted = self.teacher(pixels).float()
            scalars["distillation"] = distillation_loss(logits, wanted, self.config.temperature)
            weight = self.config.teacher_weight
            loss = (1 - weight) * loss + weight * scalars["distillation"]
        return loss, scalars

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


def distillation_loss(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T² KL(teacher ‖ student) of softmaxes at temperature T (Hinton et al. 2015, section 2)."""
    student = F.log_softmax(logits / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=1)
    divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return divergence * temperature**2


def _load_teacher(
    student: TimmWrapperForImageClassification, folder: str | None
) -> nn.Module | None:
    """The frozen teacher, which must know the same classes and read pixels normalised alike."""
    if folder is None:
        return None
    teacher = load_component(TimmWrapperForImageClassification, folder)
    keys = ("mean", "std")
    ours, theirs = student.config.pretrained_cfg, teacher.config.pretrained_cfg
    alike = all(list(ours[key]) == list(theirs[key]) for key in keys)
    if teacher.config.id2label != student.config.id2label or not alike:
        raise InputError(
            f"The teacher in {folder} must know the same classes in the same order and normalise "
            "pixels alike, but it does not. Train it on the same data."
        )
    return teacher.timm_model


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


def _copy_weights(source: nn.Module, target: nn.Module, folder: str) -> None:
    try:
        target.load_state_dict(source.state_dict())
    except RuntimeError as error:
        raise InputError(
            f"model.init must hold a classifier of this architecture and these classes, but "
            f"{folder} does not: {str(error).splitlines()[1].strip()}"
        ) from None


def train_classifier(config: ClassifierConfig) -> Path:
    """Trains to the end and returns the folder that holds `classifier/`."""
    accelerator = make_accelerator(config.optim, config.run)
    torch.manual_seed(config.seed)
    images = open_training_images(config.data)
    train, held = make_datasets(images, config.data, config.seed)
    wrapper = make_classifier(config.model, images.class_names or [], config.data.size)
    if config.model.init is not None:
        init = load_component(TimmWrapperForImageClassification, config.model.init)
        _copy_weights(init, wrapper, config.model.init)
    task = ClassifierTask(wrapper, config.model, stack_images(held))
    return fit(task, train, accelerator, config.optim, config.run, to_yaml(config))


if __name__ == "__main__":
    run_recipe(ClassifierConfig, train_classifier, __doc__)
