"""Trains a small SigLIP on images and the names of their classes, or with SigLIP 2's extra losses.

A batch holds few distinct texts, so the images are compared with the text of every class of the
data set, and each image has one match.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTokenizer, SiglipImageProcessor, SiglipModel

from featinv_diffusion.config import to_yaml
from featinv_diffusion.data import DataConfig, load_records, read_class_titles, to_images
from featinv_diffusion.errors import InputError
from featinv_diffusion.seeds import derive_seed
from featinv_diffusion.tensors import read_tensors, write_tensors
from featinv_diffusion.training.config import OptimConfig, RunConfig
from featinv_diffusion.training.contrastive_model import (
    ContrastiveModelConfig,
    ContrastiveNetworks,
    make_siglip,
    tokenize,
)
from featinv_diffusion.training.entry import make_datasets, stack_images
from featinv_diffusion.training.loop import fit, make_accelerator
from featinv_diffusion.training.noise import SampleNoise
from featinv_diffusion.training.self_distillation import random_crops, random_mask
from featinv_diffusion.training.tokenizer import make_tokenizer

STATE_FORMAT = "featinv contrastive training state"


@dataclass(frozen=True)
class ContrastiveConfig:
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    model: ContrastiveModelConfig = field(default_factory=ContrastiveModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)


def sigmoid_loss(logits: Float[Tensor, "b k"], labels: Int[Tensor, " b"]) -> Float[Tensor, ""]:
    """−Σ log σ(z · logit) / b, z = 1 for the image's own text and −1 for all others.

    Zhai et al. 2023, algorithm 1, with the texts of all classes in place of those of the batch.
    """
    own = F.one_hot(labels, logits.shape[1]).bool()
    return -F.logsigmoid(torch.where(own, logits, -logits)).sum() / len(logits)


class ContrastiveTask:
    """The sigmoid loss of images and class texts, and perhaps the losses of `SelfDistillation`."""

    def __init__(
        self,
        networks: ContrastiveNetworks,
        tokenizer: CLIPTokenizer,
        config: ContrastiveModelConfig,
        validation: tuple[Tensor, Tensor],
    ):
        self.networks, self.tokenizer, self.config = networks, tokenizer, config
        self.module: nn.Module = networks
        self.validation = validation

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        pass  # the loop moves the module, and there is nothing else

    def loss(self, module: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        pixels = normalise(to_images(batch["pixels"]))
        draw = SampleNoise(batch["seed"], pixels.device)
        kept = self._draw_kept(draw)
        logits, extra = module(pixels, kept, self._draw_views(draw, pixels))
        scalars = {"contrastive": sigmoid_loss(logits, batch["label"])}
        scalars["accuracy"] = (logits.argmax(1) == batch["label"]).float().mean()
        loss, settings = scalars["contrastive"], self.config.self_distillation
        if settings is not None:
            loss = loss + settings.masked_weight * extra["masked"]
            loss = loss + settings.local_weight * extra["local"]
        return loss, {**scalars, **extra}

    def _draw_kept(self, draw: SampleNoise) -> Tensor | None:
        """Drawn first, and before the extra views, so that all recipes see the same patches."""
        n_patches = self.networks.siglip.vision_model.embeddings.num_patches
        uniform = draw.uniform(n_patches)
        end = self.config.full_after
        if end is not None and int(self.networks.step) >= end:
            return None
        n_kept = max(1, round((1 - self.config.patch_drop_rate) * n_patches))
        return None if n_kept == n_patches else uniform.argsort(dim=1)[:, :n_kept]

    def _draw_views(self, draw: SampleNoise, pixels: Tensor) -> tuple[Tensor, Tensor] | None:
        settings = self.config.self_distillation
        if settings is None:
            return None
        n_patches = self.networks.siglip.vision_model.embeddings.num_patches
        n = min(settings.n_images, len(pixels))
        masked = random_mask(draw.uniform(n_patches)[:n], settings.mask_rate)
        crops = random_crops(pixels[:n], settings.crop_size, draw.uniform(2)[:n])
        return masked, crops

    def validate(self, module: nn.Module) -> tuple[dict[str, float], dict[str, Image.Image]]:
        """Zero-shot classification of the held-back images by the texts of the classes."""
        images, labels = self.validation
        device = next(module.parameters()).device
        parts = [module(normalise(x.to(device)))[0].cpu() for x in images.split(250)]
        logits = torch.cat(parts)
        top5 = logits.topk(min(5, logits.shape[1])).indices
        return {
            "loss": float(sigmoid_loss(logits, labels)),
            "top1": float((top5[:, 0] == labels).float().mean()),
            "top5": float((top5 == labels[:, None]).any(1).float().mean()),
            "scale": float(self.networks.siglip.logit_scale.exp()),
            "bias": float(self.networks.siglip.logit_bias),
        }, {}

    def save(self, module: nn.Module, folder: Path) -> None:
        """Writes `backbone/`, the vision tower; `model/`, both; and what only training needs."""
        networks: Any = module
        vision = networks.siglip.vision_model
        size = vision.config.image_size
        vision.save_pretrained(folder / "backbone")
        processor = SiglipImageProcessor(size={"height": size, "width": size})
        for name in ("backbone", "model"):
            processor.save_pretrained(folder / name)
        networks.siglip.save_pretrained(folder / "model")
        self.tokenizer.save_pretrained(str(folder / "model"))
        rest = {k: v for k, v in networks.state_dict().items() if not k.startswith("siglip.")}
        write_tensors(folder / "training.safetensors", rest, {}, STATE_FORMAT)

    def load(self, module: nn.Module, folder: Path) -> None:
        networks: Any = module
        networks.siglip.load_state_dict(SiglipModel.from_pretrained(folder / "model").state_dict())
        advice = "Resume from another checkpoint."
        path = folder / "training.safetensors"
        rest, _ = read_tensors(path, STATE_FORMAT, advice)
        wanted = {name for name in networks.state_dict() if not name.startswith("siglip.")}
        if strange := sorted(wanted ^ rest.keys()):
            raise InputError(
                f"{path} must hold the training state of this recipe and no other, but differs in "
                f"{len(strange)} tensors, e.g. {strange[0]!r}. {advice}"
            )
        networks.load_state_dict(rest, strict=False)  # the model's own were loaded above


def normalise(images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    """SigLIP's preprocessing: [0, 1] to [−1, 1]."""
    return (images - 0.5) / 0.5


def make_networks(
    config: ContrastiveModelConfig, image_size: int, titles: list[str]
) -> tuple[ContrastiveNetworks, CLIPTokenizer]:
    """Builds towers and tokenizer for classes of these titles.

    SigLIP's weights are drawn first, so that equal seeds give all recipes the same.
    """
    settings = config.self_distillation
    if settings is not None and not _fits(settings.crop_size, image_size, config.patch_size):
        raise InputError(
            "model.self_distillation.crop_size must be a multiple of model.patch_size "
            f"({config.patch_size}) below data.size ({image_size}), but {settings.crop_size} came."
        )
    texts = [f"a photo of a {title}" for title in titles]
    tokenizer = make_tokenizer(texts, config.text_length)
    ids = tokenize(tokenizer, texts, config.text_length)
    siglip = make_siglip(config, image_size, tokenizer, len(texts))
    return ContrastiveNetworks(siglip, ids, settings), tokenizer


def _fits(crop_size: int, image_size: int, patch_size: int) -> bool:
    return crop_size % patch_size == 0 and 0 < crop_size < image_size


def find_titles(class_names: Sequence[str], path: str | None) -> list[str]:
    """Returns the title of each class from a file of titles; without one, the classes' names.

    Raises:
        InputError: classes without a title in the file.
    """
    if path is None:
        return list(class_names)
    titles = read_class_titles(path)
    if untitled := [name for name in class_names if name not in titles]:
        raise InputError(
            f"{path} must give each class a title, which the encoder reads, but these have none: "
            f"{', '.join(untitled)}. Write it behind the name."
        )
    return [titles[name] for name in class_names]


def train_contrastive(config: ContrastiveConfig) -> Path:
    """Trains to the end and returns the folder that holds `backbone/` and `model/`."""
    accelerator = make_accelerator(config.optim, config.run, config.seed)
    torch.manual_seed(derive_seed(config.seed, "initial weights"))
    records = load_records(config.data)
    train, held = make_datasets(records, config.data, config.seed)
    titles = find_titles(records.class_names, config.data.classes)
    networks, tokenizer = make_networks(config.model, config.data.size, titles)
    task = ContrastiveTask(networks, tokenizer, config.model, stack_images(held))
    return fit(task, train, accelerator, config.optim, config.run, to_yaml(config))
