"""An inverter whose pictures can be told by hand, and pictures in files."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from featinv_diffusion.backbones import Backbone
from featinv_diffusion.inverters.base import Inverter
from tests import tiny


class PaintingInverter(Inverter):
    """Each cell becomes a patch as grey as its first two channels together, plus noise.

    Args:
        noise: height of the noise; None draws none, as a deterministic inverter.
    """

    def __init__(self, backbone: Backbone, noise: float | None = 0.0):
        self._backbone, self.noise = backbone, noise

    @property
    def spec(self):
        return self._backbone.spec

    @property
    def backbone(self) -> Backbone:
        return self._backbone

    @property
    def networks(self):
        return {}

    @property
    def is_deterministic(self) -> bool:
        return self.noise is None

    def _invert(self, features: Tensor, generator) -> Tensor:
        grey = features[:, :2].sum(dim=1, keepdim=True)
        images = grey.repeat_interleave(8, 2).repeat_interleave(8, 3).expand(-1, 3, -1, -1)
        if self.noise is None:
            return images
        return images + self.noise * torch.stack(
            [torch.rand(3, 64, 64, generator=g) for g in generator]
        )


def save_pictures(folder: Path, n: int = 2) -> list[Path]:
    """Writes square pictures as large as the backbone reads them."""
    paths = [folder / f"{name}.png" for name in "abcdef"[:n]]
    for path, image in zip(paths, tiny.make_images(n), strict=True):
        Image.fromarray((image.permute(1, 2, 0) * 255).byte().numpy()).save(path)
    return paths


def assert_alike(results) -> None:
    """Whether results hold the same pictures, numbers and rows, bit for bit."""
    first, *others = results
    for other in others:
        assert other.numbers() == first.numbers()
        assert other.rows() == first.rows()
        pictures = other.pictures()
        assert pictures.keys() == first.pictures().keys()
        for name, picture in first.pictures().items():
            assert pictures[name].tobytes() == picture.tobytes()
