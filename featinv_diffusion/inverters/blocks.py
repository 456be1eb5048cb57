"""What the inverse modules share: specs at both ends, standardisation, the way to pixels."""

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

    Embeddings are standardised per channel on both sides; means of 0 and standard deviations of 1,
    the initial values of the buffers, are the published modules. Images are neither: they are
    written as they are, in [0, 1].

    Subclasses take `reads_spec` and `writes_spec`, `FeatureSpec`s as dicts, into their config and
    call `_wire` with them, which refuses other kinds of stages than `reads_kinds` and
    `writes_kinds`; there the image is a kind of its own.
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
        """The stage that it reads."""
        return spec_of(self.config["reads_spec"])

    @property
    def writes(self) -> FeatureSpec:
        """The stage that it writes, or the image."""
        return spec_of(self.config["writes_spec"])

    @property
    def writes_image(self) -> bool:
        """Whether it ends the way back."""
        return self.writes.layer == IMAGE

    @abstractmethod
    def transform(self, embedding: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """Maps the standardised embedding to the standardised one that is written, or an image."""

    def forward(self, embedding: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """Returns the embedding that is written; shapes are those of the specs."""
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
        """Stores (mean, std) per channel of the embeddings that are read and written.

        None leaves a side as it is. A channel that hardly varies is divided by 1/1000 of the
        largest standard deviation.
        """
        if inputs is not None and self.standardises_input:
            self.input_mean.copy_(inputs[0])
            self.input_std.copy_(inputs[1].clamp_min(1e-3 * inputs[1].max()))
        if outputs is not None and not self.writes_image:
            self.output_mean.copy_(outputs[0])
            self.output_std.copy_(outputs[1].clamp_min(1e-3 * outputs[1].max()))

    def _wire(self, reads: FeatureSpec, writes: FeatureSpec) -> None:
        self._check_kind("read", reads, self.reads_kinds)
        self._check_kind("write", writes, self.writes_kinds)
        for name, n in (("input", reads.channels), ("output", writes.channels)):
            self.register_buffer(f"{name}_mean", torch.zeros(n))
            self.register_buffer(f"{name}_std", torch.ones(n))

    def _check_kind(self, verb: str, spec: FeatureSpec, kinds: tuple[str, ...]) -> None:
        if (IMAGE if spec.layer == IMAGE else spec.kind) not in kinds:
            raise InputError(
                f"A stage that {type(self).__name__} can {verb} must be of kind "
                f"{' or '.join(kinds)}, but {spec} came. Choose a module of another kind for it."
            )

    @staticmethod
    def _fit(embedding: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        if embedding.ndim == 4:
            return mean[:, None, None], std[:, None, None]
        return mean, std


class ConvInverse(InverseModule):
    """Transposed convolutions from a map, or the patch tokens of a ViT, to an image in [0, 1].

    Each but the last is followed by batch norm and ReLU, the last by a sigmoid; each enlarges the
    map by its stride, whatever its kernel. `published_layers` has the networks of the papers.

    Args:
        channels: of the hidden maps, in order; empty for a single transposed convolution.
        kernels: one more than `channels`.
        strides: likewise; their product is the side of the image by that of the map.
        n_prefix: of tokens: how many before the patches are dropped.
        grid: of tokens: (h, w) in patches.
        positions: subtract a fixed table of positions from tokens, set by `set_positions`.
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
        reads, writes = spec_of(reads_spec), spec_of(writes_spec)
        self._wire(reads, writes)
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

    `paper` is DETR's 6-layer network, `released` the larger one of the code's training scripts,
    `linear` its single transposed convolution, and `vit` the 4 layers for patches of 16 pixels.

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


def spec_of(spec: Mapping[str, Any]) -> FeatureSpec:
    """Reads a spec from the dict of a config."""
    return read_spec(spec)


def _upsample(n_in: int, n_out: int, kernel: int, stride: int) -> nn.ConvTranspose2d:
    """A transposed convolution whose output is `stride` times as large as its input."""
    if kernel < stride:
        raise InputError(f"A kernel must be at least its stride, but {kernel} and {stride} came.")
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
            f"but {counts[1]} and {len(strides)} came."
        )
    factor = 1
    for stride in strides:
        factor *= stride
    height, width = reads.grid if reads.kind == "map" else grid or (0, 0)
    if (height * factor, width * factor) != writes.grid:
        raise InputError(
            f"The strides must lead from {height}×{width} cells to {writes.grid[0]}×"
            f"{writes.grid[1]} pixels, but their product is {factor}."
        )
