"""The one interface of everything that turns features into images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from featinv_diffusion.backbones.base import Backbone
from featinv_diffusion.errors import InputError
from featinv_diffusion.images import Pictures, read_batch
from featinv_diffusion.settings import SampleSettings
from featinv_diffusion.types import FeatureMaps, Features, FeatureSpec, Images

Generators: TypeAlias = torch.Generator | Sequence[torch.Generator] | None
"""One generator for the batch, one per image, or None for the global one, as in diffusers."""


class Inverter(ABC):
    """Turns features of `spec` into images that have about these features.

    Whatever an inverter can be set to (steps, guidance, strength) is an argument of its
    constructor, so that applications, metrics and commands see this signature alone.

    Attributes:
        spec: the features that it reads.
        backbone: the model that the features come from; None where it is not at hand.
        networks: the weights that decide its pictures, beside the backbone's.
        settings: how `load_inverter` opened it; None for one that was built by hand.
        on_progress: called with the number of images that were made, a fraction of one for a
            denoising step.
    """

    spec: FeatureSpec
    backbone: Backbone | None
    networks: dict[str, nn.Module]
    settings: SampleSettings | None = None
    on_progress: Callable[[float], None] | None = None

    @property
    def is_deterministic(self) -> bool:
        """Whether it makes one picture of a map, whatever the noise."""
        return True

    @property
    def is_optimised(self) -> bool:
        """Whether pictures are made by looking through the backbone, which then is no judge."""
        return False

    @abstractmethod
    def _invert(self, features: Features, generator: Generators) -> Images:
        """As `invert`, of features that fit `spec`."""

    def invert(self, features: Features | np.ndarray, *, generator: Generators = None) -> Images:
        """Returns one image in [0, 1] per feature map, float32; deterministic inverters ignore
        `generator`.

        Raises:
            InputError: features of another shape, or not finite.
        """
        features = torch.as_tensor(features).as_subclass(Tensor)
        self.spec.check_features(features)
        with torch.no_grad():
            return self._invert(features, generator)

    def require_backbone(self) -> Backbone:
        """Returns the backbone.

        Raises:
            InputError: it has none.
        """
        if self.backbone is None:
            raise InputError("The inverter must have its backbone to read pictures, but has none.")
        return self.backbone

    @torch.no_grad()
    def encode(self, pictures: Pictures, *, batch_size: int = 1) -> FeatureMaps:
        """Returns the features `[b, c, h, w]` of pictures, which remember their pictures.

        Args:
            pictures: one or several paths, PIL images, arrays or tensors, see `images.read_batch`.
            batch_size: pictures per batch of the backbone. One at a time, as commands encode, the
                features of a picture do not depend on what stands beside it, to the last bit.

        Raises:
            InputError: a picture that cannot be read, features that are not finite, or an
                inverter without its backbone.
        """
        backbone = self.require_backbone()
        images, sources = read_batch(pictures, max(backbone.picture_size))
        seen = [
            backbone.features_and_logits(batch.to(backbone.device))
            for batch in images.split(batch_size)
        ]
        features = torch.cat([maps for maps, _ in seen])
        logits = [row for _, rows in seen if rows is not None for row in rows] or [None] * len(
            images
        )
        for one, source in zip(features, sources, strict=True):
            if not bool(one.isfinite().all()):
                name = source.location or source.name or "a picture"
                raise InputError(f"The features of {name} hold NaN or infinite values.")
        known = zip(sources, logits, strict=True)
        return FeatureMaps.of(features, [replace(source, logits=row) for source, row in known])

    def _advance(self, n: float) -> None:
        if self.on_progress is not None:
            self.on_progress(n)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.spec})"


@runtime_checkable
class LatentInverter(Protocol):
    """An inverter that samples in the latent space of an autoencoder, from a prior of images."""

    @property
    def image_size(self) -> tuple[int, int]:
        """(h, w) in pixels of the samples."""
        ...

    def sample_prior(self, n: int, *, generator: Generators = None) -> Images:
        """Returns n images that were sampled without features: the null of any agreement."""
        ...

    def to_latents(self, images: Images) -> Float[Tensor, "b k h w"]:
        """Returns what the autoencoder makes of images of the sampled size."""
        ...

    def from_latents(self, latents: Float[Tensor, "b k h w"]) -> Images:
        """Returns the pictures of latents, in [0, 1]."""
        ...

    def round_trip(self, images: Images) -> Images:
        """Returns images of the sampled size after the autoencoder: the ceiling of agreement."""
        ...


class RoundTrip(ABC):
    """The round trip of an inverter with an autoencoder."""

    @abstractmethod
    def to_latents(self, images: Images) -> Float[Tensor, "b k h w"]:
        """As of a `LatentInverter`."""

    @abstractmethod
    def from_latents(self, latents: Float[Tensor, "b k h w"]) -> Images:
        """As of a `LatentInverter`."""

    def round_trip(self, images: Images) -> Images:
        """Returns the images after the autoencoder: the best that any sample can be."""
        return self.from_latents(self.to_latents(images))
