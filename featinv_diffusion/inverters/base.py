"""The one interface of everything that turns features into images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeAlias, runtime_checkable

import torch

from featinv_diffusion.backbones.base import Backbone
from featinv_diffusion.types import Features, FeatureSpec, Images

Generators: TypeAlias = torch.Generator | Sequence[torch.Generator] | None
"""One generator for the batch, one per image, or None for the global one, as in diffusers."""


@runtime_checkable
class Inverter(Protocol):
    """Turns features of `spec` into images that have about these features.

    Whatever an inverter can be set to (steps, guidance, strength) is an argument of its
    constructor, so that applications, metrics and commands see this signature alone.
    """

    @property
    def spec(self) -> FeatureSpec:
        """The features it reads."""
        ...

    @property
    def backbone(self) -> Backbone | None:
        """The model the features come from; None where it is not at hand."""
        ...

    def invert(self, features: Features, *, generator: Generators = None) -> Images:
        """Returns one image per feature map; deterministic inverters ignore `generator`.

        Raises:
            InputError: features of another shape, or not finite.
        """
        ...


@runtime_checkable
class LatentInverter(Inverter, Protocol):
    """An inverter that samples in the latent space of an autoencoder, from a prior of images."""

    @property
    def image_size(self) -> tuple[int, int]:
        """(h, w) in pixels of the samples."""
        ...

    def sample_prior(self, n: int, *, generator: Generators = None) -> Images:
        """Returns n images that were sampled without features: the null of any agreement."""
        ...

    def round_trip(self, images: Images) -> Images:
        """Returns images of the sampled size after the autoencoder: the ceiling of agreement."""
        ...
