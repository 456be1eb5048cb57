"""A second eye: whether pictures fool the backbone that they were made by looking through."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, TypeAlias

import torch
from torch import Tensor

from featinv_diffusion.backbones import Backbone, load_backbone, same_backbone
from featinv_diffusion.backbones.public_weights import packed_weights
from featinv_diffusion.images import builtin_photo, center_square, read_image, to_tensor
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.metrics import feature_cosine
from featinv_diffusion.runs.sampling import Reconstruction

EYES = ("tf_efficientnet_lite0", "tiny/convnext", "tiny/resnet")
"""Who looks too: the first that is at hand and did not make the pictures.

The public EfficientNet-Lite0 of the extra `real` shares nothing with the bundled models.
"""
OTHERS = ("flower.jpg", "china.jpg")
"""The photos that stand for another image; one that is the original itself is left out."""
RISE = 0.15
"""Share of the way from another image's cosine to 1 that the second eye must see at least.

A trained inverter reaches .3 in the eyes of EfficientNet-Lite0 and .8 in those of the bundled
models; coloured noise that fools an untrained network reaches .1.
"""


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
        second = load_backbone(second_eye_of(own.name)).to(own.device)
        self.eyes = {"own": Eye(own), "second": Eye(second)}
        self.size = max(own.picture_size)
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


def second_eye_of(own: str) -> str:
    """Returns the name of the backbone that judges pictures which another one made."""
    at_hand = EYES if packed_weights(EYES[0]) else EYES[1:]
    return next(name for name in at_hand if not same_backbone(own, name))


def open_second_eye(inverter: Inverter) -> SecondEye | None:
    """Returns the eyes for an inverter that looks through its backbone; None for any other."""
    return SecondEye(inverter.require_backbone()) if inverter.is_optimised else None


def second_eye_line(content: dict[str, Any]) -> str:
    """Returns what the two saw, in one line, and a warning where the second does not agree."""
    own, second = (
        f"cosine {seen['cosine']:.2f} (another image {seen['other_image']:.2f})"
        for seen in (content["own"], content["second"])
    )
    verdict = ""
    cosine, other = content["second"]["cosine"], content["second"]["other_image"]
    if cosine < other + RISE * (1 - other):
        verdict = (
            " The pictures fool the backbone that they were made by: the other one sees hardly "
            "more of the original in them than of another image."
        )
    return (
        f"Second eye: {content['second']['backbone']}, which took no part, sees {second}; "
        f"{content['own']['backbone']}, which the pictures were optimised for, sees {own}.{verdict}"
    )
