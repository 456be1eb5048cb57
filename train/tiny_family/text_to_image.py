"""Trains the text-conditional UNet of the tiny family, with its CLIP text encoder, on latents.

accelerate launch -m train.tiny_family.text_to_image --config FILE key=value
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from featinv_diffusion.cli.train import run_recipe
from featinv_diffusion.config import to_yaml
from featinv_diffusion.data.crops import DataConfig, open_training_images
from featinv_diffusion.diffusion.objective import (
    PUBLISHED_PROMPT,
    gaussian_floor,
    make_noise_scheduler,
    prediction_target,
)
from featinv_diffusion.settings import Depth, Probability, Seed, Size, check
from featinv_diffusion.training.config import OptimConfig, RunConfig
from featinv_diffusion.training.entry import load_component, make_datasets
from featinv_diffusion.training.latents import (
    CacheConfig,
    CachedCropDataset,
    SampleNoise,
    fill_cache,
)
from featinv_diffusion.training.loop import fit, make_accelerator
from train.tiny_family.tokenizer import make_tokenizer


@dataclass(frozen=True)
class TextToImageModelConfig:
    """Sizes of the UNet and text encoder, and how often a prompt is generic or empty."""

    vae: str = ""
    block_out_channels: tuple[Size, ...] = (96, 160)
    down_block_types: tuple[str, ...] = ("DownBlock2D", "CrossAttnDownBlock2D")
    up_block_types: tuple[str, ...] = ("CrossAttnUpBlock2D", "UpBlock2D")
    layers_per_block: Depth = 1
    attention_head_dim: Size = 4
    norm_num_groups: Size = 16
    text_hidden_size: Size = 96
    text_layers: Depth = 2
    text_length: Size = 24
    generic_prompt_share: Probability = 0.2
    empty_prompt_share: Probability = 0.1

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class TextToImageConfig:
    seed: Seed = 0
    data: DataConfig = field(default_factory=DataConfig)
    model: TextToImageModelConfig = field(default_factory=TextToImageModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        check(self)


class _Networks(nn.Module):
    """UNet and text encoder as one forward pass, so that distributed wrappers see it."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, latents: Tensor, timesteps: Tensor, ids: Tensor) -> Tensor:
        return self.unet(latents, timesteps, self.text_encoder(ids)[0]).sample  # pyright: ignore[reportArgumentType]


class TextToImageTask:
    """ε-prediction with a prompt that names the class, is the paper's generic one, or is empty."""

    def __init__(self, config: TextToImageModelConfig, titles: list[str], vae: AutoencoderKL):
        self.config, self.vae = config, vae
        prompts = ["", PUBLISHED_PROMPT, *(f"a photo of a {title}" for title in titles)]
        self.prompts = prompts
        self.tokenizer = make_tokenizer(prompts, config.text_length)
        self.ids = self.tokenize(prompts)
        self.scheduler = make_scheduler()
        self.noise_scheduler = make_noise_scheduler(self.scheduler)
        self.module: nn.Module = _Networks(
            make_unet(config, vae), make_text_encoder(config, self.tokenizer)
        )

    def tokenize(self, prompts: list[str]) -> Tensor:
        encoded = self.tokenizer(
            prompts, padding="max_length", truncation=True, return_tensors="pt"
        )
        return encoded.input_ids

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        vae: Any = self.vae
        vae.to(device)
        self.ids = self.ids.to(device)

    def loss(self, module: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        draw = SampleNoise(batch["seed"], batch["latent_mean"].device)
        shape = batch["latent_mean"].shape[1:]
        latents = batch["latent_mean"] + batch["latent_std"] * draw.normal(*shape)
        latents = latents * self.vae.config["scaling_factor"]
        noise = draw.normal(*shape)
        timesteps = draw.timesteps(len(self.noise_scheduler.alphas_cumprod))
        ids = self.ids[self._prompt_numbers(batch["label"], draw.uniform())]
        noisy = self.noise_scheduler.add_noise(latents, noise, timesteps)  # pyright: ignore[reportArgumentType]
        target = prediction_target(self.noise_scheduler, latents, noise, timesteps)
        return F.mse_loss(module(noisy, timesteps, ids).float(), target), {}

    def _prompt_numbers(self, labels: Tensor, uniform: Tensor) -> Tensor:
        empty, generic = self.config.empty_prompt_share, self.config.generic_prompt_share
        numbers = torch.where(uniform < empty + generic, 1, labels + 2)
        return torch.where(uniform < empty, 0, numbers)

    def validate(self, module: nn.Module) -> tuple[dict[str, float], dict[str, Image.Image]]:
        networks: Any = module
        pipeline = StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=networks.text_encoder,
            tokenizer=self.tokenizer,
            unet=networks.unet,
            scheduler=self.scheduler,  # pyright: ignore[reportArgumentType]
            safety_checker=None,  # pyright: ignore[reportArgumentType]
            feature_extractor=None,  # pyright: ignore[reportArgumentType]
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        step = max(1, (len(self.prompts) - 2) // 16)
        result: Any = pipeline(
            self.prompts[2::step][:16],
            num_inference_steps=20,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        )
        images: Tensor = result.images
        grid = make_grid(images.float().cpu(), nrow=8, padding=1)
        floor = gaussian_floor(self.noise_scheduler)  # the loss says something only below it
        scalars = {"pixel_std": float(images.std()), "gaussian_floor": floor}
        return scalars, {"samples": to_pil_image(grid)}

    def save(self, module: nn.Module, folder: Path) -> None:
        networks: Any = module
        self.vae.save_pretrained(folder / "vae")  # the folder is a whole Stable Diffusion base
        networks.unet.save_pretrained(folder / "unet")
        networks.text_encoder.save_pretrained(folder / "text_encoder")
        self.tokenizer.save_pretrained(str(folder / "tokenizer"))
        self.scheduler.save_pretrained(folder / "scheduler")

    def load(self, module: nn.Module, folder: Path) -> None:
        networks: Any = module
        for name, component_class in (
            ("unet", UNet2DConditionModel),
            ("text_encoder", CLIPTextModel),
        ):
            loaded = component_class.from_pretrained(folder / name)
            getattr(networks, name).load_state_dict(loaded.state_dict())


def make_scheduler() -> DDIMScheduler:
    """Stable Diffusion 1.x's noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def make_unet(config: TextToImageModelConfig, vae: AutoencoderKL) -> UNet2DConditionModel:
    """Builds the UNet for the latents of `vae`."""
    channels = vae.config["latent_channels"]
    factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
    return UNet2DConditionModel(
        sample_size=vae.config["sample_size"] // factor,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=config.block_out_channels,
        down_block_types=config.down_block_types,
        up_block_types=config.up_block_types,
        layers_per_block=config.layers_per_block,
        cross_attention_dim=config.text_hidden_size,
        attention_head_dim=config.attention_head_dim,
        norm_num_groups=config.norm_num_groups,
    )


def make_text_encoder(config: TextToImageModelConfig, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Builds a small CLIP text encoder for `tokenizer`."""
    make_config: Any = CLIPTextConfig
    return CLIPTextModel(
        make_config(
            vocab_size=len(tokenizer),
            hidden_size=config.text_hidden_size,
            intermediate_size=4 * config.text_hidden_size,
            num_hidden_layers=config.text_layers,
            num_attention_heads=4,
            max_position_embeddings=config.text_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train_text_to_image(config: TextToImageConfig) -> Path:
    """Trains to the end and returns a folder in Stable Diffusion's layout."""
    accelerator = make_accelerator(config.optim, config.run)
    torch.manual_seed(config.seed)
    images = open_training_images(config.data)
    train, _ = make_datasets(images, config.data, config.seed)
    vae = load_component(AutoencoderKL, config.model.vae)
    cache = fill_cache(
        train,
        vae.to(accelerator.device),
        config.cache.folder or f"{config.run.output}/latents",
        config.cache.n_crops,
        vae.config["sample_size"],
        accelerator,
    )
    dataset = CachedCropDataset(train, cache, with_pixels=False)
    task = TextToImageTask(config.model, images.class_names or [], vae)
    return fit(task, dataset, accelerator, config.optim, config.run, to_yaml(config))


if __name__ == "__main__":
    run_recipe(TextToImageConfig, train_text_to_image, __doc__)
