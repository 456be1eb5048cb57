"""Pulling pictures towards features: gradient descent through a decoder and a frozen backbone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from featinv_diffusion.backbones.base import Backbone
from featinv_diffusion.inverters.base import Generators
from featinv_diffusion.metrics import feature_cosine
from featinv_diffusion.types import Features, Images

LENGTH = 0.1
"""Weight of the lengths of cells beside their directions, which a cosine does not see."""

Decode = Callable[[Tensor], Images]
"""From latents, or whatever parametrises pictures, to pictures of about [0, 1]."""


def feature_loss(seen: Features, target: Features) -> Float[Tensor, " b"]:
    """Returns how far maps are from others: 1 − mean cosine of cells + LENGTH × relative error.

    The relative error is the squared distance of two maps in units of the target's mean square.
    """
    error = (seen - target).square().mean(dim=(1, 2, 3))
    scale = target.square().mean(dim=(1, 2, 3)).clamp_min(torch.finfo(target.dtype).tiny)
    return 1 - feature_cosine(target, seen) + LENGTH * error / scale


def pull(
    latents: Tensor,
    target: Features,
    backbone: Backbone,
    decode: Decode,
    *,
    n_steps: int,
    learning_rate: float,
    max_shift: int = 0,
    generator: Generators = None,
    on_step: Callable[[Float[Tensor, " b"]], None] | None = None,
) -> Tensor:
    """Takes Adam steps on latents, so that the features of what they decode to approach a target.

    The samples of a batch do not see each other: the loss is their sum, and Adam works on each
    number alone. Adam's steps have about the length of the learning rate however large a gradient
    is, so that no step can throw a picture away.

    It is all of the inverter `optimise`, and each step of `guided`. `FeatInvPipeline` refines its
    samples by itself, for its file travels without this package.

    Args:
        latents: `[b, …]`, where to start; they are not changed in place.
        target: one map per sample, of the spec of the backbone.
        decode: differentiable.
        n_steps: number of steps; 0 returns the latents.
        learning_rate: of Adam, in units of the latents.
        max_shift: pictures are moved by up to so many pixels at random in each step, so that less
            is gained by patterns that the backbone sees on exact pixels only.
        generator: of the shifts.
        on_step: called before each step with the loss of each sample.

    Returns:
        Latents without gradient.
    """
    moved = latents.detach().clone().requires_grad_()
    adam = torch.optim.Adam([moved], lr=learning_rate)
    target = target.detach().to(moved.device, torch.float32)
    for _ in range(n_steps):
        with torch.enable_grad():
            images = shift(decode(moved), max_shift, generator).clamp(0, 1)
            losses = feature_loss(backbone.features(images).float(), target)
            (moved.grad,) = torch.autograd.grad(losses.sum(), moved)
        if on_step is not None:
            on_step(losses.detach())
        adam.step()
    return moved.detach()


def shift(images: Images, most: int, generator: Generators = None) -> Images:
    """Moves each picture by up to `most` pixels along both axes; edges are mirrored."""
    if most == 0:
        return images
    height, width = images.shape[-2:]
    padded = F.pad(images, (most,) * 4, mode="reflect")
    places = [
        torch.randint(2 * most + 1, (2,), generator=one, device=None if one is None else one.device)
        for one in generator_rows(generator, len(images))
    ]
    rows = [
        image[:, y : y + height, x : x + width]
        for image, (y, x) in zip(padded, (place.tolist() for place in places), strict=True)
    ]
    return torch.stack(rows)


def generator_rows(generator: Generators, n: int) -> list[torch.Generator | None]:
    """Returns the generator of each sample of a batch."""
    return list(generator) if isinstance(generator, Sequence) else [generator] * n


def draw_noise(n: int, shape: Sequence[int], generator: Generators) -> Tensor:
    """Returns standard normal noise `[n, *shape]` on the CPU, each sample by its own generator."""
    return torch.stack(
        [
            torch.randn(*shape, generator=one, device=None if one is None else one.device).cpu()
            for one in generator_rows(generator, n)
        ]
    )


# ---- What pictures are parametrised by -----------------------------------------------------------


class Latents:
    """Latents of an autoencoder, in the units of a diffusion prior: about standard normal.

    Args:
        size: (height, width) that pictures have at least; it is rounded up to whole latents.
    """

    def __init__(self, vae: AutoencoderKL, size: tuple[int, int]):
        self.vae: Any = vae.eval().requires_grad_(False)
        self.config: Any = vae.config
        factor = 2 ** (len(self.config.block_out_channels) - 1)
        grid = [math.ceil(side / factor) for side in size]
        self.shape = (self.config.latent_channels, *grid)
        self.image_size = (grid[0] * factor, grid[1] * factor)

    def start(self, n: int, generator: Generators) -> Tensor:
        """Returns noise of the prior's scale, on the autoencoder's device."""
        return draw_noise(n, self.shape, generator).to(self.vae.device)

    def __call__(self, latents: Tensor) -> Images:
        """Decodes; gradients flow."""
        config = self.config
        latents = latents / config.scaling_factor
        if config.get("latents_mean") is not None and config.get("latents_std") is not None:
            mean, std = (
                latents.new_tensor(values)[:, None, None]
                for values in (config.latents_mean, config.latents_std)
            )
            latents = latents * std + mean
        latents = latents + (config.get("shift_factor") or 0)
        return self.vae.decode(latents, return_dict=False)[0] / 2 + 0.5


COLOURS = ((0.26, 0.09, 0.02), (0.27, 0.0, -0.05), (0.27, -0.09, 0.03))
"""Root of the covariance of RGB in natural images, by which three channels become independent."""


class FourierPixels:
    """Pixels as amplitudes of waves, scaled so that equal steps change coarse and fine alike.

    Natural images have amplitudes of about 1 / frequency (Olah et al. 2017, "Feature
    Visualization", whose preconditioning and colours these are).

    Args:
        size: (height, width) of the pictures.
    """

    def __init__(self, size: tuple[int, int], device: torch.device):
        self.image_size, self.device = size, device
        height, width = size
        frequency = torch.fft.fftfreq(height)[:, None].hypot(torch.fft.rfftfreq(width))
        self.scale = (1 / frequency.clamp_min(1 / max(size))).to(device)
        colours = torch.tensor(COLOURS, device=device)
        self.colours = colours / colours.norm(dim=0).max()

    def start(self, n: int, generator: Generators) -> Tensor:
        """Returns amplitudes of a nearly grey picture."""
        return 0.01 * draw_noise(n, (3, *self.scale.shape, 2), generator).to(self.device)

    def __call__(self, amplitudes: Tensor) -> Images:
        """Returns pictures in (0, 1)."""
        waves = torch.view_as_complex(amplitudes * self.scale[..., None])
        channels = torch.fft.irfft2(waves, s=self.image_size, norm="ortho") / 4
        return torch.einsum("rc,bchw->brhw", self.colours, channels).sigmoid()
