"""Packs trained pipelines into a family folder, as float16, the base shared by all members."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from torch import nn
from transformers import TimmWrapperForImageClassification

from featinv_diffusion.backbones.base import without_progress_bars
from featinv_diffusion.diffusion.featinv_controlnet import FeatureControlNet
from featinv_diffusion.diffusion.featinv_pipeline import FeatInvPipeline, tidy_saved_folder
from featinv_diffusion.diffusion.folders import (
    BACKBONE,
    BASE,
    BASE_MODELS,
    CERTAINTY_FILE,
    CONTROLNET,
    DEFAULTS,
    ENCODER,
    PUBLIC_BACKBONE,
    SCOPE_FILE,
    TRUNK,
    CardInfo,
    load_on_trunk,
    read_json,
    write_model_card,
)
from featinv_diffusion.errors import InputError
from featinv_diffusion.files import new_folder, write_text

MAX_FILE_MB = 16
SHARD_SIZE = "15MB"
NOTE = """\
## Where it is

In the package featinv-diffusion: `load_pipeline("{name}")` loads it there, and
`featinv export {folder} --pipeline {name}` writes the folder used above."""


def write_bundled(
    pipeline: FeatInvPipeline,
    family: str | Path,
    name: str,
    info: CardInfo,
    *,
    replace_base: bool = False,
    trunk: str | None = None,
    public_backbone: str | None = None,
) -> Path:
    """Packs a trained pipeline as member `name` of a family folder and returns the member's folder.

    An older member of that name is replaced; its statistics of natural maps stay where its weights
    are the same. The base is written with the first member. Where the ControlNet declares the
    features of another member, `tiny/convnext` for a family `tiny`, the backbone of that one is
    referred to.

    Args:
        family: e.g. `featinv_diffusion/assets/tiny`.
        replace_base: write the base anew, which breaks members that were trained on another.
        trunk: a member whose ControlNet this one was trained from; what it has too is not stored.
        public_backbone: timm id of the backbone, whose weights come from another package.

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
        replace_folder(
            base, lambda f: stable_diffusion.save_pretrained(f, max_shard_size=SHARD_SIZE)
        )
    else:
        _check_same_base(pipeline, base)

    def write(folder: Path) -> None:
        controlnet = to_half(pipeline.controlnet)
        if trunk is None:
            controlnet.save_pretrained(folder / CONTROLNET, max_shard_size=SHARD_SIZE)
        else:
            write_on_trunk(controlnet, folder / CONTROLNET, family / trunk / CONTROLNET)
        defaults = {k: v for k, v in pipeline.parameters.items() if v is not None}
        if trunk is not None:
            defaults[TRUNK] = trunk
        if public_backbone is not None:
            defaults[PUBLIC_BACKBONE] = public_backbone
        elif owner == name:
            to_half(pipeline.backbone).save_pretrained(folder / BACKBONE, max_shard_size=SHARD_SIZE)
        else:
            defaults[BACKBONE] = owner
        write_text(folder / DEFAULTS, json.dumps(defaults, indent=2, sort_keys=True) + "\n")
        where = NOTE.format(name=f"{family.name}/{name}", folder=f"{family.name}-{name}")
        if _is_same_member(pipeline, family / owner / BACKBONE, member, trunk, public_backbone):
            for file in (SCOPE_FILE, CERTAINTY_FILE):
                if (member / file).is_file():
                    shutil.copyfile(member / file, folder / file)
        card = replace(info, notes=f"{where}\n\n{info.notes}")
        write_model_card(folder, pipeline, card, f"{family.name}-{name}")

    replace_folder(member, write)
    return member


def write_on_trunk(controlnet: Any, folder: Path, trunk: Path) -> None:
    """Writes the config of a float16 ControlNet, and the weights that its trunk does not hold."""
    whole = to_half(FeatureControlNet.from_pretrained(trunk)).state_dict()
    own = {
        name: value.contiguous()
        for name, value in controlnet.state_dict().items()
        if name.startswith(ENCODER) or not torch.equal(value, whole[name])
    }
    controlnet.save_config(folder)
    save_file(own, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})


def write_bundled_backbone(
    backbone: TimmWrapperForImageClassification, family: str | Path, name: str, card: str
) -> Path:
    """Packs a classifier alone as `name` of a family folder, with `card` as its README."""
    member = Path(family) / name

    def write(folder: Path) -> None:
        to_half(backbone).save_pretrained(folder / BACKBONE, max_shard_size=SHARD_SIZE)
        write_text(folder / "README.md", card)

    replace_folder(member, write)
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


def _is_same_member(
    pipeline: FeatInvPipeline,
    backbone: Path,
    member: Path,
    trunk: str | None,
    public_backbone: str | None,
) -> bool:
    """Whether the statistics beside the member there hold for this pipeline."""
    if not any((member / file).is_file() for file in (SCOPE_FILE, CERTAINTY_FILE)):
        return False
    if trunk is None:
        same = _holds(member / CONTROLNET, pipeline.controlnet)
    else:
        stored = load_on_trunk(member / CONTROLNET, member.parent / trunk / CONTROLNET)
        same = _equal(to_half(pipeline.controlnet), stored.half())
    if public_backbone is None:
        return same and _holds(backbone, pipeline.backbone)
    return same and read_json(member / DEFAULTS).get(PUBLIC_BACKBONE) == public_backbone


def _holds(folder: Path, model: Any) -> bool:
    """Whether the folder stores this model, up to float16."""
    return _equal(to_half(model), type(model).from_pretrained(folder).half())


def _equal(one: nn.Module, other: nn.Module) -> bool:
    wanted, stored = one.state_dict(), other.state_dict()
    return wanted.keys() == stored.keys() and all(
        torch.equal(wanted[key], stored[key]) for key in wanted
    )


def replace_folder(target: Path, write: Callable[[Path], Any]) -> None:
    """Writes a folder beside `target`, checks it, and puts it in place of `target`.

    Raises:
        InputError: a file is larger than what may be bundled.
    """
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
