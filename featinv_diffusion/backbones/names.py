"""What the name of a backbone means: one word, one model, in every command and in Python."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, Literal

import timm

from featinv_diffusion import schema
from featinv_diffusion.errors import InputError, elsewhere_hint
from featinv_diffusion.files import expand_path
from featinv_diffusion.trust import FACTORY
from featinv_diffusion.types import FeatureSpec

logger = logging.getLogger(__name__)

ASSETS = Path(__file__).parents[1] / "assets"
FAMILY = "tiny/"
"""What the names of the bundled models begin with."""
PUBLISHED = {
    "convnext": "convnext_base.fb_in22k_ft_in1k",
    "resnet": "resnet50.tv_in1k",
    "swin": "swinv2_base_window12to24_192to384.ms_in22k_ft_in1k",
    "vit": "vit_base_patch16_224.augreg2_in21k_ft_in1k",
}
"""The timm ids of the papers' models that the bundled ones are named after."""


@dataclass(frozen=True)
class ResolvedName:
    """A backbone that a name means.

    Args:
        name: the canonical name, such as `tiny/convnext`, a timm id without `timm/`, or `hf/…`.
        source: what it is loaded by; bundled models are folders of transformers.
        target: a timm id, or a folder or Hub repository of transformers.
        checkpoint: file of weights for a timm id; None for those that timm publishes.
    """

    name: str
    source: Literal["bundled", "timm", "transformers"]
    target: str
    checkpoint: Path | None = None


def list_backbones() -> list[str]:
    """Returns the names of the bundled backbones, such as `tiny/convnext`.

    `load_backbone` also takes their short names (`convnext`), any timm id with or without `timm/`,
    alone or as `ID@FILE` with a file of weights, `hf/` followed by a folder or Hub repository of
    transformers, and `FILE.py:FUNCTION` with a function that returns a backbone.
    """
    found = ASSETS.glob(f"{FAMILY}*/backbone")
    return sorted(path.parent.relative_to(ASSETS).as_posix() for path in found)


def resolve_backbone(name: str) -> ResolvedName:
    """Returns the backbone that a user's name means; nothing is loaded or downloaded.

    A short name such as `convnext` means the bundled model, which is logged once.

    Raises:
        InputError: no backbone has this name; the nearest names are listed.
    """
    full = canonical_name(name)
    if full in list_backbones():
        if full != name:
            _tell_short_name(name, full)
        return ResolvedName(full, "bundled", str(ASSETS / full / "backbone"))
    if full.startswith("hf/"):
        return ResolvedName(full, "transformers", full.removeprefix("hf/"))
    timm_id, at, file = full.partition("@")
    if at:
        _check_timm_id(timm_id)
        path = expand_path(file).absolute()
        if not path.is_file():
            raise InputError(
                f"{full!r} names the weights of the timm model {timm_id!r} after the @, but no "
                f"file is at {path}."
            )
        return ResolvedName(f"{timm_id}@{path}", "timm", timm_id, path)
    if FACTORY.fullmatch(full):
        raise InputError(
            f"The backbone {full!r} is made by code, which runs only where a user names it: give "
            "it as --backbone, or to load_backbone and load_inverter(backbone=…)."
        )
    _check_timm_id(full)
    return ResolvedName(full, "timm", full)


def canonical_name(name: str) -> str:
    """Returns the name under which a backbone is recorded; an unknown name is returned as it is."""
    bundled = FAMILY + name
    return bundled if bundled in list_backbones() else name.removeprefix("timm/")


def same_backbone(one: str, other: str) -> bool:
    """Whether two names mean the same backbone."""
    return canonical_name(one) == canonical_name(other)


def recorded_name(name: str) -> str:
    """Returns the canonical name of a backbone that a file names.

    Files that were written before short names meant the bundled models say `convnext` for the
    paper's model; files that are written now never hold a short name.
    """
    return PUBLISHED.get(name, canonical_name(name))


def read_spec(
    fields: Mapping[str, Any], source: str = "the description of the features"
) -> FeatureSpec:
    """Reads a `FeatureSpec` from the fields that a file holds.

    Raises:
        InputError: fields that are missing, unknown or of another type.
    """
    known = [field.name for field in dataclasses.fields(FeatureSpec)]
    if isinstance(fields, Mapping) and (odd := sorted(map(str, fields.keys() - set(known)))):
        raise InputError(f"In {source}: {odd[0]!r} is none of {', '.join(known)}.")
    spec: FeatureSpec = schema.convert(fields, FeatureSpec, source)
    return replace(spec, backbone=recorded_name(spec.backbone))


@cache
def _tell_short_name(name: str, full: str) -> None:
    """Says once in a process what a short name means."""
    paper = f"; the paper's model is the timm id {PUBLISHED[name]}" if name in PUBLISHED else ""
    logger.warning("%r means the bundled %s%s.", name, full, paper)


def _check_timm_id(name: str) -> None:
    """Raises `InputError` unless timm has this model and this tag of weights."""
    stem, _, tag = name.partition(".")
    tagged = timm.list_pretrained(f"{stem}.*")
    if timm.is_model(stem) and (not tag or name in tagged):
        return
    bundled = list_backbones()
    prefix = "" if name.startswith(FAMILY) else FAMILY  # short names, unless a full one was tried
    ours = [full.removeprefix(prefix) for full in bundled]
    names = [*ours, *timm.list_models(), *timm.list_pretrained()]
    near = (tag and tagged) or get_close_matches(name, names, n=4, cutoff=0.5)
    if "/" in name and not name.startswith(FAMILY):
        near = [f"hf/{name}"]
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    hint = elsewhere_hint(name) or hint
    raise InputError(
        f"No backbone is named {name!r}; {hint}A backbone is one of {', '.join(bundled)}, a timm "
        "id, or hf/ followed by a folder or Hub repository of transformers."
    )
