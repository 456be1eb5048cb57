"""A stage of a forward path as a `Backbone`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from featinv_diffusion.backbones.base import Backbone
from featinv_diffusion.inverters.path import ForwardPath
from featinv_diffusion.inverters.vit_path import VitPath
from featinv_diffusion.types import Features, FeatureSpec, Images


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

    def features(self, images: Images) -> Features:
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
