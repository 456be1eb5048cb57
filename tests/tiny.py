"""Tiny models built from config, in the style of diffusers' `get_dummy_components`: 64 px images,
4×8×8 latents, 32×8×8 features. Random weights, the same at every call."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
)

from featinv_diffusion.diffusion.featinv_controlnet import FeatureControlNet
from featinv_diffusion.diffusion.featinv_pipeline import FeatInvPipeline

P = ParamSpec("P")
T = TypeVar("T")

IMAGE_SIZE, LATENT_SIZE, CHANNELS, GRID, CLASSES = 64, 8, 32, (8, 8), 10
STABLE_DIFFUSION = ("vae", "text_encoder", "tokenizer", "unet")
FEATURE_SPEC = {
    "backbone": "tiny/convnext",
    "layer": "last",
    "channels": CHANNELS,
    "grid": list(GRID),
    "kind": "map",
}


def seeded(build: Callable[P, T]) -> Callable[P, T]:
    """Makes a builder independent of the global generator, and leaves that as it was."""

    @wraps(build)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return build(*args, **kwargs)

    return wrapper


@seeded
def make_unet(**overrides) -> UNet2DConditionModel:
    config = {
        "sample_size": LATENT_SIZE,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**(config | overrides)).eval()


@seeded
def make_vae(**overrides) -> AutoencoderKL:
    config = {
        "block_out_channels": (8, 8, 8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": IMAGE_SIZE,
    }
    return AutoencoderKL(**(config | overrides)).eval()


def make_tokenizer() -> CLIPTokenizer:
    """A byte-level CLIP tokenizer without merges."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [256 + i for i in range(256 - len(kept))]
    letters = [chr(code) for code in kept + moved]
    tokens = letters + [f"{letter}</w>" for letter in letters]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


@seeded
def make_text_encoder() -> CLIPTextModel:
    config = CLIPTextConfig(
        hidden_size=32,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        vocab_size=514,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )
    return CLIPTextModel(config).eval()


def make_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


@seeded
def make_backbone(**overrides) -> TimmWrapperForImageClassification:
    """A ConvNeXt classifier whose last map is 32×8×8 at 64 px."""
    arguments = {
        "depths": (1, 1, 1, 1),
        "dims": (8, 16, 24, CHANNELS),
        "output_stride": 8,
        "ls_init_value": 1.0,
    }
    names = {i: f"class {i}" for i in range(CLASSES)}
    config = TimmWrapperConfig(
        architecture="convnext_atto",
        num_labels=CLASSES,
        id2label=names,
        label2id={name: i for i, name in names.items()},
        model_args=arguments | overrides,
        pretrained_cfg={
            "architecture": "convnext_atto",
            "input_size": (3, IMAGE_SIZE, IMAGE_SIZE),
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "interpolation": "bicubic",
            "crop_pct": 1.0,
        },
    )
    model = TimmWrapperForImageClassification(config)
    nn.init.normal_(model.timm_model.get_classifier().weight, std=0.2)
    return model.eval()


@seeded
def make_controlnet(
    unet: UNet2DConditionModel | None = None, *, zero: bool = False, **overrides
) -> FeatureControlNet:
    """A FeatureControlNet; unless `zero`, its zero convolutions are random, as after training."""
    config = {
        "feature_channels": CHANNELS,
        "feature_hidden_channels": 16,
        "feature_spec": FEATURE_SPEC,
    }
    controlnet = FeatureControlNet.from_unet(unet or make_unet(), **(config | overrides))
    if not zero:
        convolutions = [*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block]
        for convolution in [*convolutions, controlnet.feature_encoder.conv3]:
            nn.init.normal_(convolution.weight, std=0.1)
            nn.init.normal_(convolution.bias, std=0.1)
        controlnet.feature_encoder.feature_mean.normal_(std=0.1)
        controlnet.feature_encoder.feature_std.uniform_(0.5, 2)
    return controlnet.eval()


def make_components(**overrides) -> dict:
    components = {
        "vae": make_vae(),
        "text_encoder": make_text_encoder(),
        "tokenizer": make_tokenizer(),
        "unet": make_unet(),
        "controlnet": make_controlnet(),
        "scheduler": make_scheduler(),
        "backbone": make_backbone(),
    }
    return components | overrides


def make_pipeline(**overrides) -> FeatInvPipeline:
    pipeline = FeatInvPipeline(**make_components(**overrides))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_images(n: int = 2) -> torch.Tensor:
    """Smooth random images `[n, 3, 64, 64]` in [0, 1], each the same whatever `n` is."""
    small = [torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(i)) for i in range(n)]
    return nn.functional.interpolate(
        torch.cat(small), size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear"
    )


def make_features(n: int = 2) -> torch.Tensor:
    """Random feature maps `[n, 32, 8, 8]`, each the same whatever `n` is."""
    shape = (1, CHANNELS, *GRID)
    return torch.cat(
        [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(n)]
    )


def make_generators(n: int, first: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(100 + first + i) for i in range(n)]
