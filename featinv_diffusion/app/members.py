"""The inverters that the page offers, and one that is opened once for all qualities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from featinv_diffusion.diffusion.folders import (
    ASSETS,
    BACKBONE,
    DEFAULTS,
    bundled_folder,
    is_complete,
    list_bundled,
)
from featinv_diffusion.errors import InputError, choices_hint
from featinv_diffusion.inverters import modular, reconstructor
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.inverters.diffusion import DiffusionInverter
from featinv_diffusion.inverters.open import BUNDLED, load_inverter
from featinv_diffusion.inverters.quality import with_quality
from featinv_diffusion.schema import read_json
from featinv_diffusion.types import FeatureSpec

AT = "@"


@dataclass(frozen=True)
class Member:
    """An inverter by name.

    Args:
        name: what a state calls it: that of `load_inverter`, with `@STAGE` of a modular one.
        family: members of one family read layers of one model, the earliest first.
        layer: the layer, as the slider of the family shows it.
    """

    name: str
    family: str
    layer: str

    @property
    def inverter(self) -> str:
        """The name that `load_inverter` takes."""
        return self.name.partition(AT)[0] if self.stage else self.name

    @property
    def stage(self) -> str | None:
        """The stage of a modular inverter."""
        return self.layer if self.name.endswith(AT + self.layer) else None

    def to_content(self) -> dict[str, Any]:
        """Returns plain values."""
        return asdict(self)


def list_members(pipelines: Sequence[str] = ()) -> list[Member]:
    """Returns the given pipelines, or else the bundled family: members that need no optimisation.

    Raises:
        InputError: a pipeline is named twice.
    """
    if pipelines:
        if len(set(pipelines)) < len(pipelines):
            raise InputError(f"Each pipeline must be named once, got {', '.join(pipelines)}.")
        return [Member(name, name, "last") for name in pipelines]
    members = [_bundled(name) for name in filter(is_complete, list_bundled())]
    members.sort(key=lambda one: (one.family != "tiny/convnext", one.family, _depth(one.layer)))
    for name in modular.list_modular():
        index = ASSETS / BUNDLED / name / "inverter" / modular.INDEX
        stages = read_json(index, dict[str, Any])["stages"]
        members += [Member(f"{name}{AT}{stage}", f"{name} by modules", stage) for stage in stages]
    members += [Member(name, name, "last") for name in reconstructor.list_reconstructors()]
    return members


def find_member(name: str, members: Sequence[Member]) -> Member:
    """Returns the member of a name.

    Raises:
        InputError: none is called so; nothing else can be opened from a page.
    """
    for member in members:
        if member.name == name:
            return member
    hint = choices_hint(name, [member.name for member in members])
    raise InputError(f"The page was started without an inverter {name!r}; {hint}")


def open_member(member: Member, device: str) -> Inverter:
    """Opens a member at its standard quality."""
    return load_inverter(member.inverter, stage=member.stage, device=device)


def at_quality(inverter: Inverter, quality: str) -> Inverter:
    """Returns what `load_inverter(…, quality=…)` opens, which shares the weights of this one.

    Deterministic inverters have one quality, and are returned as they are.
    """
    settings = inverter.settings
    if not isinstance(inverter, DiffusionInverter) or settings is None:
        return inverter
    wanted = with_quality(
        replace(settings, quality=quality, steps=None, refine=None, refine_at=None),
        inverter.pipeline,
    )
    opened = DiffusionInverter(
        inverter.pipeline,
        backbone=inverter.backbone,
        num_inference_steps=wanted.steps,
        guidance_scale=inverter.guidance_scale,
        guidance=inverter.guidance,
        strength=inverter.strength,
        refine=wanted.refine or 0,
        refine_at=wanted.refine_at or "end",
    )
    opened.settings = replace(wanted, steps=opened.num_inference_steps)
    return opened


def has_places(spec: FeatureSpec) -> bool:
    """Whether cells of the map are places of the picture; a sequence is a map of one column."""
    return spec.grid[1] > 1 or spec.grid[0] == 1


def _bundled(name: str) -> Member:
    owner = read_json(bundled_folder(name) / DEFAULTS, dict[str, Any]).get(BACKBONE)
    family = f"{name.partition('/')[0]}/{owner}" if owner else name
    return Member(name, family, name.removeprefix(family).removeprefix("-") or "last")


def _depth(layer: str) -> tuple[int, str]:
    return {"last": 1, "pooled": 2}.get(layer, 0), layer
