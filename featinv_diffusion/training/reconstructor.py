"""Trains a reconstructor: the image of a vision encoder from one of its maps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from featinv_diffusion.backbones.base import LAST, Backbone
from featinv_diffusion.config import to_yaml
from featinv_diffusion.data.crops import CropDataset, DataConfig, to_images
from featinv_diffusion.errors import InputError
from featinv_diffusion.inverters.reconstructor import FOLDER, Reconstructor, load_encoder
from featinv_diffusion.metrics.features import psnr
from featinv_diffusion.seeds import derive_seed
from featinv_diffusion.settings import Depth, Seed, Size, check
from featinv_diffusion.training.config import OptimConfig, RunConfig
from featinv_diffusion.training.entry import stack_items
from featinv_diffusion.training.inverter import (
    N_VALIDATION,
    add_rows,
    draw_rows,
    held_back_config,
    load_images,
    refuse_streaming,
    split_images,
)
from featinv_diffusion.training.loop import fit, make_accelerator


@dataclass(frozen=True)
class ReconstructorModelConfig:
    """The encoder and the sizes of its reconstructor; None is the published one.

    Args:
        family: `reconstructor`.
        backbone: the name under which the saved reconstructor loads the encoder again.
        weights: folder of the encoder where the name does not lead to it yet.
        layer: `last`, or a dotted path that `featinv layers BACKBONE` lists.
        depth, n_heads, feedforward, channels, n_residual: see `Reconstructor`.
    """

    family: str = "reconstructor"
    backbone: str = "hf/google/siglip-base-patch16-256"
    weights: str | None = None
    layer: str = LAST
    depth: Depth = 4
    n_heads: Size | None = None
    feedforward: Size | None = None
    channels: list[Size] | None = None
    n_residual: Depth = 2

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class ReconstructorConfig:
    seed: Seed = 0
    data: DataConfig = field(default_factory=lambda: DataConfig(held_back_per_class=1))
    model: ReconstructorModelConfig = field(default_factory=ReconstructorModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        check(self)


class ReconstructorTask:
    """MSE between the written and the encoder's preprocessed image, in its normalised pixels.

    Args:
        validation: uint8 images `[n, 3, h, w]` that are reconstructed again and again.
        n_pictures: how many of them are drawn.
        batch_size: of validation.
    """

    def __init__(
        self,
        reconstructor: Reconstructor,
        backbone: Backbone,
        validation: Tensor,
        n_pictures: int = 16,
        batch_size: int = 64,
    ):
        self.module: nn.Module = reconstructor
        self.backbone, self.batches = backbone, validation.split(batch_size)
        self.n_pictures = n_pictures

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        self.backbone.to(device)

    def loss(self, module: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        error, _, _ = self._compare(module, to_images(batch["pixels"]))
        return error.mean(), {}

    def _compare(self, module: nn.Module, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the squared error in normalised pixels, the target and what is written.

        In training the encoder computes in the precision of the run: the published features were
        stored as bfloat16.
        """
        with torch.no_grad():
            features, target = self.backbone.features(images), self.backbone.preprocess(images)
        mean, std = (
            target.new_tensor(values)[:, None, None]
            for values in (self.backbone.preprocessing.mean, self.backbone.preprocessing.std)
        )
        target = target * std + mean
        written = module(features).float()
        return ((written - target) / std).square(), target, written

    def validate(self, module: nn.Module) -> tuple[dict[str, float], dict[str, Image.Image]]:
        device = next(module.parameters()).device
        errors: list[Tensor] = []
        values: list[Tensor] = []
        rows = torch.empty(0)
        for pixels in self.batches:
            error, target, written = self._compare(module, to_images(pixels.to(device)))
            written = written.clamp(0, 1)
            errors.append(error.mean(dim=(1, 2, 3)))
            values.append(psnr(written, target))
            rows = add_rows(rows, [target, written], self.n_pictures)
        scalars = {"mse": float(torch.cat(errors).mean()), "psnr": float(torch.cat(values).mean())}
        return scalars, {"reconstructions": draw_rows(rows)}

    def save(self, module: nn.Module, folder: Path) -> None:
        reconstructor: Any = module
        reconstructor.save_pretrained(folder / FOLDER)

    def load(self, module: nn.Module, folder: Path) -> None:
        module.load_state_dict(Reconstructor.from_pretrained(folder / FOLDER).state_dict())


def make_reconstructor(config: ReconstructorModelConfig, backbone: Backbone) -> Reconstructor:
    """Builds a new reconstructor for the features of an encoder."""
    return Reconstructor(
        spec=asdict(backbone.spec),
        image_size=backbone.input_size,
        mean=backbone.preprocessing.mean,
        std=backbone.preprocessing.std,
        depth=config.depth,
        n_heads=config.n_heads,
        feedforward=config.feedforward,
        channels=config.channels,
        n_residual=config.n_residual,
    )


def train_reconstructor(config: ReconstructorConfig) -> Path:
    """Trains to the end and returns the folder that holds `reconstructor/`."""
    refuse_streaming(config.data)
    accelerator = make_accelerator(config.optim, config.run)
    model = config.model
    backbone = load_encoder(model.backbone, model.layer, weights=model.weights)
    _check_size(config.data, backbone)
    torch.manual_seed(derive_seed(config.seed, "initial weights"))
    reconstructor = make_reconstructor(model, backbone)
    images = load_images(config.data)
    kept, held = split_images(images, config.data)
    train = CropDataset(images, kept, config.data, config.seed)
    validation = CropDataset(images, held, held_back_config(config.data), config.seed)
    n_pictures = config.run.n_validation_images
    pixels = stack_items(validation, max(N_VALIDATION, n_pictures))["pixels"]
    task = ReconstructorTask(reconstructor, backbone, pixels, n_pictures, config.optim.batch_size)
    return fit(task, train, accelerator, config.optim, config.run, to_yaml(config))


def _check_size(data: DataConfig, backbone: Backbone) -> None:
    height, width = backbone.input_size
    if data.size < max(height, width):
        raise InputError(
            f"data.size must be at least the {height}×{width} pixels that {backbone.name!r} reads, "
            f"got {data.size}: enlarged pictures would be the targets."
        )
