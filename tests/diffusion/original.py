"""Tiny models that the original code could hold: norms of 32 groups, text heads of 64 channels."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from featinv_diffusion.diffusion.convert.config import sd15_config
from featinv_diffusion.diffusion.convert.weights import Parts, to_original
from featinv_diffusion.diffusion.featinv_controlnet import FeatureControlNet
from tests import tiny

CROSS, PLAIN = "CrossAttn", ""
SPEC = {"backbone": "test_vit", "layer": "last", "channels": 64, "grid": [10, 10], "kind": "map"}


@tiny.seeded
def make_parts(levels: tuple[str, ...] = (CROSS, CROSS, CROSS, PLAIN), **overrides) -> Parts:
    """Models of the four levels of Stable Diffusion 1.x, narrow, with random weights everywhere."""
    config = {
        "sample_size": 8,
        "block_out_channels": (32, 64, 64, 64)[: len(levels)],
        "down_block_types": tuple(f"{kind}DownBlock2D" for kind in levels),
        "up_block_types": tuple(f"{kind}UpBlock2D" for kind in reversed(levels)),
        "layers_per_block": 1,
        "cross_attention_dim": 128,
        "attention_head_dim": 4,
    }
    unet = UNet2DConditionModel(**(config | overrides))
    scheduler = {k: v for k, v in sd15_config().scheduler.items() if not k.startswith("_")}
    parts = Parts(
        unet=unet,
        controlnet=FeatureControlNet.from_unet(
            unet, feature_channels=64, feature_hidden_channels=24, feature_spec=SPEC
        ),
        vae=make_vae(),
        text_encoder=make_text_encoder(),
        scheduler=DDIMScheduler(**scheduler),
    )
    for model in (parts.unet, parts.controlnet, parts.vae, parts.text_encoder):
        for parameter in model.eval().parameters():
            nn.init.normal_(parameter, std=0.05)
    return parts


def make_vae() -> AutoencoderKL:
    config = {
        "block_out_channels": (32, 32, 64, 64),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "latent_channels": 4,
        "layers_per_block": 1,
        "sample_size": 64,
    }
    return AutoencoderKL(**config)


def make_text_encoder() -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            hidden_size=128,
            intermediate_size=160,
            num_attention_heads=2,
            num_hidden_layers=2,
            vocab_size=514,
            bos_token_id=512,
            eos_token_id=513,
            pad_token_id=513,
        )
    )


def make_checkpoint() -> dict[str, Tensor]:
    """The tensors of an original checkpoint of `make_parts()`."""
    return to_original(make_parts())[0]


def assert_same_weights(a, b) -> None:
    for component in ("unet", "controlnet", "vae", "text_encoder"):
        ours, theirs = (getattr(x, component).state_dict() for x in (a, b))
        # Text encoders differ in the prefix "text_model.", by the version that built them.
        ours, theirs = (
            {key.removeprefix("text_model."): value for key, value in state.items()}
            for state in (ours, theirs)
        )
        assert ours.keys() == theirs.keys(), component
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), component
