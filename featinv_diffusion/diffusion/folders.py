"""Pipeline folders: what they must hold, the bundled ones, and pipelines assembled from parts."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers.models.modeling_utils import ModelMixin
from huggingface_hub import ModelCard
from safetensors import SafetensorError, safe_open
from transformers import (
    PreTrainedModel,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    TimmWrapperModel,
)

from featinv_diffusion.backbones import resolve_backbone, wrap_model
from featinv_diffusion.backbones.base import without_progress_bars
from featinv_diffusion.backbones.names import read_spec
from featinv_diffusion.backbones.timm import create_timm
from featinv_diffusion.backbones.transformers import load_transformers
from featinv_diffusion.diffusion.featinv_controlnet import FeatureControlNet
from featinv_diffusion.diffusion.featinv_pipeline import FeatInvPipeline
from featinv_diffusion.diffusion.objective import make_scheduler
from featinv_diffusion.errors import InputError
from featinv_diffusion.files import write_text
from featinv_diffusion.types import FeatureSpec

# ---- Model cards ----


@dataclass(frozen=True)
class CardInfo:
    """What a model card says beyond what the pipeline knows about itself.

    Args:
        command: the command that made the pipeline.
        license: identifier of the Hub; None where it is that of the base models.
        base_models: Hub names of the models this one was made of.
        notes: further sections, as Markdown.
    """

    command: str
    license: str | None = None
    base_models: list[str] = field(default_factory=list)
    notes: str = ""


def write_model_card(
    folder: Path, pipeline: FeatInvPipeline, info: CardInfo, title: str | None = None
) -> None:
    """Writes `README.md` into a folder that holds, or is part of, the saved pipeline."""
    card = pipeline.make_model_card(
        title or folder.name, info.command, info.license, info.base_models, info.notes
    )
    write_text(folder / "README.md", str(card))


def read_card_info(folder: Path, command: str) -> CardInfo:
    """Returns what the card of a folder says besides the command; nothing where it has none."""
    path = folder / "README.md"
    if not path.is_file():
        return CardInfo(command)
    card: Any = ModelCard.load(path, ignore_metadata_errors=True)
    models = card.data.base_model or []
    models = [models] if isinstance(models, str) else list(models)
    license = str(card.data.license) if card.data.license else None
    notes = card.text.partition("\nVersions: ")[2].partition("\n")[2]
    return CardInfo(command, license, models, notes.strip())


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


# ---- The pipelines in the package ----------------------------------------------------------------

ASSETS = Path(__file__).parents[1] / "assets"
BASE, BACKBONE, DEFAULTS = "base", "backbone", "pipeline.json"
BASE_MODELS = ("unet", "vae", "text_encoder")


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
    return read_spec(declared) if declared else None


def check_backbone(model: PreTrainedModel, spec: FeatureSpec) -> None:
    """Raises `InputError` unless the model has the layer of `spec`, with its shape."""
    spec.check_matches(wrap_model(model, name=spec.backbone, layer=spec.layer).spec)


def load_backbone_component(name: str) -> PreTrainedModel | None:
    """Loads a backbone as a stock class that a pipeline folder can hold.

    That is transformers' wrapper of a timm model. Other vision models of transformers cannot
    travel in a pipeline: None is returned, and the pipeline reads features only.

    Args:
        name: as for `load_backbone`; the weights of timm are downloaded.

    Raises:
        InputError: unknown name, or weights that cannot be loaded.
    """
    found = resolve_backbone(name)
    if found.source == "timm":
        return make_timm_wrapper(found.target)
    model, _ = load_transformers(found.target, pretrained=True)
    return model if hasattr(model, "timm_model") else None


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


# ---- Folders that diffusers wrote ----

Network = TypeVar("Network", bound=ModelMixin)

CONFIG = "config.json"
UNREADABLE = (
    OSError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    SafetensorError,
)
"""What the libraries raise for a file that is missing or damaged, or for impossible settings."""


def class_name(folder: Path) -> str | None:
    """Returns the class that a folder's config names; None without one.

    Raises:
        InputError: a config that is no JSON object.
    """
    path = folder / CONFIG
    if not path.is_file():
        return None
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} must be JSON, but cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object, got a {type(content).__name__}.")
    return content.get("_class_name")


def load_network(
    network_class: type[Network], name: str | Path, *, wanted: str, **options: Any
) -> Network:
    """Loads a network in float32, with exactly the weights that its config asks for.

    Args:
        name: folder or Hub repository.
        wanted: what must be there, in words for the message.
        **options: of `from_pretrained`, such as `subfolder`.

    Raises:
        InputError: nothing there, files that cannot be downloaded or read, or weights that are
            missing or unexpected.
    """
    loader: Any = network_class
    try:
        network, found = loader.from_pretrained(
            name, use_safetensors=True, output_loading_info=True, **options
        )
    except UNREADABLE as error:
        raise InputError(
            f"{name} must be {wanted}, but it could not be read: {first_line(error)}"
        ) from error
    for kind in ("missing", "unexpected"):
        if keys := found[f"{kind}_keys"]:
            raise InputError(
                f"{name} must be {wanted}, with the weights that its {CONFIG} asks for, but "
                f"{len(keys)} are {kind}, {min(keys)} among them."
            )
    return network.float()


def first_line(error: Exception) -> str:
    """Returns the first line of a library's message, or the error's name if it has no message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
