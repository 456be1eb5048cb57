"""`InverseModule`, the base of modules that undo a stage, and `ConvInverse`, the way to pixels."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from jaxtyping import Float
from torch import Tensor, nn

from featinv_diffusion.backbones.names import read_spec
from featinv_diffusion.errors import InputError
from featinv_diffusion.inverters.path import IMAGE
from featinv_diffusion.types import FeatureSpec


class InverseModule(ModelMixin, ConfigMixin):
    """Undoes a part of a forward path: reads the embedding of one stage and writes an earlier one.

    Embeddings are standardised per channel on both sides. The buffers start with means of 0 and
    standard deviations of 1, which give the published modules. Images are not standardised; they
    are written in [0, 1].

    Subclasses take `reads_spec` and `writes_spec`, `FeatureSpec`s as dicts, into their config and
    call `_wire` with them, which refuses stages of other kinds than `reads_kinds` and
    `writes_kinds`. The image counts as a kind of its own.
    """

    reads_kinds: ClassVar[tuple[str, ...]]
    writes_kinds: ClassVar[tuple[str, ...]]
    standardises_input = True
    input_mean: Tensor
    input_std: Tensor
    output_mean: Tensor
    output_std: Tensor

    @property
    def reads(self) -> FeatureSpec:
        """The stage that the module reads."""
        return read_spec(self.config["reads_spec"])

    @property
    def writes(self) -> FeatureSpec:
        """The stage, or the image, that the module writes."""
        return read_spec(self.config["writes_spec"])

    @property
    def writes_image(self) -> bool:
        """Whether the module writes the image."""
        return self.writes.layer == IMAGE

    @abstractmethod
    def transform(self, embedding: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """Returns the standardised embedding, or the image, from a standardised embedding."""

    def forward(self, embedding: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """Returns the embedding that is written; the shapes are those of the specs."""
        embedding = embedding.to(self.dtype)
        mean, std = self._fit(embedding, self.input_mean, self.input_std)
        written = self.transform((embedding - mean) / std)
        if self.writes_image:
            return written
        mean, std = self._fit(written, self.output_mean, self.output_std)
        return written * std + mean

    @torch.no_grad()
    def set_statistics(
        self, inputs: tuple[Tensor, Tensor] | None, outputs: tuple[Tensor, Tensor] | None
    ) -> None:
        """Stores the (mean, std) per channel of the embeddings that are read and written.

        None leaves a side unchanged. Standard deviations are at least 1/1000 of the largest one.
        """
        if inputs is not None and self.standardises_input:
            self.input_mean.copy_(inputs[0])
            self.input_std.copy_(inputs[1].clamp_min(1e-3 * inputs[1].max()))
        if outputs is not None and not self.writes_image:
            self.output_mean.copy_(outputs[0])
            self.output_std.copy_(outputs[1].clamp_min(1e-3 * outputs[1].max()))

    def _wire(
        self, reads_spec: Mapping[str, Any], writes_spec: Mapping[str, Any]
    ) -> tuple[FeatureSpec, FeatureSpec]:
        reads, writes = read_spec(reads_spec), read_spec(writes_spec)
        self._check_kind("read", reads, self.reads_kinds)
        self._check_kind("write", writes, self.writes_kinds)
        for name, n in (("input", reads.channels), ("output", writes.channels)):
            self.register_buffer(f"{name}_mean", torch.zeros(n))
            self.register_buffer(f"{name}_std", torch.ones(n))
        return reads, writes

    def _check_kind(self, verb: str, spec: FeatureSpec, kinds: tuple[str, ...]) -> None:
        if (IMAGE if spec.layer == IMAGE else spec.kind) not in kinds:
            raise InputError(
                f"A stage that {type(self).__name__} can {verb} must be of kind "
                f"{' or '.join(kinds)}, got {spec}. Choose another module for it."
            )

    @staticmethod
    def _fit(embedding: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        if embedding.ndim == 4:
            return mean[:, None, None], std[:, None, None]
        return mean, std


class ConvInverse(InverseModule):
    """Transposed convolutions from a map, or the patch tokens of a ViT, to an image in [0, 1].

    Batch norm and ReLU follow each convolution but the last, which a sigmoid follows. Each enlarges
    the map by its stride, whatever its kernel. `published_layers` lists the networks of the papers.

    Args:
        channels: channels of the hidden maps, in order; empty for a single convolution.
        kernels: kernel sizes, one more than `channels`.
        strides: as many strides; the image is their product times as large as the map.
        n_prefix: for tokens, how many of them to drop before the patches.
        grid: for tokens, (h, w) in patches.
        positions: subtract from tokens the table that `set_positions` stores.
    """

    reads_kinds = ("map", "tokens")
    writes_kinds = (IMAGE,)

    @register_to_config
    def __init__(
        self,
        reads_spec: dict[str, Any],
        writes_spec: dict[str, Any],
        channels: Sequence[int] = (),
        kernels: Sequence[int] = (8,),
        strides: Sequence[int] = (8,),
        n_prefix: int = 0,
        grid: Sequence[int] | None = None,
        positions: bool = False,
    ):
        super().__init__()
        reads, writes = self._wire(reads_spec, writes_spec)
        _check_sizes(reads, writes, (len(channels), len(kernels)), strides, grid)
        widths = [reads.channels, *channels, 3]
        layers: list[nn.Module] = []
        for i, (kernel, stride) in enumerate(zip(kernels, strides, strict=True)):
            layers.append(_upsample(widths[i], widths[i + 1], kernel, stride))
            if i < len(channels):
                layers += [nn.BatchNorm2d(widths[i + 1]), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Sigmoid())
        if positions:
            self.position_table: Tensor
            self.register_buffer("position_table", torch.zeros(reads.grid[0], reads.channels))

    def set_positions(self, table: Float[Tensor, "n c"]) -> None:
        """Stores the position embedding that is subtracted, a row per token."""
        self.position_table.copy_(table)

    def transform(self, embedding: Float[Tensor, "b ..."]) -> Float[Tensor, "b 3 h w"]:
        """Returns images in [0, 1]."""
        config: Any = self.config
        if embedding.ndim == 3:
            if config.positions:
                embedding = embedding - self.position_table / self.input_std
            tokens = embedding[:, config.n_prefix :]
            embedding = tokens.transpose(1, 2).unflatten(2, tuple(config.grid))
        return self.layers(embedding)


def published_layers(name: str) -> dict[str, list[int]]:
    """Returns channels, kernels and strides of a published backbone inverse.

    `paper` is the 6-layer network for DETR, `released` the larger one of the published training
    scripts, `linear` a single transposed convolution, and `vit` 4 layers for patches of 16 pixels.

    Raises:
        InputError: another name.
    """
    doubled = [1024, 512, 256, 128, 64]
    table = {
        "paper": ([2048, *doubled], [1, 3, 3, 3, 3, 3, 3], [1, 2, 2, 2, 2, 2, 1]),
        "released": (
            [2048, 1792, 1536, *doubled],
            [1, 3, 3, 3, 3, 3, 3, 3, 3],
            [1, 1, 1, 2, 2, 2, 2, 2, 1],
        ),
        "linear": ([], [32], [32]),
        "vit": ([256, 64, 16], [2, 2, 2, 2], [2, 2, 2, 2]),
    }
    if name not in table:
        raise InputError(f"No published layers are named {name!r}; choices: {', '.join(table)}.")
    channels, kernels, strides = table[name]
    return {"channels": channels, "kernels": kernels, "strides": strides}


def _upsample(n_in: int, n_out: int, kernel: int, stride: int) -> nn.ConvTranspose2d:
    """A transposed convolution whose output is `stride` times as large as its input."""
    if kernel < stride:
        raise InputError(f"A kernel must be at least its stride, got {kernel} and {stride}.")
    padding = (kernel - stride + 1) // 2
    extra = 2 * padding - (kernel - stride)
    return nn.ConvTranspose2d(n_in, n_out, kernel, stride, padding, output_padding=extra)


def _check_sizes(
    reads: FeatureSpec,
    writes: FeatureSpec,
    counts: tuple[int, int],
    strides: Sequence[int],
    grid: Sequence[int] | None,
) -> None:
    if counts[1] != counts[0] + 1 or len(strides) != counts[1]:
        raise InputError(
            f"Kernels and strides must be one more than the hidden channels ({counts[0]}), "
            f"got {counts[1]} and {len(strides)}."
        )
    factor = 1
    for stride in strides:
        factor *= stride
    height, width = reads.grid if reads.kind == "map" else grid or (0, 0)
    if (height * factor, width * factor) != writes.grid:
        raise InputError(
            f"The strides must lead from {height}×{width} cells to {writes.grid[0]}×"
            f"{writes.grid[1]} pixels, got a product of {factor}."
        )
