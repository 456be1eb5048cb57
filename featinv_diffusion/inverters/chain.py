"""`Chain`: inverse modules in a row, from any stage of a model to the image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from featinv_diffusion.backbones import wrap_model
from featinv_diffusion.backbones.base import LAST, Backbone
from featinv_diffusion.backbones.traced import Layout
from featinv_diffusion.errors import InputError
from featinv_diffusion.inverters.base import Generators, Inverter
from featinv_diffusion.inverters.blocks import InverseModule
from featinv_diffusion.inverters.path import ClassifierPath, ForwardPath
from featinv_diffusion.types import Features, FeatureSpec, Images


class StageBackbone(Backbone):
    """A stage of a forward path as a `Backbone`: n tokens or queries of c channels are a map c×n×1.

    Args:
        path: the model.
        stage: one of `path.specs`.
    """

    def __init__(self, path: ForwardPath, stage: str):
        super().__init__(path.model, name=path.name, preprocessing=path.preprocessing)
        self.path, self.stage = path, stage
        self.spec = _as_map(path.spec(stage))

    @property
    def has_head(self) -> bool:
        """Whether the model classifies whole images; DETR scores its queries instead."""
        return isinstance(self.path, ClassifierPath) and self.path.has_head

    def _features(self, images: Images) -> Features:
        return self._to_map(self.path.embeddings(images, [self.stage])[self.stage])

    def features_and_logits(self, images: Images) -> tuple[Features, Float[Tensor, "b k"] | None]:
        """Returns the stage as a map, and class scores where there is a head."""
        stages = {self.stage, "encoder"} if self.has_head else {self.stage}
        found = self.path.embeddings(images, stages)
        features = self._to_map(found[self.stage])
        if isinstance(self.path, ClassifierPath) and self.path.has_head:
            return features, self.path.logits(found["encoder"])
        return features, None

    def layers(self) -> list[FeatureSpec]:
        """Returns all stages as maps, without the image."""
        return [_as_map(spec) for spec in list(self.path.specs.values())[1:]]

    def layout(self, layer: str = LAST) -> Layout:
        """As `Backbone.layout`, of the model that the stages are of."""
        return wrap_model(self.path.model, name=self.name, layer=LAST).layout(layer)

    def _to_map(self, embedding: Tensor) -> Features:
        return embedding if embedding.ndim == 4 else sequence_to_map(embedding)

    def _run(self, pixels: Tensor) -> Any:
        return self.path.model(pixels)

    def _class_names(self) -> tuple[str, ...] | None:
        return self.path.labels if isinstance(self.path, ClassifierPath) else None


def sequence_to_map(sequence: Float[Tensor, "b n c"]) -> Float[Tensor, "b c n 1"]:
    """Turns n tokens or queries into a map of n×1 cells."""
    return sequence.transpose(1, 2).unsqueeze(-1)


def map_to_sequence(features: Float[Tensor, "b c n 1"]) -> Float[Tensor, "b n c"]:
    """Undoes `sequence_to_map`."""
    return features.squeeze(-1).transpose(1, 2)


def _as_map(spec: FeatureSpec) -> FeatureSpec:
    return replace(spec, kind="map")


class Chain:
    """Inverse modules, each of which reads what the one before it writes; no noise is involved.

    Modules are put into evaluation mode.

    Args:
        modules: from the stage that is inverted to the image.
        path: the model that they undo; None where only embeddings are at hand.

    Raises:
        InputError: a module that reads another stage than the one before it writes, a last module
            that does not write the image, or a path with other embeddings.
    """

    def __init__(self, modules: Sequence[InverseModule], path: ForwardPath | None = None):
        if not modules:
            raise InputError("A chain must have at least one inverse module, got none.")
        for first, second in pairwise(modules):
            check_joint(first.writes, second.reads)
        if not modules[-1].writes_image:
            raise InputError(
                f"A chain must end at the image, got a last module that writes a "
                f"{modules[-1].writes}."
            )
        self.modules = [module.eval() for module in modules]
        self.path = path
        if path is not None:
            check_joint(path.spec(self.spec.layer), self.spec)

    @property
    def spec(self) -> FeatureSpec:
        """The stage that the chain inverts."""
        return self.modules[0].reads

    @property
    def backbone(self) -> StageBackbone | None:
        """The model up to that stage; there a sequence is a map of one column."""
        return None if self.path is None else StageBackbone(self.path, self.spec.layer)

    @torch.no_grad()
    def invert(self, features: Float[Tensor, "b ..."], *, generator: Generators = None) -> Images:
        """Returns one image in [0, 1] per embedding.

        A state within a stage, such as `encoder.3`, can be inverted as the stage `encoder` if it
        has the same shape.

        Raises:
            InputError: embeddings of another shape than the stage, or not finite.
        """
        self.spec.check_features(features)
        return self(features).float().clamp(0, 1)

    def __call__(self, embedding: Float[Tensor, "b ..."]) -> Float[Tensor, "b 3 h w"]:
        """Does the same as `invert` without checks and clamping, and with gradients."""
        for module in self.modules:
            embedding = module(embedding)
        return embedding


class MapChain(Inverter):
    """A `Chain` as an `Inverter`: features are maps, n tokens or queries are n×1 cells.

    Args:
        chain: has its path.

    Raises:
        InputError: a chain without its path.
    """

    def __init__(self, chain: Chain):
        backbone = chain.backbone
        if backbone is None:
            raise InputError("A chain must have its forward path to read images, but has none.")
        self.chain, self.backbone, self.spec = chain, backbone, backbone.spec
        self.networks: dict[str, nn.Module] = {m.reads.layer: m for m in chain.modules}

    def _invert(self, features: Features, generator: Generators) -> Images:
        is_map = self.chain.spec.kind == "map"
        images = self.chain.invert(features if is_map else map_to_sequence(features))
        self._advance(len(images))
        return images


def check_joint(written: FeatureSpec, read: FeatureSpec) -> None:
    """Raises `InputError` unless one module writes what the next one reads."""
    if written != read:
        raise InputError(
            f"The modules of a chain must fit: one reads a {read}, but the one before it writes a "
            f"{written}."
        )
