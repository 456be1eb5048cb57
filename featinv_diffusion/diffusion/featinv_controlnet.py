"""FeatureControlNet: a diffusers ControlNet conditioned on the feature map of a vision model.

This file travels with the weights to the Hub, so it imports only torch and diffusers.
Source: "FeatInv: Spatially resolved mapping from feature space to input space using conditional
diffusion models", section 2 ("Conditional input encoder") and figure 2.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config

# diffusers looks the base class up as an attribute of this module when it loads the pipeline.
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn
from torch.nn import functional as F


class FeatureEncoder(nn.Module):
    """Maps a feature map to the UNet's first hidden space; zero at initialisation.

    (f − mean) / std per channel → bilinear to the latent grid → conv3×3 → SiLU → conv3×3 → SiLU →
    zero conv3×3. The paper has no standardisation: `feature_mean` 0 and `feature_std` 1, the
    initial values of the buffers, are the published encoder.

    Args:
        feature_channels: channels c of the feature map `[b, c, h, w]`.
        out_channels: channels of the UNet's first block.
        hidden_channels: width of the two inner convolutions (512 in the paper).
        pooled: average the map over space and repeat it (the paper's pooled variant).
        projection_channels: channels that a 1×1 convolution on the map's own grid leaves for the
            first 3×3 convolution, which then needs far fewer weights; None has none (published).
    """

    def __init__(
        self,
        feature_channels: int,
        out_channels: int,
        hidden_channels: int = 512,
        pooled: bool = False,
        projection_channels: int | None = None,
    ):
        super().__init__()
        self.pooled = pooled
        read = projection_channels or feature_channels
        self.project = None
        if projection_channels:  # without a bias, so that a hidden condition stays zero
            self.project = nn.Conv2d(feature_channels, read, 1, bias=False)
        self.conv1 = nn.Conv2d(read, hidden_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(hidden_channels, hidden_channels, 3, padding=1)
        self.conv3 = nn.Conv2d(hidden_channels, out_channels, 3, padding=1)
        nn.init.zeros_(self.conv3.weight)
        nn.init.zeros_(self.conv3.bias)  # pyright: ignore[reportArgumentType]
        self.feature_mean: Tensor
        self.feature_std: Tensor
        self.register_buffer("feature_mean", torch.zeros(feature_channels))
        self.register_buffer("feature_std", torch.ones(feature_channels))

    def standardise(self, features: Tensor) -> Tensor:
        mean = self.feature_mean[:, None, None]
        return (features - mean) / self.feature_std[:, None, None]

    def forward(
        self, features: Tensor, size: tuple[int, int], keep: Tensor | None = None
    ) -> Tensor:
        """Encodes `[b, c, h, w]` to `[b, out, *size]`.

        Args:
            keep: bool `[b]`; where False the standardised map is set to zero, the "no features"
                condition of training drop-out and of guidance on the features.
        """
        hidden = self.standardise(features)
        if keep is not None:
            hidden = hidden * keep.to(hidden.dtype)[:, None, None, None]
        if self.project is not None:
            hidden = self.project(hidden)
        if self.pooled:
            hidden = hidden.mean(dim=(2, 3), keepdim=True).expand(-1, -1, *size)
        else:
            hidden = F.interpolate(hidden, size=size, mode="bilinear", align_corners=False)
        hidden = F.silu(self.conv1(hidden))
        hidden = F.silu(self.conv2(hidden))
        return self.conv3(hidden)


class FeatureControlNet(ControlNetModel):
    """diffusers' ControlNet whose condition is a feature map instead of an image.

    Everything else is inherited: gradient checkpointing, attention processors, `save_pretrained`.
    The condition does not depend on the timestep: call `encode_condition` once per image and pass
    the result as `encoded_cond` in sampling; pass the raw map as `controlnet_cond` in training.

    Args:
        feature_channels: channels of the feature map.
        feature_hidden_channels: width of the feature encoder.
        feature_pooled: condition on the average-pooled map.
        feature_projection_channels: channels that the encoder's 1×1 convolution leaves; None has
            no such convolution, as published.
        feature_spec: where the features come from, as a dict with the keys `backbone`, `layer`,
            `channels`, `grid` and `kind`; checked when a pipeline is wired.
        **kwargs: the arguments of `ControlNetModel`.
    """

    _repeated_blocks = ["BasicTransformerBlock"]  # noqa: RUF012
    _no_split_modules = ["BasicTransformerBlock", "ResnetBlock2D"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        feature_channels: int = 1024,
        feature_hidden_channels: int = 512,
        feature_pooled: bool = False,
        feature_spec: dict[str, Any] | None = None,
        feature_projection_channels: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.controlnet_cond_embedding = nn.Identity()  # the condition arrives encoded
        self.feature_encoder = FeatureEncoder(
            feature_channels,
            self.config["block_out_channels"][0],
            feature_hidden_channels,
            feature_pooled,
            feature_projection_channels,
        )

    @staticmethod
    def _get_init_keys(input_class: type) -> set[str]:
        # diffusers drops config keys that the signature does not name, and ours ends in **kwargs.
        keys = set(inspect.signature(input_class.__init__).parameters)
        return keys | set(inspect.signature(ControlNetModel.__init__).parameters)

    @classmethod
    def from_unet(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        unet: UNet2DConditionModel,
        feature_channels: int = 1024,
        feature_hidden_channels: int = 512,
        feature_pooled: bool = False,
        feature_spec: dict[str, Any] | None = None,
        load_weights_from_unet: bool = True,
        feature_projection_channels: int | None = None,
    ) -> FeatureControlNet:
        """Builds a ControlNet whose blocks are copies of the UNet's encoder and middle block."""
        base = ControlNetModel.from_unet(unet, load_weights_from_unet=load_weights_from_unet)
        config = {k: v for k, v in base.config.items() if not k.startswith("_")}
        model = cls(
            feature_channels=feature_channels,
            feature_hidden_channels=feature_hidden_channels,
            feature_pooled=feature_pooled,
            feature_spec=feature_spec,
            feature_projection_channels=feature_projection_channels,
            **config,
        )
        missing, unexpected = model.load_state_dict(base.state_dict(), strict=False)
        stray = [k for k in missing if not k.startswith("feature_encoder.")]
        stray += [k for k in unexpected if not k.startswith("controlnet_cond_embedding.")]
        if stray:
            raise RuntimeError(
                f"ControlNetModel.from_unet left parameters without a place: {stray}"
            )
        return model

    @apply_forward_hook
    def encode_condition(
        self, features: Tensor, size: tuple[int, int], keep: Tensor | None = None
    ) -> Tensor:
        """Encodes feature maps `[b, c, h, w]` to the condition `[b, c0, *size]` of `forward`."""
        return self.feature_encoder(features.to(self.dtype), size, keep)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        controlnet_cond: Tensor | None = None,
        *args: Any,
        encoded_cond: Tensor | None = None,
        keep: Tensor | None = None,
        **kwargs: Any,
    ):
        """As `ControlNetModel.forward`, with a feature map or its encoding as the condition.

        Args:
            sample: noisy latents `[b, 4, h, w]`.
            controlnet_cond: feature maps `[b, c, h_f, w_f]`; not read if `encoded_cond` is given.
            encoded_cond: what `encode_condition` returned.
            keep: bool `[b]`, False where the features are dropped.
        """
        if encoded_cond is None:
            if controlnet_cond is None:
                raise ValueError("Pass feature maps as controlnet_cond, or encoded_cond.")
            height, width = sample.shape[-2:]
            encoded_cond = self.encode_condition(controlnet_cond, (height, width), keep)
        return super().forward(
            sample, timestep, encoder_hidden_states, encoded_cond, *args, **kwargs
        )
