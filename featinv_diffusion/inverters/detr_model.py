"""DETR models: from the Hub, a folder or the package, and new ones around a trained classifier."""

from __future__ import annotations

from pathlib import Path
from typing import Any, no_type_check

import torch
from torch import nn
from transformers import (
    AutoBackbone,
    AutoConfig,
    DetrConfig,
    DetrForObjectDetection,
    TimmBackbone,
    TimmBackboneConfig,
    TimmWrapperForImageClassification,
)

from featinv_diffusion.errors import InputError

ASSETS = Path(__file__).parents[1] / "assets"
DETECTOR = "detector"
"""Folder of a bundled member that holds a detector."""


@no_type_check  # transformers makes it a dataclass that takes more than its fields
class TimmArgumentsConfig(TimmBackboneConfig):
    """A timm backbone with arguments of its own for `timm.create_model`."""

    model_type = "timm_backbone_with_arguments"
    model_args: dict[str, Any] | None = None


class TimmArgumentsBackbone(TimmBackbone):
    """transformers' timm backbone, which otherwise knows registered architectures only."""

    config_class = TimmArgumentsConfig

    def __init__(self, config: TimmArgumentsConfig, **kwargs: Any):
        super().__init__(config, **{**(config.model_args or {}), **kwargs})


def register_backbone() -> None:
    """Lets transformers build `TimmArgumentsBackbone` from a config; again it does nothing."""
    AutoConfig.register(TimmArgumentsConfig.model_type, TimmArgumentsConfig, exist_ok=True)
    AutoBackbone.register(TimmArgumentsConfig, TimmArgumentsBackbone, exist_ok=True)


def load_detr(name: str) -> DetrForObjectDetection:
    """Loads a detector, in evaluation mode.

    Args:
        name: bundled (`tiny/detr`), a folder, or a Hub id such as `facebook/detr-resnet-50`.

    Raises:
        InputError: nothing of that name, or no DETR.
    """
    register_backbone()
    bundled = ASSETS / name / DETECTOR
    source = str(bundled) if bundled.is_dir() else name
    try:
        model = DetrForObjectDetection.from_pretrained(source, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"A DETR must be bundled, in a folder or a reachable Hub repository, but {name!r} "
            f"could not be loaded: {str(error).strip().splitlines()[0]}"
        ) from error
    return model.eval()


def make_detr(
    classifier: TimmWrapperForImageClassification, class_names: list[str], **sizes: Any
) -> DetrForObjectDetection:
    """Builds a new DETR on the trained convolutional stages of a classifier.

    Args:
        classifier: with a convolutional timm model whose last feature map is used.
        sizes: of the transformer, as `DetrConfig` calls them; dropout is 0 unless given.
    """
    register_backbone()
    wrapper: Any = classifier
    arguments = dict(wrapper.config.model_args or {})
    make_backbone_config: Any = TimmArgumentsConfig
    backbone_config = make_backbone_config(
        backbone=wrapper.config.architecture,
        output_stride=arguments.pop("output_stride", None),
        out_indices=[-1],
        model_args=arguments,
    )
    names = dict(enumerate(class_names))
    make: Any = DetrConfig
    config = make(
        backbone_config=backbone_config,
        id2label=names,
        label2id={name: i for i, name in names.items()},
        **{"dropout": 0.0, **sizes},
    )
    model = DetrForObjectDetection(config)
    _copy_stages(wrapper.timm_model, model.model.backbone.model)
    return model.eval()


def _copy_stages(classifier: nn.Module, stages: nn.Module) -> None:
    """Copies the weights by name; what the classifier has beyond its stages is its head."""
    weights = classifier.state_dict()
    missing = [key for key in stages.state_dict() if key not in weights]
    if missing:
        raise InputError(
            "The classifier must be a convolutional timm model whose stages keep their names, "
            f"but {missing[0]!r} is not among its weights."
        )
    stages.load_state_dict({key: weights[key] for key in stages.state_dict()})
