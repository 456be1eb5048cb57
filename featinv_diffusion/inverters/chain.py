"""`Chain`: inverse modules in a row, from any stage to the image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from featinv_diffusion.backbones.base import Backbone
from featinv_diffusion.errors import InputError
from featinv_diffusion.inverters.base import Generators, Inverter
from featinv_diffusion.inverters.blocks import InverseModule
from featinv_diffusion.inverters.path import ForwardPath
from featinv_diffusion.inverters.vit import VitPath
from featinv_diffusion.types import Features, FeatureSpec, Images

# ---- A stage of a forward path as a `Backbone` ---------------------------------------------------


class StageBackbone(Backbone):
    """Shows a stage as a map: n tokens or queries of c channels are a map c×n×1.

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
        """Whether the model scores images as wholes; DETR scores its queries."""
        model: Any = self.path.model
        return isinstance(self.path, VitPath) and bool(model.num_classes > 0)

    def _features(self, images: Images) -> Features:
        """Returns the stage as a map."""
        return self._to_map(self.path.embeddings(images, [self.stage])[self.stage])

    def features_and_logits(self, images: Images) -> tuple[Features, Float[Tensor, "b k"] | None]:
        """Returns the stage as a map, and class scores where there is a head."""
        stages = {self.stage, "encoder"} if self.has_head else {self.stage}
        found = self.path.embeddings(images, stages)
        logits = self.path.logits(found["encoder"]) if isinstance(self.path, VitPath) else None
        return self._to_map(found[self.stage]), logits if self.has_head else None

    def layers(self) -> list[FeatureSpec]:
        """Returns all stages as maps, the image left out."""
        return [_as_map(spec) for spec in list(self.path.specs.values())[1:]]

    def _to_map(self, embedding: Tensor) -> Features:
        return embedding if embedding.ndim == 4 else sequence_to_map(embedding)

    def _run(self, pixels: Tensor) -> Any:
        return self.path.model(pixels)

    def _class_names(self) -> tuple[str, ...] | None:
        return self.path.labels if isinstance(self.path, VitPath) else None


def sequence_to_map(sequence: Float[Tensor, "b n c"]) -> Float[Tensor, "b c n 1"]:
    """Turns n tokens or queries into a map of n×1 cells."""
    return sequence.transpose(1, 2).unsqueeze(-1)


def map_to_sequence(features: Float[Tensor, "b c n 1"]) -> Float[Tensor, "b n c"]:
    """Undoes `sequence_to_map`."""
    return features.squeeze(-1).transpose(1, 2)


def _as_map(spec: FeatureSpec) -> FeatureSpec:
    return replace(spec, kind="map")


class Chain:
    """An `Inverter` of inverse modules, each of which reads what the one before writes.

    Deterministic: generators are ignored. Modules are put into evaluation mode.

    Args:
        modules: from the stage that is inverted to the image.
        path: the model they undo; None where only embeddings are at hand.

    Raises:
        InputError: a module that reads another stage than the one before writes, a last module
            that does not write the image, a path that makes other embeddings.
    """

    def __init__(self, modules: Sequence[InverseModule], path: ForwardPath | None = None):
        if not modules:
            raise InputError("A chain must have at least one inverse module, but none came.")
        for first, second in pairwise(modules):
            check_joint(first.writes, second.reads)
        if not modules[-1].writes_image:
            raise InputError(
                f"A chain must end at the image, but its last module writes a {modules[-1].writes}."
            )
        self.modules = [module.eval() for module in modules]
        self.path = path
        if path is not None:
            check_joint(path.spec(self.spec.layer), self.spec)

    @property
    def spec(self) -> FeatureSpec:
        """The stage that it inverts."""
        return self.modules[0].reads

    @property
    def backbone(self) -> StageBackbone | None:
        """The model up to the stage that is inverted; sequences are maps of one column there."""
        return None if self.path is None else StageBackbone(self.path, self.spec.layer)

    @torch.no_grad()
    def invert(self, features: Float[Tensor, "b ..."], *, generator: Generators = None) -> Images:
        """Returns one image in [0, 1] per embedding.

        States within a stage fit where they have its shape, such as `encoder.3` for `encoder`.

        Raises:
            InputError: embeddings of another shape than that of the stage, or not finite.
        """
        self.spec.check_features(features)
        return self(features).float().clamp(0, 1)

    def __call__(self, embedding: Float[Tensor, "b ..."]) -> Float[Tensor, "b 3 h w"]:
        """As `invert`, unchecked, unclamped and with gradients."""
        for module in self.modules:
            embedding = module(embedding)
        return embedding


class MapChain(Inverter):
    """A `Chain` whose features are always maps: n tokens or queries are n×1 cells.

    This is the form in which metrics, edits and commands know features.

    Args:
        chain: with its path.

    Raises:
        InputError: a chain without its path.
    """

    def __init__(self, chain: Chain):
        backbone = chain.backbone
        if backbone is None:
            raise InputError("A chain must know its forward path to read images, but has none.")
        self.chain, self._backbone = chain, backbone

    @property
    def spec(self) -> FeatureSpec:
        """The stage that it inverts, as a map."""
        return self._backbone.spec

    @property
    def backbone(self) -> StageBackbone:
        """The model up to the stage that is inverted."""
        return self._backbone

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The modules of the chain by the stage that each reads."""
        return {module.reads.layer: module for module in self.chain.modules}

    def _invert(self, features: Features, generator: Generators) -> Images:
        is_map = self.chain.spec.kind == "map"
        images = self.chain.invert(features if is_map else map_to_sequence(features))
        self._advance(len(images))
        return images


def check_joint(written: FeatureSpec, read: FeatureSpec) -> None:
    """Raises `InputError` unless what is written is what is read: model, stage and shape."""
    if written != read:
        raise InputError(
            f"The modules of a chain must fit: one reads a {read}, but before it comes a {written}."
        )
