"""Opens any inverter by name, folder or Hub repository: `load_inverter`."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import nn

from featinv_diffusion.backbones import (
    Backbone,
    load_backbone,
    load_named_backbone,
    resolve_backbone,
    same_backbone,
)
from featinv_diffusion.backbones.base import LAST, without_progress_bars
from featinv_diffusion.devices import find_device
from featinv_diffusion.diffusion.featinv_pipeline import FeatInvPipeline
from featinv_diffusion.diffusion.folders import INDEX, class_name, list_bundled
from featinv_diffusion.diffusion.hub import REPO, load_pipeline
from featinv_diffusion.diffusion.objective import make_scheduler, scheduler_name
from featinv_diffusion.errors import InputError, choices_hint
from featinv_diffusion.files import expand_path
from featinv_diffusion.inverters import guided, modular, optimise, rae, reconstructor
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.inverters.chain import MapChain
from featinv_diffusion.inverters.diffusion import DiffusionInverter, declared_spec
from featinv_diffusion.inverters.quality import with_quality
from featinv_diffusion.settings import DIFFUSION, SampleSettings
from featinv_diffusion.trust import FACTORY
from featinv_diffusion.types import FeatureSpec

DEFAULT_BACKBONE = "tiny/convnext"
BUNDLED = "tiny/"
OF_DIFFUSION = (
    "quality",
    "steps",
    "scheduler",
    "guidance_scale",
    "guidance",
    "strength",
    "refine",
    "refine_at",
    "capture",
    "attention",
    "dtype",
)
"""Settings that only the diffusion inverter has, unless `Kind.takes` names them."""

logger = logging.getLogger(__name__)


def load_inverter(
    name: str | Path | None = None,
    *,
    stage: str | None = None,
    pipeline: str | None = None,
    backbone: Backbone | str | None = None,
    layer: str | None = None,
    quality: str | None = None,
    steps: int | None = None,
    scheduler: str | None = None,
    guidance_scale: float | None = None,
    guidance: str | None = None,
    strength: float = 1.0,
    refine: int | None = None,
    refine_at: str | None = None,
    capture: bool = False,
    parametrise: str = "latents",
    attention: str = "native",
    device: str = "auto",
    dtype: str = "float32",
) -> Inverter:
    """Opens an inverter, which turns features into images, with the backbone that makes them.

    Args:
        name: a name of `list_inverters`, a folder (a pipeline, a modular inverter or a
            reconstructor), or a Hub repository of a pipeline; default is `tiny/convnext`.
        stage: stage that a modular inverter (`detr`, `vit`) inverts; None is its default one.
        pipeline: for `rae`, the folder or Hub repository of its autoencoder; for `optimise` and
            `guided`, that of a Stable Diffusion, default is the bundled `tiny/base`.
        backbone: the model that the features come from: for `optimise` and `guided` any, such as a
            `wrap_module` of yours; for a pipeline that does not hold it, the one that it was
            trained on. Default is found by name.
        layer: of the backbone where that is named.
        quality: `draft`, `standard`, `best` or `published`: presets of a diffusion pipeline, see
            `inverters.quality`.
        steps, scheduler, guidance_scale, guidance: of a diffusion pipeline; None is what the
            quality says.
        strength: factor on the residuals of the ControlNet.
        refine: steps that move a sample towards the features, through its own backbone.
        refine_at: `end` (the finished sample) or `steps` (the last steps of denoising).
        capture: whether UNet and ControlNet are traced once and kept, which pays for many images.
        parametrise: what `optimise` changes: `latents` of the autoencoder or `pixels`.
        attention: `native` or `xformers`.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps` …
        dtype: `float32`, `float16` or `bfloat16`, of a diffusion pipeline.

    Raises:
        InputError: nothing of that name, files that cannot be read, a setting that this inverter
            does not have, a device that is not there.
    """
    settings = SampleSettings(
        inverter=DIFFUSION if name is None else str(name),
        stage=stage,
        pipeline=pipeline,
        backbone=backbone if isinstance(backbone, str) else None,
        layer=layer,
        quality=quality,
        steps=steps,
        scheduler=scheduler,
        guidance_scale=guidance_scale,
        guidance=guidance,
        strength=strength,
        refine=refine,
        refine_at=refine_at,
        capture=capture,
        parametrise=parametrise,
        attention=attention,
        device=device,
        dtype=dtype,
    )
    return open_inverter(settings, backbone=None if isinstance(backbone, str) else backbone)


def open_inverter(
    settings: SampleSettings,
    on_progress: Callable[[float], None] | None = None,
    backbone: Backbone | None = None,
) -> Inverter:
    """As `load_inverter`, of settings; those of the inverter are resolved.

    In the resolved settings nothing is None or `auto` but what the inverter does not have, such
    as the stage of a diffusion pipeline, or a scheduler that has no name here.

    Raises:
        InputError: as `load_inverter`, or settings with the backbone and layer of another inverter.
    """
    settings = name_inverter(settings)
    device = find_device(settings.device)
    with without_progress_bars():
        if settings.inverter == DIFFUSION:
            inverter = _open_diffusion(settings, device, backbone)
        elif find_kind(settings.inverter).takes_backbone:
            inverter = _open_by_gradient(settings, device, backbone)
        elif backbone is not None:
            raise InputError(
                f"The inverter {settings.inverter!r} has its own backbone, but another was given. "
                "Leave that out."
            )
        else:
            inverter = _open_deterministic(settings, device)
    inverter.on_progress = on_progress
    logger.info("Opened an inverter of the %s on %s.", inverter.spec, device)
    return inverter


# ---- Names ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A kind of inverter that is no diffusion pipeline.

    Args:
        names: the bundled ones, or the names that always mean this kind.
        holds: whether a folder holds one.
        open: loads one, of settings that name it and, if it takes any backbone, of that.
        takes_pipeline: whether its weights are named by `SampleSettings.pipeline`.
        takes: the settings of a sampler that it has. Kinds with a backbone among them take any, and
            draw noise; the others are deterministic.
    """

    names: Callable[[], list[str]]
    holds: Callable[[Path], bool]
    open: Callable[..., Inverter]
    takes_pipeline: bool = False
    takes: tuple[str, ...] = ()

    @property
    def takes_backbone(self) -> bool:
        return "backbone" in self.takes


def _open_modular(settings: SampleSettings) -> Inverter:
    return MapChain(modular.load_modular(settings.inverter).chain(settings.stage))


def _open_reconstructor(settings: SampleSettings) -> Inverter:
    return _check_stage(reconstructor.load_reconstructor(settings.inverter), settings)


def _open_rae(settings: SampleSettings) -> Inverter:
    if settings.pipeline is None:
        raise InputError(
            f"The inverter {settings.inverter!r} must be told its weights: give --pipeline with a "
            f"folder or a Hub repository, such as {rae.EXAMPLE}."
        )
    return _check_stage(rae.load_rae(settings.pipeline), settings)


def _open_optimise(settings: SampleSettings, backbone: Backbone) -> Inverter:
    if settings.parametrise == "pixels":
        return optimise.OptimiseInverter(backbone, n_steps=settings.steps or optimise.STEPS)
    vae = optimise.load_part(AutoencoderKL, settings.pipeline or optimise.PRIOR, "vae")
    return optimise.OptimiseInverter(backbone, vae, n_steps=settings.steps or optimise.STEPS)


def _open_guided(settings: SampleSettings, backbone: Backbone) -> Inverter:
    prior = settings.pipeline or optimise.PRIOR
    return guided.load_guided(backbone, prior, n_steps=settings.steps or guided.STEPS)


def _check_stage(inverter: Inverter, settings: SampleSettings) -> Inverter:
    if settings.stage not in (None, inverter.spec.layer):
        raise InputError(
            f"The inverter {settings.inverter!r} reads the layer {inverter.spec.layer!r} and no "
            f"other, but the stage {settings.stage!r} was asked for. Leave that out."
        )
    return inverter


KINDS = (
    Kind(modular.list_modular, lambda folder: (folder / modular.INDEX).is_file(), _open_modular),
    Kind(
        reconstructor.list_reconstructors,
        lambda folder: reconstructor.find_reconstructor(str(folder)) is not None,
        _open_reconstructor,
    ),
    Kind(lambda: [rae.NAME], lambda _folder: False, _open_rae, takes_pipeline=True),
    Kind(
        lambda: [guided.NAME],
        lambda _folder: False,
        _open_guided,
        takes_pipeline=True,
        takes=("backbone", "layer", "steps"),
    ),
    Kind(
        lambda: [optimise.NAME],
        lambda _folder: False,
        _open_optimise,
        takes_pipeline=True,
        takes=("backbone", "layer", "steps", "parametrise"),
    ),
)


def list_named() -> list[str]:
    """Returns the names of the inverters that are no diffusion pipelines, such as `siglip2`."""
    return sorted(name for kind in KINDS for name in kind.names())


def list_inverters() -> list[str]:
    """Returns all names that `load_inverter` takes: diffusion pipelines are called `tiny/…`."""
    return [*list_bundled(), *list_named()]


def name_inverter(settings: SampleSettings) -> SampleSettings:
    """Returns settings whose inverter is `diffusion` with a pipeline, or one of another kind.

    `inverter` may name a pipeline, such as `tiny/convnext`, a folder or a repository. A name that
    only one inverter could have is understood with and without `tiny/`. A deterministic inverter
    makes one sample.

    Raises:
        InputError: nothing of that name, or settings that the inverter does not have.
    """
    if settings.inverter == DIFFUSION:
        if settings.stage is not None:
            raise InputError(_stage_of_diffusion(settings, "the inverter is a diffusion pipeline"))
        if settings.parametrise == "pixels":
            raise InputError(
                "Only the inverter optimise changes pixels, but the inverter is a diffusion "
                "pipeline, got --parametrise pixels. Leave that out."
            )
        return replace(settings, pipeline=pipeline_name(settings))
    if (pipeline := _as_pipeline(settings.inverter)) is not None:
        if settings.stage is not None:
            what = f"{settings.inverter!r} means the diffusion pipeline {pipeline}"
            raise InputError(_stage_of_diffusion(settings, what))
        if settings.pipeline not in (None, pipeline):
            raise InputError(
                f"One pipeline must be named, got --inverter {settings.inverter} and --pipeline "
                f"{settings.pipeline}. Leave one of them out."
            )
        return name_inverter(replace(settings, inverter=DIFFUSION, pipeline=pipeline))
    settings = replace(settings, inverter=_bare_name(settings.inverter))
    kind = find_kind(settings.inverter)
    if not kind.takes_backbone:
        settings = replace(settings, n_samples=1)
    if settings.pipeline is not None and not kind.takes_pipeline:
        raise InputError(
            f"The inverter {settings.inverter!r} takes no pipeline, got {settings.pipeline!r}. "
            f"Leave that out, or use --inverter {DIFFUSION}."
        )
    _check_taken(settings, kind)
    return settings


def _stage_of_diffusion(settings: SampleSettings, what: str) -> str:
    both = ""
    name = (settings.pipeline or settings.inverter).removeprefix(BUNDLED)
    if name in modular.list_modular():
        both = f" The modular inverter is --inverter {name} --stage {settings.stage}."
    return f"Only modular inverters have stages, but {what}.{both} Leave --stage out otherwise."


def _as_pipeline(name: str) -> str | None:
    """Returns the diffusion pipeline that the name of an inverter means, if it means one."""
    if name in list_bundled():
        return name
    if BUNDLED + name in list_bundled() and name not in list_named():
        return BUNDLED + name
    folder = expand_path(name)
    if (folder / INDEX).is_file():
        return name
    is_ours = name.startswith(BUNDLED) or folder.exists()
    return name if REPO.fullmatch(name) and not is_ours else None


def _bare_name(name: str) -> str:
    bare = name.removeprefix(BUNDLED)
    return bare if bare in list_named() else name


def find_kind(name: str) -> Kind:
    """Returns the kind of a named inverter, or of the one in a folder.

    Raises:
        InputError: neither.
    """
    for kind in KINDS:
        if name in kind.names():
            return kind
    folder = expand_path(name)
    for kind in KINDS:
        if kind.holds(folder):
            return kind
    if class_name(folder) == rae.CLASS:
        raise InputError(
            f"An {rae.CLASS} is named by the pipeline: use --inverter {rae.NAME} --pipeline {name}."
        )
    hint = choices_hint(name, [DIFFUSION, *list_inverters()])
    raise InputError(
        "An inverter must be a name, or a folder or Hub repository of trained weights, but "
        f"{name!r} is none; {hint}"
    )


def pipeline_name(settings: SampleSettings) -> str:
    """Returns the pipeline that the settings mean: the one they name, or a bundled one.

    The bundled pipeline of an earlier layer is called after it, such as `tiny/convnext-stages.1`.

    Raises:
        InputError: no pipeline is named and none is bundled for the backbone, or the name is that
            of another kind of inverter.
    """
    if (given := settings.pipeline) is not None:
        bundled = BUNDLED + given
        if given not in list_bundled() and given.removeprefix(BUNDLED) in list_named():
            other = f" The diffusion pipeline is --pipeline {bundled}."
            raise InputError(
                f"A pipeline must be a diffusion pipeline, but {given!r} is another kind of "
                f"inverter: use --inverter {given.removeprefix(BUNDLED)}."
                + (other if bundled in list_bundled() else "")
            )
        return bundled if bundled in list_bundled() else given
    backbone = settings.backbone or DEFAULT_BACKBONE
    name = resolve_backbone(backbone).name
    of_layer = f"{name}-{settings.layer}"
    if of_layer in list_bundled():
        return of_layer
    if name not in list_bundled():
        raise InputError(
            f"No bundled pipeline inverts the backbone {backbone!r}; "
            f"{choices_hint(name, list_bundled())} For others pass a pipeline: a folder or a Hub "
            "repository."
        )
    return name


# ---- Deterministic inverters ---------------------------------------------------------------------


def _open_deterministic(settings: SampleSettings, device: torch.device) -> Inverter:
    inverter = find_kind(settings.inverter).open(settings)
    backbone = inverter.require_backbone()
    for name, own in (("backbone", inverter.spec.backbone), ("layer", inverter.spec.layer)):
        asked = getattr(settings, name)
        same = same_backbone if name == "backbone" else str.__eq__
        if asked is not None and not same(asked, own):
            raise InputError(
                f"The inverter {settings.inverter!r} reads the {name} {own!r}, but the {name} "
                f"{asked!r} was asked for. Leave that out."
            )
    for module in (*inverter.networks.values(), backbone):
        module.to(device)
    pipeline = settings.pipeline
    inverter.settings = replace(
        settings,
        inverter=_lasting_folder(settings.inverter, list_named()),
        pipeline=None if pipeline is None else _lasting_folder(pipeline, ()),
        stage=inverter.spec.layer,
        backbone=inverter.spec.backbone,
        layer=inverter.spec.layer,
        device=str(device),
    )
    return inverter


def _check_taken(settings: SampleSettings, kind: Kind) -> None:
    """Refuses settings that a kind does not have, and so would ignore.

    Resolved settings of a deterministic inverter, in which the backbone and the layer are its own,
    pass too.
    """
    default = {field.name: field.default for field in fields(settings)}
    names = [n for n in (*OF_DIFFUSION, "backbone", "layer", "parametrise") if n not in kind.takes]
    given = [name for name in names if getattr(settings, name) != default[name]]
    if kind.takes_backbone:
        given += ["stage"] if settings.stage is not None else []
        if settings.parametrise == "pixels" and settings.pipeline is not None:
            raise InputError(
                f"Pixels need no autoencoder, got --parametrise pixels and --pipeline "
                f"{settings.pipeline}. Leave one of them out."
            )
    is_resolved = settings.stage is not None and settings.layer == settings.stage
    if not given or (is_resolved and given == ["backbone", "layer"]):
        return
    why = "has its own backbone, draws no noise and computes in float32"
    if kind.takes_backbone:
        why = f"takes {_options(kind.takes)} and computes in float32"
    raise InputError(
        f"The inverter {settings.inverter!r} {why}, got {_options(given)}. Leave that out, or use "
        f"--inverter {DIFFUSION}."
    )


def _options(names: Collection[str]) -> str:
    return ", ".join("--" + name.replace("_", "-") for name in names)


# ---- Any backbone, by its gradients --------------------------------------------------------------


def _open_by_gradient(
    settings: SampleSettings, device: torch.device, backbone: Backbone | None
) -> Inverter:
    if backbone is None:
        name = settings.backbone or DEFAULT_BACKBONE
        backbone = load_backbone(name, settings.layer or LAST)
    elif settings.layer not in (None, backbone.spec.layer):
        raise InputError(
            f"The backbone that was given reads its layer {backbone.spec.layer!r}, but the layer "
            f"{settings.layer!r} was asked for. Leave that out."
        )
    inverter = find_kind(settings.inverter).open(settings, backbone.to(device))
    for module in inverter.networks.values():
        module.to(device)
    is_pixels = settings.parametrise == "pixels"
    prior = _lasting_folder(settings.pipeline or optimise.PRIOR, (optimise.PRIOR, *list_bundled()))
    assert isinstance(inverter, optimise.GradientInverter)
    inverter.settings = replace(
        settings,
        pipeline=None if is_pixels else prior,
        backbone=inverter.spec.backbone,
        layer=inverter.spec.layer,
        steps=inverter.n_steps,
        device=str(device),
    )
    return inverter


# ---- Diffusion -----------------------------------------------------------------------------------


def _open_diffusion(
    settings: SampleSettings, device: torch.device, backbone: Backbone | None
) -> DiffusionInverter:
    name = settings.pipeline
    assert name is not None
    pipeline = load_pipeline(name)
    spec = declared_spec(pipeline)
    _check_fits(name, spec, settings)
    settings = with_quality(settings, pipeline)
    _prepare(pipeline, settings, device)
    inverter = DiffusionInverter(
        pipeline,
        backbone=_backbone_for(pipeline, spec, settings, backbone, device),
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        guidance=settings.guidance,
        strength=settings.strength,
        refine=settings.refine or 0,
        refine_at=settings.refine_at or "end",
    )
    if settings.capture:
        pipeline.enable_capture()
    n_train = pipeline.scheduler.config["num_train_timesteps"]
    if inverter.num_inference_steps > n_train:
        raise InputError(
            f"There can be at most {n_train} steps, as many as the pipeline was trained with, got "
            f"{inverter.num_inference_steps}."
        )
    inverter.settings = replace(
        settings,
        pipeline=_lasting_folder(name, list_bundled()),
        backbone=spec.backbone,
        layer=spec.layer,
        steps=inverter.num_inference_steps,
        scheduler=scheduler_name(pipeline.scheduler),
        guidance_scale=inverter.guidance_scale,
        guidance=inverter.guidance,
        device=str(device),
    )
    return inverter


def _backbone_for(
    pipeline: FeatInvPipeline,
    spec: FeatureSpec,
    settings: SampleSettings,
    given: Backbone | None,
    device: torch.device,
) -> Backbone | None:
    """Returns the backbone that the user gives or names, else the pipeline's own (None)."""
    if given is None and settings.backbone is not None and FACTORY.fullmatch(settings.backbone):
        given = load_backbone(settings.backbone)
    if given is not None:
        spec.check_matches(given.spec)
        return given.to(device)
    if pipeline.backbone is not None:
        return None
    return load_named_backbone(spec.backbone, spec.layer).to(device)


def _check_fits(name: str, spec: FeatureSpec, settings: SampleSettings) -> None:
    asked, has = settings.backbone, spec.backbone
    if asked is not None and FACTORY.fullmatch(asked):
        return  # its features are compared with the pipeline's once they are known
    if asked is not None and not same_backbone(asked, has):
        raise InputError(
            f"The pipeline {name} inverts the backbone {has!r}, but the backbone "
            f"{resolve_backbone(asked).name!r} was asked for. Use the pipeline of that backbone, "
            "or leave the backbone out."
        )
    if settings.layer not in (None, spec.layer):
        raise InputError(
            f"The pipeline {name} inverts the layer {spec.layer!r} of {has}, but the layer "
            f"{settings.layer!r} was asked for. Use a pipeline that was trained for that layer."
        )


def _prepare(pipeline: FeatInvPipeline, settings: SampleSettings, device: torch.device) -> None:
    """Sets scheduler, device, dtype and attention; the backbone is left in float32."""
    if settings.scheduler is not None:
        pipeline.scheduler = make_scheduler(settings.scheduler, pipeline.scheduler.config)
    pipeline.to(device)
    dtype = getattr(torch, settings.dtype)
    for name, component in pipeline.components.items():
        # diffusers warns of any cast, also of one that changes nothing
        if isinstance(component, nn.Module) and name != "backbone" and component.dtype != dtype:
            component.to(dtype)
    if pipeline.unet.config["block_out_channels"][0] >= WIDE:
        lay_out_channels_last(pipeline)
    _set_attention(pipeline, settings.attention, device)
    pipeline.set_progress_bar_config(disable=True)


WIDE = 320
"""Channels of a UNet's first block from which channels_last pays, those of Stable Diffusion 1.x."""


def lay_out_channels_last(pipeline: FeatInvPipeline) -> None:
    """Puts the channels of UNet, ControlNet and autoencoder last in memory."""
    for part in (pipeline.unet, pipeline.controlnet, pipeline.vae):
        part.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def _set_attention(pipeline: FeatInvPipeline, attention: str, device: torch.device) -> None:
    """`native` needs nothing: it is what diffusers uses unless told otherwise."""
    if attention == "native":
        return
    if importlib.util.find_spec("xformers") is None:
        raise InputError(
            "The attention 'xformers' needs a package that is not installed: "
            "pip install 'featinv-diffusion[xformers]', or use 'native'."
        )
    if device.type != "cuda":
        raise InputError(
            f"The attention 'xformers' needs a CUDA device, but the device is {device}."
        )
    pipeline.enable_xformers_memory_efficient_attention()


def _lasting_folder(name: str, bundled: Collection[str]) -> str:
    """Makes the path of a folder absolute, so that a manifest can be replayed from anywhere."""
    folder = expand_path(name)
    return str(folder.absolute()) if name not in bundled and folder.is_dir() else name
