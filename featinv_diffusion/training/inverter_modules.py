"""From the configuration of an inverter to its forward path and new inverse modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import TimmWrapperForImageClassification

from featinv_diffusion.backbones import wrap_model
from featinv_diffusion.errors import InputError
from featinv_diffusion.inverters.blocks import ConvInverse, InverseModule, published_layers
from featinv_diffusion.inverters.detr import DecoderInverse, EncoderInverse, HeadInverse
from featinv_diffusion.inverters.detr_model import load_detr
from featinv_diffusion.inverters.detr_path import PUBLISHED_SIZE, DetrPath
from featinv_diffusion.inverters.modular import InverseSet, PathInfo, load_path, vit_path
from featinv_diffusion.inverters.path import IMAGE, ForwardPath
from featinv_diffusion.inverters.vit import BlocksInverse
from featinv_diffusion.inverters.vit_path import VitPath
from featinv_diffusion.training.entry import load_component


@dataclass(frozen=True)
class ModuleConfig:
    """One inverse module; only the fields of its kind are read.

    Args:
        kind: `conv` ends at the image; `encoder`, `decoder` and `head` belong to DETR, `blocks`
            to a ViT.
        writes: the stage that it is trained to give back.
        published: of `conv`: layers by a name of `published_layers`, instead of the next three.
        channels, kernels, strides, positions: of `conv`, see `ConvInverse`.
        depth, n_heads: of `encoder`, `decoder` and `blocks`.
        feedforward, linear_output: of `encoder` and `decoder`.
        mlp_ratio: of `blocks`.
        hidden: of `head`.
    """

    kind: Literal["conv", "encoder", "decoder", "head", "blocks"] = "conv"
    writes: str = IMAGE
    published: str | None = None
    channels: tuple[int, ...] = ()
    kernels: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    positions: bool = False
    depth: int = 6
    n_heads: int = 8
    feedforward: int = 2048
    linear_output: bool = True
    mlp_ratio: float = 4.0
    hidden: tuple[int, int] = (512, 256)


@dataclass(frozen=True)
class InverterModelConfig:
    """The model that is inverted, and its inverse modules by the stage that each reads.

    Args:
        family: `detr` or `vit`.
        model: the name under which the saved inverter loads the model again.
        weights: folder of the model where the name does not lead to it yet: a DETR, or a timm
            wrapper of transformers.
        input_size: (h, w) of DETR's images; a ViT knows its own.
        standardise: measure mean and std per channel of every embedding on `statistics_images`
            images and keep them in the modules; the published ones read raw embeddings.
    """

    family: str = "detr"
    model: str = "facebook/detr-resnet-50"
    weights: str | None = None
    input_size: tuple[int, int] | None = None
    modules: dict[str, ModuleConfig] = field(default_factory=dict)
    standardise: bool = True
    statistics_images: int = 2048


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
    return vit_path(wrap_model(wrapper, name=config.model))


def info_of(config: InverterModelConfig) -> PathInfo:
    """Returns what the saved inverter says of its model."""
    return PathInfo(config.family, config.model, config.input_size)


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
