"""Pipeline folders: what they must hold, the bundled ones, and pipelines assembled from parts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    PreTrainedModel,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    TimmWrapperModel,
)
from transformers.utils import logging as transformers_logging

from featinv_diffusion.backbones import SHORT_NAMES, wrap_model
from featinv_diffusion.backbones.timm import create_timm
from featinv_diffusion.backbones.transformers import load_transformers
from featinv_diffusion.diffusion.cards import CardInfo, write_model_card
from featinv_diffusion.diffusion.featinv_controlnet import FeatureControlNet
from featinv_diffusion.diffusion.featinv_pipeline import FeatInvPipeline, tidy_saved_folder
from featinv_diffusion.diffusion.objective import make_scheduler
from featinv_diffusion.errors import InputError
from featinv_diffusion.files import new_folder, write_text
from featinv_diffusion.types import FeatureSpec

# ---- What a saved pipeline folder must hold, checked before anything is loaded from it -----------

INDEX = "model_index.json"
CLASS_NAME = "FeatInvPipeline"
SCOPE_FILE = "scope.safetensors"
"""Statistics of natural maps, see `features.natural_maps`; not every pipeline has them."""

TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))


def check_pipeline_folder(folder: Path) -> None:
    """Raises `InputError` unless the folder holds a FeatInv pipeline with all its files whole."""
    if not folder.is_dir():
        raise InputError(f"A pipeline must be a folder, but there is none at {folder}.")
    index = read_json(folder / INDEX)
    name = index.get("_class_name")
    name = name[-1] if isinstance(name, list) else name
    if name != CLASS_NAME:
        raise InputError(
            f"{folder} must hold a {CLASS_NAME}, but its {INDEX} names a {name}. To make one from "
            "a Stable Diffusion folder: featinv export OUT --controlnet FOLDER --base FOLDER."
        )
    for component, entry in index.items():
        is_component = isinstance(entry, list) and not component.startswith("_")
        if is_component and len(entry) == 2 and entry[0] is not None:
            check_component(folder / component, entry[0])
    if (folder / SCOPE_FILE).exists():
        check_safetensors(folder / SCOPE_FILE)


def check_component(folder: Path, library: str) -> None:
    """Raises `InputError` unless one component's files are there and whole.

    Args:
        library: `transformers`, `diffusers` or the name of a shipped module; it decides how the
            weight files are named.
    """
    if folder.name == "scheduler":
        read_json(folder / "scheduler_config.json")
    elif folder.name == "tokenizer":
        if not any(all((folder / f).is_file() for f in files) for files in TOKENIZER_FILES):
            raise InputError(f"{folder / 'tokenizer.json'} is missing. Restore the file.")
    else:
        read_json(folder / "config.json")
        stem = "model" if library == "transformers" else "diffusion_pytorch_model"
        for path in _weight_files(folder, stem):
            check_safetensors(path)


def check_safetensors(path: Path) -> None:
    """Raises `InputError` unless the file is there and as long as its header says."""
    if not path.is_file():
        raise InputError(f"{path} is missing. Restore the file, or save the model again.")
    try:
        with safe_open(path, framework="pt") as tensors:
            tensors.keys()
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path} must be a whole safetensors file, but it is truncated or of another kind "
            f"({error}). Copy it or save it again."
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        InputError: no such file, or no JSON object in it.
    """
    if not path.is_file():
        raise InputError(f"{path} is missing. Restore the file, or save the model again.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(f"{path} must hold JSON, but cannot be read: {error}.") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object, but holds a {type(content).__name__}.")
    return content


def _weight_files(folder: Path, stem: str) -> list[Path]:
    index = folder / f"{stem}.safetensors.index.json"
    if not index.is_file():
        return [folder / f"{stem}.safetensors"]
    weights = read_json(index).get("weight_map", {})
    return [folder / name for name in sorted(set(weights.values()))]


_LIBRARIES = (diffusers_logging, transformers_logging)


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Hides the libraries' bars over components and tensors, which take little time."""
    shown = [library for library in _LIBRARIES if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


# ---- The pipelines in the package ----------------------------------------------------------------

ASSETS = Path(__file__).parents[1] / "assets"
BASE, BACKBONE, DEFAULTS = "base", "backbone", "pipeline.json"
BASE_MODELS = ("unet", "vae", "text_encoder")
MAX_FILE_MB = 16
SHARD_SIZE = "15MB"
NOTE = """\
## Where it is

In the package featinv-diffusion: `load_pipeline("{name}")` loads it there, and
`featinv export {folder} --pipeline {name}` writes the folder used above."""


def list_bundled() -> list[str]:
    """Returns the names of the pipelines in the package, such as `tiny/convnext`."""
    members = sorted(path.parent for path in ASSETS.glob(f"*/*/{DEFAULTS}"))
    return [f"{member.parent.name}/{member.name}" for member in members]


def bundled_folder(name: str) -> Path:
    """Returns the folder of a bundled pipeline, which holds its `controlnet` and `backbone`."""
    return ASSETS / name


def load_bundled(name: str, torch_dtype: torch.dtype = torch.float32) -> FeatInvPipeline:
    """Loads a pipeline of `list_bundled`.

    Raises:
        InputError: a file is missing or truncated.
    """
    return load_member(bundled_folder(name), torch_dtype)


def load_member(member: Path, torch_dtype: torch.dtype = torch.float32) -> FeatInvPipeline:
    """Loads the pipeline of a family that lies in a folder, see `load_bundled`."""
    base = member.parent / BASE
    defaults = read_json(member / DEFAULTS)
    backbone = member.parent / defaults.pop(BACKBONE, member.name) / BACKBONE
    for component in BASE_MODELS:
        library = read_json(base / INDEX)[component][0]
        check_component(base / component, library)
    check_component(member / "controlnet", "diffusers")
    check_component(backbone, "transformers")
    return FeatInvPipeline.from_pretrained(
        str(base),
        controlnet=FeatureControlNet.from_pretrained(
            member / "controlnet", dtype=torch_dtype, use_safetensors=True
        ),
        backbone=TimmWrapperForImageClassification.from_pretrained(backbone, dtype=torch_dtype),
        dtype=torch_dtype,
        use_safetensors=True,
        **defaults,
    )


def write_bundled(
    pipeline: FeatInvPipeline,
    family: str | Path,
    name: str,
    info: CardInfo,
    *,
    replace_base: bool = False,
) -> Path:
    """Packs a trained pipeline as member `name` of a family folder and returns the member's folder.

    An older member of that name is replaced; its statistics of natural maps stay where its weights
    are the same. The base is written with the first member. Where the ControlNet declares the
    features of another member, `tiny/convnext` for a family `tiny`, the backbone of that one is
    referred to.

    Args:
        family: e.g. `featinv_diffusion/assets/tiny`.
        replace_base: write the base anew, which breaks members that were trained on another.

    Raises:
        InputError: the base or the other member's backbone there is another one, a weight does
            not fit float16, a file is larger than 16 MB, the disk refuses.
    """
    if pipeline.backbone is None:
        raise InputError("A bundled pipeline must have its backbone, but this one has none.")
    family = Path(family)
    owner = _backbone_owner(pipeline, family, name)
    base, member = family / BASE, family / name
    if replace_base or not base.exists():
        stable_diffusion = _base_pipeline(pipeline)
        _replace(base, lambda f: stable_diffusion.save_pretrained(f, max_shard_size=SHARD_SIZE))
    else:
        _check_same_base(pipeline, base)

    def write(folder: Path) -> None:
        to_half(pipeline.controlnet).save_pretrained(
            folder / "controlnet", max_shard_size=SHARD_SIZE
        )
        defaults = {k: v for k, v in pipeline.parameters.items() if v is not None}
        if owner == name:
            to_half(pipeline.backbone).save_pretrained(folder / BACKBONE, max_shard_size=SHARD_SIZE)
        else:
            defaults[BACKBONE] = owner
        write_text(folder / DEFAULTS, json.dumps(defaults, indent=2, sort_keys=True) + "\n")
        where = NOTE.format(name=f"{family.name}/{name}", folder=f"{family.name}-{name}")
        if _is_same_member(pipeline, family / owner / BACKBONE, member):
            shutil.copyfile(member / SCOPE_FILE, folder / SCOPE_FILE)
        card = replace(info, notes=f"{where}\n\n{info.notes}")
        write_model_card(folder, pipeline, card, f"{family.name}-{name}")

    _replace(member, write)
    return member


def write_bundled_backbone(
    backbone: TimmWrapperForImageClassification, family: str | Path, name: str, card: str
) -> Path:
    """Packs a classifier alone as `name` of a family folder, with `card` as its README."""
    member = Path(family) / name

    def write(folder: Path) -> None:
        to_half(backbone).save_pretrained(folder / BACKBONE, max_shard_size=SHARD_SIZE)
        write_text(folder / "README.md", card)

    _replace(member, write)
    return member


def to_half(module: nn.Module) -> Any:
    """Returns a float16 copy.

    Raises:
        InputError: a value overflows, or a standard deviation or variance becomes zero.
    """
    half = deepcopy(module).half()
    for key, tensor in half.state_dict().items():
        scale = key.endswith(("feature_std", "running_var"))
        if not bool(tensor.isfinite().all()) or (scale and bool((tensor == 0).any())):
            raise InputError(
                f"Bundled weights must fit float16, but {key} of {type(module).__name__} does not: "
                "it overflows or a scale becomes zero."
            )
    return half


def _base_pipeline(pipeline: FeatInvPipeline) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=to_half(pipeline.vae),
        text_encoder=to_half(pipeline.text_encoder),
        tokenizer=pipeline.tokenizer,
        unet=to_half(pipeline.unet),
        scheduler=pipeline.scheduler,
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )


def _check_same_base(pipeline: FeatInvPipeline, base: Path) -> None:
    for component in BASE_MODELS:
        if not _holds(base / component, getattr(pipeline, component)):
            raise InputError(
                f"The family shares the base in {base}, but the {component} of this pipeline is "
                "another one. Train on that base, or pass replace_base=True and pack all again."
            )


def _backbone_owner(pipeline: FeatInvPipeline, family: Path, name: str) -> str:
    """The member that holds the backbone: another one that the ControlNet names, or `name`."""
    spec = pipeline.controlnet.config.get("feature_spec") or {}
    owner = spec.get("backbone", "").removeprefix(f"{family.name}/")
    stored = family / owner / BACKBONE
    if owner in ("", name) or f"{family.name}/{owner}" != spec["backbone"] or not stored.exists():
        return name
    if not _holds(stored, pipeline.backbone):
        raise InputError(
            f"The ControlNet reads the features of {spec['backbone']}, but the backbone in "
            f"{stored} is not the one of this pipeline. Pack {owner} anew first."
        )
    return owner


def _is_same_member(pipeline: FeatInvPipeline, backbone: Path, member: Path) -> bool:
    """Whether the member there has statistics of natural maps that hold for this pipeline."""
    return (
        (member / SCOPE_FILE).is_file()
        and _holds(member / "controlnet", pipeline.controlnet)
        and _holds(backbone, pipeline.backbone)
    )


def _holds(folder: Path, model: Any) -> bool:
    """Whether the folder stores this model, up to float16."""
    wanted = to_half(model).state_dict()
    stored = type(model).from_pretrained(folder).half().state_dict()
    return wanted.keys() == stored.keys() and all(
        torch.equal(wanted[key], stored[key]) for key in wanted
    )


def _replace(target: Path, write: Callable[[Path], Any]) -> None:
    """Writes a folder beside `target`, checks it, and puts it in place of `target`."""
    fresh = target.with_name(f"{target.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    with new_folder(fresh) as folder, without_progress_bars():
        write(folder)
        tidy_saved_folder(folder)
        for path in folder.rglob("*"):
            if path.is_file() and path.stat().st_size > MAX_FILE_MB * 10**6:
                raise InputError(
                    f"No bundled file may be larger than {MAX_FILE_MB} MB, but "
                    f"{path.relative_to(folder)} has {path.stat().st_size / 1e6:.1f} MB. "
                    "Make the model smaller."
                )
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)


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
