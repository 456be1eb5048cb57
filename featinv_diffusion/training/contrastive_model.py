"""A small SigLIP for images and the names of their classes, and its forward pass in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTokenizer, SiglipConfig, SiglipModel

from featinv_diffusion.errors import InputError
from featinv_diffusion.training.self_distillation import (
    SelfDistillation,
    SelfDistillationConfig,
    encode_patches,
)


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

    patch_size: int = 8
    hidden_size: int = 192
    depth: int = 6
    n_heads: int = 3
    text_hidden_size: int = 96
    text_depth: int = 2
    text_heads: int = 4
    text_length: int = 16
    scale: float = 10.0
    patch_drop_rate: float = 0.0
    full_after: int | None = None
    self_distillation: SelfDistillationConfig | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.patch_drop_rate < 1:
            raise InputError(
                f"model.patch_drop_rate must be in [0, 1), but {self.patch_drop_rate} came."
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
            f"but {image_size} came."
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
