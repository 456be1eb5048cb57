"""How much of an image each stage of a model keeps: MSE of its reconstruction from there.

Source: "Inverting DETR" (modular inversion), section 4.1 and figure 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import torch
from jaxtyping import Float
from torch import Tensor

from featinv_diffusion.inverters.modular import ModularInverter
from featinv_diffusion.inverters.vit import AnalyticPatchInverse
from featinv_diffusion.inverters.vit_path import VitPath
from featinv_diffusion.types import Images

AVERAGE = "average image"


@torch.no_grad()
def reconstruct_stages(
    inverter: ModularInverter, images: Images, stages: Sequence[str], batch_size: int = 32
) -> dict[str, Images]:
    """Returns the reconstructions from each stage, on the CPU."""
    chains = {stage: inverter.chain(stage) for stage in stages}
    parts: dict[str, list[Tensor]] = {stage: [] for stage in stages}
    for batch in images.split(batch_size):
        found = inverter.path.embeddings(batch.to(inverter.path.device), stages)
        for stage, chain in chains.items():
            parts[stage].append(chain.invert(found[stage]).cpu())
    return {stage: torch.cat(part) for stage, part in parts.items()}


@torch.no_grad()
def invert_patch_embedding(path: VitPath, images: Images) -> dict[str, float]:
    """Undoes the patch embedding in closed form, in float64.

    Returns:
        `condition_number` of the embedding and `max_error` of the pixels.

    Raises:
        InputError: the model norms its patches before the first block.
    """
    exact = VitPath(deepcopy(path.model).double(), name=path.name, preprocessing=path.preprocessing)
    module = AnalyticPatchInverse.from_path(exact)
    tokens = exact.embeddings(images, ["patches"])["patches"]
    error = float((module(tokens) - images).abs().max())
    return {"condition_number": module.condition_number, "max_error": error}


def stage_mse(reconstructions: dict[str, Images], images: Images) -> dict[str, Float[Tensor, " b"]]:
    """Returns the MSE of each image in [0, 1] by stage, and that of the average image.

    The average is that of these images, so no constant picture scores better.
    """
    guess = images.mean(0, keepdim=True).expand_as(images)
    candidates = {**reconstructions, AVERAGE: guess}
    return {
        name: (other - images).square().mean(dim=(1, 2, 3)) for name, other in candidates.items()
    }
