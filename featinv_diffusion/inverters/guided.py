"""Inversion without training: a text-to-image model whose samples are pulled towards features.

Each step of DDIM estimates the clean picture; here that estimate is pulled towards the features
before the step is taken (Shirahama et al. 2025, "Feature Space Analysis by Guided Diffusion
Model", arXiv 2509.07936: strong guidance in early steps, bounded gradients; Yu et al. 2023,
"FreeDoM", for going back in time). Unlike there, no gradient need pass through the UNet: the
latents of the estimate itself are moved, through the autoencoder and the backbone alone.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from featinv_diffusion.backbones.base import Backbone
from featinv_diffusion.diffusion.folders import UNREADABLE
from featinv_diffusion.diffusion.objective import PUBLISHED_PROMPT
from featinv_diffusion.errors import InputError, reason_of
from featinv_diffusion.inverters.base import Generators, RoundTrip
from featinv_diffusion.inverters.optimise import GradientInverter, find_part, load_part
from featinv_diffusion.inverters.refine import Latents, draw_noise, pull
from featinv_diffusion.types import Features, Images

NAME = "guided"
STEPS = 20
NOISY = 0.5
"""Steps at ᾱ below this are early: they are taken twice, and pulled the most."""


class GuidedInverter(RoundTrip, GradientInverter):
    """Samples a text-to-image model, pulling each step's clean estimate towards the features.

    Args:
        vae, unet, scheduler: of a Stable Diffusion folder; the scheduler gives the noise schedule.
        prompt: embedding of the prompt, `[1, tokens, d]`.
        n_steps: of DDIM.
        n_pulls: Adam steps on the estimate of each step.
        learning_rate: of Adam, at full noise; it falls with the noise that is left.
        n_travels: how often an early step is undone by noise and taken again.
        max_shift: of the picture in each Adam step, in pixels.
        through_unet: moves the noisy latents by the gradient through the UNet instead, as the
            papers do; about twice as slow here, and far more memory at full size.
    """

    def __init__(
        self,
        backbone: Backbone,
        vae: AutoencoderKL,
        unet: UNet2DConditionModel,
        scheduler: DDIMScheduler,
        prompt: Float[Tensor, "1 n d"],
        *,
        n_steps: int = STEPS,
        n_pulls: int = 6,
        learning_rate: float = 0.1,
        n_travels: int = 1,
        max_shift: int = 1,
        through_unet: bool = False,
    ):
        super().__init__(backbone)
        self.unet, self.scheduler, self.prompt = (
            unet.eval().requires_grad_(False),
            scheduler,
            prompt,
        )
        self.networks = {"vae": vae, "unet": unet}
        size: Any = unet.config["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
        self.decode = Latents(vae, (height * factor, width * factor))
        self.n_steps, self.n_pulls, self.learning_rate = n_steps, n_pulls, learning_rate
        self.n_travels, self.max_shift, self.through_unet = n_travels, max_shift, through_unet

    @property
    def image_size(self) -> tuple[int, int]:
        """(h, w) in pixels of the samples."""
        return self.decode.image_size

    def _invert(self, features: Features, generator: Generators) -> Images:
        return self._sample(len(features), features, generator)

    @torch.no_grad()
    def sample_prior(self, n: int, *, generator: Generators = None) -> Images:
        """Returns n samples of the text-to-image model, which sees the prompt alone."""
        return self._sample(n, None, generator)

    @torch.no_grad()
    def to_latents(self, images: Images) -> Float[Tensor, "b k h w"]:
        """Returns the mean of the latents."""
        vae: Any = self.networks["vae"]
        return vae.encode(images.to(vae.device).float() * 2 - 1).latent_dist.mode()

    @torch.no_grad()
    def from_latents(self, latents: Float[Tensor, "b k h w"]) -> Images:
        """Returns the pictures of latents."""
        vae: Any = self.networks["vae"]
        decoded = vae.decode(latents.to(vae.device), return_dict=False)[0]
        return (decoded / 2 + 0.5).clamp(0, 1)

    def _sample(self, n: int, target: Features | None, generator: Generators) -> Images:
        self.scheduler.set_timesteps(self.n_steps)
        times = self.scheduler.timesteps.tolist()
        ends = [*(self._signal(t) for t in times[1:]), 1.0]
        x = self.decode.start(n, generator)
        for t, end in zip(times, ends, strict=True):
            signal = self._signal(t)
            travels = self.n_travels if target is not None and signal < NOISY else 0
            for travel in range(travels + 1):
                clean, noise = self._estimate(x, t)
                if target is not None:
                    clean, noise = self._pulled(x, t, clean, noise, target, generator)
                after = end**0.5 * clean + (1 - end) ** 0.5 * noise
                if travel < travels:
                    again = draw_noise(n, self.decode.shape, generator).to(x)
                    kept = signal / end
                    x = kept**0.5 * after + (1 - kept) ** 0.5 * again
            x = after
            self._advance(n / self.n_steps)
        return self.decode(x).float().clamp(0, 1)

    def _pulled(
        self,
        x: Tensor,
        t: int,
        clean: Tensor,
        noise: Tensor,
        target: Features,
        generator: Generators,
    ) -> tuple[Tensor, Tensor]:
        """Returns the clean estimate and the noise of a step after the pull."""
        options: Any = {
            "n_steps": self.n_pulls,
            "learning_rate": self.learning_rate * (1 - self._signal(t)) ** 0.5,
            "max_shift": self.max_shift,
            "generator": generator,
        }
        if not self.through_unet:
            return pull(clean, target, self.backbone, self.decode, **options), noise
        x = pull(
            x,
            target,
            self.backbone,
            lambda moved: self.decode(self._estimate(moved, t)[0]),
            **options,
        )
        return self._estimate(x, t)

    def _estimate(self, x: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """Returns the clean latents and the noise that the UNet sees in noisy latents."""
        prompt = self.prompt.to(x).expand(len(x), -1, -1)
        found = self.unet(x, t, encoder_hidden_states=prompt, return_dict=False)[0]
        signal = self._signal(t)
        if self.scheduler.config["prediction_type"] == "v_prediction":
            return (
                signal**0.5 * x - (1 - signal) ** 0.5 * found,
                signal**0.5 * found + (1 - signal) ** 0.5 * x,
            )
        return (x - (1 - signal) ** 0.5 * found) / signal**0.5, found

    def _signal(self, t: int) -> float:
        """ᾱ, the share of the picture in the variance at a time."""
        return float(self.scheduler.alphas_cumprod[t])


def load_guided(backbone: Backbone, prior: str, *, n_steps: int = STEPS) -> GuidedInverter:
    """Loads the text-to-image model of a folder or Hub repository, see `optimise.load_part`.

    Raises:
        InputError: nothing there, files that cannot be read, or more steps than it has.
    """
    scheduler = _load(DDIMScheduler, prior, "scheduler")
    tokenizer = _load(CLIPTokenizer, prior, "tokenizer")
    encoder = _load(CLIPTextModel, prior, "text_encoder").float().eval()
    n_train = scheduler.config["num_train_timesteps"]
    if n_steps > n_train:
        raise InputError(
            f"There can be at most {n_train} steps, as many as {prior} was trained with, got "
            f"{n_steps}."
        )
    tokens = tokenizer(
        PUBLISHED_PROMPT,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        prompt = encoder(tokens.input_ids)[0]
    return GuidedInverter(
        backbone,
        load_part(AutoencoderKL, prior, "vae"),
        load_part(UNet2DConditionModel, prior, "unet"),
        scheduler,
        prompt,
        n_steps=n_steps,
    )


def _load(kind: Any, prior: str, part: str) -> Any:
    place, options = find_part(prior, part)
    try:
        return kind.from_pretrained(place, **options)
    except UNREADABLE as error:
        raise InputError(
            f"{prior} must be a Stable Diffusion folder or Hub repository, but its {part} could "
            f"not be read: {reason_of(error)}"
        ) from error
