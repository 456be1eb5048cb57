"""Many pictures in units, on any processes: their samples, or their feature maps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featinv_diffusion.backbones import Backbone
from featinv_diffusion.backbones.base import weights_sha256
from featinv_diffusion.data.selection import digest
from featinv_diffusion.data.sets import ImageSet, read_location
from featinv_diffusion.errors import InputError
from featinv_diffusion.features.maps import load_maps, write_maps
from featinv_diffusion.figures.grid import GridRow
from featinv_diffusion.images import center_square, read_image, write_png
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.inverters.open import open_inverter
from featinv_diffusion.processes import Processes, joins
from featinv_diffusion.runs.parts import units_of
from featinv_diffusion.runs.progress import advancing, progress_bar
from featinv_diffusion.runs.record import read_environment
from featinv_diffusion.runs.samples import MAX_GRID_ROWS, Manifest, SampleFolder, to_captions
from featinv_diffusion.runs.samples import to_jobs as jobs_of
from featinv_diffusion.runs.sampling import Job, encode_jobs, make_jobs, reconstruct
from featinv_diffusion.runs.scope import open_scope
from featinv_diffusion.runs.second_eye import open_second_eye
from featinv_diffusion.runs.units import (
    FAILURES,
    FILES,
    Unit,
    describe_inverter,
    discard_run,
    merge_units,
    run_units,
    share,
)
from featinv_diffusion.runs.workers import Call, begin_units
from featinv_diffusion.settings import SampleSettings
from featinv_diffusion.types import FeatureMaps

SHARDED_ROWS = 24
"""Pictures in the grid of a run whose samples lie in shards."""
IMAGES, SECOND_EYE = "images", "second_eye"
LEAST_UNIT, ENCODED_UNIT = 4, 64
"""Pictures of a unit: at least, where samples are made, and where maps are."""
MAPS = "maps.safetensors"

Place = Callable[[Unit[Job], Job], Job]


def as_named(unit: Unit[Job], job: Job) -> Job:
    """Leaves the samples where `featinv sample` writes them."""
    return job


def in_shard(unit: Unit[Job], job: Job) -> Job:
    """Moves the samples into the folder of their unit, so that no folder holds very many."""
    folder = unit.folder.relative_to(unit.folder.parents[1]).as_posix()
    return replace(job, outputs=tuple(f"{folder}/{name}" for name in job.outputs))


def unit_size(settings: SampleSettings) -> int:
    """Returns so many pictures that the batches of units are those of one run over all pictures."""
    whole = settings.batch_size // math.gcd(settings.batch_size, settings.n_samples)
    return whole * math.ceil(LEAST_UNIT / whole)


def sample_units(
    processes: Processes,
    settings: SampleSettings,
    images: ImageSet,
    size: int,
    output: Path,
    *,
    place: Place = as_named,
    n_rows: int = MAX_GRID_ROWS,
    call: Call | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> Manifest | None:
    """Does this process's share; returns the manifest of all where it joins them, else None.

    Args:
        settings: whose inverter is named, see `name_inverter`.
        size: pictures of a unit; no batch crosses one.
        n_rows: pictures in the grid.
        call: what workers note, whose number of units is filled in.
        say: is told how many units there are.

    Raises:
        InputError: settings or pictures that cannot be used; open units where they are joined.
    """
    with processes.main_process_first():  # one downloads, the others find it there
        inverter = open_inverter(settings)
        scope, eye = open_scope(inverter), open_second_eye(inverter)
    resolved, backbone = inverter.settings, inverter.require_backbone()
    assert resolved is not None
    jobs = make_jobs(images, resolved.seed, resolved.n_samples)
    identity = {
        **asdict(replace(resolved, device=resolved.device.partition(":")[0])),
        **describe_inverter(inverter, backbone),
        "shard_size": size,
        "n_images": len(jobs),
        "images_sha256": digest(str(job) for job in jobs),
        "data_fingerprint": images.fingerprint,
    }
    if place is as_named:  # where the samples of finished units lie
        identity["layout"] = "flat"
    units, todo = begin_units(jobs, size, output, identity, processes, call)
    say(
        f"Shards: {len(units)}, done before: {len(units) - len(todo)}. "
        f"Processes: {processes.num_processes}."
    )

    def work(unit: Unit[Job]) -> Mapping[str, Any]:
        part, seen = Manifest(resolved), []
        jobs = [place(unit, job) for job in unit.items]
        for done in reconstruct(inverter, jobs, resolved.batch_size, part.fail, scope.p_value):
            for name, picture in zip(done.job.outputs, done.samples, strict=True):
                write_png(picture, output / name)
            part.add(done)
            if eye is not None:
                eye.look(done)
                seen.append(eye.take())
        files = [output / name for entry in part.images for name in entry["outputs"]]
        noted = {} if eye is None else {SECOND_EYE: seen}
        return {IMAGES: part.images, FAILURES: part.failures, FILES: files, **noted}

    n_samples = sum(len(job.seeds) for unit in share(todo, processes) for job in unit.items)
    with advancing(inverter, n_samples, processes.is_main_process):
        run_units(todo, work, processes)
    if not joins(processes):
        return None
    manifest = Manifest(
        resolved,
        images=merge_units(units, IMAGES),
        failures=merge_units(units, FAILURES),
        environment=read_environment(resolved.device),
        scope_basis=scope.basis,
    )
    if eye is not None:
        for seen in merge_units(units, SECOND_EYE):
            eye.put(seen)
        manifest.second_eye = eye.content()
    _finish(manifest, inverter, output, n_rows)
    return manifest


def _finish(manifest: Manifest, inverter: Inverter, output: Path, n_rows: int) -> None:
    """Writes the grid of the first pictures, then the manifest."""
    if not manifest.images:
        discard_run(output)
        raise InputError("\n".join(failure["error"] for failure in manifest.failures))
    folder = SampleFolder(output, manifest)
    size = max(inverter.require_backbone().picture_size)
    for job, entry in list(zip(jobs_of(manifest), manifest.images, strict=True))[:n_rows]:
        original = center_square(read_location(job.input), size)
        samples = [read_image(output / name) for name in job.outputs]
        folder.shown.append(GridRow(original, job.name, samples, to_captions(entry["cosine"])))
    folder.complete()


# ---- Maps ----------------------------------------------------------------------------------------


def encode_units(
    processes: Processes, backbone: Backbone, images: ImageSet, output: Path, call: Call
) -> FeatureMaps | None:
    """Encodes this worker's share; returns the maps of all and writes them where it joins them.

    Args:
        output: the file; units lie beside it in `units_of`.

    Raises:
        InputError: a picture that cannot be read; open units where they are joined.
    """
    jobs, folder = make_jobs(images, 0, 1), units_of(output)
    identity = {
        "backbone": backbone.name,
        "spec": asdict(backbone.spec),
        "device": backbone.device.type,
        "backbone_sha256": weights_sha256({"backbone": backbone.model}),
        "images_sha256": digest(str(job) for job in jobs),
        "data_fingerprint": images.fingerprint,
    }
    units, todo = begin_units(jobs, ENCODED_UNIT, folder, identity, processes, call)
    mine = sum(len(unit.items) for unit in share(todo, processes))
    with progress_bar(mine, doing="encoding", noun="pictures") as advance:

        def work(unit: Unit[Job]) -> Mapping[str, Any]:
            maps = encode_jobs(backbone, unit.items)
            write_maps(unit.folder / MAPS, maps, backbone.spec)
            advance(len(maps))
            return {FAILURES: []}

        run_units(todo, work, processes)
    if not joins(processes):
        return None
    parts = [load_maps(unit.folder / MAPS, backbone.spec) for unit in units]
    sources = [source for part in parts for source in part.sources]
    maps = FeatureMaps.of(torch.cat([part.as_subclass(Tensor) for part in parts]), sources)
    write_maps(output, maps, backbone.spec)
    return maps
