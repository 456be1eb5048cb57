"""FeatInvPipeline: samples images that have given features in the eyes of a frozen vision model.

This file travels with the weights to the Hub and is executed there without its package, so it
imports nothing but PIL, numpy, torch, timm and the libraries of Hugging Face. A folder that
`save_pretrained` writes loads in two ways: with `FeatInvPipeline.from_pretrained(folder)`, which
runs the installed code and never the shipped one, and with `DiffusionPipeline.from_pretrained(
folder, trust_remote_code=True)`, which runs the shipped code and needs no installation.

Source: "FeatInv: Spatially resolved mapping from feature space to input space using conditional
diffusion models", sections 2 and 3.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
import operator
import re
import shlex
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from diffusers import AutoencoderKL, ControlNetModel, DiffusionPipeline, UNet2DConditionModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput, StableDiffusionMixin
from diffusers.schedulers import SchedulerMixin
from diffusers.utils import logging
from huggingface_hub import ModelCard, ModelCardData, create_repo
from timm.data import resolve_data_config
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer, PreTrainedModel

logger = logging.get_logger(__name__)

Whole: TypeAlias = int | np.integer
Number: TypeAlias = float | np.floating | np.integer | torch.Tensor
SCOPE_FILE = "scope.safetensors"
CERTAINTY_FILE = "certainty.safetensors"
SCHEDULERS_THAT_WORK = "DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler"
GUIDANCE = ("text", "features")
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
PROMPT_CACHE_SIZE = 64

CARD_TAGS = ["feature-inversion", "interpretability", "controlnet", "featinv"]
CARD = """\
# {heading}

Turns feature maps of a frozen vision model back into images: a ControlNet on a latent
text-to-image model, conditioned on the map. Many images share one map; each seed gives another.

| | |
|---|---|
| Features | {features} |
| Images | {pixels} × {pixels} pixels |
| Sampling | {steps} steps of {scheduler}, guidance scale {scale} ({guidance}) |
| Prompt | {prompt} |

## Use

With diffusers, transformers and timm alone; the folder carries its code:

```python
import torch
from diffusers import DiffusionPipeline

folder = {title!r}  # this folder, or the name of the repository it was pushed to
pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
features = {get_features}
images = pipe(
    features=features, num_images_per_prompt=4, generator=torch.Generator().manual_seed(0)
).images
```

Where the package featinv-diffusion is installed, no code of the folder has to be trusted:

```python
from featinv_diffusion.diffusion.hub import load_pipeline

pipe = load_pipeline(folder)
```

## How it was made

```
{command}
```

Versions: {versions}.
{notes}"""

Image = PIL.Image.Image | str | Path

# Files keep these names wherever they travel: a saved folder names its code by them.
_CONTROLNET_STEM = "featinv_controlnet"
REFINE_AT = {"end": 0.1, "steps": 0.05}
"""Where latents are refined, and Adam's learning rate there."""
_LIBRARIES = ("diffusers", "transformers")
# What the libraries write into a config about the place it was loaded from.
_LOADING_TRACES = ("_name_or_path", "is_local", "local_files_only")
# What a Stable Diffusion folder has besides, when the pipeline is assembled from one.
_OTHERS_COMPONENTS = (
    "safety_checker",
    "requires_safety_checker",
    "feature_extractor",
    "image_encoder",
)

# Where diffusers runs the shipped copy of this file there is no package beside it.
_PACKAGE = None if __name__.startswith("diffusers_modules.") else __package__
if _PACKAGE:
    # diffusers loads a component only from a module that is imported already.
    importlib.import_module(f"{_PACKAGE}.{_CONTROLNET_STEM}")


class FeatInvPipeline(DiffusionPipeline, StableDiffusionMixin):
    """Samples images from feature maps with a latent text-to-image model and a FeatureControlNet.

    Args:
        text_encoder: optional where `prompt_embeds` are passed to the call.
        controlnet: a FeatureControlNet; its `config.feature_spec` says which features it reads.
        backbone: a `TimmWrapperForImageClassification`, which makes features of images; optional
            where features are passed to the call.
        default_prompt: the prompt of training.
        default_num_inference_steps: used where the call names no number of steps; likewise
            `default_guidance_scale` and `default_guidance`.
        best_refine: steps of refinement of the best quality, of which another backbone than the
            pipeline's judged that they help; 0 where none has judged. `best_refine_at` says where.
        feature_layer: dotted path of a module of the timm model, or `last` for the last spatial
            map before pooling; None takes the layer of the controlnet's `feature_spec`.
        through: side in pixels that pictures are brought to before the size that the backbone
            takes, because its maps of sharper ones were not seen in training; None leaves them.
    """

    model_cpu_offload_seq = "backbone->text_encoder->unet->vae"
    _optional_components = ["text_encoder", "tokenizer", "backbone"]  # noqa: RUF012
    _callback_tensor_inputs = ["latents", "prompt_embeds", "encoded_cond"]  # noqa: RUF012

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel | None,
        tokenizer: CLIPTokenizer | None,
        unet: UNet2DConditionModel,
        controlnet: ControlNetModel,
        scheduler: SchedulerMixin,
        backbone: PreTrainedModel | None = None,
        default_prompt: str = "a high-quality, detailed, and professional image",
        default_num_inference_steps: int = 50,
        default_guidance_scale: float = 1.75,
        default_guidance: str = "text",
        best_refine: int = 0,
        best_refine_at: str = "end",
        feature_layer: str | None = None,
        through: int | None = None,
    ):
        super().__init__()
        _check_choice("default_guidance", default_guidance, GUIDANCE)
        _check_choice("best_refine_at", best_refine_at, tuple(REFINE_AT))
        if not isinstance(default_prompt, str):
            raise ValueError(f"default_prompt must be a text, got {default_prompt!r}.")
        if "feature_channels" not in controlnet.config:
            raise ValueError(
                "The controlnet must be a FeatureControlNet, which reads feature maps, got a "
                f"{type(controlnet).__name__}."
            )
        trained_layer = _declared_features(controlnet).get("layer")
        if feature_layer and trained_layer and feature_layer != trained_layer:
            raise ValueError(
                f"The controlnet reads features of layer {trained_layer!r}, but feature_layer is "
                f"{feature_layer!r}. Leave feature_layer out, or use the controlnet of that layer."
            )
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            controlnet=controlnet,
            scheduler=scheduler,
            backbone=backbone,
        )
        self.register_to_config(
            default_prompt=default_prompt,
            default_num_inference_steps=int(default_num_inference_steps),
            default_guidance_scale=float(default_guidance_scale),
            default_guidance=default_guidance,
            best_refine=int(best_refine),
            best_refine_at=best_refine_at,
            feature_layer=feature_layer or trained_layer or "last",
            through=None if through is None else int(through),
        )
        self.vae_scale_factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self._interrupt = False
        self._graphs: dict[tuple[Any, ...], Any] | None = None
        self.scope_file: Path | None = None
        """Statistics of natural feature maps, which a saved folder takes along."""
        self.certainty_file: Path | None = None
        """How far samples err, by their spread; a saved folder takes it along too."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("text_encoder", "tokenizer"):
            self.__dict__["_prompt_cache"] = {}
        if name in ("unet", "controlnet") and self.__dict__.get("_graphs"):
            self._graphs = {}
        super().__setattr__(name, value)

    @property
    def interrupt(self) -> bool:
        """Set `pipeline._interrupt = True` in a callback to stop after the step."""
        return self._interrupt

    @property
    def num_timesteps(self) -> int:
        """Denoising evaluations of the latest call."""
        return self._num_timesteps

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the latest call."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the latest call evaluates a negative branch; at scale 1 it would cancel."""
        return self._guidance_scale != 1

    # ---- features ------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_features(self, images: Image | Sequence[Image] | torch.Tensor) -> torch.Tensor:
        """Returns the feature maps `[b, c, h, w]` that the backbone sees in images.

        Args:
            images: PIL images or paths, of which the centre square is scaled to the backbone's
                input size, bilinear with antialiasing; or a tensor `[b, 3, h, w]` in [0, 1],
                scaled whole as the backbone's configuration says.
        """
        features = self._see(images)
        self._check_features(features, f"the backbone {self.backbone.config.architecture!r} gives")
        return features

    def _see(self, images: Image | Sequence[Image] | torch.Tensor) -> torch.Tensor:
        """Returns the maps of images; gradients flow to a tensor of them."""
        backbone = self._timm_backbone()
        pixels = self._preprocess(images).to(self._execution_device, backbone.dtype)
        layer = self.config["feature_layer"]
        with _weights_at_hand(backbone, backbone.timm_model):
            if layer == "last":
                features = self._last_map(backbone.timm_model, pixels)
            else:
                features = self._map_of_layer(backbone.timm_model, pixels, layer)
        return features

    def _last_map(self, model: Any, pixels: torch.Tensor) -> torch.Tensor:
        output = model.forward_features(pixels)
        is_tensor = isinstance(output, torch.Tensor)
        if is_tensor and (output.ndim == 4 or self._grid):
            return self._to_map(output, model, self._grid)
        own = model.forward_intermediates(
            pixels, indices=1, output_fmt="NCHW", intermediates_only=True
        )[-1]
        # Tokens of one scale lie on the grid of the model's own map; of several, that map is it.
        return self._to_map(output, model, tuple(own.shape[2:])) if is_tensor else own

    def _map_of_layer(self, model: Any, pixels: torch.Tensor, layer: str) -> torch.Tensor:
        if layer not in dict(model.named_modules()):
            raise ValueError(
                f"The backbone {type(model).__name__} has no layer {layer!r}. "
                "Use the backbone that the controlnet was trained on."
            )
        outputs = []
        hook = model.get_submodule(layer).register_forward_hook(
            lambda _module, _inputs, output: outputs.append(output.clone())
        )
        try:
            model(pixels)
        finally:
            hook.remove()
        return self._to_map(outputs[0], model, self._grid)

    @property
    def _grid(self) -> tuple[int, ...] | None:
        spec = _declared_features(self.controlnet)
        return tuple(spec["grid"]) if spec else None

    def _to_map(
        self, output: torch.Tensor, model: Any, grid: tuple[int, ...] | None
    ) -> torch.Tensor:
        """Returns `[b, c, h, w]`; the declared shape of the features says which axis is which."""
        channels = self.controlnet.config.feature_channels
        if output.ndim == 4:
            maps = [output, output.permute(0, 3, 1, 2)]
            if getattr(model, "output_fmt", "NCHW") == "NHWC":
                maps.reverse()
        elif output.ndim == 3 and grid:
            n_prefix = output.shape[1] - math.prod(grid)
            if n_prefix not in (0, getattr(model, "num_prefix_tokens", 0)):
                raise self._shape_error("the backbone gives tokens of", output.shape)
            maps = [output[:, n_prefix:].transpose(1, 2).unflatten(2, grid)]
        else:
            raise self._shape_error("the backbone gives", output.shape)
        fitting = [m for m in maps if m.shape[1] == channels and grid in (None, m.shape[2:])]
        return (fitting or maps)[0].contiguous()

    def _timm_backbone(self) -> Any:
        if self.backbone is None:
            raise ValueError(
                "Images need a backbone, which this pipeline was loaded without. Pass features, "
                "or load the pipeline with backbone=TimmWrapperForImageClassification(...)."
            )
        if not hasattr(self.backbone, "timm_model"):
            raise ValueError(
                "The backbone of a pipeline must be a TimmWrapperForImageClassification, got a "
                f"{type(self.backbone).__name__}. Compute the features yourself and pass them."
            )
        return self.backbone

    def _preprocess(self, images: Image | Sequence[Image] | torch.Tensor) -> torch.Tensor:
        config = resolve_data_config(
            pretrained_cfg=dict(self.backbone.config.pretrained_cfg), use_test_size=True
        )
        # Some models accept one input size only, whatever their configuration says.
        embedding: Any = getattr(self.backbone.timm_model, "patch_embed", None)
        strict = getattr(embedding, "strict_img_size", False)
        height, width = embedding.img_size if strict else config["input_size"][-2:]
        size = (int(height), int(width))
        # All that is seen of a picture, where a backbone for large ones is shown small ones.
        side = self.config["through"]
        through = (int(side), int(side)) if side else size
        if isinstance(images, torch.Tensor):
            pixels = _check_pixels(images)
        else:
            several = not isinstance(images, (PIL.Image.Image, str, Path))
            pictures = list(images) if several else [images]
            if not pictures:
                raise ValueError("At least one image must be given, got an empty list.")
            pixels = torch.cat([_to_pixels(picture, through) for picture in pictures])
        for wanted in (through, size):
            pixels = _resize(pixels, wanted, config["interpolation"])
        mean = pixels.new_tensor(config["mean"])[:, None, None]
        std = pixels.new_tensor(config["std"])[:, None, None]
        return (pixels - mean) / std

    def _check_features(self, features: torch.Tensor, source: str = "the features have") -> None:
        channels, grid = self.controlnet.config.feature_channels, self._grid
        fits = features.ndim == 4 and features.shape[1] == channels and len(features) > 0
        if not fits or grid not in (None, features.shape[2:]):
            raise self._shape_error(source, features.shape)
        if not bool(torch.isfinite(features).all()):
            raise ValueError(
                "Features must be finite, got NaN or infinite values. "
                "Look for overflow in half precision or a broken edit."
            )

    def _edit(
        self, features: torch.Tensor, edit: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        edited = edit(features)
        self._check_features(edited, "the feature_edit gives")
        if len(edited) != len(features):
            raise ValueError(
                f"A feature_edit must return one map for each of the {len(features)} it is given, "
                f"but returned {len(edited)}."
            )
        return edited

    def _shape_error(self, source: str, shape: Sequence[int]) -> ValueError:
        spec, grid = _declared_features(self.controlnet), self._grid or ("h", "w")
        wanted = ["b", self.controlnet.config.feature_channels, *grid]
        origin = f" (layer {spec['layer']!r} of {spec['backbone']!r})" if spec else ""
        return ValueError(
            f"The controlnet reads feature maps of shape [{', '.join(map(str, wanted))}]{origin}, "
            f"but {source} shape {list(shape)}. Use the backbone and layer that it was trained on."
        )

    # ---- prompts -------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_prompt(self, prompt: str | Sequence[str]) -> torch.Tensor:
        """Returns text embeddings `[b, tokens, d]`; a prompt runs through the text encoder once.

        After changing the weights of the text encoder in place, call `clear_prompt_cache`.
        """
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError(
                "A prompt needs the text encoder and the tokenizer, which this pipeline was loaded "
                "without. Pass prompt_embeds, and negative_prompt_embeds where guidance is used."
            )
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        embeds = [self._encode_one_prompt(text) for text in prompts]
        return torch.cat(embeds).to(self._execution_device)

    def clear_prompt_cache(self) -> None:
        """Forgets the embeddings of all prompts."""
        self._prompt_cache.clear()

    def _encode_one_prompt(self, text: str) -> torch.Tensor:
        # One at a time, so that an embedding does not depend on what else is in the batch.
        key = (text, self.text_encoder.dtype)
        if key not in self._prompt_cache:
            limit = self.tokenizer.model_max_length
            ids = self.tokenizer(
                text, padding="max_length", max_length=limit, truncation=True, return_tensors="pt"
            ).input_ids
            if len(self.tokenizer(text).input_ids) > limit:
                logger.warning("The prompt is cut at %d tokens: %r", limit, text)
            if len(self._prompt_cache) >= PROMPT_CACHE_SIZE:
                self._prompt_cache.clear()
            self._prompt_cache[key] = self.text_encoder(ids.to(self._execution_device))[0]
        return self._prompt_cache[key]

    def _prompt_rows(
        self,
        name: str,
        prompt: str | Sequence[str] | None,
        embeds: torch.Tensor | None,
        n_images: int,
        n_samples: int,
    ) -> torch.Tensor:
        """Returns one embedding per sample; sample j of image i is row i * n_samples + j."""
        if embeds is None:
            embeds = self.encode_prompt(self.config["default_prompt"] if prompt is None else prompt)
        if embeds.ndim != 3 or len(embeds) not in (1, n_images):
            raise ValueError(
                f"There must be one {name} or one per image ({n_images}), got {len(embeds)} "
                f"as embeddings of shape {list(embeds.shape)}."
            )
        embeds = embeds.to(self._execution_device, self.unet.dtype)
        if len(embeds) == 1:
            return embeds.expand(n_images * n_samples, -1, -1)
        return embeds.repeat_interleave(n_samples, dim=0)

    # ---- sampling ------------------------------------------------------------------------------

    def enable_capture(self) -> None:
        """Runs controlnet and UNet as one traced graph, which spares Python's share of each step.

        A graph is traced at the first step of each batch size and size of images, which takes
        seconds, and is kept until `disable_capture`, so it pays for many images of small models.
        It reads the weights where they are: those that change in place are followed. After
        changing modules, such as attention processors or adapters, call this again.
        """
        self._graphs = {}

    def disable_capture(self) -> None:
        """Forgets the graphs and runs the modules themselves."""
        self._graphs = None

    @torch.no_grad()
    def __call__(
        self,
        images: Image | Sequence[Image] | torch.Tensor | None = None,
        features: torch.Tensor | np.ndarray | None = None,
        feature_edit: Callable[[torch.Tensor], torch.Tensor] | None = None,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] = "",
        num_inference_steps: Whole | None = None,
        guidance_scale: Number | None = None,
        guidance: str | None = None,
        controlnet_conditioning_scale: Number | Sequence[float] = 1.0,
        num_images_per_prompt: Whole = 1,
        eta: Number = 0.0,
        refine: Whole = 0,
        refine_at: str = "end",
        refine_learning_rate: Number | None = None,
        refine_backbone: Callable[[torch.Tensor], torch.Tensor] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """Samples images whose features match those of `images`, or `features` themselves.

        Sample j of image i is output i * num_images_per_prompt + j.

        Args:
            images: as for `encode_features`; exactly one of `images` and `features` is given.
            features: `[b, c, h, w]`, a tensor or an array, from the backbone and layer that the
                controlnet was trained on.
            feature_edit: turns the features into those that are inverted, of the same shape; it
                must not change its input in place.
            prompt: one, or one per image; None is the prompt of training.
            guidance_scale: s of eps = eps_n + s (eps_p - eps_n), p the positive and n the negative
                branch. At 1 the negative branch cancels and is not evaluated.
            guidance: what the negative branch sees. `text`: the negative prompt and the features,
                the published sampler. `features`: the negative prompt and no features, the pair
                that joint drop-out trains.
            controlnet_conditioning_scale: strength of the features, one number or one for each
                residual, the middle block last. At 0 only the prompt is left.
            eta: of DDIM; refused by schedulers that have none.
            refine: Adam steps on the latents, so that what the backbone sees in the decoded images
                comes nearer to the features. Any cosine that it reports was then optimised: let
                another backbone judge whether two or three steps help, and expect that with ten the
                images are made for this backbone alone.
            refine_at: `end`, all on the final latents; `steps`, one each on what the last `refine`
                evaluations predict for them, so that those which follow denoise what was moved.
            refine_learning_rate: of Adam, in units of the latents; None is .1 at the end and .05
                in the steps.
            refine_backbone: from images `[b, 3, h, w]` in [0, 1] to features, differentiable; None
                takes the pipeline's backbone.
            generator: one for all samples, drawn from in order, or one per sample. Noise is drawn
                in float32 on the generator's device, so that with a CPU generator of its own a
                sample does not depend on the batch or on the device.
            latents: initial noise `[b * num_images_per_prompt, 4, h, w]` of standard deviation 1,
                instead of drawn noise; its size sets the size of the images.
            prompt_embeds: text embeddings in place of the prompt, `[1 or b, tokens, d]`.
            output_type: `pil`, `np` ([b, h, w, 3] in [0, 1]), `pt` ([b, 3, h, w] in [0, 1]) or
                `latent`.
            callback_on_step_end: called as (pipeline, step, timestep, tensors); what it returns
                replaces the tensors.
            callback_on_step_end_tensor_inputs: of `latents`, `prompt_embeds`, `encoded_cond`; the
                latter two hold the negative branch first where there is one.

        Raises:
            ValueError: arguments that are missing, do not fit together or are out of range.
        """
        check_scheduler(self.scheduler)
        num_images_per_prompt = _to_int("num_images_per_prompt", num_images_per_prompt)
        if isinstance(features, np.ndarray):
            features = torch.from_numpy(np.ascontiguousarray(features, dtype=np.float32))
        steps, scale, guidance = self._defaults(num_inference_steps, guidance_scale, guidance)  # pyright: ignore[reportArgumentType]
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self._check_call(
            images, features, num_images_per_prompt, output_type, callback_on_step_end_tensor_inputs
        )
        refine, rate = self._check_refine(refine, refine_at, refine_learning_rate, refine_backbone)
        strengths = self._strengths(controlnet_conditioning_scale)
        step_kwargs = self._step_kwargs(eta, generator)
        self._interrupt, self._guidance_scale = False, scale

        if features is None:
            features = self.encode_features(images)  # pyright: ignore[reportArgumentType]
        self._check_features(features)
        if feature_edit is not None:
            features = self._edit(features, feature_edit)
        n_images, n_samples = len(features), num_images_per_prompt
        x = self._prepare_latents(n_images * n_samples, generator, latents)
        encoded_cond = self._encode_condition(features, x.shape[-2:], guidance, n_samples)
        embeds = self._prompt_rows("prompt", prompt, prompt_embeds, n_images, n_samples)
        if self.do_classifier_free_guidance:
            negative_embeds = self._prompt_rows(
                "negative prompt", negative_prompt, negative_prompt_embeds, n_images, n_samples
            )
            embeds = torch.cat([negative_embeds, embeds])

        self.scheduler.set_timesteps(steps, device=self._execution_device)
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        dtypes = self.controlnet.dtype, self.unet.dtype  # each read walks through a whole model
        x = x * self.scheduler.init_noise_sigma
        target = features.repeat_interleave(n_samples, dim=0)
        refined_from = len(timesteps) - (refine if refine_at == "steps" else 0)
        with self.progress_bar(total=len(timesteps)) as bar:  # pyright: ignore[reportCallIssue]
            for i, t in enumerate(timesteps):
                eps = self._guided_noise(x, t, embeds, encoded_cond, strengths, dtypes)
                if i >= refined_from:
                    eps = self._refine_prediction(eps, t, x, target, rate, refine_backbone)
                x = self.scheduler.step(eps, t, x, **step_kwargs, return_dict=False)[0]
                if callback_on_step_end is not None:
                    held = {"latents": x, "prompt_embeds": embeds, "encoded_cond": encoded_cond}
                    given = {name: held[name] for name in callback_on_step_end_tensor_inputs}
                    held.update(callback_on_step_end(self, i, t, given) or {})
                    x, encoded_cond = held["latents"], held["encoded_cond"]
                    if len(held["prompt_embeds"]) < len(embeds):  # a stock cut-off of the guidance
                        self._guidance_scale = 1.0
                        embeds = _positive_rows(held["prompt_embeds"], embeds, len(x))
                        encoded_cond = encoded_cond[-len(x) :]
                    else:
                        embeds = held["prompt_embeds"]
                bar.update()
                if self._interrupt:
                    break

        if refine and refine_at == "end":
            x = self._refine(x, target, refine, rate, refine_backbone)
        output: Any = x
        if output_type != "latent":
            pixels = self._decode_latents(x)
            output = self.image_processor.postprocess(pixels, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=output) if return_dict else (output,)

    def _defaults(
        self,
        steps: int | np.integer | None,
        scale: float | np.floating | None,
        guidance: str | None,
    ) -> tuple[int, float, str]:
        n_steps: int = self.config["default_num_inference_steps"] if steps is None else steps  # pyright: ignore[reportAssignmentType]
        s: float = self.config["default_guidance_scale"] if scale is None else scale  # pyright: ignore[reportAssignmentType]
        kind: str = self.config["default_guidance"] if guidance is None else guidance
        n_steps = _to_int("num_inference_steps", n_steps)
        if n_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {n_steps}.")
        if not math.isfinite(s):
            raise ValueError(f"guidance_scale must be a finite number, got {s}.")
        _check_choice("guidance", kind, GUIDANCE)
        return n_steps, float(s), kind

    def _check_call(
        self,
        images: Any,
        features: torch.Tensor | None,
        n_samples: int,
        output_type: str,
        tensor_inputs: Sequence[str],
    ) -> None:
        if (images is None) == (features is None):
            given = "none" if images is None else "both"
            raise ValueError(f"Exactly one of images and features must be given, got {given}.")
        if n_samples < 1:
            raise ValueError(f"num_images_per_prompt must be at least 1, got {n_samples}.")
        _check_choice("output_type", output_type, OUTPUT_TYPES)
        for name in tensor_inputs:
            _check_choice("a callback's tensor input", name, self._callback_tensor_inputs)

    def _strengths(self, scale: Any) -> list[float]:
        n_residuals = len(self.controlnet.controlnet_down_blocks) + 1
        if np.ndim(scale) == 0:  # a number of Python, NumPy or torch
            return [float(scale)] * n_residuals
        if len(scale) != n_residuals:
            raise ValueError(
                "controlnet_conditioning_scale must be one number or one for each of the "
                f"{n_residuals} residuals, got {len(scale)}."
            )
        return [float(s) for s in scale]

    def _step_kwargs(self, eta: Number, generator: Any) -> dict[str, Any]:
        accepted = inspect.signature(self.scheduler.step).parameters
        kwargs: dict[str, Any] = {}
        if "eta" in accepted:
            kwargs["eta"] = eta
        elif eta:
            name = type(self.scheduler).__name__
            raise ValueError(f"{name} has no eta, got eta={eta}. Use DDIMScheduler.")
        if "generator" in accepted:
            kwargs["generator"] = list(generator) if isinstance(generator, Sequence) else generator
        return kwargs

    def _prepare_latents(
        self, n: int, generator: Any, latents: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns standard normal noise `[n, 4, h, w]`, float32 on the execution device."""
        if isinstance(generator, Sequence) and len(generator) != n:
            raise ValueError(f"There must be {n} generators, one per sample, got {len(generator)}.")
        channels, size = self.unet.config.in_channels, self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        if latents is None:
            generators = generator if isinstance(generator, Sequence) else [generator] * n
            latents = torch.cat([_draw_noise((1, channels, height, width), g) for g in generators])
        elif latents.ndim != 4 or tuple(latents.shape[:2]) != (n, channels):
            raise ValueError(
                f"latents must have shape [{n}, {channels}, h, w], one per sample, got the "
                f"shape {list(latents.shape)}."
            )
        return latents.to(self._execution_device, torch.float32)

    def _encode_condition(
        self, features: torch.Tensor, size: Sequence[int], guidance: str, n_samples: int
    ) -> torch.Tensor:
        """Encodes each map once and repeats it for its samples and for the negative branch."""
        features, size = features.to(self._execution_device), tuple(size)
        positive = self.controlnet.encode_condition(features, size)
        positive = positive.repeat_interleave(n_samples, dim=0)
        if not self.do_classifier_free_guidance:
            return positive
        if guidance == "text":
            return torch.cat([positive, positive])
        keep = torch.zeros(1, dtype=torch.bool, device=features.device)
        negative = self.controlnet.encode_condition(features[:1], size, keep=keep)
        return torch.cat([negative.expand_as(positive), positive])

    def _guided_noise(
        self,
        latents: torch.Tensor,
        t: torch.Tensor,
        prompt_embeds: torch.Tensor,
        encoded_cond: torch.Tensor,
        strengths: Sequence[float],
        dtypes: tuple[torch.dtype, torch.dtype],
    ) -> torch.Tensor:
        guided = self.do_classifier_free_guidance
        model_input = torch.cat([latents, latents]) if guided else latents
        model_input = self.scheduler.scale_model_input(model_input, t)
        inputs = (model_input, t, prompt_embeds, encoded_cond)
        if self._graphs is None:
            eps = self._predict_noise(*inputs, strengths, dtypes)
        else:
            eps = self._graph_of(inputs, strengths, dtypes)(*inputs)
        if not guided:
            return eps
        eps_negative, eps_positive = eps.chunk(2)
        return eps_negative + self.guidance_scale * (eps_positive - eps_negative)

    def _predict_noise(
        self,
        model_input: torch.Tensor,
        t: torch.Tensor,
        prompt_embeds: torch.Tensor,
        encoded_cond: torch.Tensor,
        strengths: Sequence[float],
        dtypes: tuple[torch.dtype, torch.dtype],
    ) -> torch.Tensor:
        """Returns the UNet's prediction in float32; at strength 0 the controlnet does not run.

        Args:
            dtypes: of the controlnet and of the UNet.
        """
        residuals = {}
        of_controlnet, of_unet = dtypes
        if any(strengths):
            down, mid = self.controlnet(
                model_input.to(of_controlnet),
                t,
                encoder_hidden_states=prompt_embeds.to(of_controlnet),
                encoded_cond=encoded_cond,
                return_dict=False,
            )
            pairs = zip((*down, mid), strengths, strict=True)
            scaled = [(r if s == 1 else r * s).to(of_unet) for r, s in pairs]
            residuals["down_block_additional_residuals"] = scaled[:-1]
            residuals["mid_block_additional_residual"] = scaled[-1]
        prediction = self.unet(
            model_input.to(of_unet),
            t,
            encoder_hidden_states=prompt_embeds,
            return_dict=False,
            **residuals,
        )[0]
        return prediction.float()

    def _graph_of(
        self,
        inputs: tuple[torch.Tensor, ...],
        strengths: Sequence[float],
        dtypes: tuple[torch.dtype, torch.dtype],
    ) -> Callable[..., torch.Tensor]:
        """Returns the graph of `_predict_noise` for such inputs; traces it where it is missing."""
        assert self._graphs is not None
        key = (*((x.shape, x.dtype, x.device) for x in inputs), tuple(strengths), dtypes)
        if key not in self._graphs:
            if any(hasattr(module, "_hf_hook") for module in (self.unet, self.controlnet)):
                raise ValueError(
                    "A captured pipeline must hold its weights on one device, but they are "
                    "offloaded. Call disable_capture, or load the pipeline without offloading."
                )
            network = _Network(self.unet, self.controlnet, self._predict_noise, strengths, dtypes)
            with warnings.catch_warnings():  # of branches on shapes, which are the key
                warnings.simplefilter("ignore")
                self._graphs[key] = torch.jit.trace(network, inputs, check_trace=False)
        return self._graphs[key]

    def _check_refine(
        self, refine: Any, at: str, learning_rate: Any, backbone: Any
    ) -> tuple[int, float]:
        n_steps = _to_int("refine", refine)
        if n_steps < 0:
            raise ValueError(f"refine must be at least 0, got {n_steps}.")
        _check_choice("refine_at", at, tuple(REFINE_AT))
        rate = float(REFINE_AT[at] if learning_rate is None else learning_rate)
        if not 0 < rate < math.inf:
            raise ValueError(f"refine_learning_rate must be positive, got {learning_rate}.")
        if n_steps and backbone is None:
            self._timm_backbone()
        return n_steps, rate

    def _refine_prediction(
        self,
        prediction: torch.Tensor,
        t: torch.Tensor,
        sample: torch.Tensor,
        target: torch.Tensor,
        learning_rate: float,
        backbone: Callable[[torch.Tensor], torch.Tensor] | None,
    ) -> torch.Tensor:
        """Returns the prediction that stands for refined latents, at one step of denoising.

        With x = a x0 + s e of a² + s² = 1, e = (x - a x0) / s and v = (a x - x0) / s.
        """
        x = self.scheduler.scale_model_input(sample, t)  # of variance 1, whatever the scheduler's
        a, s = self._signal_and_noise(t)
        kind = self.scheduler.config.get("prediction_type", "epsilon")
        if kind == "epsilon":
            latents = (x - s * prediction) / a
        else:
            latents = a * x - s * prediction if kind == "v_prediction" else prediction
        latents = self._refine(latents, target, 1, learning_rate, backbone)
        if kind == "epsilon":
            return (x - a * latents) / s
        return (a * x - latents) / s if kind == "v_prediction" else latents

    def _signal_and_noise(self, t: torch.Tensor) -> tuple[float, float]:
        """Returns (a, s) of the current step, a² + s² = 1."""
        scheduler = self.scheduler
        if float(scheduler.init_noise_sigma) > 1:  # counts in noise per signal
            sigma = float(scheduler.sigmas[scheduler.step_index])
            norm = math.sqrt(1 + sigma**2)
            return 1 / norm, sigma / norm
        signal = float(scheduler.alphas_cumprod[int(t)])
        return math.sqrt(signal), math.sqrt(1 - signal)

    def _refine(
        self,
        latents: torch.Tensor,
        target: torch.Tensor,
        n_steps: int,
        learning_rate: float,
        backbone: Callable[[torch.Tensor], torch.Tensor] | None,
    ) -> torch.Tensor:
        """Takes Adam steps on 1 − the mean cosine of cells, through the decoder and the backbone.

        The samples of a batch do not see each other: the losses are summed, and Adam works on each
        number alone.
        """
        see = backbone or self._see
        moved = latents.detach().clone().requires_grad_()
        adam = torch.optim.Adam([moved], lr=learning_rate)
        target = target.to(moved.device, torch.float32)
        modules = [self.vae, *([] if backbone else [self.backbone])]
        with _frozen(*modules), self._vae_that_does_not_overflow():
            for _ in range(n_steps):
                with torch.enable_grad():
                    pixels = (self._decode_latents(moved) / 2 + 0.5).clamp(0, 1)
                    cosine = F.cosine_similarity(see(pixels).float(), target, dim=1)
                    loss = (1 - cosine.mean(dim=(1, 2))).sum()
                    (moved.grad,) = torch.autograd.grad(loss, moved)
                adam.step()
        return moved.detach()

    def _decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Returns pixels `[b, 3, h, w]` in float32, about [-1, 1]."""
        config = self.vae.config
        latents = latents / config.scaling_factor
        if config.get("latents_mean") is not None and config.get("latents_std") is not None:
            mean = latents.new_tensor(config.latents_mean).view(1, -1, 1, 1)
            latents = latents * latents.new_tensor(config.latents_std).view(1, -1, 1, 1) + mean
        if config.get("shift_factor") is not None:
            latents = latents + config.shift_factor
        with self._vae_that_does_not_overflow():
            return self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0].float()

    @contextmanager
    def _vae_that_does_not_overflow(self) -> Iterator[None]:
        """Puts an autoencoder in float16 to float32: activations of many overflow there."""
        dtype = self.vae.dtype
        upcast = dtype == torch.float16 and self.vae.config.get("force_upcast", True)
        if upcast:
            self.vae.to(dtype=torch.float32)
        try:
            yield
        finally:
            if upcast:
                self.vae.to(dtype=dtype)

    # ---- saving and loading --------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Writes a folder that carries the code it needs and a model card; see the file's head.

        Weights are always safetensors. With `push_to_hub`, `repo_id`, `private`, `token`,
        `commit_message` and `create_pr` are passed on as in diffusers.
        """
        if not safe_serialization:
            raise ValueError(
                "Weights are saved as safetensors only; leave safe_serialization True."
            )
        folder = Path(save_directory)
        super().save_pretrained(folder, variant=variant, max_shard_size=max_shard_size)
        index_path = folder / self.config_name
        index = json.loads(index_path.read_text(encoding="utf-8"))
        index.pop("_name_or_path", None)
        index["_class_name"] = [_copy_source(type(self), folder), type(self).__name__]
        for name, component in self.components.items():
            own = _own_class(component)
            if own is not None:
                index[name] = [_copy_source(own, folder / name), own.__name__]
        _write_json(index_path, index)
        tidy_saved_folder(folder)
        self._save_files(folder)
        card = self.make_model_card(folder.name, _this_command())
        (folder / "README.md").write_text(str(card), encoding="utf-8")
        if push_to_hub:
            self._upload(folder, **kwargs)

    def keep_files_of(self, folder: Path) -> None:
        """Notes the statistics that lie in a folder beside the weights."""
        scope, certainty = folder / SCOPE_FILE, folder / CERTAINTY_FILE
        self.scope_file = scope.absolute() if scope.is_file() else None
        self.certainty_file = certainty.absolute() if certainty.is_file() else None

    def _save_files(self, folder: Path) -> None:
        for attribute, name, what in (
            ("scope_file", SCOPE_FILE, "the statistics of natural feature maps"),
            ("certainty_file", CERTAINTY_FILE, "the calibration of certainty"),
        ):
            source: Path | None = getattr(self, attribute)
            target = folder / name
            if source is None or source.resolve() == target.resolve():
                continue
            if not source.is_file():
                raise ValueError(
                    f"{source}, {what}, must still be there to be saved, but is not. Set "
                    f"{attribute} to None to save without."
                )
            shutil.copyfile(source, target)

    def make_model_card(
        self,
        title: str,
        command: str,
        license: str | None = None,
        base_models: Sequence[str] = (),
        notes: str = "",
    ) -> ModelCard:
        """Returns the card of a folder with this pipeline: metadata, usage, how it was made.

        Args:
            title: name of the folder or repository.
            command: the command that made the pipeline.
            license: identifier of the Hub; None where it is that of the base models.
            base_models: Hub names of the models this one was made of.
            notes: further sections, as Markdown.
        """
        data = ModelCardData(
            license=license or "other",
            license_name=None if license else "that-of-the-base-models",
            library_name="diffusers",
            pipeline_tag="image-to-image",
            base_model=list(base_models) or None,
            tags=CARD_TAGS,
        )
        text = CARD.format(
            heading=_in_line(title),
            title=title,
            command=_without_paths(_one_line(command)).replace("```", "` ` `"),
            notes=f"\n{_harmless(notes.strip())}\n" if notes else "",
            **self._card_facts(),
        )
        return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")

    def _card_facts(self) -> dict[str, Any]:
        controlnet = self.controlnet.config
        spec = _declared_features(self.controlnet)
        features = f"{controlnet.feature_channels} channels"
        if spec:
            shape = "×".join(map(str, [spec["channels"], *spec["grid"]]))
            layer, backbone = (_in_line(spec[key]) for key in ("layer", "backbone"))
            features = f"{shape}, layer `{layer}` of `{backbone}`"
        size = self.unet.config.sample_size
        return {
            "features": features + (", average-pooled" if controlnet.get("feature_pooled") else ""),
            "pixels": (size if isinstance(size, int) else size[0]) * self.vae_scale_factor,
            "steps": self.config["default_num_inference_steps"],
            "scheduler": type(self.scheduler).__name__,
            "scale": self.config["default_guidance_scale"],
            "guidance": self.config["default_guidance"],
            "prompt": _in_line(self.config["default_prompt"]),
            "get_features": 'pipe.encode_features("photo.jpg")'
            if self.backbone is not None
            else "...  # [b, c, h, w], of the backbone and layer above",
            "versions": ", ".join(f"{name} {number}" for name, number in _versions().items()),
        }

    def _upload(self, folder: Path, **kwargs: Any) -> None:
        token, name = kwargs.get("token"), kwargs.get("repo_id", folder.name)
        repo = create_repo(name, private=kwargs.get("private"), token=token, exist_ok=True)
        self._upload_folder(
            folder,
            repo.repo_id,
            token=token,
            commit_message=kwargs.get("commit_message"),
            create_pr=kwargs.get("create_pr", False),
        )

    @classmethod
    def _dict_from_json_file(cls, json_file: str | Path) -> dict[str, Any]:
        config = super()._dict_from_json_file(json_file)
        if _PACKAGE and isinstance(config.get("_class_name"), list):
            # diffusers would take the list as "run the shipped code"; this class is the code.
            config["_class_name"] = (config["_class_name"] or [None])[-1]
        return {key: value for key, value in config.items() if key not in _OTHERS_COMPONENTS}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """As in diffusers; of a folder, the statistics of natural maps are kept."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        pipeline = loaded[0] if isinstance(loaded, tuple) else loaded
        pipeline.keep_files_of(Path(pretrained_model_name_or_path))
        return loaded

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        loaded = super().load_config(*args, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        for name, value in config.items():
            if _PACKAGE and isinstance(value, list) and value[:1] == [_CONTROLNET_STEM]:
                config[name] = [f"{_PACKAGE}.{_CONTROLNET_STEM}", value[1]]
        return loaded


class _Network(torch.nn.Module):
    """UNet and controlnet as one module, so that a trace holds their weights as parameters."""

    def __init__(
        self,
        unet: torch.nn.Module,
        controlnet: torch.nn.Module,
        predict: Callable[..., torch.Tensor],
        strengths: Sequence[float],
        dtypes: tuple[torch.dtype, torch.dtype],
    ):
        super().__init__()
        self.unet, self.controlnet = unet, controlnet
        self.predict, self.strengths, self.dtypes = predict, strengths, dtypes
        self.training = unet.training  # tracing sets the mode of every child to this

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.predict(*inputs, self.strengths, self.dtypes)


@contextmanager
def _frozen(*modules: torch.nn.Module) -> Iterator[None]:
    """Keeps weights out of a graph of gradients, and gives them back as they were."""
    moving = [p for module in modules for p in module.parameters() if p.requires_grad]
    for parameter in moving:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in moving:
            parameter.requires_grad_(True)


@contextmanager
def _weights_at_hand(*modules: torch.nn.Module) -> Iterator[None]:
    """Brings offloaded weights back, which accelerate does by itself only for `forward`."""
    hooked: list[Any] = [module for module in modules if hasattr(module, "_hf_hook")]
    for module in hooked:
        module._hf_hook.pre_forward(module)
    try:
        yield
    finally:
        for module in hooked:
            module._hf_hook.post_forward(module, None)


def _check_choice(what: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{what} must be one of {', '.join(choices)}, got {value!r}.")


def _to_int(what: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{what} must be a whole number, got {value!r}.") from None


def _declared_features(controlnet: Any) -> dict[str, Any]:
    """Returns the `feature_spec` of a controlnet, empty where it has none."""
    spec = controlnet.config.get("feature_spec")
    if not spec:
        return {}
    fits = isinstance(spec, dict) and all(isinstance(spec.get(k), str) for k in _NAMED)
    grid = spec.get("grid") if fits else None
    fits = isinstance(grid, (list, tuple)) and len(grid) == 2
    if not fits or not all(type(n) is int and n > 0 for n in (*(grid or ()), spec.get("channels"))):
        raise ValueError(
            "The feature_spec of the controlnet must hold backbone, layer, channels and grid, got "
            f"{str(spec)[:200]}."
        )
    return spec


_NAMED = ("backbone", "layer")


def check_scheduler(scheduler: Any) -> None:
    """Raises `ValueError` for a scheduler of another kind than the models that were trained.

    Those predict noise or velocity on a schedule of betas, which flow matching, EDM and others
    have not.
    """
    config = scheduler.config
    given = [
        p.name
        for p in inspect.signature(scheduler.step).parameters.values()
        if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    fits = (
        hasattr(scheduler, "alphas_cumprod")
        and given == ["model_output", "timestep", "sample"]
        and config.get("prediction_type", "epsilon") in ("epsilon", "v_prediction", "sample")
        and not config.get("use_flow_sigmas")
        and "Inverse" not in type(scheduler).__name__
    )
    if not fits:
        raise ValueError(
            "The scheduler must sample a diffusion with betas, as that of Stable Diffusion, but "
            f"{type(scheduler).__name__} does not. Use {SCHEDULERS_THAT_WORK} or the like."
        )


def _positive_rows(given: torch.Tensor, before: torch.Tensor, n: int) -> torch.Tensor:
    """Returns one embedding per sample of what a callback left.

    diffusers' own callbacks keep the last row, of the last sample; each sample keeps its own.
    """
    if len(given) == n:
        return given
    is_last = torch.equal(given, before[-len(given) :])
    return before[-n:] if is_last else given[-1:].expand(n, -1, -1)


def _draw_noise(shape: tuple[int, ...], generator: torch.Generator | None) -> torch.Tensor:
    device = "cpu" if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=device, dtype=torch.float32)


def _check_pixels(pixels: torch.Tensor) -> torch.Tensor:
    if pixels.ndim != 4 or pixels.shape[1] != 3 or not len(pixels):
        raise ValueError(f"A tensor of images must be [b, 3, h, w], got {list(pixels.shape)}.")
    if not pixels.is_floating_point() or pixels.min() < -1e-3 or pixels.max() > 1 + 1e-3:
        raise ValueError(
            f"A tensor of images must be floating point in [0, 1], got {pixels.dtype} in "
            f"[{pixels.min().item():g}, {pixels.max().item():g}]."
        )
    return pixels.float()


def _resize(pixels: torch.Tensor, size: tuple[int, int], interpolation: str) -> torch.Tensor:
    """Scales `[b, 3, h, w]` to `size`, whatever its aspect ratio."""
    if tuple(pixels.shape[-2:]) == size:
        return pixels
    scaled = F.interpolate(pixels, size, mode=interpolation, align_corners=False, antialias=True)
    return scaled.clamp(0, 1)  # bicubic overshoots


def _to_pixels(picture: Image, size: tuple[int, int]) -> torch.Tensor:
    """Returns the centre square of a picture, scaled to `size` = (h, w), as `[1, 3, h, w]`."""
    rgb = _to_rgb(picture)
    side = min(rgb.size)
    left, top = (rgb.width - side) / 2, (rgb.height - side) / 2
    box = (left, top, left + side, top + side)
    scaled = rgb.resize((size[1], size[0]), PIL.Image.Resampling.BILINEAR, box=box)
    return torch.from_numpy(np.array(scaled)).permute(2, 0, 1)[None].float() / 255


def _to_rgb(picture: Image) -> PIL.Image.Image:
    if isinstance(picture, (str, Path)):
        with PIL.Image.open(picture) as opened:
            picture = PIL.ImageOps.exif_transpose(opened)
    elif isinstance(picture, PIL.Image.Image):
        picture = PIL.ImageOps.exif_transpose(picture)
    else:
        raise ValueError(
            f"An image must be a PIL image, a path or a tensor, got a {type(picture).__name__}."
        )
    if picture.mode.startswith("I;16"):
        picture = PIL.Image.fromarray((np.asarray(picture, np.uint32) // 257).astype(np.uint8))
    elif picture.mode in ("I", "F"):
        raise ValueError("A 32-bit image has no declared range; convert it to 8 or 16 bits first.")
    if picture.has_transparency_data:
        rgba = picture.convert("RGBA")
        white = PIL.Image.new("RGBA", rgba.size, "white")
        picture = PIL.Image.alpha_composite(white, rgba)
    return picture.convert("RGB")


def _own_class(component: Any) -> type | None:
    """Returns the class of a component whose code must travel with it, else None."""
    component = getattr(component, "_orig_mod", component)  # torch.compile wraps the module
    if component is None or type(component).__module__.split(".")[0] in _LIBRARIES:
        return None
    return type(component)


def _copy_source(cls: type, folder: Path) -> str:
    """Copies the file that defines `cls` to the folder and returns its name without suffix."""
    source = inspect.getsourcefile(cls)
    if source is None:
        raise ValueError(f"{cls.__name__} must be defined in a file to be saved with its code.")
    shutil.copyfile(source, folder / Path(source).name)
    return Path(source).stem


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _harmless(text: str) -> str:
    """Returns Markdown without HTML, links that run code and paths of this machine."""
    text = re.sub(r"(?i)\b(javascript|vbscript|data):", r"\1&#58;", text.replace("<", "&lt;"))
    return _without_paths(text)


def _in_line(text: str) -> str:
    """Returns text for one line or cell of Markdown, in which nothing is marked up."""
    text = "".join(c for c in _one_line(text) if c.isprintable())
    return re.sub(r"([\\`\[\]|])", r"\\\1", _harmless(text))


def _without_paths(text: str) -> str:
    """Leaves of each path of this machine its last part; such paths hold names of users."""
    return OWN_PATH.sub(lambda found: found[0].replace("\\", "/").rpartition("/")[2], text)


# Absolute ones and those that begin with ~ or .., but no addresses such as https://a/b.
_PART = r"[^\s/\\'\"`,;:)<>\[\]]"
OWN_PATH = re.compile(
    r"(?<![\w.:/~\\<-])(?:(?:[A-Za-z]:|~[\w.-]*|\.\.)[/\\]|[/\\](?=" + _PART + r"+[/\\]))"
    r"(?:" + _PART + r"+[/\\])*" + _PART + r"*"
)


def _this_command() -> str:
    program = Path(sys.argv[0]).name if sys.argv[0] not in ("", "-c") else "python"
    return shlex.join([program, *sys.argv[1:]])


def _versions() -> dict[str, str]:
    versions = {name: version(name) for name in ("torch", "diffusers", "transformers", "timm")}
    if _PACKAGE:
        package = importlib.import_module(_PACKAGE.partition(".")[0])
        versions = {"featinv-diffusion": package.__version__, **versions}
    return versions


def tidy_saved_folder(folder: Path) -> None:
    """Makes saved components fit for others: no paths of this machine, readable by all."""
    for path in folder.rglob("*config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        if any(key in config for key in _LOADING_TRACES):
            _write_json(path, {k: v for k, v in config.items() if k not in _LOADING_TRACES})
        # safetensors makes files that only their owner can read.
        for weights in path.parent.glob("*.safetensors"):
            shutil.copymode(path, weights)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
