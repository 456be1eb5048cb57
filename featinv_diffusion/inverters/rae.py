"""Representation autoencoders (RAE) of diffusers as an inverter: a frozen encoder, a ViT decoder.

Source: "Diffusion Transformers with Representation Autoencoders" (Zheng et al. 2025). Checkpoints
that diffusers documents: `nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08` (also `small`, `large`, and
`base` at 512 px with `-i512`), `nyu-visionx/RAE-siglip2-base-p16-i256-ViTXL-n08` and
`nyu-visionx/RAE-mae-base-p16-ViTXL-n08`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import transformers
from diffusers import AutoencoderRAE
from jaxtyping import Float
from torch import Tensor, nn
from transformers import SiglipVisionModel

from featinv_diffusion.backbones.base import LAST, Backbone, Preprocessing
from featinv_diffusion.diffusion.folders import UNREADABLE, class_name, load_network
from featinv_diffusion.errors import InputError, reason_of
from featinv_diffusion.files import expand_path
from featinv_diffusion.inverters.base import Generators, Inverter
from featinv_diffusion.types import Features, FeatureSpec, Images

NAME, CLASS = "rae", AutoencoderRAE.__name__
EXAMPLE = "nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08"


class RaeBackbone(Backbone):
    """The encoder of a representation autoencoder.

    Its features are the latents that the decoder reads: the patch tokens as a map, normalised by
    the checkpoint's statistics if it has any.
    """

    def __init__(self, autoencoder: AutoencoderRAE, *, name: str):
        config: Any = autoencoder.config
        size = (autoencoder.encoder_input_size, autoencoder.encoder_input_size)
        mean, std = (
            tuple(values.flatten().tolist())
            for values in (autoencoder.encoder_mean, autoencoder.encoder_std)
        )
        preprocessing = Preprocessing(size, mean, std, "bicubic")
        super().__init__(autoencoder.requires_grad_(False), name=name, preprocessing=preprocessing)
        side = size[0] // config.encoder_patch_size
        self.spec = FeatureSpec(name, LAST, config.encoder_hidden_size, (side, side))

    @property
    def has_head(self) -> bool:
        """Always false: these encoders do not classify."""
        return False

    def _features(self, images: Images) -> Features:
        return self._run(self.preprocess(images))

    def features_and_logits(self, images: Images) -> tuple[Features, Float[Tensor, "b k"] | None]:
        """Returns the latents, and None."""
        return self.features(images), None

    def layers(self) -> list[FeatureSpec]:
        """Returns the one layer that the decoder reads."""
        return [self.spec]

    def _run(self, pixels: Tensor) -> Any:
        autoencoder: Any = self.model
        # The autoencoder normalises again, with the same statistics.
        images = pixels * autoencoder.encoder_std + autoencoder.encoder_mean
        latents = autoencoder.encode(images.to(self.dtype)).latent
        return latents if latents.ndim == 4 else _to_map(latents, self.spec.grid)

    def _class_names(self) -> tuple[str, ...] | None:
        return None


class RaeInverter(Inverter):
    """A representation autoencoder as an `Inverter` of its encoder's features; without noise.

    Args:
        name: name of the encoder in specs and messages.
    """

    def __init__(self, autoencoder: AutoencoderRAE, *, name: str = NAME):
        self.autoencoder: Any = autoencoder.eval()
        self.backbone = RaeBackbone(autoencoder, name=name)
        self.spec = self.backbone.spec
        self.networks: dict[str, nn.Module] = {"decoder": self.autoencoder.decoder}

    def _invert(self, features: Features, generator: Generators) -> Images:
        latents = features.to(self.require_backbone().dtype)
        if not self.autoencoder.reshape_to_2d:
            latents = latents.flatten(2).transpose(1, 2)
        images = self.autoencoder.decode(latents).sample.float().clamp(0, 1)
        self._advance(len(images))
        return images


def load_rae(name_or_path: str) -> RaeInverter:
    """Loads a representation autoencoder from a folder or Hub repository, in float32.

    Raises:
        InputError: no autoencoder there, or one that cannot be downloaded or read.
    """
    folder = expand_path(name_or_path)
    is_folder = bool(name_or_path) and folder.is_dir()
    source = str(folder) if is_folder else name_or_path
    wanted = f"a folder or Hub repository of an {CLASS} of diffusers, such as {EXAMPLE}"
    found = class_name(folder) if is_folder else _class_on_hub(source, wanted)
    if found != CLASS:
        raise InputError(f"{source!r} must be {wanted}, but its config is of class {found}.")
    with _nested_siglip():
        autoencoder = load_network(_Autoencoder, source, wanted=wanted)
    name = folder.resolve().name if is_folder else name_or_path
    return RaeInverter(autoencoder, name=f"{NAME}/{name}")


def _class_on_hub(name: str, wanted: str) -> Any:
    try:
        config: Any = AutoencoderRAE.load_config(name)
    except UNREADABLE as error:
        raise InputError(
            f"{name!r} must be {wanted}, but it could not be read: {reason_of(error)}"
        ) from error
    return config.get("_class_name")


class _Autoencoder(AutoencoderRAE):
    """Also reads the weights of SigLIP encoders that were saved before transformers 5."""

    def _fix_state_dict_keys_on_load(self, state_dict: Any) -> None:
        super()._fix_state_dict_keys_on_load(state_dict)
        nested, flat = "encoder.vision_model.", "encoder."
        own = self.state_dict().keys()
        for key in [key for key in state_dict if key.startswith(nested) and key not in own]:
            state_dict[flat + key.removeprefix(nested)] = state_dict.pop(key)


@contextmanager
def _nested_siglip() -> Iterator[None]:
    """Lets diffusers build a SigLIP encoder with transformers 5.

    diffusers reads the attribute `vision_model` of the tower, which transformers 5 has removed.
    """
    tower_class: Any = SiglipVisionModel
    if int(transformers.__version__.partition(".")[0]) < 5:
        yield
        return
    tower_class.vision_model = property(lambda tower: tower)
    try:
        yield
    finally:
        del tower_class.vision_model


def _to_map(tokens: Float[Tensor, "b n c"], grid: tuple[int, int]) -> Float[Tensor, "b c h w"]:
    return tokens.transpose(1, 2).unflatten(2, grid)
