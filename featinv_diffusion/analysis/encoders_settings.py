"""Which encoders are compared, on which images, and the inverters that turn them back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import PurePath
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from featinv_diffusion.backbones import Backbone
from featinv_diffusion.data import to_images
from featinv_diffusion.errors import InputError
from featinv_diffusion.evaluation.evaluator import noise_of
from featinv_diffusion.evaluation.observers import finite_rows, to_pixels
from featinv_diffusion.evaluation.selection import Item
from featinv_diffusion.evaluation.settings import EvaluationSettings
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.sampling import DIFFUSION, SampleSettings, open_chosen
from featinv_diffusion.types import Images


@dataclass(frozen=True)
class EncoderSettings:
    """What is compared, on which images.

    Args:
        inverters: names or folders as of `--inverter`, and `diffusion:PIPELINE`.
        scorers: backbones that measure similarity; none takes a bundled classifier.
        grey: measure similarity without colour too.
        seed: of the noise of diffusion inverters.
        n_images: None takes all.

    The others are those of `EvaluationSettings`; the same choice takes the same images.
    """

    inverters: tuple[str, ...] = ()
    data: str | None = None
    split: str = "validation"
    classes: str | None = None
    held_back_per_class: int = 0
    n_images: int | None = 250
    scorers: tuple[str, ...] = ()
    grey: bool = False
    seed: int = 0
    batch_size: int = 32
    device: str = "auto"

    def __post_init__(self) -> None:
        _ = self.selection  # checks what they share

    @property
    def selection(self) -> EvaluationSettings:
        """The same choice of images for `select_items`."""
        shared = {f.name for f in fields(self)} & {f.name for f in fields(EvaluationSettings)}
        return EvaluationSettings(**{name: getattr(self, name) for name in shared})


@dataclass(frozen=True, eq=False)
class Encoder:
    """One that is compared.

    Args:
        label: what tables and figures call it.
        name: of its inverter, as it was given.
    """

    label: str
    name: str
    inverter: Inverter
    backbone: Backbone

    def describe(self) -> dict[str, Any]:
        spec = self.inverter.spec
        return {
            "label": self.label,
            "inverter": self.name,
            "backbone": spec.backbone,
            "layer": spec.layer,
            "channels": spec.channels,
            "grid": list(spec.grid),
            "input_size": list(self.backbone.input_size),
        }

    @torch.no_grad()
    def reconstruct(self, images: Images, items: Sequence[Item]) -> Float[Tensor, "b 3 _ _"]:
        """Returns what its features are turned back into, in 8-bit steps.

        Raises:
            InputError: features or samples that are not finite.
        """
        samples = self.inverter.invert(self.backbone.features(images), generator=noise_of(items))
        if not bool(finite_rows(samples).all()):
            raise InputError(f"The inverter {self.name!r} gave NaN values; use a full precision.")
        return to_images(to_pixels(samples)).to(images.device)


def open_encoders(settings: EncoderSettings) -> list[Encoder]:
    """Loads all inverters with their encoders.

    Raises:
        InputError: fewer than two names, unknown ones, or a device that is not there.
    """
    if len(settings.inverters) < 2 or len(set(settings.inverters)) < len(settings.inverters):
        raise InputError(
            "A comparison needs at least two different inverters, e.g. --inverter siglip,siglip2, "
            f"but {', '.join(settings.inverters) or 'none'} came."
        )
    opened = []
    for name in settings.inverters:
        kind, _, pipeline = name.partition(":")
        sampling = SampleSettings(device=settings.device)
        if kind == DIFFUSION:
            sampling = replace(sampling, pipeline=pipeline or None)
        else:
            sampling = replace(sampling, inverter=name)
        inverter, _ = open_chosen(sampling)
        if inverter.backbone is None:
            raise InputError(f"The inverter {name!r} must know its backbone, but does not.")
        opened.append((name, inverter, inverter.backbone))
    labels = make_labels([(inverter.spec.backbone, name) for name, inverter, _ in opened])
    return [Encoder(label, *one) for label, one in zip(labels, opened, strict=True)]


def make_labels(named: Sequence[tuple[str, str]]) -> list[str]:
    """Labels of (backbone, inverter): the backbone where that is one's alone, else the inverter.

    Of a folder as many of its last parts, at least two, as tell it from the others.
    """
    parts = [PurePath(name).parts for _, name in named]
    longest = max(len(part) for part in parts)
    levels = [[backbone for backbone, _ in named]]
    levels += [["/".join(part[-n:]) for part in parts] for n in range(2, max(3, longest + 1))]
    counts = [Counter(level) for level in levels]
    return [
        next(level[i] for level, count in zip(levels, counts, strict=True) if count[level[i]] == 1)
        for i in range(len(named))
    ]
