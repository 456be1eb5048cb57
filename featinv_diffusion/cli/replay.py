"""`featinv replay`: the same pictures again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from featinv_diffusion.settings import SampleSettings
    from featinv_diffusion.studies.concepts import ConceptFit
    from featinv_diffusion.studies.study import Study


def replay(
    manifest: Annotated[Path, typer.Argument(help="manifest.json, or the folder that holds it.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder to write to.", show_default="replay beside it"),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="Last bits differ on another.", show_default="the manifest's"),
    ] = None,
) -> None:
    """Make the pictures (or concepts) of a manifest again, from the seeds and settings in it.

    On the same machine and libraries they are identical; says how many are.
    """
    from featinv_diffusion.studies import read_study
    from featinv_diffusion.studies.concepts import read_fit

    folder = manifest if manifest.is_dir() else manifest.parent
    target = output or folder / "replay"
    if (fit := read_fit(manifest)) is not None:
        _replay_fit(*fit, folder, target, device)
    elif (found := read_study(manifest)) is None:
        _replay_samples(manifest, folder, target, device)
    else:
        _replay_study(*found, folder, target, device)


def _replay_samples(manifest: Path, folder: Path, target: Path, device: str | None) -> None:
    from featinv_diffusion.cli.run import report, run_jobs
    from featinv_diffusion.runs.record import read_manifest, to_jobs

    before = read_manifest(manifest)
    digests = _digests(folder, [name for entry in before.images for name in entry["outputs"]])
    _use_threads(before.environment)
    after = run_jobs(_on(before.settings, device), to_jobs(before), target)
    report(after, target)
    _compare(digests, target, [name for entry in after.images for name in entry["outputs"]])
    if after.failures:
        raise typer.Exit(1)


def _replay_study(
    study: Study,
    settings: SampleSettings,
    content: dict[str, Any],
    folder: Path,
    target: Path,
    device: str | None,
) -> None:
    from featinv_diffusion.cli import studies

    digests = _digests(folder, content["outputs"])
    _use_threads(content["environment"])
    after = studies.run(study, _on(settings, device), target)
    _compare(digests, target, after["outputs"])


def _replay_fit(
    fit: ConceptFit, content: dict[str, Any], folder: Path, target: Path, device: str | None
) -> None:
    """Concepts are compared as numbers, for their file's header has no fixed order."""
    from featinv_diffusion.cli import concepts
    from featinv_diffusion.concepts import ConceptDictionary

    before = folder / fit.output
    earlier = ConceptDictionary.load(before).directions if before.is_file() else None
    _use_threads(content["environment"])
    after = concepts.run(fit if device is None else replace(fit, device=device), target)
    if earlier is not None:
        same = after.concepts.directions.equal(earlier)
        verb = "are identical to" if same else "differ from"
        print(f"The concepts {verb} those beside the manifest.")


def _on(settings: SampleSettings, device: str | None) -> SampleSettings:
    from featinv_diffusion.backbones.names import recorded_name

    backbone = None if settings.backbone is None else recorded_name(settings.backbone)
    return replace(settings, backbone=backbone, device=device or settings.device)


def _use_threads(environment: dict[str, Any]) -> None:
    import torch

    if n_threads := environment.get("n_threads"):
        torch.set_num_threads(n_threads)  # sums are taken in another order on more threads


def _digests(folder: Path, names: Sequence[str]) -> dict[str, str]:
    return {name: _digest(folder / name) for name in names if (folder / name).is_file()}


def _compare(digests: Mapping[str, str], target: Path, names: Sequence[str]) -> None:
    """Says how many pictures are those that were there before."""
    from featinv_diffusion.runs.record import MANIFEST

    made = [name for name in names if name in digests]
    n_same = sum(_digest(target / name) == digests[name] for name in made)
    if made:
        print(f"{n_same} of {len(made)} pictures are identical to those beside {MANIFEST}.")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
