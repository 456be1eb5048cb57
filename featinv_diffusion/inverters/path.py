"""`ForwardPath`: a frozen model whose forward pass is a composition of named stages."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterator
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from featinv_diffusion.backbones.base import Preprocessing
from featinv_diffusion.backbones.traced import to_meta
from featinv_diffusion.errors import InputError, choices_hint
from featinv_diffusion.types import FeatureSpec, Images

IMAGE = "image"
"""Name of the stage before all others: images in [0, 1] at the model's input size."""


class ForwardPath(nn.Module):
    """The way from images through the main stages of a model, and the states on that way.

    The model is frozen in place and stays in evaluation mode. Gradients flow through it, and
    fine-tuning may call `requires_grad_` again. A subclass has a method for each main stage, named
    after it (`_encoder`), which `advance` calls.

    Args:
        model: the model to take apart.
        name: name of the model in specs and messages.
        preprocessing: from images in [0, 1] to the model's input.

    Attributes:
        specs: shapes of all stages and of the states within them, by name, in the model's order.
    """

    family: ClassVar[str]
    main_stages: ClassVar[tuple[str, ...]]
    sequence_kind: ClassVar[Literal["tokens", "queries"]]
    default_stage: ClassVar[str] = "encoder"

    def __init__(self, model: nn.Module, *, name: str, preprocessing: Preprocessing):
        super().__init__()
        self.model = model.requires_grad_(False)
        self.name = name
        self.preprocessing = preprocessing
        self.train(False)
        self.specs = self._describe()

    def advance(
        self, stage: str, previous: Float[Tensor, "b ..."]
    ) -> dict[str, Float[Tensor, "b ..."]]:
        """Returns a main stage, and the states within it, from the main stage before.

        The first main stage starts from preprocessed pixels.
        """
        return getattr(self, f"_{stage}")(previous)

    def embeddings(
        self, images: Images, stages: Collection[str] | None = None
    ) -> dict[str, Float[Tensor, "b ..."]]:
        """Returns the named stages and states of a batch of images; None takes the main stages.

        Raises:
            InputError: a name that is not in `specs`.
        """
        wanted = self.main_stages if stages is None else stages
        for stage in wanted:
            self.spec(stage)
        found = {IMAGE: images}
        for states in self._walk(self.preprocess(images)):
            found |= states
            if all(stage in found for stage in wanted):
                break
        return {stage: found[stage] for stage in wanted}

    def spec(self, stage: str) -> FeatureSpec:
        """Returns the shape of a stage.

        Raises:
            InputError: no such stage.
        """
        if stage not in self.specs:
            hint = choices_hint(stage, list(self.specs))
            raise InputError(f"{self.name!r} has no stage named {stage!r}; {hint}")
        return self.specs[stage]

    def preprocess(self, images: Images) -> Float[Tensor, "b 3 h w"]:
        """Resizes images to the input size, without cropping, and normalises them."""
        return self.preprocessing(images).to(self.dtype)

    @property
    def input_size(self) -> tuple[int, int]:
        """(h, w) in pixels of the model's input."""
        return self.preprocessing.size

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def train(self, mode: bool = True) -> ForwardPath:
        """Keeps the model in evaluation mode, so that targets hold no noise."""
        return super().train(False)

    def _walk(self, pixels: Tensor) -> Iterator[dict[str, Tensor]]:
        embedding = pixels
        for stage in self.main_stages:
            states = self.advance(stage, embedding)
            embedding = states[stage]
            yield states

    def _describe(self) -> dict[str, FeatureSpec]:
        specs = {IMAGE: FeatureSpec(self.name, IMAGE, 3, self.input_size)}
        ghost = to_meta(self)
        pixels = torch.zeros(1, 3, *self.input_size, dtype=self.dtype, device="meta")
        with torch.no_grad():
            for states in ghost._walk(pixels):
                specs |= {stage: self._make_spec(stage, x) for stage, x in states.items()}
        return specs

    def _make_spec(self, stage: str, state: Tensor) -> FeatureSpec:
        if state.ndim == 4:
            channels, height, width = state.shape[1:]
            return FeatureSpec(self.name, stage, channels, (height, width))
        n, channels = state.shape[1:]
        return FeatureSpec(self.name, stage, channels, (n, 1), self.sequence_kind)


class ClassifierPath(ForwardPath):
    """The way through a classifier: what enters its blocks, what leaves them, its `last` layer.

    Args:
        model, name, preprocessing: as in `ForwardPath`.
        labels: names of the classes.
    """

    main_stages: ClassVar[tuple[str, ...]] = ("patches", "encoder", "last")

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str,
        preprocessing: Preprocessing,
        labels: tuple[str, ...] | None = None,
    ):
        self.check_model(model, name)
        self.labels = labels
        super().__init__(model, name=name, preprocessing=preprocessing)

    @staticmethod
    @abstractmethod
    def check_model(model: nn.Module, name: str) -> None:
        """Raises `InputError` where a model is not of this family."""

    @property
    def has_head(self) -> bool:
        """Whether the model has a head, so that `logits` are class scores."""
        model: Any = self.model
        return bool(model.num_classes > 0)

    @abstractmethod
    def logits(self, encoder: Float[Tensor, "b ..."]) -> Float[Tensor, "b k"]:
        """Returns the class scores of the stage `encoder`."""
