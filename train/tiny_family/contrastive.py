"""Trains a small SigLIP on images and the names of their classes, or with SigLIP 2's extra losses.

A batch holds few distinct texts, so the images are compared with the text of every class of the
data set, and each image has one match.

    accelerate launch -m train.tiny_family.contrastive --config FILE key=value
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPTokenizer,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipVisionModel,
)

from featinv_diffusion.cli.train import run_recipe
from featinv_diffusion.config import to_yaml
from featinv_diffusion.data.classes import read_classes
from featinv_diffusion.data.crops import DataConfig, open_training_images, to_images
from featinv_diffusion.errors import InputError
from featinv_diffusion.files import read_tensors, write_tensors
from featinv_diffusion.seeds import derive_seed
from featinv_diffusion.settings import (
    Depth,
    NotNegative,
    Number,
    Positive,
    Probability,
    Seed,
    Size,
    check,
)
from featinv_diffusion.training.config import OptimConfig, RunConfig
from featinv_diffusion.training.entry import make_datasets, stack_images
from featinv_diffusion.training.latents import SampleNoise
from featinv_diffusion.training.loop import fit, make_accelerator
from train.tiny_family.tokenizer import make_tokenizer

# ---- Masked prediction and local-to-global self-distillation from the tower's own average -------


@dataclass(frozen=True)
class SelfDistillationConfig:
    """Weights beside the sigmoid loss, and how much the student is not shown.

    Args:
        n_images: of each batch, which are also seen masked, as a crop, and by the teacher.
        mask_rate: share of the patch embeddings that the mask token replaces.
        crop_size: side in pixels of the local view, a multiple of the patch size.
        momentum: of the teacher's moving average, per step.
        masked_weight, local_weight: of the two losses; SigLIP 2's are 2.5 and 1.
        predictor_size: hidden units of the two predictors.
    """

    n_images: Size = 32
    mask_rate: Probability = 0.5
    crop_size: Size = 32
    momentum: Probability = 0.99
    masked_weight: NotNegative = 2.5
    local_weight: NotNegative = 1.0
    predictor_size: Size = 384

    def __post_init__(self) -> None:
        check(self)
        for name in ("mask_rate", "momentum"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(
                    f"model.self_distillation.{name} must lie between 0 and 1, "
                    f"got {getattr(self, name)}."
                )


class SelfDistillation(nn.Module):
    """The frozen teacher, the mask token and the predictors; the student is given to `forward`.

    Args:
        student: at its initial weights, with which the teacher begins.
    """

    def __init__(self, student: SiglipVisionModel, config: SelfDistillationConfig):
        super().__init__()
        width, hidden = student.config.hidden_size, config.predictor_size
        self.momentum = config.momentum
        self.teacher = copy.deepcopy(student).requires_grad_(False)
        self.mask_token = nn.Parameter(torch.randn(width) * width**-0.5)
        self.patch_predictor = _make_predictor(width, hidden)
        self.pooled_predictor = _make_predictor(width, hidden)

    def forward(
        self,
        student: SiglipVisionModel,
        pixels: Float[Tensor, "n 3 h w"],
        masked: Bool[Tensor, "n p"],
        crops: Float[Tensor, "n 3 s s"],
    ) -> dict[str, Tensor]:
        """Returns `masked` and `local`, to be minimised, and how much the teacher's features vary.

        `masked` is per masked patch and channel: predicting the mean feature scores teacher_std².
        `local` is 2 − 2 cos. In training the teacher first moves towards the student.
        """
        if self.training:
            self.update(student)
        with torch.no_grad():
            states, pooled = encode_patches(self.teacher, self.teacher.embeddings(pixels))
            target = F.layer_norm(states.float(), states.shape[-1:])
        patches = _replace_patches(student, pixels, masked, self.mask_token)
        predicted = self.patch_predictor(encode_patches(student, patches)[0])
        local = student.embeddings(crops, interpolate_pos_encoding=True)
        wanted = self.pooled_predictor(encode_patches(student, local)[1]).float()
        return {
            "masked": F.mse_loss(predicted.float()[masked], target[masked]),
            "local": 2 - 2 * F.cosine_similarity(wanted, pooled.float()).mean(),
            "teacher_std": target.flatten(0, 1).std(0).mean(),
            "teacher_pooled_std": F.layer_norm(pooled.float(), pooled.shape[-1:]).std(0).mean(),
        }

    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        """Moves the teacher's weights a share 1 − momentum of the way to the student's."""
        for mine, theirs in zip(self.teacher.parameters(), student.parameters(), strict=True):
            mine.lerp_(theirs.to(mine.dtype), 1 - self.momentum)


def encode_patches(
    vision: SiglipVisionModel, patches: Float[Tensor, "b p c"]
) -> tuple[Float[Tensor, "b p c"], Float[Tensor, "b c"]]:
    """Last hidden state and pooled embedding of embedded patches, of which some may be missing."""
    states = vision.encoder(inputs_embeds=patches).last_hidden_state
    states = vision.post_layernorm(states)
    return states, vision.head(states)


def random_crops(
    pixels: Float[Tensor, "b c h w"], size: int, offsets: Float[Tensor, "b 2"]
) -> Float[Tensor, "b c size size"]:
    """Square crops whose corners are at shares `offsets` (y, x), in [0, 1), of the free play."""
    play = torch.tensor(pixels.shape[-2:]) - size + 1
    corners = (offsets.cpu() * play).long().tolist()
    crops = [x[:, t : t + size, s : s + size] for x, (t, s) in zip(pixels, corners, strict=True)]
    return torch.stack(crops)


def random_mask(uniform: Float[Tensor, "b p"], rate: float) -> Bool[Tensor, "b p"]:
    """Marks the same number of patches of every image: those with the lowest of the draws."""
    rank = uniform.argsort(dim=1).argsort(dim=1)
    return rank < round(rate * uniform.shape[1])


def _make_predictor(width: int, hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


def _replace_patches(
    vision: SiglipVisionModel, pixels: Tensor, masked: Tensor, token: Tensor
) -> Tensor:
    """Embedded patches with the token in the masked places; its position is added there too."""
    embeddings = vision.embeddings
    patches = embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
    patches = torch.where(masked[..., None], token.to(patches.dtype), patches)
    return patches + embeddings.position_embedding(embeddings.position_ids)


# ---- A small SigLIP for images and the names of their classes ----


@dataclass(frozen=True)
class ContrastiveModelConfig:
    """Sizes of the two towers, and what the images lose in training.

    Args:
        text_length: tokens of a text; longer ones are refused.
        scale: initial scale t of the cosines.
        patch_drop_rate: share of the patches that the contrastive loss does not see.
        full_after: step from which it sees all patches; None drops to the end.
        self_distillation: SigLIP 2's image losses; None leaves SigLIP's objective.
    """

    patch_size: Size = 8
    hidden_size: Size = 192
    depth: Depth = 6
    n_heads: Size = 3
    text_hidden_size: Size = 96
    text_depth: Depth = 2
    text_heads: Size = 4
    text_length: Size = 16
    scale: Positive = 10.0
    patch_drop_rate: Probability = 0.0
    full_after: Number | None = None
    self_distillation: SelfDistillationConfig | None = None

    def __post_init__(self) -> None:
        check(self)
        if not 0 <= self.patch_drop_rate < 1:
            raise InputError(
                f"model.patch_drop_rate must be in [0, 1), got {self.patch_drop_rate}."
            )


class ContrastiveNetworks(nn.Module):
    """Both towers, the moving teacher and the step count, as one module of the training loop.

    Args:
        input_ids: the tokens of one text per class.
    """

    step: Tensor
    input_ids: Tensor

    def __init__(
        self,
        siglip: SiglipModel,
        input_ids: Int[Tensor, "k l"],
        self_distillation: SelfDistillationConfig | None,
    ):
        super().__init__()
        self.siglip = siglip
        self.distillation = None
        if self_distillation is not None:
            self.distillation = SelfDistillation(siglip.vision_model, self_distillation)
        self.register_buffer("input_ids", input_ids, persistent=False)
        self.register_buffer("step", torch.tensor(0))

    def forward(
        self,
        pixels: Float[Tensor, "b 3 h w"],
        kept: Int[Tensor, "b q"] | None = None,
        views: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Float[Tensor, "b k"], dict[str, Tensor]]:
        """Returns t cos + b against every class's text, and the losses of self-distillation.

        Args:
            pixels: normalised as the vision tower wants them.
            kept: the patches that are seen; None for all.
            views: mask [n, p] and crops [n, 3, s, s] of the first n images.
        """
        if self.training:
            self.step += 1
        vision = self.siglip.vision_model
        patches = vision.embeddings(pixels)
        if kept is not None:
            patches = patches.gather(1, kept[..., None].expand(-1, -1, patches.shape[-1]))
        logits = self.logits(encode_patches(vision, patches)[1])
        if self.distillation is None or views is None:
            return logits, {}
        masked, crops = views
        return logits, self.distillation(vision, pixels[: len(masked)], masked, crops)

    def logits(self, pooled: Float[Tensor, "b c"]) -> Float[Tensor, "b k"]:
        """t cos + b in float32: a large t would magnify the rounding of reduced precision."""
        texts = self.siglip.text_model(self.input_ids).pooler_output
        with torch.autocast(pooled.device.type, enabled=False):
            cosine = F.normalize(pooled.float(), dim=-1) @ F.normalize(texts.float(), dim=-1).T
            return cosine * self.siglip.logit_scale.exp() + self.siglip.logit_bias


def make_siglip(
    config: ContrastiveModelConfig, image_size: int, tokenizer: CLIPTokenizer, n_classes: int
) -> SiglipModel:
    """Builds both towers; t begins at `config.scale` and b at the log odds of a match.

    Raises:
        InputError: the patches do not tile the image.
    """
    if image_size % config.patch_size:
        raise InputError(
            f"data.size must be a multiple of model.patch_size ({config.patch_size}), "
            f"got {image_size}."
        )
    make_config: Any = SiglipConfig
    model = SiglipModel(
        make_config(
            text_config=_text_settings(config, tokenizer),
            vision_config={
                "hidden_size": config.hidden_size,
                "intermediate_size": 4 * config.hidden_size,
                "num_hidden_layers": config.depth,
                "num_attention_heads": config.n_heads,
                "image_size": image_size,
                "patch_size": config.patch_size,
            },
        )
    )
    with torch.no_grad():
        model.logit_scale.fill_(config.scale).log_()
        model.logit_bias.fill_(n_classes - 1).log_().neg_()
    return model


def _text_settings(config: ContrastiveModelConfig, tokenizer: CLIPTokenizer) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": config.text_hidden_size,
        "intermediate_size": 4 * config.text_hidden_size,
        "num_hidden_layers": config.text_depth,
        "num_attention_heads": config.text_heads,
        "max_position_embeddings": config.text_length,
        "projection_size": config.hidden_size,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def tokenize(tokenizer: CLIPTokenizer, texts: Sequence[str], length: int) -> Int[Tensor, "k l"]:
    """Pads to `length`, at whose last token SigLIP's text tower is read.

    Raises:
        InputError: a text that is longer, or two that are the same.
    """
    if len(set(texts)) < len(texts):
        twice = next(text for text in texts if list(texts).count(text) > 1)
        raise InputError(f"Each class needs a text of its own, but {twice!r} names several.")
    encoded: Any = tokenizer(list(texts), padding="max_length", max_length=length)
    longest = max(len(ids) for ids in encoded.input_ids)
    if longest > length:
        raise InputError(
            f"A text must fit model.text_length = {length} tokens, but the longest has {longest}."
        )
    return torch.tensor(encoded.input_ids)


STATE_FORMAT = "featinv contrastive training state"


@dataclass(frozen=True)
class ContrastiveConfig:
    seed: Seed = 0
    data: DataConfig = field(default_factory=DataConfig)
    model: ContrastiveModelConfig = field(default_factory=ContrastiveModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        check(self)


def sigmoid_loss(logits: Float[Tensor, "b k"], labels: Int[Tensor, " b"]) -> Float[Tensor, ""]:
    """−Σ log σ(z · logit) / b, z = 1 for the image's own text and −1 for all others.

    Zhai et al. 2023, algorithm 1, with the texts of all classes in place of those of the batch.
    """
    own = F.one_hot(labels, logits.shape[1]).bool()
    return -F.logsigmoid(torch.where(own, logits, -logits)).sum() / len(logits)


class ContrastiveTask:
    """The sigmoid loss of images and class texts, and perhaps the losses of `SelfDistillation`."""

    def __init__(
        self,
        networks: ContrastiveNetworks,
        tokenizer: CLIPTokenizer,
        config: ContrastiveModelConfig,
        validation: tuple[Tensor, Tensor],
    ):
        self.networks, self.tokenizer, self.config = networks, tokenizer, config
        self.module: nn.Module = networks
        self.validation = validation

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        pass  # the loop moves the module, and there is nothing else

    def loss(self, module: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        pixels = normalise(to_images(batch["pixels"]))
        draw = SampleNoise(batch["seed"], pixels.device)
        kept = self._draw_kept(draw)
        logits, extra = module(pixels, kept, self._draw_views(draw, pixels))
        scalars = {"contrastive": sigmoid_loss(logits, batch["label"])}
        scalars["accuracy"] = (logits.argmax(1) == batch["label"]).float().mean()
        loss, settings = scalars["contrastive"], self.config.self_distillation
        if settings is not None:
            loss = loss + settings.masked_weight * extra["masked"]
            loss = loss + settings.local_weight * extra["local"]
        return loss, {**scalars, **extra}

    def _draw_kept(self, draw: SampleNoise) -> Tensor | None:
        """Drawn first, and before the extra views, so that all recipes see the same patches."""
        n_patches = self.networks.siglip.vision_model.embeddings.num_patches
        uniform = draw.uniform(n_patches)
        end = self.config.full_after
        if end is not None and int(self.networks.step) >= end:
            return None
        n_kept = max(1, round((1 - self.config.patch_drop_rate) * n_patches))
        return None if n_kept == n_patches else uniform.argsort(dim=1)[:, :n_kept]

    def _draw_views(self, draw: SampleNoise, pixels: Tensor) -> tuple[Tensor, Tensor] | None:
        settings = self.config.self_distillation
        if settings is None:
            return None
        n_patches = self.networks.siglip.vision_model.embeddings.num_patches
        n = min(settings.n_images, len(pixels))
        masked = random_mask(draw.uniform(n_patches)[:n], settings.mask_rate)
        crops = random_crops(pixels[:n], settings.crop_size, draw.uniform(2)[:n])
        return masked, crops

    def validate(self, module: nn.Module) -> tuple[dict[str, float], dict[str, Image.Image]]:
        """Zero-shot classification of the held-back images by the texts of the classes."""
        images, labels = self.validation
        device = next(module.parameters()).device
        parts = [module(normalise(x.to(device)))[0].cpu() for x in images.split(250)]
        logits = torch.cat(parts)
        top5 = logits.topk(min(5, logits.shape[1])).indices
        return {
            "loss": float(sigmoid_loss(logits, labels)),
            "top1": float((top5[:, 0] == labels).float().mean()),
            "top5": float((top5 == labels[:, None]).any(1).float().mean()),
            "scale": float(self.networks.siglip.logit_scale.exp()),
            "bias": float(self.networks.siglip.logit_bias),
        }, {}

    def save(self, module: nn.Module, folder: Path) -> None:
        """Writes `backbone/`, the vision tower; `model/`, both; and what only training needs."""
        networks: Any = module
        vision = networks.siglip.vision_model
        size = vision.config.image_size
        vision.save_pretrained(folder / "backbone")
        processor = SiglipImageProcessor(size={"height": size, "width": size})
        for name in ("backbone", "model"):
            processor.save_pretrained(folder / name)
        networks.siglip.save_pretrained(folder / "model")
        self.tokenizer.save_pretrained(str(folder / "model"))
        rest = {k: v for k, v in networks.state_dict().items() if not k.startswith("siglip.")}
        write_tensors(folder / "training.safetensors", rest, {}, STATE_FORMAT)

    def load(self, module: nn.Module, folder: Path) -> None:
        networks: Any = module
        networks.siglip.load_state_dict(SiglipModel.from_pretrained(folder / "model").state_dict())
        advice = "Resume from another checkpoint."
        path = folder / "training.safetensors"
        rest, _ = read_tensors(path, STATE_FORMAT, advice)
        wanted = {name for name in networks.state_dict() if not name.startswith("siglip.")}
        if strange := sorted(wanted ^ rest.keys()):
            raise InputError(
                f"{path} must hold the training state of this recipe and no other, but differs in "
                f"{len(strange)} tensors, e.g. {strange[0]!r}. {advice}"
            )
        networks.load_state_dict(rest, strict=False)  # the model's own were loaded above


def normalise(images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    """SigLIP's preprocessing: [0, 1] to [−1, 1]."""
    return (images - 0.5) / 0.5


def make_networks(
    config: ContrastiveModelConfig, image_size: int, titles: list[str]
) -> tuple[ContrastiveNetworks, CLIPTokenizer]:
    """Builds towers and tokenizer for classes of these titles.

    SigLIP's weights are drawn first, so that equal seeds give all recipes the same.
    """
    settings = config.self_distillation
    if settings is not None and not _fits(settings.crop_size, image_size, config.patch_size):
        raise InputError(
            "model.self_distillation.crop_size must be a multiple of model.patch_size "
            f"({config.patch_size}) below data.size ({image_size}), got {settings.crop_size}."
        )
    texts = [f"a photo of a {title}" for title in titles]
    tokenizer = make_tokenizer(texts, config.text_length)
    ids = tokenize(tokenizer, texts, config.text_length)
    siglip = make_siglip(config, image_size, tokenizer, len(texts))
    return ContrastiveNetworks(siglip, ids, settings), tokenizer


def _fits(crop_size: int, image_size: int, patch_size: int) -> bool:
    return crop_size % patch_size == 0 and 0 < crop_size < image_size


def find_titles(class_names: Sequence[str], path: str | None) -> list[str]:
    """Returns the title of each class from a file of titles; without one, the classes' names.

    Raises:
        InputError: classes without a title in the file.
    """
    if path is None:
        return list(class_names)
    titles = read_classes(path)
    if untitled := [name for name, title in titles.items() if not title]:
        raise InputError(
            f"{path} must give each class a title, which the encoder reads, but these have none: "
            f"{', '.join(untitled)}. Write it behind the name."
        )
    return list(titles.values())


def train_contrastive(config: ContrastiveConfig) -> Path:
    """Trains to the end and returns the folder that holds `backbone/` and `model/`."""
    accelerator = make_accelerator(config.optim, config.run)
    torch.manual_seed(derive_seed(config.seed, "initial weights"))
    images = open_training_images(config.data)
    train, held = make_datasets(images, config.data, config.seed)
    titles = find_titles(images.class_names or [], config.data.classes)
    networks, tokenizer = make_networks(config.model, config.data.size, titles)
    task = ContrastiveTask(networks, tokenizer, config.model, stack_images(held))
    return fit(task, train, accelerator, config.optim, config.run, to_yaml(config))


if __name__ == "__main__":
    run_recipe(ContrastiveConfig, train_contrastive, __doc__)
