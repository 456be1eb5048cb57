"""`Reconstructor`: a feed-forward network from the map of a vision encoder to its image.

Source: "Image Reconstruction as a Tool for Feature Analysis", section 3; its sizes are defaults.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from jaxtyping import Float
from timm.layers.activations import QuickGELU
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from featinv_diffusion.backbones import Backbone, load_named_backbone, wrap_model
from featinv_diffusion.backbones.base import LAST
from featinv_diffusion.backbones.names import canonical_name, read_spec
from featinv_diffusion.diffusion.folders import CONFIG, class_name, load_network
from featinv_diffusion.errors import InputError, choices_hint
from featinv_diffusion.files import expand_path, new_folder, read_torch
from featinv_diffusion.inverters.base import Generators, Inverter
from featinv_diffusion.types import Features, FeatureSpec, Images

PUBLISHED_STAGES = 4
"""Stages of the published decoder, each of which doubles the sides of the map."""


class ResidualBlock(nn.Module):
    """QuickGELU(x + two convolutions with batch norm, and QuickGELU between them)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.activation = QuickGELU()

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        inner = self.activation(self.bn1(self.conv1(x)))
        return self.activation(self.bn2(self.conv2(inner)) + x)


class ResidualDecoder(nn.Module):
    """The convolutional half of a reconstructor, from a map to normalised pixels.

    Stages that double the map, each a transposed convolution and a residual block, are followed by
    residual blocks at full size and a convolution to RGB. If the stages do not lead to the size of
    the image, the picture is resized bilinearly at the end.

    Args:
        n_in: channels of the map.
        channels: channels after each stage; the published ones are n_in / 2, / 4, / 8 and / 16.
        n_residual: residual blocks after the last stage; the published decoder has 2.
        image_size: (h, w) in pixels.
    """

    def __init__(
        self,
        n_in: int,
        channels: Sequence[int],
        n_residual: int,
        image_size: tuple[int, int],
    ):
        super().__init__()
        self.image_size = image_size
        layers: list[nn.Module] = []
        for n_out in channels:
            layers += [nn.ConvTranspose2d(n_in, n_out, 4, 2, 1), ResidualBlock(n_out)]
            n_in = n_out
        layers += [ResidualBlock(n_in) for _ in range(n_residual)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(n_in, 3, 3, padding=1))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 height width"]:
        pixels = self.layers(x)
        if tuple(pixels.shape[-2:]) == self.image_size:
            return pixels
        # Antialiasing has no half precision on the CPU.
        resized = F.interpolate(pixels.float(), self.image_size, mode="bilinear", antialias=True)
        return resized.to(pixels.dtype)


def count_doublings(grid: tuple[int, int], image_size: tuple[int, int]) -> int:
    """Returns how many stages lead from a map to an image.

    If the image is the map times a power of two, it is the logarithm of that factor: 4 for patches
    of 16 pixels, 3 for 8. Otherwise it is the 4 of the published decoder, whose output is then
    resized.
    """
    factor = image_size[0] // grid[0]
    is_power = factor > 0 and factor & (factor - 1) == 0
    if is_power and image_size == (grid[0] * factor, grid[1] * factor):
        return factor.bit_length() - 1
    return PUBLISHED_STAGES


def default_channels(n_in: int, n_stages: int) -> list[int]:
    """Returns channels that halve with each stage, as in the published decoder."""
    return [max(1, n_in // 2 ** (i + 1)) for i in range(n_stages)]


ASSETS = Path(__file__).parents[1] / "assets"
FAMILY, FOLDER, BACKBONE = "tiny", "reconstructor", "backbone"
"""A bundled reconstructor lies in `assets/tiny/NAME/reconstructor`, its encoder in `backbone`."""
HEAD_CHANNELS = 64
EPS = 1e-6
"""Epsilon of the layer norms, as in SigLIP, and of the norm that locations are divided by."""


class Reconstructor(ModelMixin, ConfigMixin):
    """Transformer blocks over the unit-norm vectors of a map, and a decoder to pixels.

    A learned token is put before the locations and dropped after the blocks. There is no position
    embedding.

    Args:
        spec: `FeatureSpec` of the features as a dict.
        image_size: (h, w) of the encoder's input.
        mean, std: statistics of the encoder's preprocessing; the network writes pixels that are
            normalised by them.
        depth: number of transformer blocks.
        n_heads: attention heads; None takes one for every 64 channels.
        feedforward: hidden width of the blocks; None takes 4 × the channels.
        channels: channels of the decoder's stages, see `ResidualDecoder`; None takes
            `count_doublings` stages whose channels halve.
        n_residual: residual blocks at full size.

    Raises:
        InputError: features that are no map, sizes that are not positive, or heads that do not
            divide the channels.
    """

    @register_to_config
    def __init__(
        self,
        spec: dict[str, Any],
        image_size: Sequence[int],
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
        depth: int = 4,
        n_heads: int | None = None,
        feedforward: int | None = None,
        channels: Sequence[int] | None = None,
        n_residual: int = 2,
    ):
        super().__init__()
        reads = _read_spec(spec)
        _check_sizes("image_size", image_size, n=2)
        _check_sizes("depth", [depth], least=0)
        _check_sizes("n_residual", [n_residual], least=0)
        for name, value in (("n_heads", n_heads), ("feedforward", feedforward)):
            _check_sizes(name, [] if value is None else [value])
        _check_sizes("channels", [] if channels is None else channels)
        size, width = (image_size[0], image_size[1]), reads.channels
        self.token = nn.Parameter(torch.randn(width))
        self.norm = nn.LayerNorm(width, eps=EPS)
        blocks = (_make_block(width, n_heads, feedforward) for _ in range(depth))
        self.blocks = nn.Sequential(*blocks)
        if channels is None:
            channels = default_channels(width, count_doublings(reads.grid, size))
        self.decoder = ResidualDecoder(width, channels, n_residual, size)
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(f"pixel_{name}", torch.tensor(values)[:, None, None], False)

    pixel_mean: Tensor
    pixel_std: Tensor

    @property
    def spec(self) -> FeatureSpec:
        """The features that the network reads."""
        return read_spec(self.config["spec"])

    @property
    def image_size(self) -> tuple[int, int]:
        """(h, w) of the images in pixels."""
        height, width = self.config["image_size"]
        return height, width

    def forward(self, features: Features) -> Images:
        """Returns images, roughly in [0, 1]; they are not clamped."""
        return self.reconstruct(features) * self.pixel_std + self.pixel_mean

    def reconstruct(self, features: Features) -> Float[Tensor, "b 3 height width"]:
        """Returns pixels that are normalised as the encoder's input is."""
        features = F.normalize(features.to(self.dtype), dim=1, eps=EPS)
        tokens = features.flatten(2).transpose(1, 2)
        token = self.token.expand(len(tokens), 1, -1)
        tokens = self.blocks(self.norm(torch.cat([token, tokens], dim=1)))[:, 1:]
        return self.decoder(tokens.transpose(1, 2).unflatten(2, features.shape[2:]))


class ReconstructorInverter(Inverter):
    """A reconstructor with the encoder whose features it reads; no noise is involved.

    Raises:
        InputError: an encoder with other features or another input size.
    """

    def __init__(self, reconstructor: Reconstructor, backbone: Backbone):
        reconstructor.spec.check_matches(backbone.spec)
        if reconstructor.image_size != backbone.input_size:
            raise InputError(
                f"The reconstructor writes {_times(reconstructor.image_size)} pixels, but "
                f"{backbone.name!r} reads {_times(backbone.input_size)}. Load it at that size."
            )
        self.reconstructor = reconstructor.eval()
        self.backbone, self.spec = backbone, reconstructor.spec
        self.networks: dict[str, nn.Module] = {FOLDER: reconstructor}

    def _invert(self, features: Features, generator: Generators) -> Images:
        images = self.reconstructor(features).float().clamp(0, 1)
        self._advance(len(images))
        return images


def list_reconstructors() -> list[str]:
    """Returns the names of the bundled reconstructors, such as `siglip`."""
    return sorted(path.parents[1].name for path in ASSETS.glob(f"{FAMILY}/*/{FOLDER}/{CONFIG}"))


def find_reconstructor(name: str) -> Path | None:
    """Returns the folder of a reconstructor, by its name or by a folder that is it or holds it."""
    if name in list_reconstructors():
        return ASSETS / FAMILY / name / FOLDER
    folder = expand_path(name)
    for candidate in (folder, folder / FOLDER):
        if class_name(candidate) == Reconstructor.__name__:
            return candidate
    return None


def load_reconstructor(name: str) -> ReconstructorInverter:
    """Loads a bundled reconstructor by its name, or one from a folder, with its encoder.

    The encoder is loaded from the folder `backbone` beside it, or else by its name.

    Raises:
        InputError: no such reconstructor, or its encoder cannot be loaded.
    """
    folder = find_reconstructor(name)
    if folder is None:
        hint = choices_hint(name, list_reconstructors())
        raise InputError(
            f"A reconstructor must be a bundled name or a folder, got {name!r}; {hint}"
        )
    reconstructor = load_network(Reconstructor, folder, wanted="a folder of a reconstructor")
    spec, size = reconstructor.spec, reconstructor.image_size
    beside = folder.parent / BACKBONE
    weights = beside if beside.is_dir() else None
    backbone = load_encoder(spec.backbone, spec.layer, weights=weights, input_size=size)
    return ReconstructorInverter(reconstructor, backbone)


def load_encoder(
    name: str,
    layer: str,
    *,
    weights: str | Path | None = None,
    input_size: tuple[int, int] | None = None,
) -> Backbone:
    """Loads an encoder by its name, or from a folder under that name.

    Args:
        weights: folder of the encoder, for a name that `load_backbone` cannot find.

    Raises:
        InputError: as `load_backbone`.
    """
    if weights is None:
        return load_named_backbone(name, layer, input_size=input_size)
    from featinv_diffusion.backbones.transformers import load_transformers

    if not Path(weights).is_dir():
        raise InputError(f"The weights of {name!r} must be in a folder, got {weights}.")
    model, processor = load_transformers(str(weights), pretrained=True)
    return wrap_model(
        model,
        name=canonical_name(name),
        layer=layer,
        input_size=input_size,
        processor=processor,
    )


def _make_block(width: int, n_heads: int | None, feedforward: int | None) -> nn.Module:
    n_heads = max(1, width // HEAD_CHANNELS) if n_heads is None else n_heads
    if width % n_heads:
        raise InputError(
            f"The number of heads must divide the {width} channels of the features, got {n_heads}."
        )
    make: Any = Block
    return make(
        width,
        n_heads,
        mlp_ratio=((feedforward or 4 * width) + 0.5) / width,  # timm rounds the product down
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=EPS),
        act_layer=QuickGELU,
    )


def _read_spec(spec: Mapping[str, Any]) -> FeatureSpec:
    try:
        reads = read_spec(spec)
    except (TypeError, KeyError) as error:
        raise InputError(f"spec must hold the fields of a FeatureSpec, got {spec!r}.") from error
    if reads.kind != "map":
        raise InputError(f"A reconstructor must read a map, got {reads}.")
    _check_sizes("spec.channels", [reads.channels])
    _check_sizes("spec.grid", reads.grid, n=2)
    return reads


def _check_sizes(name: str, values: Any, *, least: int = 1, n: int | None = None) -> None:
    """Raises `InputError` unless values are whole numbers of at least `least`, n of them."""
    is_row = isinstance(values, Sequence) and not isinstance(values, str)
    if not is_row or n not in (None, len(values)):
        raise InputError(f"{name} must be {n or 'a list of'} whole numbers, got {values!r}.")
    for value in values:
        if not isinstance(value, int) or value < least:
            raise InputError(f"{name} needs whole numbers of at least {least}, got {value!r}.")


def _times(size: tuple[int, int]) -> str:
    return "×".join(map(str, size))


# ---- Converts the published checkpoints of reconstructors ----------------------------------------

_N_STAGES, _N_RESIDUAL = PUBLISHED_STAGES, 2
_BLOCK = "transformer.encoder.layers."
_PARTS = {
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "self_attn.out_proj": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def save_original(
    path: str | Path,
    backbone: str,
    folder: str | Path,
    *,
    layer: str = LAST,
    weights: str | Path | None = None,
) -> Path:
    """Converts a published checkpoint file to a folder that `load_inverter` opens; returns it.

    For instance

        save_original("models--google--siglip-base-patch16-512.pt",
                      "hf/google/siglip-base-patch16-512", "siglip-512", layer="encoder.layers.10")

    Args:
        path: state dict that `torch.save` wrote.
        backbone: name of the encoder for `load_backbone`.
        folder: folder to write `reconstructor/` in; that must not exist yet.
        layer: layer that the reconstructor reads. The published code takes `hidden_states[-2]`, the
            output of the second-last block: `encoder.layers.10` of a base model.
        weights: folder of the encoder, for a name that `load_backbone` cannot find.

    Raises:
        InputError: no such file or encoder, or weights of another network or encoder.
    """
    found = from_original(_read_checkpoint(expand_path(path)))
    encoder = load_encoder(backbone, layer, weights=weights)
    spec, preprocessing = encoder.spec, encoder.preprocessing
    reconstructor = Reconstructor(
        asdict(spec),
        encoder.input_size,
        preprocessing.mean,
        preprocessing.std,
        depth=len({key.split(".")[1] for key in found if key.startswith("blocks.")}),
        channels=default_channels(spec.channels, _N_STAGES),
        n_residual=_N_RESIDUAL,
    )
    try:
        reconstructor.load_state_dict(found)
    except RuntimeError as error:
        raise InputError(
            f"{path} must hold the published reconstructor of {spec}, but its weights do not fit: "
            f"{str(error).splitlines()[-1].strip()}"
        ) from error
    target = expand_path(folder) / FOLDER
    with new_folder(target) as staging:
        reconstructor.save_pretrained(staging)
    return target


def from_original(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames a published state dict for a `Reconstructor` of the published sizes.

    Query, key and value become one matrix. The norm after the blocks is left out, since the
    original does not use its output.

    Raises:
        InputError: weights of another network.
    """
    try:
        found = _rename(weights)
    except KeyError as error:
        raise InputError(
            f"The weights must be those of a published reconstructor, but {error} does not belong "
            "to one."
        ) from error
    if not any(key.startswith("decoder.") for key in found):
        raise InputError(
            "The weights must be those of a published reconstructor, but have no decoder."
        )
    return found


def _read_checkpoint(path: Path) -> Mapping[str, Tensor]:
    content = read_torch(path, "a state dict that torch.save wrote")
    is_state = isinstance(content, Mapping) and all(isinstance(v, Tensor) for v in content.values())
    if not is_state:
        raise InputError(f"{path} must hold a state dict, got a {type(content).__name__}.")
    return content


def _rename(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {"token": weights["transformer.embeddings.class_embedding"]}
    for kind in ("weight", "bias"):
        found[f"norm.{kind}"] = weights[f"transformer.pre_layrnorm.{kind}"]
    numbers = {key[len(_BLOCK) :].split(".")[0] for key in weights if key.startswith(_BLOCK)}
    for i in sorted(numbers):
        for kind in ("weight", "bias"):
            parts = [weights[f"{_BLOCK}{i}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            found[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
            for theirs, ours in _PARTS.items():
                found[f"blocks.{i}.{ours}.{kind}"] = weights[f"{_BLOCK}{i}.{theirs}.{kind}"]
    for key, value in weights.items():
        if key.startswith("decoder."):
            found[f"decoder.layers.{_decoder_key(key.removeprefix('decoder.'))}"] = value
    return found


def _decoder_key(key: str) -> str:
    """Returns the key in a row of layers: `upconvN` and `resblockN` by turns, then the others."""
    module, _, rest = key.partition(".")
    match = re.fullmatch(r"(upconv|resblock|final_conv)(\d*)", module)
    if match is None:
        raise KeyError(key)
    name, number = match[1], int(match[2] or 0)
    if name == "upconv":
        position = 2 * number - 2
    elif name == "final_conv":
        position = 2 * _N_STAGES + _N_RESIDUAL
    elif number <= _N_STAGES:
        position = 2 * number - 1
    else:
        position = 2 * _N_STAGES + number - _N_STAGES - 1
    return f"{position}.{rest}"
