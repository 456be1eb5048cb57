"""Which encoders are compared, on which images, and the inverters that turn them back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import PurePath
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from featinv_diffusion.backbones import Backbone
from featinv_diffusion.data import to_images
from featinv_diffusion.errors import InputError
from featinv_diffusion.evaluation.evaluator import noise_of
from featinv_diffusion.evaluation.observers import finite_rows, to_pixels
from featinv_diffusion.evaluation.selection import Item
from featinv_diffusion.evaluation.settings import EvaluationSettings
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.inverters.folders import expand_path
from featinv_diffusion.sampling import SampleSettings, open_chosen
from featinv_diffusion.types import Images


@dataclass(frozen=True)
class EncoderSettings:
    """What is compared, on which images.

    Args:
        inverters: names or folders as of `--inverter`, each perhaps with a stage and a pipeline:
            NAME, NAME@STAGE, NAME:PIPELINE (see `parse_inverter`).
        scorers: backbones that measure similarity; none takes a bundled classifier.
        grey: measure similarity without colour too.
        seed: of the noise of diffusion inverters.
        n_images: None takes at most `picture_set.N_DEFAULT`.

    The others are those of `EvaluationSettings`; the same choice takes the same images.
    """

    inverters: tuple[str, ...] = ()
    data: str | None = None
    split: str = "validation"
    classes: str | None = None
    held_back_per_class: int = 0
    n_images: int | None = None
    scorers: tuple[str, ...] = ()
    grey: bool = False
    seed: int = 0
    batch_size: int = 32
    device: str = "auto"

    def __post_init__(self) -> None:
        _ = self.selection  # checks what they share

    @property
    def selection(self) -> EvaluationSettings:
        """The same choice of images for `select_items`."""
        shared = {f.name for f in fields(self)} & {f.name for f in fields(EvaluationSettings)}
        return EvaluationSettings(**{name: getattr(self, name) for name in shared})


@dataclass(frozen=True, eq=False)
class Encoder:
    """One that is compared.

    Args:
        label: what tables and figures call it.
        name: of its inverter, as it was given.
    """

    label: str
    name: str
    inverter: Inverter
    backbone: Backbone

    def describe(self) -> dict[str, Any]:
        spec = self.inverter.spec
        return {
            "label": self.label,
            "inverter": self.name,
            "backbone": spec.backbone,
            "layer": spec.layer,
            "channels": spec.channels,
            "grid": list(spec.grid),
            "input_size": list(self.backbone.input_size),
        }

    @torch.no_grad()
    def reconstruct(self, images: Images, items: Sequence[Item]) -> Float[Tensor, "b 3 _ _"]:
        """Returns what its features are turned back into, in 8-bit steps.

        Raises:
            InputError: features or samples that are not finite.
        """
        samples = self.inverter.invert(self.backbone.features(images), generator=noise_of(items))
        if not bool(finite_rows(samples).all()):
            raise InputError(f"The inverter {self.name!r} gave NaN values; use a full precision.")
        return to_images(to_pixels(samples)).to(images.device)


def open_encoders(settings: EncoderSettings) -> list[Encoder]:
    """Loads all inverters with their encoders.

    Raises:
        InputError: fewer than two inverters, one of them twice, unknown ones, or a device that is
            not there.
    """
    chosen = {name: parse_inverter(name) for name in settings.inverters}
    _check_different(settings.inverters, chosen.values())
    opened, resolved = [], []
    for name, source in chosen.items():
        inverter, complete = open_chosen(replace(source, device=settings.device))
        if inverter.backbone is None:
            raise InputError(f"The inverter {name!r} must know its backbone, but does not.")
        opened.append((name, inverter, inverter.backbone))
        resolved.append(complete)
    _check_different(settings.inverters, resolved)  # a default may be what another one names
    labels = make_labels([(inverter.spec.backbone, name) for name, inverter, _ in opened])
    return [Encoder(label, *one) for label, one in zip(labels, opened, strict=True)]


def parse_inverter(text: str) -> SampleSettings:
    """Reads NAME[@STAGE][:PIPELINE] or FOLDER[@STAGE]; a folder's name may hold such signs itself.

    Raises:
        InputError: a sign with nothing before or after it.
    """
    folder, _, stage = text.rpartition("@")
    pipeline = None
    if _is_folder(text):
        name, stage = text, None
    elif _is_folder(folder):
        name = folder
    else:
        name, *pipelines = text.split(":", maxsplit=1)
        name, *stages = name.split("@", maxsplit=1)
        pipeline, stage = (parts[0] if parts else None for parts in (pipelines, stages))
    if "" in (name, stage, pipeline):
        raise InputError(
            f"An inverter must be given as NAME, NAME@STAGE or NAME:PIPELINE, but {text!r} came."
        )
    return SampleSettings(inverter=name, stage=stage, pipeline=pipeline)


def _check_different(names: Sequence[str], sources: Iterable[SampleSettings]) -> None:
    if len({_resolve(source) for source in sources}) < max(2, len(names)):
        raise InputError(
            "A comparison needs at least two different inverters, e.g. --inverter siglip,siglip2, "
            f"but {', '.join(names) or 'none'} came."
        )


def _is_folder(text: str) -> bool:
    return text != "" and expand_path(text).is_dir()


def _resolve(source: SampleSettings) -> tuple[str | None, ...]:
    """Name, stage and pipeline; of a folder, where it really is."""
    names = (source.inverter, source.stage, source.pipeline)
    return tuple(
        str(expand_path(name).resolve()) if name and _is_folder(name) else name for name in names
    )


def make_labels(named: Sequence[tuple[str, str]]) -> list[str]:
    """Labels of (backbone, inverter): the backbone where that is one's alone, else the inverter.

    Of a folder as many of its last parts, at least two, as tell it from the others. No two labels
    are the same.

    Raises:
        InputError: an inverter that is named twice.
    """
    candidates = [_label_candidates(*one) for one in named]
    while True:
        labels = [names[0] for names in candidates]
        counts = Counter(labels)
        shared = [names for names in candidates if counts[names[0]] > 1]
        if not shared:
            return labels
        longer = [names for names in shared if len(names) > 1]
        if not longer:
            raise InputError(f"Each inverter must be named once, but {shared[0][0]!r} came twice.")
        for names in longer:
            names.pop(0)


def _label_candidates(backbone: str, name: str) -> list[str]:
    """From the shortest on; the last is the whole name."""
    path = PurePath(name)
    return [backbone, *("/".join(path.parts[-n:]) for n in range(2, len(path.parts))), str(path)]
