"""Masked prediction and local-to-global self-distillation of a vision tower from its own average.

The two image losses that SigLIP 2 adds to SigLIP (Tschannen et al. 2025, section 2.3; from SILC,
Naeem et al. 2023, and TIPS, Maninis et al. 2024): the teacher is a moving average of the student
and sees whole images. Published, both compare distributions over prototypes and begin at 80 % of
the training. Here both are regressions, which need neither centring nor sharpening: of the
teacher's layer-normalised patch features, as in data2vec (Baevski et al. 2022), and of its pooled
embedding's direction, as in BYOL (Grill et al. 2020). They run from the first step on, on the
first `n_images` of each batch.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import SiglipVisionModel

from featinv_diffusion.errors import InputError


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

    n_images: int = 32
    mask_rate: float = 0.5
    crop_size: int = 32
    momentum: float = 0.99
    masked_weight: float = 2.5
    local_weight: float = 1.0
    predictor_size: int = 384

    def __post_init__(self) -> None:
        for name in ("mask_rate", "momentum"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(
                    f"model.self_distillation.{name} must lie between 0 and 1, "
                    f"but {getattr(self, name)} came."
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
