"""Trains a FeatureControlNet on a frozen text-to-image UNet and a frozen backbone (FeatInv)."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import default_collate
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid
from transformers import CLIPTextModel, CLIPTokenizer, TimmWrapperForImageClassification

from featinv_diffusion.backbones import Backbone, load_backbone, wrap_model
from featinv_diffusion.backbones.names import PUBLISHED, canonical_name
from featinv_diffusion.config import to_yaml
from featinv_diffusion.data.crops import (
    CropDataset,
    DataConfig,
    open_training_images,
    to_images,
)
from featinv_diffusion.data.streams import StreamedCrops
from featinv_diffusion.diffusion.featinv_controlnet import FeatureControlNet
from featinv_diffusion.diffusion.featinv_pipeline import FeatInvPipeline
from featinv_diffusion.diffusion.folders import ENCODER, PICKLED, check_reachable, feature_spec_of
from featinv_diffusion.diffusion.hub import load_pipeline
from featinv_diffusion.diffusion.objective import (
    PUBLISHED_PROMPT,
    draw_dropout,
    make_noise_scheduler,
    make_scheduler,
    prediction_target,
)
from featinv_diffusion.errors import InputError
from featinv_diffusion.inverters.diffusion import DiffusionInverter
from featinv_diffusion.metrics.features import feature_cosine, shuffled_cosine, top_k_match
from featinv_diffusion.runs.sampling import batched
from featinv_diffusion.seeds import derive_seed, make_generator
from featinv_diffusion.settings import (
    SCHEDULERS,
    Depth,
    Finite,
    Pictures,
    Probability,
    Seed,
    Size,
    check,
    option,
)
from featinv_diffusion.training.checkpoint import list_checkpoints
from featinv_diffusion.training.config import OptimConfig, RunConfig
from featinv_diffusion.training.entry import (
    load_component,
    make_datasets,
    read_items,
    stack_images,
)
from featinv_diffusion.training.feature_cache import (
    ControlNetCacheConfig,
    FeatureCache,
    fill_features,
)
from featinv_diffusion.training.group_norm import speed_up_group_norms
from featinv_diffusion.training.imitation import (
    BATCH,
    ImitationConfig,
    Pairs,
    imitate,
    read_pairs,
)
from featinv_diffusion.training.latents import (
    CachedCropDataset,
    SampleNoise,
    encode_posterior,
    fill_latents,
    plan_latents,
)
from featinv_diffusion.training.loop import fit, make_accelerator
from featinv_diffusion.training.shards import ShardedArrays, check_room


@dataclass(frozen=True)
class ControlNetModelConfig:
    """What is joined, and what the ControlNet is told.

    Args:
        base: folder or Hub id of a Stable Diffusion 1.x model in diffusers layout.
        backbone: name for `load_backbone`, or a folder of a transformers timm wrapper.
        backbone_name: what a backbone from a folder is called in the checkpoint.
        standardise: measure mean and std per channel on `statistics_images` images and keep them
            in the checkpoint; the paper feeds raw features.
        dropout: probability of hiding the condition; `joint` hides features and prompt together
            (published), `independent` each on its own.
        feature_projection_channels: channels that a 1×1 convolution leaves of the map before the
            feature encoder's 3×3 ones; None has none, as published.
        warm_start: folder of another ControlNet; of another backbone's, all but the feature encoder
            is read.
        trained: names of the parameters that are trained, as patterns; all others stay as
            `warm_start` has them. `feature_encoder.*` trains a head on a frozen trunk.
    """

    base: str = "lambdalabs/miniSD-diffusers"
    backbone: str = PUBLISHED["convnext"]
    backbone_name: str | None = None
    layer: str = "last"
    feature_hidden_channels: Size = 512
    pooled: bool = False
    standardise: bool = True
    statistics_images: Pictures = 2048
    dropout: Probability = 0.15
    dropout_kind: Literal["joint", "independent"] = "joint"
    prompt: str = PUBLISHED_PROMPT
    feature_projection_channels: Size | None = None
    warm_start: str | None = None
    trained: tuple[str, ...] = ("*",)
    attention: Literal["native", "xformers"] = "native"

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class ValidationConfig:
    """How the fixed validation images are sampled while training.

    Args:
        scheduler: a name of `settings.SCHEDULERS`; None is the scheduler of the base.
    """

    scheduler: str | None = option(None, "Scheduler of the samples.", choices=SCHEDULERS)
    num_inference_steps: Depth = 20
    guidance_scale: Finite = 1.75
    guidance: Literal["text", "features"] = "text"

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class ControlNetConfig:
    seed: Seed = 0
    data: DataConfig = field(default_factory=lambda: DataConfig(held_back_per_class=1))
    model: ControlNetModelConfig = field(default_factory=ControlNetModelConfig)
    imitation: ImitationConfig = field(default_factory=ImitationConfig)
    cache: ControlNetCacheConfig = field(default_factory=ControlNetCacheConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        check(self)


@dataclass
class FrozenParts:
    """The networks that are never trained; prompt_embeds: the prompt, the empty one."""

    backbone: Backbone
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    scheduler: DDIMScheduler
    prompt_embeds: Tensor

    @classmethod
    def of(cls, inverter: DiffusionInverter) -> FrozenParts:
        """Takes those of a pipeline, with its own prompt.

        Raises:
            InputError: a pipeline without a backbone.
        """
        pipeline = inverter.pipeline
        prompts = [pipeline.config["default_prompt"], ""]
        scheduler: Any = DDIMScheduler.from_config(pipeline.scheduler.config)
        return cls(
            backbone=inverter.require_backbone(),
            vae=pipeline.vae.eval().requires_grad_(False),
            unet=pipeline.unet.eval().requires_grad_(False),
            scheduler=scheduler,
            prompt_embeds=pipeline.encode_prompt(prompts),
        )

    @property
    def image_size(self) -> int:
        """Side of the images the latents stand for, 256 for MiniSD."""
        factor = 2 ** (len(self.vae.config["block_out_channels"]) - 1)
        return self.unet.config["sample_size"] * factor


class ControlNetTask:
    """ε-prediction through the frozen UNet with the ControlNet's residuals added.

    Args:
        controlnet: called as a `FeatureControlNet` is.
        validation: images `[n, 3, h, w]` in [0, 1] that are reconstructed again and again.
    """

    def __init__(
        self,
        controlnet: nn.Module,
        parts: FrozenParts,
        config: ControlNetConfig,
        validation: Tensor,
    ):
        self.module = controlnet
        self.parts, self.config, self.validation = parts, config, validation
        self.noise_scheduler = make_noise_scheduler(parts.scheduler)

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        self.parts.backbone.to(device)
        vae: Any = self.parts.vae
        unet: Any = self.parts.unet
        vae.to(device)
        nn.Module.to(unet, device, dtype)  # diffusers' own warns of modules that are not there
        if self.config.run.channels_last:  # as the ControlNet: no copies between the two
            unet.to(memory_format=torch.channels_last)
            vae.to(memory_format=torch.channels_last)
            speed_up_group_norms(unet)
        if self.config.run.compile:
            unet.compile()
        self.parts.prompt_embeds = self.parts.prompt_embeds.to(device, dtype)

    def loss(self, module: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        features = self._features(batch)
        mean, std = self._posterior(batch)
        draw = SampleNoise(batch["seed"], mean.device)
        latents = (mean + std * draw.normal(*mean.shape[1:])) * self.parts.vae.config[
            "scaling_factor"
        ]
        noise = draw.normal(*mean.shape[1:])
        timesteps = draw.timesteps(len(self.noise_scheduler.alphas_cumprod))
        model = self.config.model
        keep_features, keep_prompt = draw_dropout(
            draw.uniform(2), model.dropout, model.dropout_kind
        )
        noisy = self.noise_scheduler.add_noise(latents, noise, timesteps)  # pyright: ignore[reportArgumentType]
        prompt = self.parts.prompt_embeds[(~keep_prompt).long()]
        predicted = self._predict(module, noisy, timesteps, prompt, features, keep_features)
        target = prediction_target(self.noise_scheduler, latents, noise, timesteps)
        return F.mse_loss(predicted.float(), target), {}

    def _features(self, batch: Mapping[str, Any]) -> Tensor | Sequence[Tensor]:
        if "features" in batch:
            return batch["features"].float()
        with torch.no_grad():
            return self.parts.backbone.features(to_images(batch["pixels"]))

    def _posterior(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        if "latent_mean" in batch:
            return batch["latent_mean"], batch["latent_std"]
        images = to_images(batch["pixels"])
        return encode_posterior(self.parts.vae, images, self.parts.image_size)

    def _predict(
        self,
        module: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        prompt: Tensor,
        features: Tensor | Sequence[Tensor],
        keep: Tensor,
    ) -> Tensor:
        dtype = self.parts.unet.dtype
        down, middle = module(
            noisy, timesteps, prompt.to(noisy.dtype), features, keep=keep, return_dict=False
        )
        return self.parts.unet(
            noisy.to(dtype),
            timesteps,
            prompt,
            down_block_additional_residuals=tuple(x.to(dtype) for x in down),
            mid_block_additional_residual=middle.to(dtype),
            return_dict=False,
        )[0]

    def validate(self, module: nn.Module) -> tuple[dict[str, float], dict[str, Image.Image]]:
        device = self.parts.unet.device
        images = self.validation.to(device)
        features, logits = self.parts.backbone.features_and_logits(images)
        samples = self._sample(module, features)
        again, logits_again = self.parts.backbone.features_and_logits(samples)
        scalars = {
            "cosine": float(feature_cosine(features, again).mean()),
            "cosine_shuffled": float(
                shuffled_cosine(features, again, make_generator(self.config.seed)).mean()
            ),
        }
        if logits is not None and logits_again is not None:
            for k in (1, 5):
                matches = top_k_match(logits, logits_again, min(k, logits.shape[1]))
                scalars[f"top{k}_match"] = float(matches.float().mean())
        size = samples.shape[-1]
        originals = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
        pairs = torch.stack([originals, samples], 1).flatten(0, 1).float().cpu()
        return scalars, {"reconstructions": to_pil_image(make_grid(pairs, nrow=8, padding=1))}

    def _sample(self, module: nn.Module, features: Tensor) -> Tensor:
        controlnet: Any = module
        pipeline = FeatInvPipeline(
            vae=self.parts.vae,
            text_encoder=None,
            tokenizer=None,
            unet=self.parts.unet,
            controlnet=controlnet,
            scheduler=self._sampler(),
        )
        pipeline.set_progress_bar_config(disable=True)
        n, settings = len(features), self.config.validation
        result: Any = pipeline(
            features=features,
            prompt_embeds=self.parts.prompt_embeds[:1],
            negative_prompt_embeds=self.parts.prompt_embeds[1:],
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            guidance=settings.guidance,
            generator=[make_generator(self.config.seed, "validation", i) for i in range(n)],
            output_type="pt",
        )
        return result.images.float()

    def _sampler(self) -> Any:
        name, scheduler = self.config.validation.scheduler, self.parts.scheduler
        return make_scheduler(name, scheduler.config) if name else scheduler

    def save(self, module: nn.Module, folder: Path) -> None:
        controlnet: Any = module
        controlnet.save_pretrained(folder / "controlnet")

    def load(self, module: nn.Module, folder: Path) -> None:
        loaded = FeatureControlNet.from_pretrained(folder / "controlnet")
        module.load_state_dict(loaded.state_dict())


def load_frozen_parts(config: ControlNetModelConfig, channels_last: bool = False) -> FrozenParts:
    """Loads backbone, VAE, UNet and scheduler, and encodes the two prompts once.

    Args:
        channels_last: memory format of the backbone, which computes before the others are moved.
    """
    check_reachable(config.base)
    tokenizer = _load_sub(CLIPTokenizer, config.base, "tokenizer")
    text_encoder = _load_sub(CLIPTextModel, config.base, "text_encoder").float()
    # Where its files are missing, transformers gives an empty tokenizer without an error.
    if not 2 < len(tokenizer) <= text_encoder.config.vocab_size:
        raise InputError(
            f"The tokenizer of {config.base!r} must have up to {text_encoder.config.vocab_size} "
            f"tokens, those of its text encoder, but it has {len(tokenizer)}. "
            "Complete the tokenizer folder."
        )
    ids = tokenizer(
        [config.prompt, ""], padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        prompt_embeds = text_encoder(ids)[0]
    backbone = load_training_backbone(config)
    if channels_last:
        backbone.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    unet = _load_sub(UNet2DConditionModel, config.base, "unet").eval().requires_grad_(False)
    if config.attention == "xformers":
        _use_xformers(unet)
    return FrozenParts(
        backbone=backbone,
        vae=_load_sub(AutoencoderKL, config.base, "vae").eval().requires_grad_(False),
        unet=unet,
        scheduler=_load_sub(DDIMScheduler, config.base, "scheduler"),
        prompt_embeds=prompt_embeds,
    )


def load_training_backbone(config: ControlNetModelConfig) -> Backbone:
    """Loads a backbone by name, or from the folder of a transformers timm wrapper, in float32."""
    if not Path(config.backbone).is_dir():
        return load_backbone(config.backbone, config.layer).float()
    wrapper = load_component(TimmWrapperForImageClassification, config.backbone)
    name = canonical_name(config.backbone_name or wrapper.config.architecture)
    return wrap_model(wrapper, name=name, layer=config.layer)


def _load_sub(component_class: Any, base: str, subfolder: str) -> Any:
    try:
        return component_class.from_pretrained(base, subfolder=subfolder)
    except UnpicklingError:
        raise InputError(f"{subfolder} of {base!r} could not be loaded. {PICKLED}") from None
    except (OSError, ValueError) as error:
        raise InputError(
            f"model.base must be a Stable Diffusion 1.x folder or Hub id in diffusers layout, but "
            f"{subfolder} of {base!r} could not be loaded: {str(error).splitlines()[0]}"
        ) from error


def _use_xformers(model: Any) -> None:
    try:
        model.enable_xformers_memory_efficient_attention()
    except (ImportError, ValueError) as error:
        raise InputError(
            "model.attention=xformers needs a CUDA device and the package xformers "
            f"(pip install 'featinv-diffusion[xformers]'): {str(error).splitlines()[0]} "
            "Or leave it at native."
        ) from None


def make_controlnet(config: ControlNetModelConfig, parts: FrozenParts) -> FeatureControlNet:
    """Copies the UNet's encoder, or another backbone's ControlNet, behind a new feature encoder."""
    spec = parts.backbone.spec
    controlnet = FeatureControlNet.from_unet(
        parts.unet,
        feature_channels=spec.channels,
        feature_hidden_channels=config.feature_hidden_channels,
        feature_pooled=config.pooled,
        feature_spec=asdict(spec),
        feature_projection_channels=config.feature_projection_channels,
    ).float()
    if config.warm_start:
        begin_with(controlnet, load_component(FeatureControlNet, config.warm_start))
    freeze_all_but(controlnet, config.trained)
    if config.attention == "xformers":
        _use_xformers(controlnet)
    return controlnet.train()


def begin_with(controlnet: FeatureControlNet, other: FeatureControlNet) -> None:
    """Copies the weights of another ControlNet; the feature encoder's only where it is for the same
    features.

    Raises:
        InputError: one of another base.
    """
    with_head = _reads_the_same(controlnet, other)
    weights, mine = (
        {k: v for k, v in one.state_dict().items() if with_head or not k.startswith(ENCODER)}
        for one in (other, controlnet)
    )
    if weights.keys() != mine.keys() or any(weights[k].shape != mine[k].shape for k in mine):
        raise InputError(
            "A warm start (model.warm_start) must be from a ControlNet of the same base, but the "
            "one given has other blocks. Use one that was trained on the same base."
        )
    controlnet.load_state_dict(weights, strict=False)


def _reads_the_same(one: FeatureControlNet, other: FeatureControlNet) -> bool:
    """Whether two feature encoders are of one shape and for the same declared features."""
    if feature_spec_of(one) is None or feature_spec_of(one) != feature_spec_of(other):
        return False
    shape = ("feature_projection_channels", "feature_hidden_channels", "feature_pooled")
    return all(one.config[key] == other.config[key] for key in shape)


def freeze_all_but(controlnet: FeatureControlNet, trained: Sequence[str]) -> None:
    """Freezes the parameters whose names none of the patterns matches.

    Raises:
        InputError: a pattern that matches none.
    """
    parameters = dict(controlnet.named_parameters())
    for pattern in trained:
        if not fnmatch.filter(parameters, pattern):
            raise InputError(
                f"Each pattern of model.trained must match parameters, but {pattern!r} matches "
                "none. Use feature_encoder.*, controlnet_* (the zero convolutions) or *."
            )
    for name, parameter in parameters.items():
        parameter.requires_grad_(any(fnmatch.fnmatchcase(name, p) for p in trained))


@torch.no_grad()
def set_feature_statistics(
    controlnet: FeatureControlNet, backbone: Backbone, images: Tensor, batch_size: int = 64
) -> None:
    """Measures mean and std per channel over the cells of `images` and stores them."""
    count = 0
    total = square = torch.zeros(backbone.spec.channels, dtype=torch.float64)
    for batch in images.split(batch_size):
        features = backbone.features(batch.to(backbone.device)).cpu()
        cells = features.double().movedim(1, -1).flatten(0, -2)
        count += len(cells)
        total = total + cells.sum(0)
        square = square + cells.square().sum(0)
    mean = total / count
    std = (square / count - mean.square()).clamp_min(0).sqrt()
    encoder: Any = controlnet.feature_encoder
    encoder.feature_mean.copy_(mean)
    encoder.feature_std.copy_(std.clamp_min(1e-3 * std.max()))


def train_controlnet(config: ControlNetConfig) -> Path:
    """Trains to the end and returns the folder that holds `controlnet/`."""
    accelerator = make_accelerator(config.optim, config.run)
    torch.manual_seed(derive_seed(config.seed, "initial weights"))
    parts = load_frozen_parts(config.model, config.run.channels_last)
    train, validation = open_data(config)
    controlnet = make_controlnet(config.model, parts)
    fresh = not list_checkpoints(Path(config.run.output))  # a checkpoint holds the statistics
    if config.model.standardise and fresh and not config.run.dry_run:
        parts.backbone.to(accelerator.device)
        images = first_images(train, config.model.statistics_images)
        set_feature_statistics(controlnet, parts.backbone, images)
    if isinstance(train, CropDataset) and config.cache.folder and not _is_done(config):
        train = _cached(config, parts, train, config.cache.folder, accelerator)
    if config.imitation.pipeline and fresh and not config.run.dry_run:
        left = imitate_pipeline(controlnet, parts, train, config)
        what = f"imitation of {config.imitation.pipeline}"
        accelerator.print(f"{what}: {left:.3f} of the variance left")
    if config.run.gradient_checkpointing:
        controlnet.enable_gradient_checkpointing()
        parts.unet.enable_gradient_checkpointing()
    task = ControlNetTask(controlnet, parts, config, validation)
    return fit(task, train, accelerator, config.optim, config.run, to_yaml(config))


def _is_done(config: ControlNetConfig) -> bool:
    """Whether a run has all its steps, so that no cache need be filled again."""
    checkpoints = list_checkpoints(Path(config.run.output))
    n_steps = config.optim.max_steps
    return bool(checkpoints and n_steps) and checkpoints[-1].name == f"step-{n_steps:08d}"


def imitate_pipeline(
    controlnet: FeatureControlNet,
    parts: FrozenParts,
    dataset: CropDataset | StreamedCrops,
    config: ControlNetConfig,
) -> float:
    """Fits the feature encoder to that of another pipeline, see `imitation.imitate`."""
    pairs = read_pipeline_pairs(parts, dataset, config.imitation, config.cache.features_dtype)
    controlnet.to(parts.backbone.device)  # pyright: ignore[reportArgumentType]
    return imitate(controlnet, pairs, config.imitation, config.seed)


def read_pipeline_pairs(
    parts: FrozenParts,
    dataset: CropDataset | StreamedCrops,
    config: ImitationConfig,
    dtype: str,
) -> Pairs:
    """Returns maps of images, and the conditions that the imitated pipeline makes of its own.

    Args:
        dtype: of the maps, see `imitation.read_pairs`.
    """
    assert config.pipeline is not None
    other = load_pipeline(config.pipeline)
    spec, device = feature_spec_of(other.controlnet), parts.backbone.device
    if spec is None or other.backbone is None:
        raise InputError(
            f"imitation.pipeline must hold its backbone and declare the features that it reads, "
            f"but {config.pipeline} does not."
        )
    read = DiffusionInverter(other).require_backbone().to(device)
    side = parts.unet.config["sample_size"]
    n = config.n_images
    if isinstance(dataset, CropDataset):
        n = min(n, len(dataset))
    batches = first_batches(dataset, n)
    controlnet = other.controlnet.to(device)
    return read_pairs(parts.backbone, controlnet, read, batches, n, (side, side), dtype)


def first_batches(
    dataset: CropDataset | StreamedCrops, n: int
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yields n images `[b, 3, s, s]`, or all, and maps `[b, c, h, w]` where a cache holds them.

    Those of a data set are spread evenly over it, those of a stream are the first.
    """
    if not isinstance(dataset, CropDataset):
        items = islice(iter(dataset), n)
    else:
        if isinstance(dataset, CachedCropDataset):
            dataset = dataset.with_its_pixels()
        items = read_items(dataset, n)
    for some in batched(items, BATCH):
        joined = default_collate(some)
        yield to_images(joined["pixels"]), joined.get("features")


def open_data(config: ControlNetConfig) -> tuple[CropDataset | StreamedCrops, Tensor]:
    n = config.run.n_validation_images
    if config.data.streaming:
        if config.cache.folder:
            raise InputError("A latent cache needs random access: unset cache.folder or streaming.")
        stream = StreamedCrops(config.data, config.seed, n_skipped=n)
        return stream, stream.held_back_images()
    train, held = make_datasets(open_training_images(config.data), config.data, config.seed)
    return train, stack_images(held, n)[0]


def first_images(dataset: CropDataset | StreamedCrops, n: int) -> Tensor:
    """Returns n images `[n, 3, s, s]` in [0, 1], or all; of a stream the first."""
    return torch.cat([images for images, _ in first_batches(dataset, n)])


def _cached(
    config: ControlNetConfig,
    parts: FrozenParts,
    train: CropDataset,
    folder: str,
    accelerator: Accelerator,
) -> CropDataset:
    """Fills the caches after saying their sizes; a dry run says them only."""
    vae: Any = parts.vae.to(accelerator.device)  # pyright: ignore[reportCallIssue, reportArgumentType]
    latents = plan_latents(train, vae, folder, config.cache.n_crops, parts.image_size)
    features = None
    if config.cache.features:
        features = FeatureCache(latents, parts.backbone, config.cache.features_dtype)
    caches: list[ShardedArrays] = [latents, *([features] if features else [])]
    for cache in caches:
        accelerator.print(str(cache))
    if config.run.dry_run:
        return train
    check_room(caches)
    fill_latents(latents, train, vae, parts.image_size, accelerator)
    if features is None:
        return CachedCropDataset(train, latents)
    parts.backbone.to(accelerator.device)
    fill_features(features, CachedCropDataset(train, latents), parts.backbone, accelerator)
    return CachedCropDataset(train, latents, with_pixels=False, features=features)
