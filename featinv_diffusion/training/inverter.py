"""Trains the inverse modules of a model, each on its own and all in one pass over the data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid
from transformers import TimmWrapperForImageClassification
from transformers.loss.loss_for_object_detection import HungarianMatcher, ImageLoss

from featinv_diffusion.backbones import wrap_model
from featinv_diffusion.backbones.names import canonical_name
from featinv_diffusion.config import to_yaml
from featinv_diffusion.data.boxes import BoxDataset, coco_annotations, open_boxed_images, targets_of
from featinv_diffusion.data.crops import (
    CropDataset,
    DataConfig,
    open_training_images,
    split_held_back,
    to_images,
)
from featinv_diffusion.data.sets import ImageSet
from featinv_diffusion.errors import InputError
from featinv_diffusion.files import write_text
from featinv_diffusion.inverters.blocks import ConvInverse, InverseModule, published_layers
from featinv_diffusion.inverters.detr import (
    PUBLISHED_SIZE,
    DecoderInverse,
    DetrPath,
    EncoderInverse,
    HeadInverse,
    load_detr,
)
from featinv_diffusion.inverters.modular import (
    TUNING,
    InverseSet,
    PathInfo,
    classifier_path,
    load_path,
)
from featinv_diffusion.inverters.path import IMAGE, ForwardPath
from featinv_diffusion.inverters.swin import SwinInverse
from featinv_diffusion.inverters.vit import BlocksInverse, VitPath
from featinv_diffusion.metrics.detection import best_query_scores
from featinv_diffusion.metrics.features import psnr
from featinv_diffusion.seeds import derive_seed
from featinv_diffusion.settings import Depth, Pictures, Positive, Probability, Seed, Size, check
from featinv_diffusion.training.config import OptimConfig, RunConfig
from featinv_diffusion.training.entry import load_component, stack_items
from featinv_diffusion.training.loop import fit, make_accelerator

# ---- DETR's set prediction loss, from transformers' matcher and criterion ------------------------


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


# ---- From the configuration of an inverter to its forward path and new inverse modules -----------


@dataclass(frozen=True)
class ModuleConfig:
    """One inverse module; only the fields of its kind are read.

    Args:
        kind: `conv` ends at the image; `encoder`, `decoder` and `head` belong to DETR, `blocks`
            to a ViT or DeiT, `swin` to a Swin.
        writes: the stage that it is trained to give back.
        published: of `conv`: layers by a name of `published_layers`, instead of the next three.
        channels, kernels, strides, positions: of `conv`, see `ConvInverse`.
        depth, n_heads: of `encoder`, `decoder`, `blocks` and `swin`.
        feedforward, linear_output: of `encoder` and `decoder`.
        mlp_ratio: of `blocks` and `swin`.
        window: of `swin`, the side of its windows in cells.
        hidden: of `head`.
    """

    kind: Literal["conv", "encoder", "decoder", "head", "blocks", "swin"] = "conv"
    writes: str = IMAGE
    published: str | None = None
    channels: tuple[Size, ...] = ()
    kernels: tuple[Size, ...] = ()
    strides: tuple[Size, ...] = ()
    positions: bool = False
    depth: Depth = 6
    n_heads: Size = 8
    feedforward: Size = 2048
    linear_output: bool = True
    mlp_ratio: Positive = 4.0
    window: Size = 7
    hidden: tuple[Size, Size] = (512, 256)

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class InverterModelConfig:
    """The model that is inverted, and its inverse modules by the stage that each reads.

    Args:
        family: `detr`, `vit` (also for a DeiT) or `swin`.
        model: the name under which the saved inverter loads the model again.
        weights: folder of the model where the name does not lead to it yet: a DETR, or a timm
            wrapper of transformers.
        input_size: (h, w) of DETR's images; classifiers know their own.
        standardise: measure mean and std per channel of every embedding on `statistics_images`
            images and keep them in the modules; the published ones read raw embeddings.
    """

    family: str = "detr"
    model: str = "facebook/detr-resnet-50"
    weights: str | None = None
    input_size: tuple[Size, Size] | None = None
    modules: dict[str, ModuleConfig] = field(default_factory=dict)
    standardise: bool = True
    statistics_images: Pictures = 2048

    def __post_init__(self) -> None:
        check(self)


def load_training_path(config: InverterModelConfig) -> ForwardPath:
    """Loads the frozen model by its name, or from `weights` under that name."""
    info = info_of(config)
    if config.weights is None:
        return load_path(info)
    if not Path(config.weights).is_dir():
        raise InputError(f"model.weights must be a folder, but {config.weights!r} is none.")
    if config.family == "detr":
        size = config.input_size or PUBLISHED_SIZE
        return DetrPath(load_detr(config.weights), name=config.model, input_size=size)
    wrapper = load_component(TimmWrapperForImageClassification, config.weights)
    return classifier_path(wrap_model(wrapper, name=info.model), info.family)


def info_of(config: InverterModelConfig) -> PathInfo:
    """Returns what the saved inverter says of its model."""
    return PathInfo(config.family, canonical_name(config.model), config.input_size)


def make_inverses(config: InverterModelConfig, path: ForwardPath) -> InverseSet:
    """Builds a new module for every entry of `config.modules`.

    Raises:
        InputError: no entry, or one of a stage that the model does not have.
    """
    if not config.modules:
        raise InputError("model.modules must name at least one stage to invert, but is empty.")
    modules = {stage: make_inverse(path, stage, part) for stage, part in config.modules.items()}
    return InverseSet(modules, info_of(config))


def make_inverse(path: ForwardPath, stage: str, config: ModuleConfig) -> InverseModule:
    """Builds the module that reads a stage of a path.

    Raises:
        InputError: a stage that the model does not have, or one to write that does not come before.
    """
    specs = {
        "reads_spec": asdict(path.spec(stage)),
        "writes_spec": asdict(path.spec(config.writes)),
    }
    order = list(path.specs)
    if order.index(config.writes) >= order.index(stage):
        raise InputError(
            f"The inverse of {stage!r} must write a stage before it, but {config.writes!r} is not; "
            f"the order is {', '.join(order)}."
        )
    if config.kind == "conv":
        return _make_conv(path, stage, config, specs)
    if config.kind == "head":
        return HeadInverse(**specs, hidden=config.hidden)
    sizes: dict[str, Any] = {"depth": config.depth, "n_heads": config.n_heads}
    if config.kind == "blocks":
        return BlocksInverse(**specs, **sizes, mlp_ratio=config.mlp_ratio)
    if config.kind == "swin":
        return SwinInverse(**specs, **sizes, mlp_ratio=config.mlp_ratio, window=config.window)
    module_class = EncoderInverse if config.kind == "encoder" else DecoderInverse
    return module_class(
        **specs, **sizes, feedforward=config.feedforward, linear_output=config.linear_output
    )


def _make_conv(
    path: ForwardPath, stage: str, config: ModuleConfig, specs: dict[str, Any]
) -> ConvInverse:
    layers: dict[str, Any] = (
        published_layers(config.published)
        if config.published
        else {
            "channels": list(config.channels),
            "kernels": list(config.kernels),
            "strides": list(config.strides),
        }
    )
    if path.spec(stage).kind == "tokens" and isinstance(path, VitPath):
        layers |= {"n_prefix": path.n_prefix, "grid": list(path.grid)}
    module = ConvInverse(**specs, **layers, positions=config.positions)
    if config.positions:
        if not isinstance(path, VitPath) or stage != "patches":
            raise InputError("positions=true is for the stage 'patches' of a ViT.")
        module.set_positions(path.positions())
    return module


@torch.no_grad()
def measure_statistics(
    path: ForwardPath, stages: list[str], images: Tensor, batch_size: int = 64
) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns (mean, std) per channel of the named stages, over images and the cells that count.

    Images are squashed to the input size of the model, as those that modules are trained to write.
    """
    count: dict[str, int] = dict.fromkeys(stages, 0)
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    for batch in images.split(batch_size):
        found = path.embeddings(batch.to(path.device), stages)
        if IMAGE in found:
            found[IMAGE] = resize(batch, path.input_size)
        for stage, embedding in found.items():
            axis = 1 if embedding.ndim == 4 else -1
            cells = counted(path, stage, embedding).cpu().double().movedim(axis, -1).flatten(0, -2)
            total, square = sums.get(stage, (torch.zeros(()), torch.zeros(())))
            sums[stage] = (total + cells.sum(0), square + cells.square().sum(0))
            count[stage] += len(cells)
    return {stage: _mean_and_std(*sums[stage], count[stage]) for stage in stages}


def counted(
    path: ForwardPath, stage: str, embedding: Float[Tensor, "b ..."]
) -> Float[Tensor, "b ..."]:
    """Leaves out the prefix tokens that enter a ViT's first block: they are the same for all."""
    if stage == "patches" and isinstance(path, VitPath):
        return embedding[:, path.n_prefix :]
    return embedding


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Squashes images to (h, w)."""
    if tuple(images.shape[-2:]) == size:
        return images
    return nn.functional.interpolate(images, size, mode="bilinear", antialias=True)


def set_statistics(inverses: InverseSet, statistics: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Stores in each module the statistics of the stages that it reads and writes."""
    for stage in inverses.stages:
        module = inverses[stage]
        module.set_statistics(statistics[stage], statistics[module.writes.layer])


def _mean_and_std(total: Tensor, square: Tensor, count: int) -> tuple[Tensor, Tensor]:
    mean = total / count
    std = (square / count - mean.square()).clamp_min(0).sqrt()
    return mean.float(), std.float()


# ---- Fine-tunes DETR and its inverse modules end to end for reconstruction and detection ---------


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
    accelerator = make_accelerator(config.optim, config.run)
    path = load_training_path(config.model)
    if not isinstance(path, DetrPath):
        raise InputError(f"Fine-tuning is for DETR, but {path.name!r} is of family {path.family}.")
    inverses = InverseSet.from_pretrained(str(config.tuning.inverter))
    images = open_boxed_images(config.data)
    kept, held = split_images(images, config.data)
    train = BoxDataset(images, kept, config.data, config.seed)
    validation = BoxDataset(images, held, held_back_config(config.data), config.seed)
    task = TuningTask(
        path, inverses, config.tuning, stack_items(validation, 250), config.run.n_validation_images
    )
    return fit(task, train, accelerator, config.optim, config.run, to_yaml(config))


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
    reconstruction_weight: Probability = 0.9

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class InverterConfig:
    seed: Seed = 0
    data: DataConfig = field(default_factory=lambda: DataConfig(held_back_per_class=1))
    model: InverterModelConfig = field(default_factory=InverterModelConfig)
    tuning: TuningConfig = field(default_factory=TuningConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        check(self)


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


def train_inverter(config: InverterConfig) -> Path:
    """Trains to the end and returns the folder that holds `inverter/`."""
    refuse_streaming(config.data)
    if config.tuning.inverter is not None:
        return tune_inverter(config)
    accelerator = make_accelerator(config.optim, config.run)
    torch.manual_seed(derive_seed(config.seed, "initial weights"))
    path = load_training_path(config.model).to(accelerator.device)
    inverses = make_inverses(config.model, path)
    images = load_images(config.data)
    kept, held = split_images(images, config.data)
    train = CropDataset(images, kept, config.data, config.seed)
    validation = CropDataset(images, held, held_back_config(config.data), config.seed)
    n = 1 if config.run.dry_run else config.model.statistics_images
    statistics = measure_statistics(
        path, _stages_of(inverses), to_images(stack_items(train, n)["pixels"])
    )
    if config.model.standardise and not config.run.dry_run:
        set_statistics(inverses, statistics)
    n_pictures = config.run.n_validation_images
    pixels = stack_items(validation, max(N_VALIDATION, n_pictures))["pixels"]
    task = InverterTask(inverses, path, pixels, statistics, n_pictures, config.optim.batch_size)
    return fit(task, train, accelerator, config.optim, config.run, to_yaml(config))


def refuse_streaming(config: DataConfig) -> None:
    """Raises `InputError` for data that are only read in passing."""
    if config.streaming:
        raise InputError(
            "Inverters are trained on images that can be read in any order, but data.streaming is "
            "true. Name a folder or a table, and leave data.streaming out."
        )


def split_images(images: ImageSet, config: DataConfig) -> tuple[list[int], list[int]]:
    """Returns (training, held-back) indices.

    Raises:
        InputError: one side has none.
    """
    kept, held = split_held_back(
        images.labels or [], config.held_back_per_class, config.train_per_class
    )
    if not held:
        raise InputError("Validation images are needed: set data.held_back_per_class to 1 or more.")
    if not kept:
        raise InputError(
            f"Images to train on are needed, but data.held_back_per_class="
            f"{config.held_back_per_class} holds back all {len(held)}. Set it lower."
        )
    return kept, held


def load_images(config: DataConfig) -> ImageSet:
    """Opens any images; COCO's have no folders of classes."""
    root = Path(config.root or "").expanduser()
    is_coco = bool(config.root) and coco_annotations(root, config.split).is_file()
    return open_boxed_images(config) if is_coco else open_training_images(config)


def _stages_of(inverses: InverseSet) -> list[str]:
    read: Sequence[str] = inverses.stages
    return list(dict.fromkeys([*read, *(inverses[stage].writes.layer for stage in read)]))


def _target_variance(path: ForwardPath, stage: str, std: Tensor) -> float:
    if stage == IMAGE:
        std = std / std.new_tensor(path.preprocessing.std)
    return max(float(std.square().mean()), 1e-12)
