"""The class token of DINOv2, in which FD-DINOv2 is measured (Stein et al. 2023)."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import UInt8
from PIL.Image import Resampling
from torch import Tensor, nn

from featinv_diffusion.errors import InputError
from featinv_diffusion.images import to_pil, to_tensor
from featinv_diffusion.metrics.extractors import ImageFeatures

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
    if name.startswith("hf/"):
        from featinv_diffusion.backbones.load_transformers import load_transformers

        model, _ = load_transformers(name[3:], pretrained=pretrained, **model_kwargs)
        is_dinov2 = getattr(model, "base_model_prefix", "").startswith("dinov2")
        model = getattr(model, model.base_model_prefix, model)
    else:
        from featinv_diffusion.backbones.load_timm import check_timm_id, create_timm

        timm_id = name.removeprefix("timm/")
        check_timm_id(timm_id, [])
        is_dinov2 = "dinov2" in timm_id
        model_kwargs = {"img_size": _INPUT_SIZE[0], **model_kwargs} if is_dinov2 else model_kwargs
        model = create_timm(timm_id, pretrained=pretrained and is_dinov2, **model_kwargs)
    if not is_dinov2:
        raise InputError(
            f"FD-DINOv2 needs a DINOv2 model, but {name!r} is none. Name one of timm, e.g. "
            "vit_large_patch14_dinov2.lvd142m, or hf/<folder or repository> of transformers."
        )
    return Dinov2Features(model, name)


def _width(model: nn.Module) -> int:
    config = getattr(model, "config", None)
    return int(model.embed_dim if config is None else config.hidden_size)  # pyright: ignore[reportArgumentType]
