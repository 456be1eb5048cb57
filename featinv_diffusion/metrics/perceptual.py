"""LPIPS: the distance of two images as a network sees them."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models import AlexNet_Weights, SqueezeNet1_1_Weights, VGG16_Weights

from featinv_diffusion.errors import InputError, choices_hint
from featinv_diffusion.metrics.extractors import file_sha256, find_weights, read_weights
from featinv_diffusion.types import Images

_TRUNKS = {
    "alex": AlexNet_Weights.IMAGENET1K_V1.url,
    "vgg": VGG16_Weights.IMAGENET1K_V1.url,
    "squeeze": SqueezeNet1_1_Weights.IMAGENET1K_V1.url,
}
_SMALLEST = 32


class Lpips(nn.Module):
    """Learned perceptual image patch similarity, version 0.1 (Zhang et al. 2018, equation 1).

    0 for equal images. The linear layers come with the package lpips, the network below them is
    torchvision's ImageNet classifier, read from a file. Nothing is downloaded.

    Args:
        net: `alex` (the usual one for comparing reconstructions), `vgg` or `squeeze`.
        weights: torchvision's weight file; by default the one that it has cached.

    Raises:
        InputError: unknown net, lpips not installed, weights that are not there or of another net.
    """

    def __init__(self, net: str = "alex", weights: str | Path | None = None):
        super().__init__()
        if net not in _TRUNKS:
            hint = choices_hint(net, list(_TRUNKS))
            raise InputError(f"LPIPS needs a network that is known, got {net!r}; {hint}")
        what = f"torchvision's network {net!r} for LPIPS"
        path = find_weights(_TRUNKS[net], weights, what=what, option="--lpips-weights")
        self.network = _build(net)
        _load_trunk(self.network, read_weights(path, what=what), path)
        self.network.eval().requires_grad_(False)
        self.name = f"lpips_{net}"
        self.conventions = {
            "network": net,
            "version": "0.1",
            "weights": path.name,
            "weights_sha256": file_sha256(path),
        }

    @torch.no_grad()
    def forward(self, images: Images, others: Float[Tensor, "b 3 _ _"]) -> Float[Tensor, " b"]:
        """Returns the distance of each pair; lower is more alike.

        Raises:
            InputError: the two are not of one shape, or too small for the network.
        """
        if images.shape != others.shape or min(images.shape[-2:]) < _SMALLEST:
            raise InputError(
                f"LPIPS needs images of one shape of at least {_SMALLEST}×{_SMALLEST} pixels, "
                f"got {list(images.shape)} and {list(others.shape)}."
            )
        device = next(self.network.parameters()).device
        pair = (x.to(device, torch.float32) for x in (images, others))
        return self.network(*pair, normalize=True).flatten()


def _build(net: str) -> nn.Module:
    try:
        import lpips
    except ImportError as error:
        raise InputError(
            "LPIPS needs the package lpips, which is not installed. "
            "Install it with: pip install 'featinv-diffusion[evaluate]'."
        ) from error
    with warnings.catch_warnings():
        # It names no weights to torchvision in a way that torchvision no longer likes.
        warnings.simplefilter("ignore", UserWarning)
        return lpips.LPIPS(net=net, pnet_rand=True, verbose=False)


def _load_trunk(network: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Copies torchvision's `features.<i>.…` to the slices in which lpips holds them."""
    wanted = {name: name.split(".", 2)[2] for name in network.state_dict() if name[:4] == "net."}
    try:
        trunk = {name: state[f"features.{place}"] for name, place in wanted.items()}
        network.load_state_dict(trunk, strict=False)
    except (KeyError, RuntimeError) as error:
        raise InputError(
            f"{path} must hold torchvision's weights of the network that LPIPS was asked for, "
            f"but does not: {str(error).strip().splitlines()[0]}"
        ) from error
