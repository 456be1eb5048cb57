"""FeatInv as an `Inverter`: a pipeline with its settings held fixed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from featinv_diffusion.backbones import wrap_model
from featinv_diffusion.backbones.base import Backbone
from featinv_diffusion.diffusion.featinv_pipeline import FeatInvPipeline
from featinv_diffusion.diffusion.folders import feature_spec_of
from featinv_diffusion.errors import InputError
from featinv_diffusion.inverters.base import Generators, Inverter, RoundTrip
from featinv_diffusion.types import Features, FeatureSpec, Images


class DiffusionInverter(RoundTrip, Inverter):
    """Samples an image from p(image | features) with a `FeatInvPipeline`.

    Args:
        pipeline: holds the ControlNet whose config declares the features it reads.
        backbone: makes the features; None takes the one in the pipeline, where there is one.
        num_inference_steps: denoising steps; None takes the pipeline's default, as below.
        guidance_scale: s in ε_u + s (ε_c − ε_u); 1 is no guidance.
        guidance: `text` (only the prompt is dropped from ε_u) or `features` (both are).
        strength: factor on all residuals of the ControlNet.
        refine: Adam steps on the latents towards the features, through the backbone.
        refine_at: `end`, on the final latents; `steps`, in the last steps of denoising.

    Raises:
        InputError: the ControlNet does not declare its features, or the backbone makes others.
    """

    def __init__(
        self,
        pipeline: FeatInvPipeline,
        *,
        backbone: Backbone | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance: str | None = None,
        strength: float = 1.0,
        refine: int = 0,
        refine_at: str = "end",
    ):
        default = pipeline.config
        self.pipeline = pipeline
        self.spec = declared_spec(pipeline)
        self.backbone = _seen_through(
            backbone or _backbone_of(pipeline, self.spec), pipeline.config["through"]
        )
        if self.backbone is not None:
            self.spec.check_matches(self.backbone.spec)
        parts = pipeline.components.items()
        self.networks = {name: part for name, part in parts if isinstance(part, nn.Module)}
        self.num_inference_steps: int = _first(
            num_inference_steps, default["default_num_inference_steps"]
        )
        self.guidance_scale: float = _first(guidance_scale, default["default_guidance_scale"])
        self.guidance: str = _first(guidance, default["default_guidance"])
        self.strength, self.refine, self.refine_at = strength, refine, refine_at
        if refine:
            self.require_backbone().check_gradient()

    @property
    def is_deterministic(self) -> bool:
        """Noise decides a sample."""
        return False

    @property
    def is_optimised(self) -> bool:
        """Refined samples were moved until the backbone agreed."""
        return self.refine > 0

    @property
    def image_size(self) -> tuple[int, int]:
        """(h, w) in pixels of the samples."""
        size = self.pipeline.unet.config["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        factor = self.pipeline.vae_scale_factor
        return height * factor, width * factor

    def _invert(self, features: Features, generator: Generators) -> Images:
        return self._sample(features, self.strength, generator, self.refine)

    @torch.no_grad()
    def sample_prior(self, n: int, *, generator: Generators = None) -> Images:
        """Returns n samples of the frozen text-to-image model, which sees the prompt alone."""
        device = self.pipeline.device
        unseen = torch.zeros(n, self.spec.channels, *self.spec.grid, device=device)
        return self._sample(unseen, 0.0, generator)

    @torch.no_grad()
    def to_latents(self, images: Images) -> Float[Tensor, "b k h w"]:
        """Returns the mean of the latents, in float32 whatever the dtype of sampling."""
        with self._float32_vae() as vae:
            images = images.to(vae.device, torch.float32)
            return vae.encode(images * 2 - 1).latent_dist.mode()

    @torch.no_grad()
    def from_latents(self, latents: Float[Tensor, "b k h w"]) -> Images:
        """Returns the pictures of latents, decoded in float32."""
        with self._float32_vae() as vae:
            decoded = vae.decode(latents.to(vae.device), return_dict=False)[0]
            return (decoded / 2 + 0.5).clamp(0, 1)

    @contextmanager
    def _float32_vae(self) -> Iterator[Any]:
        vae = self.pipeline.vae
        dtype = vae.dtype
        if dtype != torch.float32:
            vae.to(dtype=torch.float32)
        try:
            yield vae
        finally:
            if dtype != torch.float32:
                vae.to(dtype=dtype)

    def _sample(
        self, features: Features, strength: float, generator: Generators, refine: int = 0
    ) -> Images:
        (images,) = self.pipeline(
            features=features,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            guidance=self.guidance,
            controlnet_conditioning_scale=strength,
            refine=refine,
            refine_at=self.refine_at,
            refine_backbone=self.backbone.features if self.backbone and refine else None,
            generator=generator,
            output_type="pt",
            callback_on_step_end=self._report(len(features)),
            return_dict=False,
        )
        return images.float()

    def _report(self, n_images: int) -> Callable[..., dict[str, Any]] | None:
        if self.on_progress is None:
            return None

        def callback(pipeline: Any, _step: int, _t: Any, _tensors: Any) -> dict[str, Any]:
            self._advance(n_images / len(pipeline.scheduler.timesteps))
            return {}

        return callback


def declared_spec(pipeline: FeatInvPipeline) -> FeatureSpec:
    """Returns the features that the pipeline's ControlNet was trained on."""
    spec = feature_spec_of(pipeline.controlnet)
    if spec is None:
        raise InputError(
            "The pipeline's ControlNet must declare the features it reads as feature_spec in its "
            "config, but it has none. Give backbone, layer, channels, grid and kind there."
        )
    return spec


def _backbone_of(pipeline: FeatInvPipeline, spec: FeatureSpec) -> Backbone | None:
    if pipeline.backbone is None:
        return None
    return wrap_model(pipeline.backbone, name=spec.backbone, layer=spec.layer)


def _seen_through(backbone: Backbone | None, side: int | None) -> Backbone | None:
    """Returns a backbone that sees pictures as the pipeline's training showed them."""
    if backbone is None or side is None or backbone.picture_size == (side, side):
        return backbone
    shown = copy(backbone)  # shares its weights
    shown.preprocessing = replace(backbone.preprocessing, through=(side, side))
    return shown


def _first(value: Any, default: Any) -> Any:
    return default if value is None else value
