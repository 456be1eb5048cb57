"""The deterministic inverters by name or folder: one table, one way to open any of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import nn

from featinv_diffusion.errors import InputError, choices_hint
from featinv_diffusion.inverters import modular, rae, reconstructor
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.inverters.chain import MapChain
from featinv_diffusion.inverters.folders import class_name, expand_path

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
