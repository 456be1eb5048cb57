"""Fits a new feature encoder to what another backbone's gives of the same images.

The trunk of a ControlNet has learned to read the conditions of the feature encoder it was trained
with. A new one that gives about the same conditions of the same images can be fitted by plain
regression, without the UNet and without noise, before the diffusion loss takes over.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from featinv_diffusion.backbones import Backbone
from featinv_diffusion.diffusion.featinv_controlnet import FeatureControlNet
from featinv_diffusion.errors import InputError
from featinv_diffusion.seeds import make_generator
from featinv_diffusion.settings import Depth, Pictures, Positive, check
from featinv_diffusion.training.config import OptimConfig
from featinv_diffusion.training.feature_cache import to_number_format
from featinv_diffusion.training.loop import learning_rate, make_optimizer

BATCH = 48


@dataclass(frozen=True)
class ImitationConfig:
    """The regression before the diffusion loss; without a pipeline there is none.

    Args:
        pipeline: one of the same base, as `load_pipeline` takes it, whose feature encoder is
            imitated; `model.warm_start` should be its ControlNet.
        n_images: training images whose maps and conditions are computed once.
        epochs: passes over them.
        lr: of Muon, to zero by a line.
    """

    pipeline: str | None = None
    n_images: Pictures = 4096
    epochs: Depth = 8
    lr: Positive = 0.01

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class Pairs:
    """Maps of a new backbone and the conditions to be given of them, one per image."""

    features: Float[Tensor, "n c h w"]
    conditions: Float[Tensor, "n c0 h0 w0"]


@torch.no_grad()
def read_pairs(
    backbone: Backbone,
    other: FeatureControlNet,
    other_backbone: Backbone,
    batches: Iterable[tuple[Tensor, Tensor | None]],
    n: int,
    size: tuple[int, int],
    dtype: str = "float16",
) -> Pairs:
    """Computes what is fitted.

    Args:
        other: the ControlNet that is imitated, on the features of `other_backbone`.
        batches: images `[b, 3, height, width]`, and the maps of `backbone`, `[b, c, h, w]`, where
            they are known already.
        n: images of all batches, at most.
        size: (h0, w0) of the latents.
        dtype: of the maps, `float16` or `float32`; the conditions are kept in float16.

    Raises:
        InputError: maps that the number format cannot hold.
    """
    spec, encoder = backbone.spec, cast(Any, other.feature_encoder)
    features = torch.empty(n, spec.channels, *spec.grid, dtype=getattr(torch, dtype))
    conditions = torch.empty(n, encoder.conv3.out_channels, *size, dtype=torch.float16)
    done = 0
    for images, maps in batches:
        images = images.to(backbone.device)
        rows = slice(done, done + len(images))
        maps = backbone.features(images).cpu() if maps is None else maps
        features[rows] = to_number_format(maps, dtype)
        conditions[rows] = other.encode_condition(other_backbone.features(images), size).cpu()
        done += len(images)
    return Pairs(features[:done], conditions[:done])


def imitate(
    controlnet: FeatureControlNet, pairs: Pairs, config: ImitationConfig, seed: int = 0
) -> float:
    """Fits the feature encoder; returns the last epoch's mean-square error by the variance.

    Args:
        seed: of the order of the images.

    Raises:
        InputError: conditions of another width than the encoder's.
    """
    encoder: Any = controlnet.feature_encoder
    width, wanted = encoder.conv3.out_channels, pairs.conditions.shape[1]
    if width != wanted:
        raise InputError(
            f"The imitated ControlNet must be one of the same base, with conditions of {width} "
            f"channels, but has {wanted}."
        )
    parameters = list(encoder.parameters())
    was_trained = [p.requires_grad for p in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    with torch.no_grad():  # the best that a head knows before it has read anything
        conditions = pairs.conditions.float()
        encoder.conv3.bias.copy_(conditions.mean(dim=(0, 2, 3)))
        variance = conditions.var(0, correction=0).mean()
        del conditions
    n = len(pairs.features)
    n_steps = config.epochs * -(-n // BATCH)
    settings = OptimConfig(
        optimizer="muon", lr=config.lr, weight_decay=0, warmup_steps=10, schedule="linear"
    )
    optimizer = make_optimizer(parameters, settings)
    size = (pairs.conditions.shape[2], pairs.conditions.shape[3])
    total, step = 0.0, 0
    for epoch in range(config.epochs):
        total = 0.0
        order = torch.randperm(n, generator=make_generator(seed, "imitation", epoch))
        for rows in order.split(BATCH):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(settings, step, n_steps)
            device = encoder.conv1.weight.device
            given = encoder(pairs.features[rows].to(device).float(), size)
            error = (given - pairs.conditions[rows].to(device).float()).square().mean()
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
            total += error.item() * len(rows)
            step += 1
    for parameter, before in zip(parameters, was_trained, strict=True):
        parameter.requires_grad_(before)
        parameter.grad = None
    return total / n / float(variance)
