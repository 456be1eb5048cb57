"""The forward pass of DETR (Carion et al. 2020) in transformers, stage by stage."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.nn import functional as F
from transformers import DetrForObjectDetection

from featinv_diffusion.backbones.preprocessing import Preprocessing
from featinv_diffusion.inverters.path import ForwardPath

PUBLISHED_SIZE = (480, 640)
"""(h, w) to which the inversion paper squashes every image."""

N_BOX = 4


class DetrPath(ForwardPath):
    """DETR as backbone → encoder → decoder → prediction → detection.

    - `backbone`: the projected map of the convolutional network, B.
    - `encoder`: the map after all encoder layers, E. `encoder.0` is B, `encoder.i` layer i's.
    - `decoder`: the queries after all decoder layers and the final norm, D. `decoder.i` is layer
      i's through the same norm; `decoder.0` is zeros, where the decoder starts.
    - `prediction`: per query the class scores before softmax, no-object last, and the box
      (centre x, centre y, width, height) as shares of the image.
    - `detection`: the same with the scores replaced by the one-hot code of the highest.

    Args:
        model: `DetrForObjectDetection`; its dropout is off and its batch norms are fixed.
        name: what the model is called in specs and messages.
        input_size: (h, w) to which images are squashed; no padding.
    """

    family: ClassVar[str] = "detr"
    main_stages: ClassVar[tuple[str, ...]] = (
        "backbone",
        "encoder",
        "decoder",
        "prediction",
        "detection",
    )
    sequence_kind: ClassVar[Literal["tokens", "queries"]] = "queries"
    model: DetrForObjectDetection

    def __init__(
        self,
        model: DetrForObjectDetection,
        *,
        name: str,
        input_size: tuple[int, int] = PUBLISHED_SIZE,
    ):
        preprocessing = Preprocessing(
            input_size, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, "bilinear"
        )
        super().__init__(model, name=name, preprocessing=preprocessing)

    @property
    def n_classes(self) -> int:
        """Number of classes without no-object, which is the class of this number."""
        return self.model.class_labels_classifier.out_features - 1

    def advance(
        self, stage: str, previous: Float[Tensor, "b ..."]
    ) -> dict[str, Float[Tensor, "b ..."]]:
        """Returns a main stage and the states within it; see `ForwardPath.advance`."""
        steps = {
            "backbone": self._backbone,
            "encoder": self._encoder,
            "decoder": self._decoder,
            "prediction": self._prediction,
            "detection": self._detection,
        }
        return steps[stage](previous)

    def split(
        self, prediction: Float[Tensor, "b n_queries d"]
    ) -> tuple[Float[Tensor, "b n_queries k"], Float[Tensor, "b n_queries 4"]]:
        """Splits a `prediction` or `detection` into class scores and boxes."""
        return prediction[..., :-N_BOX], prediction[..., -N_BOX:]

    @property
    def _detr(self) -> Any:
        return self.model.model

    def _backbone(self, pixels: Tensor) -> dict[str, Tensor]:
        nothing_padded = pixels.new_ones(pixels.shape[0], *pixels.shape[2:])
        features, _ = self._detr.backbone(pixels, nothing_padded)[-1]
        return {"backbone": self._detr.input_projection(features)}

    def _encoder(self, embedding: Tensor) -> dict[str, Tensor]:
        grid = embedding.shape[2:]
        positions = self._positions(embedding)
        tokens = embedding.flatten(2).transpose(1, 2)
        states = {"encoder.0": embedding}
        for i, layer in enumerate(self._detr.encoder.layers, start=1):
            tokens = layer(tokens, None, spatial_position_embeddings=positions)
            states[f"encoder.{i}"] = tokens.transpose(1, 2).unflatten(2, grid)
        return states | {"encoder": states[f"encoder.{len(states) - 1}"]}

    def _decoder(self, embedding: Tensor) -> dict[str, Tensor]:
        decoder, memory = self._detr.decoder, embedding.flatten(2).transpose(1, 2)
        positions = self._positions(embedding)
        query_positions = self._detr.query_position_embeddings.weight.expand(len(memory), -1, -1)
        hidden = torch.zeros_like(query_positions)
        states = {"decoder.0": hidden}
        for i, layer in enumerate(decoder.layers, start=1):
            hidden = layer(hidden, None, positions, query_positions, memory)
            if self.model.config.auxiliary_loss:  # then transformers feeds the norm's output on
                hidden = decoder.layernorm(hidden)
            states[f"decoder.{i}"] = decoder.layernorm(hidden)
        return states | {"decoder": states[f"decoder.{len(states) - 1}"]}

    def _prediction(self, queries: Tensor) -> dict[str, Tensor]:
        scores = self.model.class_labels_classifier(queries)
        boxes = self.model.bbox_predictor(queries).sigmoid()
        return {"prediction": torch.cat([scores, boxes], dim=-1)}

    def _detection(self, prediction: Tensor) -> dict[str, Tensor]:
        scores, boxes = self.split(prediction)
        one_hot = F.one_hot(scores.argmax(-1), scores.shape[-1]).to(scores.dtype)
        return {"detection": torch.cat([one_hot, boxes], dim=-1)}

    def _positions(self, embedding: Tensor) -> Tensor:
        positions = self._detr.position_embedding(
            shape=embedding.shape, device=embedding.device, dtype=embedding.dtype
        )
        return positions.flatten(2).transpose(1, 2)
