"""Modular inverters: the inverse modules of a model by the stage that each reads, and the model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from featinv_diffusion import schema
from featinv_diffusion.backbones import Backbone, load_named_backbone
from featinv_diffusion.backbones.names import recorded_name
from featinv_diffusion.diffusion.folders import load_network
from featinv_diffusion.errors import InputError, choices_hint
from featinv_diffusion.files import write_text
from featinv_diffusion.inverters.blocks import ConvInverse, InverseModule
from featinv_diffusion.inverters.chain import Chain, check_joint
from featinv_diffusion.inverters.detr import (
    ASSETS,
    DETECTOR,
    PUBLISHED_SIZE,
    DecoderInverse,
    DetrPath,
    EncoderInverse,
    HeadInverse,
    load_detr,
)
from featinv_diffusion.inverters.path import ClassifierPath, ForwardPath
from featinv_diffusion.inverters.swin import SwinInverse, SwinPath
from featinv_diffusion.inverters.vit import AnalyticPatchInverse, BlocksInverse, VitPath

INDEX = "inverter.json"
TUNING = "tuning.json"
"""File beside an inverter that was tuned end to end, with its λ as `reconstruction_weight`."""
FAMILY, FOLDER = "tiny", "inverter"
"""A bundled inverter lies in `assets/tiny/NAME/inverter`."""
PATHS: dict[str, type[ClassifierPath]] = {"vit": VitPath, "swin": SwinPath}
"""The families of classifiers; a DeiT is a ViT with one token more."""
FAMILIES = ("detr", *PATHS)
MODULES: dict[str, type[InverseModule]] = {
    cls.__name__: cls
    for cls in (
        ConvInverse,
        EncoderInverse,
        DecoderInverse,
        HeadInverse,
        BlocksInverse,
        SwinInverse,
        AnalyticPatchInverse,
    )
}
"""The classes of modules, by the name in the config of a saved one."""


@dataclass(frozen=True)
class PathInfo:
    """How to load the forward path again.

    Args:
        family: one of `FAMILIES`.
        model: name for `load_detr` or `load_backbone`.
        input_size: (h, w) to which images are resized for DETR; None for the others.
    """

    family: str
    model: str
    input_size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            hint = choices_hint(self.family, list(FAMILIES))
            raise InputError(f"No family of models is named {self.family!r}; {hint}")


class InverseSet(nn.Module):
    """Inverse modules of one model, by the stage that each reads.

    Args:
        modules: the modules by stage.
        info: the model that they undo.

    Raises:
        InputError: a module under the name of another stage than it reads, or one that writes
            another stage than the next module reads.
    """

    def __init__(self, modules: Mapping[str, InverseModule], info: PathInfo):
        super().__init__()
        for stage, module in modules.items():
            if module.reads.layer != stage:
                raise InputError(f"The module of stage {stage!r} reads a {module.reads}.")
            if module.writes.layer in modules:
                check_joint(module.writes, modules[module.writes.layer].reads)
        self.info = info
        self._stages = list(modules)
        for stage, module in modules.items():
            self.add_module(_key(stage), module)

    @property
    def stages(self) -> list[str]:
        """The stages that have an inverse."""
        return list(self._stages)

    def __getitem__(self, stage: str) -> InverseModule:
        if stage not in self._stages:
            hint = choices_hint(stage, self._stages)
            raise InputError(f"There is no inverse of stage {stage!r}; {hint}")
        module = self.get_submodule(_key(stage))
        assert isinstance(module, InverseModule)
        return module

    def forward(self, embeddings: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "b ..."]]:
        """Returns what each module writes, given the true embedding of its stage."""
        return {stage: self[stage](embeddings[stage]) for stage in self._stages}

    def chain(self, stage: str, path: ForwardPath | None = None) -> Chain:
        """Returns the modules from a stage to the image.

        Raises:
            InputError: a stage on the way has no module.
        """
        modules = [self[stage]]
        while not modules[-1].writes_image:
            modules.append(self[modules[-1].writes.layer])
        return Chain(modules, path)

    def chainable(self) -> list[str]:
        """Returns the stages from which modules lead to the image."""
        return [stage for stage in self._stages if self._reaches_image(stage)]

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes a folder per module (config and safetensors) and an index."""
        folder = Path(folder)
        for stage in self._stages:
            self[stage].save_pretrained(folder / stage)
        index = {
            "family": self.info.family,
            "model": self.info.model,
            "input_size": self.info.input_size and list(self.info.input_size),
            "stages": self._stages,
        }
        write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> InverseSet:
        """Reads what `save_pretrained` wrote, in float32, in evaluation mode.

        Raises:
            InputError: no such folder, or missing files.
        """
        folder = Path(folder)
        try:
            index: _Index = schema.read_json(folder / INDEX, _Index)
            modules = {stage: _load_module(folder / stage) for stage in index.stages}
            info = PathInfo(index.family, recorded_name(index.model), index.input_size)
        except (OSError, KeyError, ValueError) as error:
            raise InputError(
                f"{folder} must hold a modular inverter ({INDEX} and a folder per stage), but it "
                f"could not be read: {str(error).splitlines()[0]}"
            ) from error
        return cls(modules, info).eval()

    def _reaches_image(self, stage: str) -> bool:
        if stage not in self._stages:
            return False
        return self[stage].writes_image or self._reaches_image(self[stage].writes.layer)


@dataclass(frozen=True)
class _Index:
    """The schema of the file that lists the modules."""

    stages: list[str]
    family: str
    model: str
    input_size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if odd := [name for name in self.stages if not re.fullmatch(r"\w+(\.\w+)*", name)]:
            raise InputError(f"stages must be names of folders, got {odd[0]!r}")


@dataclass(frozen=True, eq=False)
class ModularInverter:
    """Inverse modules with the model that they undo."""

    inverses: InverseSet
    path: ForwardPath

    def chain(self, stage: str | None = None) -> Chain:
        """Returns the modules from a stage, or from the family's default one, to the image."""
        return self.inverses.chain(stage or self.path.default_stage, self.path)


def list_modular() -> list[str]:
    """Returns the names of the bundled modular inverters, such as `vit`."""
    return sorted(path.parents[1].name for path in ASSETS.glob(f"{FAMILY}/*/{FOLDER}/{INDEX}"))


def load_modular(name: str) -> ModularInverter:
    """Loads a bundled inverter by its name, or one from a folder, with its model.

    End-to-end fine-tuning writes a detector beside the folder, which is then the model.

    Raises:
        InputError: no such inverter, or a model that cannot be loaded.
    """
    folder = ASSETS / FAMILY / name / FOLDER if name in list_modular() else Path(name).expanduser()
    if not (folder / INDEX).is_file():
        hint = choices_hint(name, list_modular())
        raise InputError(
            f"A modular inverter must be a name or a folder of trained modules, got {name!r}; "
            f"{hint}"
        )
    inverses = InverseSet.from_pretrained(folder)
    tuned = folder.parent / DETECTOR
    if inverses.info.family == "detr" and tuned.is_dir():
        return ModularInverter(inverses, _detr_path(inverses.info, str(tuned)))
    return ModularInverter(inverses, load_path(inverses.info))


def load_path(info: PathInfo) -> ForwardPath:
    """Loads the model that an inverter undoes.

    Raises:
        InputError: a model that cannot be loaded, or of another family.
    """
    if info.family == "detr":
        return _detr_path(info, info.model)
    return classifier_path(load_named_backbone(info.model), info.family)


def _detr_path(info: PathInfo, source: str) -> DetrPath:
    size = info.input_size or PUBLISHED_SIZE
    return DetrPath(load_detr(source), name=info.model, input_size=size)


def classifier_path(backbone: Backbone, family: str) -> ClassifierPath:
    """Returns the forward path of a backbone of a family of `PATHS`.

    Raises:
        InputError: a model of another family.
    """
    return PATHS[family](
        backbone.model,
        name=backbone.name,
        preprocessing=backbone.preprocessing,
        labels=backbone.labels,
    )


def _load_module(folder: Path) -> InverseModule:
    config: Any = InverseModule.load_config(folder)
    module_class = MODULES.get(config["_class_name"])
    if module_class is None:
        hint = choices_hint(config["_class_name"], list(MODULES))
        raise ValueError(f"No inverse module is a {config['_class_name']!r}; {hint}")
    return load_network(module_class, folder, wanted="an inverse module")


def _key(stage: str) -> str:
    return stage.replace(".", "_")
