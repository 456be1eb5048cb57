"""From images to the vectors whose distributions are compared; the base and the classifiers."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from PIL.Image import Resampling
from torch import Tensor, nn
from torch.nn import functional as F

from featinv_diffusion.backbones import Backbone, resolve_backbone
from featinv_diffusion.backbones.timm import create_timm
from featinv_diffusion.backbones.transformers import load_transformers
from featinv_diffusion.errors import InputError, choices_hint
from featinv_diffusion.files import read_torch
from featinv_diffusion.images import to_pil, to_tensor
from featinv_diffusion.types import Images

# ---- Weight files of metrics ----


def find_weights(url: str, path: str | Path | None, *, what: str, option: str) -> Path:
    """Returns the file given, or the one that torch.hub has cached; never downloads.

    Args:
        url: where the file comes from; its last part is its name in the cache.
        path: the file that the user named.
        what: whose weights they are, for the message.
        option: how a user names the file.

    Raises:
        InputError: the file is not there.
    """
    name = url.rpartition("/")[2]
    found = Path(path) if path is not None else Path(torch.hub.get_dir()) / "checkpoints" / name
    if not found.is_file():
        raise InputError(
            f"The weights of {what} must be in a file, but there is none at {found}. "
            f"Download {url} to that place, or name the file with {option}."
        )
    return found


def read_weights(path: Path, *, what: str) -> dict[str, Any]:
    """Reads a state dict without running code from the file.

    Raises:
        InputError: the file holds something else.
    """
    state = read_torch(path, f"the weights of {what}")
    if not isinstance(state, dict):
        raise InputError(
            f"{path} must hold the weights of {what}, but holds a {type(state).__name__}."
        )
    return state


def file_sha256(path: Path) -> str:
    """Returns the hash of a file's bytes in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class ImageFeatures(nn.Module, ABC):
    """A frozen network that gives one vector for each image.

    Images are rounded to 8 bits first, as they would be read from a file. Move it with `.to`; the
    images follow it to its device.

    Args:
        name: of the space.
        distance_name: what a Fréchet distance in this space is called in reports.
        dim: d, the length of a vector.
        conventions: everything about the vectors that changes a distance: model, weights, resize,
            rounding. State them beside each figure.
    """

    def __init__(self, *, name: str, distance_name: str, dim: int, conventions: dict[str, str]):
        super().__init__()
        self.name, self.distance_name, self.dim = name, distance_name, dim
        self.conventions = {"images": "rounded to 8 bits", **conventions}

    @abstractmethod
    def _describe(self, pixels: UInt8[Tensor, "b 3 h w"]) -> Tensor:
        """Returns a vector for each image."""

    @torch.no_grad()
    def forward(self, images: Images) -> Float[Tensor, "b d"]:
        """Returns the vectors in float32."""
        pixels = (images.float().clamp(0, 1) * 255).round().to(torch.uint8)
        return self._describe(pixels.to(self._device())).float()

    def train(self, mode: bool = True) -> ImageFeatures:
        """Does nothing but keep the network in evaluation mode."""
        return super().train(False)

    def _device(self) -> torch.device:
        return next(self.parameters()).device


class ClassifierFeatures(ImageFeatures):
    """The mean over cells of a backbone's feature map; needs no weights but the backbone's.

    A Fréchet distance in this space is not an FID and is named after the backbone.
    """

    def __init__(self, backbone: Backbone):
        spec, preprocessing = backbone.spec, backbone.preprocessing
        height, width = preprocessing.size
        super().__init__(
            name=backbone.name,
            distance_name=f"frechet_distance_{backbone.name}",
            dim=spec.channels,
            conventions={
                "features": f"mean over cells of the {spec}",
                "resize": f"to {height}×{width}, {preprocessing.interpolation} with antialiasing",
                "resize_rounding": "none",
            },
        )
        self.backbone = backbone

    def _describe(self, pixels: UInt8[Tensor, "b 3 h w"]) -> Tensor:
        return self.backbone.features(pixels.float() / 255).float().mean(dim=(2, 3))


# ---- The class token of DINOv2, in which FD-DINOv2 is measured (Stein et al. 2023) ---------------

_INPUT_SIZE = (224, 224)
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Dinov2Features(ImageFeatures):
    """The class token after the last layer norm, as dgm-eval takes it.

    The published figures are of ViT-L/14: `vit_large_patch14_dinov2.lvd142m` of timm or
    `hf/facebook/dinov2-large`. The two resample the positions from 518 to 224 pixels a little
    differently, so name the one beside the figure (`conventions` does).

    Args:
        model: a DINOv2 of transformers or timm.
        source: where it came from.
    """

    def __init__(self, model: nn.Module, source: str):
        super().__init__(
            name="dinov2",
            distance_name="fd_dinov2",
            dim=_width(model),
            conventions={
                "features": "class token of DINOv2 after the last layer norm",
                "weights": source,
                "resize": "to 224×224, bicubic with antialiasing, as Pillow on 8-bit images",
                "resize_rounding": "8 bits",
            },
        )
        self.model: Any = model.eval().requires_grad_(False)

    def _describe(self, pixels: UInt8[Tensor, "b 3 h w"]) -> Tensor:
        # Through Pillow itself: torch's resize of 8-bit images rounds one pixel in 200 otherwise.
        pictures = [
            image.resize(_INPUT_SIZE, Resampling.BICUBIC) for image in to_pil(pixels.float() / 255)
        ]
        images = to_tensor(pictures).to(self._device())
        mean, std = (torch.tensor(x, device=images.device)[:, None, None] for x in (_MEAN, _STD))
        pixel_values = (images - mean) / std
        if hasattr(self.model, "forward_features"):
            return self.model.forward_features(pixel_values)[:, 0]
        return self.model(pixel_values).last_hidden_state[:, 0]


def load_dinov2(
    name: str = "vit_large_patch14_dinov2.lvd142m", *, pretrained: bool = True, **model_kwargs: Any
) -> Dinov2Features:
    """Loads a DINOv2 by its timm id, or by `hf/` and a folder or Hub repository of transformers.

    Args:
        name: with or without `timm/`.
        pretrained: False leaves the weights random.
        **model_kwargs: for `timm.create_model` or `from_pretrained`.

    Raises:
        InputError: no such model, no DINOv2, weights that cannot be loaded.
    """
    found = resolve_backbone(name)
    if found.source != "timm":
        model, _ = load_transformers(found.target, pretrained=pretrained, **model_kwargs)
        is_dinov2 = getattr(model, "base_model_prefix", "").startswith("dinov2")
        model = getattr(model, model.base_model_prefix, model)
    else:
        is_dinov2 = "dinov2" in found.target
        model_kwargs = {"img_size": _INPUT_SIZE[0], **model_kwargs} if is_dinov2 else model_kwargs
        model = create_timm(found.target, pretrained=pretrained and is_dinov2, **model_kwargs)
    if not is_dinov2:
        raise InputError(
            f"FD-DINOv2 needs a DINOv2 model, but {name!r} is none. Name one of timm, e.g. "
            "vit_large_patch14_dinov2.lvd142m, or hf/<folder or repository> of transformers."
        )
    return Dinov2Features(model, name)


def _width(model: nn.Module) -> int:
    config = getattr(model, "config", None)
    return int(model.embed_dim if config is None else config.hidden_size)  # pyright: ignore[reportArgumentType]


# ---- The Inception network of the FID, under three named conventions -----------------------------

_INCEPTION_SIZE = (299, 299)
_WHAT = "the FID's Inception network"
_LEGACY_RESIZE = "to 299×299, bilinear without antialiasing, as TensorFlow 1"

CONVENTIONS = {
    "torch-fidelity": _LEGACY_RESIZE,
    "clean": "to 299×299, bicubic with antialiasing, as Pillow on float channels (clean-fid)",
    "adm": f"{_LEGACY_RESIZE} (inside the graph that the ADM evaluator runs)",
}
"""How images reach the network. `torch-fidelity` and `adm` give equal vectors and differ in their
reference: a folder of images for the one, published moments for the other."""


class InceptionFeatures(ImageFeatures):
    """The 2048 pooled features of the Inception network of 2015-12-05, through torch-fidelity.

    Args:
        convention: a name of `CONVENTIONS`.
        weights: torch-fidelity's weight file; by default the one that it has cached. Nothing is
            downloaded.

    Raises:
        InputError: unknown convention, torch-fidelity not installed, weights that are not there or
            are no weights of this network.
    """

    def __init__(self, convention: str = "torch-fidelity", weights: str | Path | None = None):
        if convention not in CONVENTIONS:
            hint = choices_hint(convention, list(CONVENTIONS))
            raise InputError(
                f"A convention of the FID must be known, but is {convention!r}; {hint}"
            )
        network, path = _load_network(weights)
        super().__init__(
            name="inception",
            distance_name="fid",
            dim=2048,
            conventions={
                "convention": convention,
                "features": "pool3 of Inception 2015-12-05, 2048, by torch-fidelity",
                "resize": CONVENTIONS[convention],
                "resize_rounding": "none",
                "weights": path.name,
                "weights_sha256": file_sha256(path),
            },
        )
        self.network = network.eval().requires_grad_(False)

    def _describe(self, pixels: UInt8[Tensor, "b 3 h w"]) -> Tensor:
        if self.conventions["convention"] == "clean":
            return self._describe_resized(_resize_clean(pixels))
        return self.network(pixels)[0]

    def _describe_resized(self, pixels: Float[Tensor, "b 3 299 299"]) -> Tensor:
        # torch-fidelity's own forward takes 8-bit images only, and this resize is not rounded. Its
        # layers stand in the order in which they run, the classifier last.
        x = (pixels - 128) / 128
        for layer in list(self.network.children())[:-1]:
            x = layer(x)
        return x.flatten(1)


def _resize_clean(pixels: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 299 299"]:
    # Beyond 0 … 255 where the bicubic overshoots: clean-fid does not clip.
    return F.interpolate(
        pixels.float(), _INCEPTION_SIZE, mode="bicubic", align_corners=False, antialias=True
    )


def _load_network(weights: str | Path | None) -> tuple[Any, Path]:
    try:
        from torch_fidelity import feature_extractor_inceptionv3 as fidelity
    except ImportError as error:
        raise InputError(
            "FID, KID and their precision and recall need torch-fidelity, which is not installed. "
            "Install it with: pip install 'featinv-diffusion[evaluate]'."
        ) from error
    path = find_weights(
        fidelity.URL_INCEPTION_V3, weights, what=_WHAT, option="--inception-weights"
    )
    read_weights(path, what=_WHAT)  # torch-fidelity would run whatever code the file holds
    try:
        network = fidelity.FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path)
        )
    except RuntimeError as error:
        raise InputError(
            f"{path} must hold the weights of {_WHAT} as torch-fidelity names them, but does not: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error
    return network, path
