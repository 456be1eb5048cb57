"""DETR: its forward pass by stages, and inverses of encoder, decoder and prediction heads.

Source: "Inverting DETR" (modular inversion), section 3. The inverses are built from the DETR layers
of transformers, since in the paper they have the architecture of what they undo.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, no_type_check

import torch
from diffusers.configuration_utils import register_to_config
from jaxtyping import Float
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoBackbone,
    AutoConfig,
    DetrConfig,
    DetrForObjectDetection,
    TimmBackbone,
    TimmBackboneConfig,
    TimmWrapperForImageClassification,
)
from transformers.models.detr.modeling_detr import (
    DetrDecoderLayer,
    DetrEncoderLayer,
    DetrSinePositionEmbedding,
)

from featinv_diffusion.backbones.base import Preprocessing
from featinv_diffusion.errors import InputError
from featinv_diffusion.inverters.blocks import InverseModule
from featinv_diffusion.inverters.path import ForwardPath


class EncoderInverse(InverseModule):
    """encoder⁻¹: post-norm encoder layers from the encoder's map E to the backbone's map B.

    Args:
        depth, n_heads, feedforward: sizes of the layers; the published ones are 6, 8 and 2048.
        linear_output: end in a linear layer. The published modules end in a layer norm, which
            fixes the mean and variance of each cell, although those of B vary.
    """

    reads_kinds = ("map",)
    writes_kinds = ("map",)

    @register_to_config
    def __init__(
        self,
        reads_spec: dict[str, Any],
        writes_spec: dict[str, Any],
        depth: int = 6,
        n_heads: int = 8,
        feedforward: int = 2048,
        linear_output: bool = True,
    ):
        super().__init__()
        reads, writes = self._wire(reads_spec, writes_spec)
        config = make_layer_config(reads.channels, n_heads, feedforward)
        self.layers = nn.ModuleList([DetrEncoderLayer(config) for _ in range(depth)])
        self.head = _make_head(reads.channels, writes.channels, linear_output)

    def transform(self, embedding: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        """Returns a map of the same grid."""
        positions = sine_positions(embedding.shape[1], embedding)
        tokens = embedding.flatten(2).transpose(1, 2)
        for layer in self.layers:
            tokens = layer(tokens, None, spatial_position_embeddings=positions)
        return self.head(tokens).transpose(1, 2).unflatten(2, embedding.shape[2:])


class DecoderInverse(InverseModule):
    """decoder⁻¹: decoder layers that read D; their queries are the cells of E, zero at first.

    The cells have sine positions. Each row of D, a query of DETR, has a learned position.

    Args:
        depth, n_heads, feedforward, linear_output: as in `EncoderInverse`.
    """

    reads_kinds = ("queries", "tokens")
    writes_kinds = ("map",)

    @register_to_config
    def __init__(
        self,
        reads_spec: dict[str, Any],
        writes_spec: dict[str, Any],
        depth: int = 6,
        n_heads: int = 8,
        feedforward: int = 2048,
        linear_output: bool = True,
    ):
        super().__init__()
        reads, writes = self._wire(reads_spec, writes_spec)
        config = make_layer_config(reads.channels, n_heads, feedforward)
        self.layers = nn.ModuleList([DetrDecoderLayer(config) for _ in range(depth)])
        self.query_positions = nn.Embedding(reads.grid[0], reads.channels)
        self.head = _make_head(reads.channels, writes.channels, linear_output)

    def transform(self, embedding: Float[Tensor, "b n c"]) -> Float[Tensor, "b d h w"]:
        """Returns the map of cells."""
        height, width = self.writes.grid
        like = embedding.new_empty(len(embedding), 1, height, width)
        positions = sine_positions(embedding.shape[2], like)
        memory_positions = self.query_positions.weight.expand(len(embedding), -1, -1)
        cells = torch.zeros_like(positions)
        for layer in self.layers:
            cells = layer(cells, None, memory_positions, positions, embedding)
        return self.head(cells).transpose(1, 2).unflatten(2, (height, width))


class HeadInverse(InverseModule):
    """prediction head⁻¹ and detection⁻¹: an MLP per query from class scores and box to D.

    It is the one or the other by the stage that it reads, `prediction` or `detection`.

    Args:
        hidden: widths of the two hidden layers.
    """

    reads_kinds = ("queries", "tokens")
    writes_kinds = ("queries", "tokens")
    standardises_input = False  # the one-hot codes of rare classes would become huge

    @register_to_config
    def __init__(
        self,
        reads_spec: dict[str, Any],
        writes_spec: dict[str, Any],
        hidden: Sequence[int] = (512, 256),
    ):
        super().__init__()
        reads, writes = self._wire(reads_spec, writes_spec)
        self.fc1 = nn.Linear(reads.channels, hidden[0])
        self.fc2 = nn.Linear(hidden[0], hidden[1])
        self.fc3 = nn.Linear(hidden[1], writes.channels)

    def transform(self, embedding: Float[Tensor, "b n c"]) -> Float[Tensor, "b n d"]:
        """Returns one row of D per query."""
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(embedding)))))


def make_layer_config(channels: int, n_heads: int, feedforward: int) -> DetrConfig:
    """Returns the config of transformers' DETR layers, without dropout."""
    make: Any = DetrConfig
    return make(
        d_model=channels,
        encoder_attention_heads=n_heads,
        decoder_attention_heads=n_heads,
        encoder_ffn_dim=feedforward,
        decoder_ffn_dim=feedforward,
        dropout=0.0,
        attn_implementation="sdpa",
    )


def sine_positions(
    channels: int, like: Float[Tensor, "b _ h w"]
) -> Float[Tensor, "b cells {channels}"]:
    """Returns DETR's sine positions for the grid of `like`, in raster order."""
    embed = DetrSinePositionEmbedding(channels // 2, normalize=True)
    positions: Tensor = embed(shape=like.shape, device=like.device, dtype=like.dtype)
    return positions.flatten(2).transpose(1, 2)


def _make_head(n_in: int, n_out: int, linear: bool) -> nn.Module:
    return nn.Linear(n_in, n_out) if linear or n_in != n_out else nn.Identity()


# ---- Detectors -----------------------------------------------------------------------------------

ASSETS = Path(__file__).parents[1] / "assets"
DETECTOR = "detector"
"""Name of the folder that holds a detector, in a bundled member or beside an inverter."""


@no_type_check  # transformers makes it a dataclass that takes more than its fields
class TimmArgumentsConfig(TimmBackboneConfig):
    """A timm backbone with arguments of its own for `timm.create_model`."""

    model_type = "timm_backbone_with_arguments"
    model_args: dict[str, Any] | None = None


class TimmArgumentsBackbone(TimmBackbone):
    """transformers' timm backbone, for architectures that timm has not registered too."""

    config_class = TimmArgumentsConfig

    def __init__(self, config: TimmArgumentsConfig, **kwargs: Any):
        super().__init__(config, **{**(config.model_args or {}), **kwargs})


def register_backbone() -> None:
    """Lets transformers build `TimmArgumentsBackbone` from a config; a second call does nothing."""
    AutoConfig.register(TimmArgumentsConfig.model_type, TimmArgumentsConfig, exist_ok=True)
    AutoBackbone.register(TimmArgumentsConfig, TimmArgumentsBackbone, exist_ok=True)


def load_detr(name: str) -> DetrForObjectDetection:
    """Loads a detector, in evaluation mode.

    Args:
        name: bundled (`tiny/detr`), a folder, or a Hub id such as `facebook/detr-resnet-50`.

    Raises:
        InputError: nothing of that name, or no DETR.
    """
    register_backbone()
    bundled = ASSETS / name / DETECTOR
    source = str(bundled) if bundled.is_dir() else name
    try:
        model = DetrForObjectDetection.from_pretrained(source, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"A DETR must be bundled, in a folder or in a Hub repository that can be reached, but "
            f"{name!r} could not be loaded: {str(error).strip().splitlines()[0]}"
        ) from error
    return model.eval()


def make_detr(
    classifier: TimmWrapperForImageClassification, class_names: list[str], **sizes: Any
) -> DetrForObjectDetection:
    """Builds a new DETR on the trained convolutional stages of a classifier.

    Args:
        classifier: holds a convolutional timm model, whose last feature map is used.
        sizes: of the transformer, by their names in `DetrConfig`; dropout is 0 by default.
    """
    register_backbone()
    wrapper: Any = classifier
    arguments = dict(wrapper.config.model_args or {})
    make_backbone_config: Any = TimmArgumentsConfig
    backbone_config = make_backbone_config(
        backbone=wrapper.config.architecture,
        output_stride=arguments.pop("output_stride", None),
        out_indices=[-1],
        model_args=arguments,
    )
    names = dict(enumerate(class_names))
    make: Any = DetrConfig
    config = make(
        backbone_config=backbone_config,
        id2label=names,
        label2id={name: i for i, name in names.items()},
        **{"dropout": 0.0, **sizes},
    )
    model = DetrForObjectDetection(config)
    _copy_stages(wrapper.timm_model, model.model.backbone.model)
    return model.eval()


def _copy_stages(classifier: nn.Module, stages: nn.Module) -> None:
    """Copies the weights by name; the rest of the classifier is its head."""
    weights = classifier.state_dict()
    missing = [key for key in stages.state_dict() if key not in weights]
    if missing:
        raise InputError(
            "The classifier must be a convolutional timm model whose stages keep their names, "
            f"but {missing[0]!r} is not among its weights."
        )
    stages.load_state_dict({key: weights[key] for key in stages.state_dict()})


# ---- The forward pass (Carion et al. 2020) by stages ---------------------------------------------

PUBLISHED_SIZE = (480, 640)
"""(h, w) to which the inversion paper resizes every image."""

N_BOX = 4


class DetrPath(ForwardPath):
    """DETR as backbone → encoder → decoder → prediction → detection.

    - `backbone`: the projected map of the convolutional network, B.
    - `encoder`: the map after all encoder layers, E. `encoder.0` is B, `encoder.i` layer i's.
    - `decoder`: the queries after all decoder layers and the final norm, D. `decoder.i` is layer
      i's after the same norm; `decoder.0` is the zeros that the decoder starts with.
    - `prediction`: per query the class scores before softmax, no-object last, and the box
      (centre x, centre y, width, height) as shares of the image.
    - `detection`: the same with the scores replaced by the one-hot code of the highest.

    Args:
        model: `DetrForObjectDetection`; its dropout is off and its batch norms are fixed.
        name: name of the model in specs and messages.
        input_size: (h, w) to which images are resized, without cropping or padding.
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
        """Number of classes; no-object is the class after them."""
        return self.model.class_labels_classifier.out_features - 1

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
            if self.model.config.auxiliary_loss:  # then the next layer reads the norm's output
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
