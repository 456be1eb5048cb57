"""Original ldm/cldm checkpoint files to FeatInv pipelines, and back."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from transformers import PreTrainedModel

from featinv_diffusion.backbones import LAST, load_backbone
from featinv_diffusion.diffusion.assemble import check_backbone, load_backbone_component
from featinv_diffusion.diffusion.convert_config import (
    PIPELINE_SETTINGS,
    OriginalConfig,
    read_original_config,
    sd15_config,
)
from featinv_diffusion.diffusion.convert_files import (
    check_suffix,
    read_checkpoint,
    write_checkpoint,
)
from featinv_diffusion.diffusion.convert_from import from_original
from featinv_diffusion.diffusion.convert_to import to_original
from featinv_diffusion.diffusion.convert_tokenizer import DEFAULT_TOKENIZER, load_tokenizer
from featinv_diffusion.diffusion.convert_yaml import to_original_config
from featinv_diffusion.diffusion.featinv_pipeline import FeatInvPipeline
from featinv_diffusion.errors import InputError, choices_hint
from featinv_diffusion.files import check_absent, write_text
from featinv_diffusion.types import FeatureSpec

logger = logging.getLogger(__name__)

DEFAULT_BACKBONE = "convnext"
# Fixed in the original code.
HINT_WIDTH, LATENT_SIZE = 512, 32


def read_original(
    checkpoint: str | Path,
    original_config: str | Path | None = None,
    *,
    tokenizer: str | None = DEFAULT_TOKENIZER,
    backbone: str | None = None,
    layer: str | None = None,
    pooled: bool | None = None,
    with_backbone: bool = True,
) -> FeatInvPipeline:
    """Builds a pipeline from an original checkpoint.

    Only the tokenizer and the weights of the backbone, which no checkpoint holds, may need a
    network. A backbone whose weights cannot be had is left out with a warning.

    Args:
        checkpoint: `.ckpt`, `.pt`, `.pth` or `.safetensors`.
        original_config: the YAML it was trained with; None is Stable Diffusion 1.x at 256 pixels.
        tokenizer: a folder or Hub repository; None leaves it out, and the pipeline then takes
            `prompt_embeds` only.
        backbone: whose features the ControlNet reads. None takes what a YAML of `write_original`
            says, else `convnext`; so do `layer` (else `last`) and `pooled` (else False), whether
            it reads average-pooled maps.

    Raises:
        InputError: a file that cannot be read, or parts that do not fit each other.
    """
    config = sd15_config() if original_config is None else read_original_config(original_config)
    settings = _pipeline_settings(config)
    tensors = read_checkpoint(checkpoint)
    spec = _feature_spec(config, backbone, layer)
    if pooled is None:
        pooled = bool(config.extras.get("feature_pooled", False))
    parts = from_original(tensors, config, spec, pooled=pooled)
    components = {
        "tokenizer": None if tokenizer is None else load_tokenizer(tokenizer, parts.text_encoder),
        "backbone": _load_backbone(spec) if with_backbone else None,
    }
    try:
        return FeatInvPipeline(**vars(parts), **components, **settings)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"The pipeline settings of the YAML must be valid, but: {error}"
        ) from error


def write_original(pipeline: FeatInvPipeline, checkpoint: str | Path) -> Path:
    """Writes a checkpoint in the original layout and, beside it, the YAML of its sizes.

    The tokenizer and the backbone stay behind: the original checkpoint has neither.

    Returns:
        The path of the YAML.

    Raises:
        InputError: a setting or weight that the original layout cannot hold, a file is there
            already, or the disk refuses.
    """
    checkpoint = Path(checkpoint)
    config_path = checkpoint.with_suffix(".yaml")
    check_suffix(checkpoint)
    check_absent(checkpoint)
    check_absent(config_path)
    tensors, config = to_original(pipeline)
    write_text(config_path, OmegaConf.to_yaml(OmegaConf.create(to_original_config(config))))
    try:
        write_checkpoint(checkpoint, tensors)
    except BaseException:
        config_path.unlink()  # both or none
        raise
    _note_differences(pipeline, config)
    return config_path


def _feature_spec(config: OriginalConfig, backbone: str | None, layer: str | None) -> FeatureSpec:
    declared = config.extras.get("feature_spec") or {}
    named = declared.get("backbone")
    if declared and backbone in (None, named):
        try:
            spec = FeatureSpec(**{**declared, "grid": tuple(declared["grid"])})
        except (TypeError, KeyError) as error:
            raise InputError(f"feature_spec of the YAML must be complete, but: {error}") from error
        if layer in (None, spec.layer):
            return spec
    name = backbone or named or DEFAULT_BACKBONE
    return load_backbone(name, layer or LAST, pretrained=False).spec


def _load_backbone(spec: FeatureSpec) -> PreTrainedModel | None:
    try:
        model = load_backbone_component(spec.backbone)
    except InputError as error:
        logger.warning("The pipeline is without its backbone and takes features only. %s", error)
        return None
    if model is None:
        logger.warning(
            "The pipeline is without its backbone and takes features only: %s cannot travel in a "
            "pipeline folder.",
            spec.backbone,
        )
        return None
    check_backbone(model, spec)
    return model


def _pipeline_settings(config: OriginalConfig) -> dict[str, Any]:
    settings = dict(config.extras.get("pipeline") or {})
    for name in settings:
        if name not in PIPELINE_SETTINGS:
            hint = choices_hint(name, list(PIPELINE_SETTINGS))
            raise InputError(f"The original config has no pipeline setting {name!r}; {hint}")
    return settings


def _note_differences(pipeline: FeatInvPipeline, config: OriginalConfig) -> None:
    """Warns of sizes that the original code has fixed in it and that are others here."""
    text_width = sd15_config().text_encoder["hidden_size"]
    sizes = (
        ("a hint block", pipeline.controlnet.config["feature_hidden_channels"], HINT_WIDTH),
        ("latents", config.unet["sample_size"], LATENT_SIZE),
        ("a text encoder", config.text_encoder["hidden_size"], text_width),
    )
    changes = [f"{what} of width {a}, not {b}" for what, a, b in sizes if a != b]
    if changes:
        logger.warning(
            "The original code has sizes fixed in it besides its YAML. Before it can load this "
            "checkpoint it needs %s.",
            ", ".join(changes),
        )
