"""Trains the inverse modules of a model, each on its own and all in one pass over the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from featinv_diffusion.boxes import coco_annotations, load_box_records
from featinv_diffusion.config import to_yaml
from featinv_diffusion.data import (
    CropDataset,
    DataConfig,
    Records,
    load_records,
    split_held_back,
    to_images,
)
from featinv_diffusion.errors import InputError
from featinv_diffusion.inverters.modular import InverseSet
from featinv_diffusion.inverters.path import IMAGE, ForwardPath
from featinv_diffusion.metrics.pixels import psnr
from featinv_diffusion.seeds import derive_seed
from featinv_diffusion.training.config import OptimConfig, RunConfig
from featinv_diffusion.training.inverter_modules import (
    InverterModelConfig,
    counted,
    load_training_path,
    make_inverses,
    measure_statistics,
    resize,
    set_statistics,
)
from featinv_diffusion.training.loop import fit, make_accelerator

N_VALIDATION = 250
"""Images, or more pictures if those are asked for, that the figures of validation are of."""


@dataclass(frozen=True)
class TuningConfig:
    """End-to-end fine-tuning of DETR and its inverses with λ MSE + (1 − λ) Hungarian loss.

    Args:
        inverter: folder of the trained inverse modules to begin with; None trains modules in
            isolation instead.
        stage: from which images are reconstructed.
        reconstruction_weight: λ in [0, 1]. At 0 the gradients of the inverses are zero, but weight
            decay acts on them and their batch norms go on counting.
    """

    inverter: str | None = None
    stage: str = "decoder"
    reconstruction_weight: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.reconstruction_weight <= 1:
            raise InputError(
                "tuning.reconstruction_weight (λ) must lie in [0, 1], "
                f"but {self.reconstruction_weight} came."
            )


@dataclass(frozen=True)
class InverterConfig:
    seed: int = 0
    data: DataConfig = field(default_factory=lambda: DataConfig(held_back_per_class=1))
    model: InverterModelConfig = field(default_factory=InverterModelConfig)
    tuning: TuningConfig = field(default_factory=TuningConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)


class InverterTask:
    """Σ over modules of MSE / variance: 1 is what the mean embedding would score.

    The division makes the losses of all modules alike in size, which a common limit of the
    gradient's norm needs; to Adam it makes no difference. Images are compared in the model's
    normalised pixels.

    Args:
        validation: uint8 images `[n, 3, h, w]` that are reconstructed again and again.
        statistics: (mean, std) per channel of every stage that is read or written.
        n_pictures: how many of them are drawn.
        batch_size: of validation.
    """

    def __init__(
        self,
        inverses: InverseSet,
        path: ForwardPath,
        validation: Tensor,
        statistics: Mapping[str, tuple[Tensor, Tensor]],
        n_pictures: int = 16,
        batch_size: int = 64,
    ):
        self.module: nn.Module = inverses
        self.path, self.batches = path, validation.split(batch_size)
        self.n_validation, self.n_pictures = len(validation), n_pictures
        self.targets = {stage: inverses[stage].writes.layer for stage in inverses.stages}
        self.variance = {
            stage: _target_variance(path, target, statistics[target][1])
            for stage, target in self.targets.items()
        }

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        self.path.to(device)

    def loss(self, module: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        embeddings = self._embed(to_images(batch["pixels"]))
        losses = self._relative_losses(module(embeddings), embeddings)
        return torch.stack(list(losses.values())).sum(), losses

    @torch.no_grad()
    def _embed(self, images: Tensor) -> dict[str, Tensor]:
        with torch.autocast(images.device.type, enabled=False):
            embeddings = self.path.embeddings(images, {*self.targets, *self.targets.values()})
        return embeddings | {IMAGE: resize(images, self.path.input_size)}

    def _relative_losses(
        self, written: Mapping[str, Tensor], embeddings: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        return {
            stage: squared_error(self.path, target, written[stage], embeddings[target]).mean()
            / self.variance[stage]
            for stage, target in self.targets.items()
        }

    def validate(self, module: nn.Module) -> tuple[dict[str, float], dict[str, Image.Image]]:
        inverses: Any = module
        stages = inverses.chainable()
        device = next(module.parameters()).device
        totals: dict[str, float] = {}
        rows = torch.empty(0)
        for pixels in self.batches:
            embeddings = self._embed(to_images(pixels.to(device)))
            scalars = self._relative_losses(module(embeddings), embeddings)
            chained = {s: inverses.chain(s).invert(embeddings[s]) for s in stages}
            truth = embeddings[IMAGE]
            scalars |= {f"psnr_{s}": psnr(x, truth).mean() for s, x in chained.items()}
            for name, value in scalars.items():
                totals[name] = totals.get(name, 0.0) + float(value) * len(pixels)
            rows = add_rows(rows, [truth, *chained.values()], self.n_pictures)
        scalars = {name: value / self.n_validation for name, value in totals.items()}
        return scalars, {"reconstructions": draw_rows(rows)}

    def save(self, module: nn.Module, folder: Path) -> None:
        inverses: Any = module
        inverses.save_pretrained(folder / "inverter")

    def load(self, module: nn.Module, folder: Path) -> None:
        module.load_state_dict(InverseSet.from_pretrained(folder / "inverter").state_dict())


def squared_error(path: ForwardPath, stage: str, written: Tensor, target: Tensor) -> Tensor:
    """Returns the element-wise error that counts: in pixels normalised, without constant tokens."""
    error = written.float() - target.float()
    if stage == IMAGE:
        error = error / error.new_tensor(path.preprocessing.std)[:, None, None]
    return counted(path, stage, error).square()


def add_rows(rows: Tensor, pictures: Sequence[Tensor], n: int) -> Tensor:
    """Returns the first n rows of k pictures `[n, k, 3, h, w]`, of those there are and k batches.

    `rows` is empty at first; once there are n, nothing is copied.
    """
    missing = n - len(rows)
    if missing <= 0:
        return rows
    new = torch.stack([batch[:missing] for batch in pictures], 1).cpu()
    return torch.cat([rows, new]) if len(rows) else new


def draw_rows(images: Tensor) -> Image.Image:
    """Draws `[n, k, 3, h, w]` as two blocks of rows of k pictures, one row an image."""
    k = images.shape[1]
    return to_pil_image(make_grid(images.flatten(0, 1), nrow=2 * k, padding=1))


def held_back_config(config: DataConfig) -> DataConfig:
    """Returns how validation images are cut: as wholes or central squares, never flipped."""
    crop = "squash" if config.crop == "squash" else "center"
    return replace(config, crop=crop, hflip=False, vflip=False)


def stack_pixels(dataset: CropDataset, n: int) -> Tensor:
    """Returns n images, or all, spread evenly over the data: uint8 `[n, 3, s, s]`."""
    n = min(n, len(dataset))
    positions = torch.linspace(0, len(dataset) - 1, n).round().long().tolist()
    return torch.stack([dataset[position]["pixels"] for position in positions])


def train_inverter(config: InverterConfig) -> Path:
    """Trains to the end and returns the folder that holds `inverter/`."""
    refuse_streaming(config.data)
    if config.tuning.inverter is not None:
        from featinv_diffusion.training.inverter_tuning import tune_inverter

        return tune_inverter(config)
    accelerator = make_accelerator(config.optim, config.run, config.seed)
    torch.manual_seed(derive_seed(config.seed, "initial weights"))
    path = load_training_path(config.model).to(accelerator.device)
    inverses = make_inverses(config.model, path)
    records = load_images(config.data)
    kept, held = split_images(records, config.data)
    train = CropDataset(records, kept, config.data, config.seed)
    validation = CropDataset(records, held, held_back_config(config.data), config.seed)
    n = 1 if config.run.dry_run else config.model.statistics_images
    statistics = measure_statistics(path, _stages_of(inverses), to_images(stack_pixels(train, n)))
    if config.model.standardise and not config.run.dry_run:
        set_statistics(inverses, statistics)
    n_pictures = config.run.n_validation_images
    pixels = stack_pixels(validation, max(N_VALIDATION, n_pictures))
    task = InverterTask(inverses, path, pixels, statistics, n_pictures, config.optim.batch_size)
    return fit(task, train, accelerator, config.optim, config.run, to_yaml(config))


def refuse_streaming(config: DataConfig) -> None:
    """Raises `InputError` for data that are only read in passing."""
    if config.streaming:
        raise InputError(
            "Inverters are trained on images that can be read in any order, but data.streaming is "
            "true. Name a folder or a table, and leave data.streaming out."
        )


def split_images(records: Records, config: DataConfig) -> tuple[list[int], list[int]]:
    """Returns (training, held-back) indices.

    Raises:
        InputError: one side has none.
    """
    kept, held = split_held_back(records.labels, config.held_back_per_class)
    if not held:
        raise InputError("Validation images are needed: set data.held_back_per_class to 1 or more.")
    if not kept:
        raise InputError(
            f"Images to train on are needed, but data.held_back_per_class="
            f"{config.held_back_per_class} holds back all {len(held)}. Set it lower."
        )
    return kept, held


def load_images(config: DataConfig) -> Records:
    """Opens any images; COCO's have no folders of classes."""
    root = Path(config.root or "").expanduser()
    is_coco = bool(config.root) and coco_annotations(root, config.split).is_file()
    return load_box_records(config) if is_coco else load_records(config)


def _stages_of(inverses: InverseSet) -> list[str]:
    read: Sequence[str] = inverses.stages
    return list(dict.fromkeys([*read, *(inverses[stage].writes.layer for stage in read)]))


def _target_variance(path: ForwardPath, stage: str, std: Tensor) -> float:
    if stage == IMAGE:
        std = std / std.new_tensor(path.preprocessing.std)
    return max(float(std.square().mean()), 1e-12)
