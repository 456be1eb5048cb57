"""The files of `featinv concepts`: written, read back for a replay, and held against a backbone."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from featinv_diffusion import __version__
from featinv_diffusion.analysis.concept_figure import draw_concepts
from featinv_diffusion.analysis.concept_fit import ConceptFit, Fitted, to_rows
from featinv_diffusion.analysis.concept_table import describe
from featinv_diffusion.analysis.figures import write_figure
from featinv_diffusion.backbones import Backbone
from featinv_diffusion.concepts import ConceptDictionary
from featinv_diffusion.errors import InputError
from featinv_diffusion.evaluation.fingerprints import weights_sha256
from featinv_diffusion.files import replacing, write_text
from featinv_diffusion.manifest import from_values, path_of, read_content, read_environment
from featinv_diffusion.sampling import find_device

MANIFEST_SUFFIX = ".manifest.json"


def write_fit(fit: ConceptFit, fitted: Fitted, folder: Path) -> list[str]:
    """Writes concepts, figure, numbers and manifest, the manifest last; returns their names."""
    stem = Path(fit.output).stem
    manifest = folder / f"{stem}{MANIFEST_SUFFIX}"
    manifest.unlink(missing_ok=True)
    fitted.concepts.save(folder / fit.output)
    write_figure(draw_concepts(fit, fitted), folder / fit.figure)
    numbers = describe(fitted)
    write_text(folder / f"{stem}.json", _to_json(numbers))
    with replacing(folder / f"{stem}.parquet") as partial:
        parquet.write_table(pa.Table.from_pylist(to_rows(fitted)), partial)
    device = str(find_device(fit.device))
    content = {
        "version": __version__,
        "command": fit.command,
        **asdict(replace(fit, device=device)),
        **{key: numbers[key] for key in ("class_index", "class_name", "completeness", "energy")},
        "environment": read_environment(device),
    }
    write_text(manifest, _to_json(content))
    return [fit.output, fit.figure, f"{stem}.json", f"{stem}.parquet", manifest.name]


def read_fit(path: Path) -> tuple[ConceptFit, dict[str, Any]] | None:
    """Reads a manifest that `write_fit` wrote; None where it is one of another command.

    Raises:
        InputError: no such file, no JSON, keys missing or of a wrong kind.
    """
    path = path_of(path)
    content = read_content(path)
    if not isinstance(content, dict) or content.get("command") != ConceptFit.command:
        return None
    names = [field.name for field in fields(ConceptFit)]
    if missing := [name for name in (*names, "environment") if name not in content]:
        raise InputError(
            f"{path} is no manifest of featinv concepts; it lacks {', '.join(missing)}."
        )
    if not isinstance(content["environment"], dict):
        raise InputError(f"{path} must tell its environment, but holds something else.")
    return from_values(ConceptFit, {name: content[name] for name in names}, path), content


def load_concepts(path: str | Path, backbone: Backbone) -> ConceptDictionary:
    """Reads concepts that were fitted on this backbone and layer.

    Raises:
        InputError: no concepts, or those of another layer or other weights.
    """
    concepts = ConceptDictionary.load(path)
    mine, spec = concepts.spec, backbone.spec
    if mine is None:
        raise InputError(
            f"The concepts in {path} must tell which features they are of, but do not. "
            f"Give the dictionary spec={spec!r} before it is saved."
        )
    digest = concepts.origin.get("weights_sha256")
    layers = [(s.layer, s.kind, s.channels) for s in (mine, spec)]
    if layers[0] != layers[1] or (digest is None and mine.backbone != spec.backbone):
        raise InputError(
            f"The concepts in {path} are those of a {mine}, but the pipeline inverts a {spec}. "
            "Use the pipeline of that backbone and layer, or fit concepts of this one with "
            f"featinv concepts FOLDER --backbone {spec.backbone} --layer {spec.layer}."
        )
    if digest not in (None, weights_sha256({"backbone": backbone.model})):
        raise InputError(
            f"The concepts in {path} were fitted on a {mine} with other weights than those of the "
            f"pipeline's {spec}. Fit them again."
        )
    return concepts


def _to_json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, allow_nan=False) + "\n"
