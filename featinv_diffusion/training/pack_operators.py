"""Fits the operators in feature space that ship with the tiny family."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from omegaconf import OmegaConf

from featinv_diffusion.analysis.operator_fit import draw_images, fit_operator
from featinv_diffusion.evaluation.dataset import open_images
from featinv_diffusion.features.operator_files import FOLDER, SUFFIX
from featinv_diffusion.inverters.reconstructor import load_reconstructor
from featinv_diffusion.pixel_operations import make_operation
from featinv_diffusion.training.family import CONFIGS

MEMBER = "siglip2"
METHODS = {"swap": "orthogonal", "suppress": "linear", "colourise": "linear"}
"""By the operation; a rotation cannot forget a channel, nor make colours of grey."""
N_IMAGES = 1024


def fit_operators(family: Path, data: str | None = None) -> Iterator[Path]:
    """Fits the operators of the packed encoder that are not there yet, and yields their files.

    Args:
        data: folder of the images; None takes that of the reconstructor's config.

    Raises:
        InputError: as `analysis.operator_fit.fit_operator`.
    """
    if not (family / MEMBER).is_dir():
        return
    backbone = load_reconstructor(str(family / MEMBER)).backbone
    config = OmegaConf.load(CONFIGS / f"reconstructor-{MEMBER}.yaml").data
    images = open_images(data or config.root, config.get("split", "train"), config.classes)
    for name, method in METHODS.items():
        path = family / MEMBER / FOLDER / f"{name}{SUFFIX}"
        if path.is_file():
            continue
        drawn = draw_images(images, N_IMAGES, 0, max(backbone.input_size))
        operator = fit_operator(backbone, drawn, make_operation(name), method)
        path.parent.mkdir(exist_ok=True)
        replace(operator, matrix=operator.matrix.to(torch.float32)).save(path)
        yield path
