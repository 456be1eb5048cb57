"""A pipeline out of its parts: a trained ControlNet, a text-to-image model and a backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    TimmWrapperModel,
)

from featinv_diffusion.backbones import SHORT_NAMES, wrap_model
from featinv_diffusion.backbones.load_timm import create_timm
from featinv_diffusion.backbones.load_transformers import load_transformers
from featinv_diffusion.diffusion.bundled import bundled_folder, list_bundled
from featinv_diffusion.diffusion.featinv_controlnet import FeatureControlNet
from featinv_diffusion.diffusion.featinv_pipeline import FeatInvPipeline
from featinv_diffusion.diffusion.pipeline_folder import INDEX, check_component, read_json
from featinv_diffusion.diffusion.quiet import without_progress_bars
from featinv_diffusion.diffusion.schedulers import make_scheduler
from featinv_diffusion.errors import InputError
from featinv_diffusion.types import FeatureSpec

BASE_COMPONENTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


def assemble(
    controlnet: str | Path,
    base: str | Path,
    backbone: str | None = None,
    *,
    torch_dtype: torch.dtype = torch.float32,
) -> FeatInvPipeline:
    """Joins a ControlNet folder, a Stable Diffusion folder or Hub repository, and a backbone.

    The scheduler becomes DDIM, the published sampler, on the noise schedule of the base.

    Args:
        controlnet: a folder of `FeatureControlNet.save_pretrained`, or one that holds it as
            `controlnet/`, such as a training checkpoint.
        backbone: a name of `load_backbone`; None takes the one that the ControlNet declares.

    Raises:
        InputError: a part that is missing, damaged or does not fit the others.
    """
    net = load_controlnet(Path(controlnet), torch_dtype)
    spec = feature_spec_of(net)
    name = backbone or (spec.backbone if spec else None)
    if name is None:
        raise InputError(
            f"The ControlNet in {controlnet} must declare which backbone it reads, as feature_spec "
            "in its config, but does not. Name the backbone."
        )
    model = load_backbone_component(name)
    if model is not None and spec is not None:
        check_backbone(model, spec)
    _check_base(Path(base))
    try:
        with without_progress_bars():
            pipeline = FeatInvPipeline.from_pretrained(
                str(base), controlnet=net, backbone=model, dtype=torch_dtype
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"The base {base} must be a Stable Diffusion folder or Hub repository, but loading it "
            f"failed: {str(error).strip()}"
        ) from error
    _check_unet(pipeline, str(base))
    pipeline.scheduler = make_scheduler("ddim", pipeline.scheduler.config)
    return pipeline


def load_controlnet(folder: Path, torch_dtype: torch.dtype = torch.float32) -> FeatureControlNet:
    """Loads a FeatureControlNet.

    Raises:
        InputError: no such folder, a file missing or truncated, a ControlNet of another kind.
    """
    if not folder.is_dir():
        raise InputError(f"A ControlNet must be a folder, but there is none at {folder}.")
    if not (folder / "config.json").is_file() and (folder / "controlnet").is_dir():
        folder = folder / "controlnet"
    check_component(folder, "diffusers")
    name = read_json(folder / "config.json").get("_class_name")
    if name != FeatureControlNet.__name__:
        raise InputError(
            f"{folder} must hold a {FeatureControlNet.__name__}, but its config names a {name}."
        )
    try:
        return FeatureControlNet.from_pretrained(folder, dtype=torch_dtype, use_safetensors=True)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"The ControlNet in {folder} does not fit its config: {error}") from error


def feature_spec_of(controlnet: Any) -> FeatureSpec | None:
    """Returns the features that a ControlNet declares to read, None where it declares none."""
    declared = controlnet.config.get("feature_spec")
    return FeatureSpec(**{**declared, "grid": tuple(declared["grid"])}) if declared else None


def check_backbone(model: PreTrainedModel, spec: FeatureSpec) -> None:
    """Raises `InputError` unless the model has the layer of `spec`, with its shape."""
    spec.check_matches(wrap_model(model, name=spec.backbone, layer=spec.layer).spec)


def load_backbone_component(name: str) -> PreTrainedModel | None:
    """Loads a backbone as a stock class that a pipeline folder can hold.

    That is transformers' wrapper of a timm model. Other vision models of transformers cannot
    travel in a pipeline: None is returned, and the pipeline reads features only.

    Args:
        name: as for `load_backbone`; timm weights are downloaded.

    Raises:
        InputError: unknown name, or weights that cannot be loaded.
    """
    if name in list_bundled():
        return load_transformers(str(bundled_folder(name) / "backbone"), pretrained=True)[0]
    if name.startswith("hf/"):
        model, _ = load_transformers(name.removeprefix("hf/"), pretrained=True)
        return model if hasattr(model, "timm_model") else None
    return make_timm_wrapper(SHORT_NAMES.get(name, name).removeprefix("timm/"))


def make_timm_wrapper(timm_id: str) -> PreTrainedModel:
    """Downloads a timm model into transformers' wrapper, with the names of its classes."""
    model: Any = create_timm(timm_id, pretrained=True)
    config = TimmWrapperConfig.from_dict(
        {
            "architecture": timm_id,
            "num_classes": model.num_classes,
            "pretrained_cfg": dict(model.pretrained_cfg),
        }
    )
    wrapper_class = TimmWrapperForImageClassification if model.num_classes else TimmWrapperModel
    wrapper = wrapper_class(config)
    wrapper.timm_model.load_state_dict(model.state_dict())
    return wrapper.eval()


def _check_base(base: Path) -> None:
    if not base.is_dir():
        return  # a Hub repository, or an error when it is downloaded
    index = read_json(base / INDEX)
    missing = [name for name in BASE_COMPONENTS if not (index.get(name) or [None])[0]]
    if missing:
        raise InputError(
            f"The base {base} must be a Stable Diffusion folder, but its {INDEX} has no "
            f"{', '.join(missing)}."
        )


def _check_unet(pipeline: FeatInvPipeline, base: str) -> None:
    for key in ("block_out_channels", "cross_attention_dim", "in_channels"):
        ours, theirs = pipeline.controlnet.config[key], pipeline.unet.config[key]
        same = ours == theirs if not isinstance(ours, list | tuple) else list(ours) == list(theirs)
        if not same:
            raise InputError(
                f"The ControlNet was made for a UNet with {key} {ours}, but the UNet of the base "
                f"{base} has {theirs}. Use the base that it was trained on."
            )
