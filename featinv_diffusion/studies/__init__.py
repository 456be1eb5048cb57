"""Studies that need a backbone, and perhaps an inverter."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path, PurePosixPath
from typing import Any

from featinv_diffusion.errors import InputError
from featinv_diffusion.inverters.open import SampleSettings
from featinv_diffusion.runs.record import from_values, path_of, read_content
from featinv_diffusion.runs.sampling import Encoded, SampleBatch, encode_picture, sample_map
from featinv_diffusion.studies.composition import Composition, SpatialComposition, compose
from featinv_diffusion.studies.featinv_viz import ConceptEffect, ConceptViz, measure_concept
from featinv_diffusion.studies.interpolation import Interpolation, Mixtures, sample_mixtures
from featinv_diffusion.studies.study import Study
from featinv_diffusion.studies.variability import (
    SampleVariability,
    Variability,
    measure_variability,
)

__all__ = [
    "Composition",
    "ConceptEffect",
    "Encoded",
    "Mixtures",
    "SampleBatch",
    "Variability",
    "compose",
    "encode_picture",
    "measure_concept",
    "measure_variability",
    "sample_map",
    "sample_mixtures",
]


# ---- All studies by the command that runs them, and their manifests read back --------------------

STUDIES: dict[str, type[Study]] = {
    kind.command: kind
    for kind in (Interpolation, SpatialComposition, SampleVariability, ConceptViz)
}


def read_study(path: Path) -> tuple[Study, SampleSettings, dict[str, Any]] | None:
    """Reads a manifest that `run_study` wrote; None where it is one of another command.

    Raises:
        InputError: no such file, no JSON, keys missing or of a wrong kind.
    """
    path = path_of(path)
    content = read_content(path)
    if not isinstance(content, dict) or "command" not in content:
        return None
    kind = STUDIES.get(str(content["command"]))
    if kind is None:
        raise InputError(f"{path} is of the command {content['command']!r}, which has no replay.")
    outputs, environment = content.get("outputs"), content.get("environment")
    if not (isinstance(outputs, list) and all(map(_is_plain, outputs))):
        raise InputError(f"{path} must list file names as its outputs, but holds {outputs!r}.")
    if not isinstance(environment, dict):
        raise InputError(f"{path} must tell its environment, but holds {environment!r}.")
    study = from_values(kind, _taken(content, kind, path), path)
    return study, from_values(SampleSettings, _taken(content, SampleSettings, path), path), content


def _taken(content: dict[str, Any], kind: type, path: Path) -> dict[str, Any]:
    names = [field.name for field in fields(kind)]
    if missing := [name for name in names if name not in content]:
        raise InputError(
            f"{path} is no manifest of featinv {content['command']}; it lacks {', '.join(missing)}."
        )
    return {name: content[name] for name in names}


def _is_plain(name: Any) -> bool:
    return isinstance(name, str) and name == PurePosixPath(name).name
