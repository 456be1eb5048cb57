"""What decides the pictures of a sampling run, and the inverter that these settings mean."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from featinv_diffusion.backbones import load_backbone, resolve_backbone, same_backbone
from featinv_diffusion.diffusion.featinv_pipeline import GUIDANCE, FeatInvPipeline
from featinv_diffusion.diffusion.folders import without_progress_bars
from featinv_diffusion.diffusion.hub import list_bundled, load_pipeline
from featinv_diffusion.diffusion.objective import SCHEDULERS, make_scheduler, scheduler_name
from featinv_diffusion.errors import InputError, choices_hint
from featinv_diffusion.inverters import modular, rae, reconstructor
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.inverters.chain import MapChain
from featinv_diffusion.inverters.diffusion import DiffusionInverter, declared_spec
from featinv_diffusion.inverters.folders import class_name, expand_path
from featinv_diffusion.types import FeatureSpec

# ---- The deterministic inverters by name or folder: one table, one way to open any of them -------

DIFFUSION = "diffusion"
"""The one inverter that is not deterministic, and not opened here."""


@runtime_checkable
class DeterministicInverter(Inverter, Protocol):
    """An inverter without noise: one picture for a map."""

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The weights that decide its pictures, beside the backbone's."""
        ...


@dataclass(frozen=True)
class Source:
    """What a user says of a deterministic inverter.

    Args:
        name: a name of `list_inverters`, or a folder.
        stage: of a modular inverter; of others it can only be their own layer.
        pipeline: folder or Hub repository, of inverters whose kind `takes_pipeline`.
        on_progress: called after each batch with its number of images.
    """

    name: str
    stage: str | None = None
    pipeline: str | None = None
    on_progress: Callable[[float], None] | None = None


@dataclass(frozen=True)
class Kind:
    """A kind of deterministic inverter.

    Args:
        names: what is bundled, or the names that always mean this kind.
        holds: whether a folder holds one.
        open: loads one.
        takes_pipeline: whether its weights are named by `Source.pipeline`.
    """

    names: Callable[[], list[str]]
    holds: Callable[[Path], bool]
    open: Callable[[Source], DeterministicInverter]
    takes_pipeline: bool = False


def _open_modular(source: Source) -> MapChain:
    chain = modular.load_modular(source.name).chain(source.stage)
    return MapChain(chain, source.on_progress)


def _open_reconstructor(source: Source) -> DeterministicInverter:
    inverter = reconstructor.load_reconstructor(source.name, source.on_progress)
    return _check_stage(inverter, source)


def _open_rae(source: Source) -> DeterministicInverter:
    if source.pipeline is None:
        raise InputError(
            f"The inverter {source.name!r} must be told its weights: give --pipeline with a folder "
            f"or a Hub repository, such as {rae.EXAMPLE}."
        )
    return _check_stage(rae.load_rae(source.pipeline, source.on_progress), source)


def _check_stage(inverter: DeterministicInverter, source: Source) -> DeterministicInverter:
    if source.stage not in (None, inverter.spec.layer):
        raise InputError(
            f"The inverter {source.name!r} reads the layer {inverter.spec.layer!r} and no other, "
            f"but the stage {source.stage!r} was asked for. Leave that out."
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
)


def list_inverters() -> list[str]:
    """Returns the names of all deterministic inverters."""
    return sorted(name for kind in KINDS for name in kind.names())


def find_kind(name: str) -> Kind:
    """Returns the kind of a named inverter, or of the one in a folder.

    Raises:
        InputError: neither; an autoencoder is told by `Source.pipeline`.
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
        f"An inverter must be a name or a folder of trained modules, but {name!r} is none; {hint}"
    )


def open_deterministic(source: Source) -> DeterministicInverter:
    """Opens the inverter that a name or folder means, on the CPU, with its backbone.

    Raises:
        InputError: nothing of that name, files that cannot be read, a stage that it does not have,
            a pipeline that it does not take.
    """
    kind = find_kind(source.name)
    if source.pipeline is not None and not kind.takes_pipeline:
        raise InputError(
            f"The inverter {source.name!r} takes no pipeline, but {source.pipeline!r} came. Leave "
            f"that out, or use --inverter {DIFFUSION}."
        )
    return kind.open(source)


DEFAULT_BACKBONE = "tiny/convnext"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CHOICES: dict[str, Collection[str]] = {
    "scheduler": SCHEDULERS,
    "guidance": GUIDANCE,
    "attention": ("native", "xformers"),
    "dtype": DTYPES,
}
OF_DIFFUSION = (
    "steps",
    "scheduler",
    "guidance_scale",
    "guidance",
    "strength",
    "attention",
    "dtype",
)
"""Settings that only the diffusion inverter has."""


@dataclass(frozen=True)
class SampleSettings:
    """Everything that decides the pictures; a manifest records it.

    Args:
        pipeline: bundled name, folder or Hub repo; None is the bundled one of `backbone`. Of the
            inverter `rae`, the folder or Hub repo of its autoencoder.
        backbone: must be the pipeline's; None takes it, or `tiny/convnext` without a pipeline.
        layer: must be the pipeline's; None takes it.
        steps, guidance_scale, guidance: see `DiffusionInverter`; None is the pipeline's default.
        scheduler: a name of `schedulers.SCHEDULERS`; None is the pipeline's own.
        batch_size: samples per batch; it decides the last bits of the pictures.
        attention: `native` is PyTorch's scaled dot product, `xformers` needs that extra.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps` …
        dtype: of the diffusion model; the backbone always computes in float32.
        inverter: `diffusion`, or a deterministic inverter: a name of `list_inverters`, or a folder
            of a modular inverter or a reconstructor.
        stage: of a modular inverter; None is its default one. Others have their own layer only.
    """

    pipeline: str | None = None
    backbone: str | None = None
    layer: str | None = None
    n_samples: int = 4
    seed: int = 0
    steps: int | None = None
    scheduler: str | None = None
    guidance_scale: float | None = None
    guidance: str | None = None
    strength: float = 1.0
    batch_size: int = 8
    attention: str = "native"
    device: str = "auto"
    dtype: str = "float32"
    inverter: str = DIFFUSION
    stage: str | None = None

    def __post_init__(self) -> None:
        for name in ("n_samples", "batch_size", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, but {value} came.")
        for name in ("guidance_scale", "strength"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise InputError(f"{name} must be a finite number, but {value} came.")
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in choices:
                hint = choices_hint(value, list(choices))
                raise InputError(f"No {name} is named {value!r}; {hint}")
        for path in (self.inverter, self.pipeline or ""):
            expand_path(path)  # refuses the home folder of nobody
        if self.inverter == DIFFUSION and self.stage is not None:
            raise InputError("--stage is of a modular inverter; name one with --inverter.")
        if self.inverter != DIFFUSION:
            _check_deterministic(self)


def choose_inverter(settings: SampleSettings, inverter: str, stage: str | None) -> SampleSettings:
    """Returns the settings of an inverter; samples of a deterministic one would all be the same."""
    n_samples = settings.n_samples if inverter == DIFFUSION else 1
    return replace(settings, inverter=inverter, stage=stage, n_samples=n_samples)


def open_chosen(
    settings: SampleSettings, on_progress: Callable[[float], None] | None = None
) -> tuple[Inverter, SampleSettings]:
    """As `open_inverter`, of whichever kind the settings name.

    In the resolved settings of a deterministic inverter backbone, layer and stage are its own.

    Raises:
        InputError: as `open_inverter` and `open_deterministic`, or settings with the backbone and
            layer of another inverter.
    """
    if settings.inverter == DIFFUSION:
        return open_inverter(settings, on_progress)
    device = find_device(settings.device)
    source = Source(settings.inverter, settings.stage, settings.pipeline, on_progress)
    with without_progress_bars():
        inverter = open_deterministic(source)
    assert inverter.backbone is not None
    _check_own(inverter.spec, settings)
    for module in (*inverter.networks.values(), inverter.backbone):
        module.to(device)
    pipeline = settings.pipeline
    resolved = replace(
        settings,
        inverter=_lasting_folder(settings.inverter, list_inverters()),
        pipeline=None if pipeline is None else _lasting_folder(pipeline, ()),
        stage=inverter.spec.layer,
        backbone=inverter.spec.backbone,
        layer=inverter.spec.layer,
        device=str(device),
    )
    return inverter, resolved


def open_inverter(
    settings: SampleSettings, on_progress: Callable[[float], None] | None = None
) -> tuple[DiffusionInverter, SampleSettings]:
    """Loads the pipeline and returns it as an inverter with a backbone, and the settings resolved.

    In the resolved settings nothing is None or `auto`, but for the stage, which deterministic
    inverters have, and a scheduler that has no name here.

    Raises:
        InputError: unknown names, a device that is not there, a pipeline of another backbone or
            layer than asked for.
    """
    device = find_device(settings.device)
    name = pipeline_name(settings)
    pipeline = load_pipeline(name)
    spec = declared_spec(pipeline)
    _check_fits(name, spec, settings)
    _prepare(pipeline, settings, device)
    inverter = DiffusionInverter(
        pipeline,
        backbone=None if pipeline.backbone else load_backbone(spec.backbone, spec.layer).to(device),
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        guidance=settings.guidance,
        strength=settings.strength,
        on_progress=on_progress,
    )
    _check_steps(inverter)
    resolved = replace(
        settings,
        pipeline=_lasting_name(name),
        backbone=spec.backbone,
        layer=spec.layer,
        steps=inverter.num_inference_steps,
        scheduler=scheduler_name(pipeline.scheduler),
        guidance_scale=inverter.guidance_scale,
        guidance=inverter.guidance,
        device=str(device),
    )
    return inverter, resolved


def pipeline_name(settings: SampleSettings) -> str:
    """Returns the pipeline that the settings mean: the one they name, or a bundled one.

    The bundled one of an earlier layer is called after it, such as `tiny/convnext-stages.1`.

    Raises:
        InputError: no pipeline is named and none is bundled for the backbone.
    """
    if settings.pipeline is not None:
        return settings.pipeline
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


def find_device(name: str) -> torch.device:
    """Returns the device; `auto` is the GPU where there is one.

    Raises:
        InputError: no such device on this machine.
    """
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"The device {name!r} cannot be used here: {reason}") from None
    return device


def _check_fits(name: str, spec: FeatureSpec, settings: SampleSettings) -> None:
    asked, has = settings.backbone, spec.backbone
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


def _check_steps(inverter: DiffusionInverter) -> None:
    n_train = inverter.pipeline.scheduler.config["num_train_timesteps"]
    if inverter.num_inference_steps > n_train:
        raise InputError(
            f"There can be at most {n_train} steps, as many as the pipeline was trained with, but "
            f"{inverter.num_inference_steps} came."
        )


def _prepare(pipeline: FeatInvPipeline, settings: SampleSettings, device: torch.device) -> None:
    """Sets scheduler, device, dtype and attention; the backbone is left in float32."""
    if settings.scheduler is not None:
        pipeline.scheduler = make_scheduler(settings.scheduler, pipeline.scheduler.config)
    pipeline.to(device)
    dtype = DTYPES[settings.dtype]
    for name, component in pipeline.components.items():
        # diffusers warns of any cast, also of one that changes nothing
        if isinstance(component, nn.Module) and name != "backbone" and component.dtype != dtype:
            component.to(dtype)
    _set_attention(pipeline, settings.attention, device)
    pipeline.set_progress_bar_config(disable=True)


def _lasting_name(name: str) -> str:
    """Makes the path of a folder absolute, so that a manifest can be replayed from anywhere."""
    return _lasting_folder(name, list_bundled())


def _lasting_folder(name: str, bundled: Collection[str]) -> str:
    folder = expand_path(name)
    return str(folder.absolute()) if name not in bundled and folder.is_dir() else name


def _check_deterministic(settings: SampleSettings) -> None:
    """A deterministic inverter implies its backbone, draws no noise and computes in float32.

    Resolved settings, in which the backbone and the layer are the inverter's own, pass too.
    """
    default = {field.name: field.default for field in fields(settings)}
    names = (*OF_DIFFUSION, "backbone", "layer")
    given = [name for name in names if getattr(settings, name) != default[name]]
    is_resolved = settings.stage is not None and settings.layer == settings.stage
    if given and not (is_resolved and given == ["backbone", "layer"]):
        options = ", ".join("--" + name.replace("_", "-") for name in given)
        raise InputError(
            f"The inverter {settings.inverter!r} has its own backbone, draws no noise and computes "
            f"in float32, but {options} came. Leave that out, or use --inverter diffusion."
        )


def _check_own(spec: FeatureSpec, settings: SampleSettings) -> None:
    """Of a deterministic inverter that is open: what was given must be its own."""
    for name, own in (("backbone", spec.backbone), ("layer", spec.layer)):
        asked = getattr(settings, name)
        same = same_backbone if name == "backbone" else str.__eq__
        if asked is not None and not same(asked, own):
            raise InputError(
                f"The inverter {settings.inverter!r} reads the {name} {own!r}, but the {name} "
                f"{asked!r} was asked for. Leave that out."
            )


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
