"""A second eye: whether pictures fool the backbone that they were made by looking through."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, TypeAlias

import torch
from torch import Tensor

from featinv_diffusion.backbones import Backbone, load_backbone, same_backbone
from featinv_diffusion.images import builtin_photo, center_square, read_image, to_tensor
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.inverters.optimise import GradientInverter
from featinv_diffusion.metrics import feature_cosine
from featinv_diffusion.runs.sampling import Reconstruction

SECOND, OTHERWISE = "tiny/convnext", "tiny/resnet"
"""The backbone that looks too, and the one that does where the former made the pictures."""
OTHERS = ("flower.jpg", "china.jpg")
"""The photos that stand for another image; one that is the original itself is left out."""
RISE = 0.02
"""By how much the second eye must see more of the original than of another image."""


@dataclass
class Eye:
    """What one backbone sees in the samples: their cosine to the original and to other images."""

    backbone: Backbone
    cosine: list[float] = field(default_factory=list)
    other_image: list[float] = field(default_factory=list)

    def look(self, original: Tensor, others: list[Tensor], samples: Tensor) -> None:
        """Compares the samples of one picture."""
        seen = self._see(samples)
        self.cosine += self._compare(original, seen)
        self.other_image += [
            fmean(values)
            for values in zip(*(self._compare(other, seen) for other in others), strict=True)
        ]

    def content(self) -> dict[str, Any]:
        """Returns the means, as a manifest holds them."""
        return {
            "backbone": self.backbone.name,
            "cosine": fmean(self.cosine),
            "other_image": fmean(self.other_image),
        }

    def _see(self, images: Tensor) -> Tensor:
        return self.backbone.features(images.to(self.backbone.device))

    def _compare(self, image: Tensor, seen: Tensor) -> list[float]:
        return feature_cosine(self._see(image).expand_as(seen), seen).tolist()


Seen: TypeAlias = "dict[str, list[list[float]]]"
"""By eye: the cosine of each sample to the original, and to other images."""


class SecondEye:
    """Looks at pictures with the backbone that they were made by, and with another one."""

    def __init__(self, own: Backbone):
        name = OTHERWISE if same_backbone(own.name, SECOND) else SECOND
        self.eyes = {"own": Eye(own), "second": Eye(load_backbone(name).to(own.device))}
        self.size = max(own.input_size)
        photos = [center_square(read_image(builtin_photo(photo)), self.size) for photo in OTHERS]
        self.others = [to_tensor(photo) for photo in photos]

    @torch.no_grad()
    def look(self, done: Reconstruction) -> None:
        """Looks at the samples of one picture; nothing is known where the picture is not."""
        if done.original is None:
            return
        original = to_tensor(center_square(done.original, self.size))
        others = [other for other in self.others if not torch.equal(other, original)]
        for eye in self.eyes.values():
            eye.look(original, others, to_tensor(done.samples))

    def take(self) -> Seen:
        """Returns what was seen since the last time, and forgets it."""
        seen = {name: [eye.cosine, eye.other_image] for name, eye in self.eyes.items()}
        for eye in self.eyes.values():
            eye.cosine, eye.other_image = [], []
        return seen

    def put(self, seen: Seen) -> None:
        """Adds what `take` returned, perhaps in another process."""
        for name, (cosine, other_image) in seen.items():
            self.eyes[name].cosine += cosine
            self.eyes[name].other_image += other_image

    def content(self) -> dict[str, Any] | None:
        """Returns what both saw; None where no picture was known."""
        if not self.eyes["own"].cosine:
            return None
        return {name: eye.content() for name, eye in self.eyes.items()}


def open_second_eye(inverter: Inverter) -> SecondEye | None:
    """Returns the eyes for an inverter that looks through its backbone; None for any other."""
    return SecondEye(inverter.backbone) if isinstance(inverter, GradientInverter) else None


def second_eye_line(content: dict[str, Any]) -> str:
    """Returns what the two saw, in one line, and a warning where the second does not agree."""
    own, second = (
        f"{seen['backbone']} sees cosine {seen['cosine']:.2f} (another image "
        f"{seen['other_image']:.2f})"
        for seen in (content["own"], content["second"])
    )
    verdict = ""
    if content["second"]["cosine"] < content["second"]["other_image"] + RISE:
        verdict = (
            " The pictures fool the backbone that they were made by: the other one sees no more of "
            "the original in them than of another image."
        )
    return f"Second eye: {own}, {second}.{verdict}"
