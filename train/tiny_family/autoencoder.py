"""Trains the AutoencoderKL of the tiny family: pixels, classifier features and a weak KL term.

accelerate launch -m train.tiny_family.autoencoder --config FILE key=value
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid
from transformers import TimmWrapperForImageClassification

from featinv_diffusion.cli.train import run_recipe
from featinv_diffusion.config import to_yaml
from featinv_diffusion.data.crops import DataConfig, open_training_images, to_images
from featinv_diffusion.settings import Depth, NotNegative, Seed, Size, check
from featinv_diffusion.training.config import OptimConfig, RunConfig
from featinv_diffusion.training.entry import load_component, make_datasets, stack_images
from featinv_diffusion.training.latents import SampleNoise
from featinv_diffusion.training.loop import fit, make_accelerator


@dataclass(frozen=True)
class AutoencoderModelConfig:
    """Sizes of the AutoencoderKL; the down-sampling factor is 2^(levels − 1).

    Args:
        perceptual_classifier: folder of a trained classifier whose stages give the perceptual
            loss; None leaves that loss out.
        start: folder of an AutoencoderKL of the same sizes whose weights begin the training;
            None begins with random weights.
    """

    block_out_channels: tuple[Size, ...] = (16, 32, 64, 128)
    layers_per_block: Depth = 1
    latent_channels: Size = 16
    norm_num_groups: Size = 8
    kl_weight: NotNegative = 1e-6
    perceptual_weight: NotNegative = 0.05
    perceptual_classifier: str | None = None
    start: str | None = None

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class AutoencoderConfig:
    seed: Seed = 0
    data: DataConfig = field(default_factory=DataConfig)
    model: AutoencoderModelConfig = field(default_factory=AutoencoderModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        check(self)


class _Objective(nn.Module):
    """The autoencoder as one forward pass, so that distributed wrappers see it."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, pixels: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        posterior = self.vae.encode(pixels).latent_dist  # pyright: ignore[reportAttributeAccessIssue]
        latents = posterior.mode() if noise is None else posterior.mean + posterior.std * noise
        return self.vae.decode(latents).sample, posterior.kl()  # pyright: ignore[reportAttributeAccessIssue]


class PerceptualDistance(nn.Module):
    """Mean squared difference of channel-normalised features at every stage of a classifier.

    The form of LPIPS without learned weights (Zhang et al. 2018, equation 1).
    """

    def __init__(self, wrapper: TimmWrapperForImageClassification):
        super().__init__()
        network: Any = wrapper.timm_model
        self.network = network.eval().float().requires_grad_(False)  # bundled ones are float16
        statistics: Any = wrapper.config.pretrained_cfg
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(statistics["mean"])[:, None, None])
        self.register_buffer("std", torch.tensor(statistics["std"])[:, None, None])

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """Distance of images `[b, 3, h, w]` in [0, 1]; a scalar."""
        total = images.new_zeros(())
        with torch.no_grad():
            wanted = self._stages(targets)
        for mine, other in zip(self._stages(images), wanted, strict=True):
            total = total + (mine - other).square().sum(1).mean()
        return total / len(wanted)

    def _stages(self, images: Tensor) -> list[Tensor]:
        network: Any = self.network
        maps = network.forward_intermediates(
            (images - self.mean) / self.std, intermediates_only=True
        )
        return [nn.functional.normalize(x.float(), dim=1) for x in maps]


class AutoencoderTask:
    """MSE in [−1, 1] + perceptual distance + KL to the unit Gaussian."""

    def __init__(self, vae: AutoencoderKL, config: AutoencoderModelConfig, validation: Tensor):
        self.module: nn.Module = _Objective(vae)
        self.config, self.validation = config, validation
        self.perceptual = (
            PerceptualDistance(
                load_component(TimmWrapperForImageClassification, config.perceptual_classifier)
            )
            if config.perceptual_classifier
            else None
        )

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        if self.perceptual is not None:
            self.perceptual.to(device)

    def loss(self, module: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        images = to_images(batch["pixels"])
        vae = self.vae_of(module)
        factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
        noise = SampleNoise(batch["seed"], images.device).normal(
            vae.config["latent_channels"], images.shape[-2] // factor, images.shape[-1] // factor
        )
        decoded, kl = module(images * 2 - 1, noise)
        mse = (decoded.float() - (images * 2 - 1)).square().mean()
        loss = mse + self.config.kl_weight * kl.float().mean()
        scalars = {"mse": mse, "kl": kl.float().mean()}
        if self.perceptual is not None:
            scalars["perceptual"] = self.perceptual((decoded.float() + 1) / 2, images)
            loss = loss + self.config.perceptual_weight * scalars["perceptual"]
        return loss, scalars

    def vae_of(self, module: nn.Module) -> AutoencoderKL:
        unwrapped: Any = getattr(module, "module", module)
        return unwrapped.vae

    def validate(self, module: nn.Module) -> tuple[dict[str, float], dict[str, Image.Image]]:
        device = next(module.parameters()).device
        decoded = torch.cat(
            [module(x.to(device) * 2 - 1, None)[0].float().cpu() for x in self.validation.split(64)]
        )
        images = (decoded / 2 + 0.5).clamp(0, 1)
        mse = (images - self.validation).square().mean(dim=(1, 2, 3))
        pairs = torch.stack([self.validation[:16], images[:16]]).flatten(0, 1)
        return {"psnr": float((-10 * mse.log10()).mean())}, {
            "round_trip": to_pil_image(make_grid(pairs, nrow=16, padding=1))
        }

    def save(self, module: nn.Module, folder: Path) -> None:
        vae = self.vae_of(module)
        vae.register_to_config(scaling_factor=self._scaling_factor(vae))
        vae.save_pretrained(folder / "vae")

    def _scaling_factor(self, vae: AutoencoderKL) -> float:
        with torch.no_grad():
            device = next(vae.parameters()).device
            latents = torch.cat(
                [
                    vae.encode(x.to(device) * 2 - 1).latent_dist.mode()  # pyright: ignore[reportAttributeAccessIssue]
                    for x in self.validation.split(64)
                ]
            )
        return round(1 / float(latents.float().std()), 5)

    def load(self, module: nn.Module, folder: Path) -> None:
        loaded = AutoencoderKL.from_pretrained(folder / "vae")
        self.vae_of(module).load_state_dict(loaded.state_dict())


def make_autoencoder(config: AutoencoderModelConfig, size: int) -> AutoencoderKL:
    """Builds an AutoencoderKL without attention for images of `size` pixels."""
    levels = len(config.block_out_channels)
    build: Any = AutoencoderKL  # its tuples are annotated as of length one
    vae = build(
        block_out_channels=config.block_out_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_num_groups,
        mid_block_add_attention=False,
        sample_size=size,
    )
    for module in vae.modules():  # residual blocks begin as the identity, which trains faster
        if isinstance(module, ResnetBlock2D):
            nn.init.zeros_(module.conv2.weight)
    return vae


def train_autoencoder(config: AutoencoderConfig) -> Path:
    """Trains to the end and returns the folder that holds `vae/`."""
    accelerator = make_accelerator(config.optim, config.run)
    torch.manual_seed(config.seed)
    images = open_training_images(config.data)
    train, held = make_datasets(images, config.data, config.seed)
    vae = make_autoencoder(config.model, config.data.size)
    if config.model.start:
        start = load_component(AutoencoderKL, config.model.start)
        vae.load_state_dict(start.float().state_dict())
    task = AutoencoderTask(vae, config.model, stack_images(held, 250)[0])
    return fit(task, train, accelerator, config.optim, config.run, to_yaml(config))


if __name__ == "__main__":
    run_recipe(AutoencoderConfig, train_autoencoder, __doc__)
