"""The Inception network of the FID, under three named conventions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from featinv_diffusion.errors import InputError, choices_hint
from featinv_diffusion.metrics.extractors import ImageFeatures
from featinv_diffusion.metrics.weights import file_sha256, find_weights, read_weights

_INPUT_SIZE = (299, 299)
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
        pixels.float(), _INPUT_SIZE, mode="bicubic", align_corners=False, antialias=True
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
