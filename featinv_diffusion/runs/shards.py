"""Large sets in shards: fixed slices of the job list, each written whole by one process.

    OUTPUT/run.json                   settings and a digest of the jobs; guards a resumed run
    OUTPUT/shards/00012/*.png         the samples
    OUTPUT/shards/00012/records.jsonl one line per image, written last: the shard is done
    OUTPUT/manifest.json, grid.png    of all shards, written last

Shards depend on the job list alone and batches never cross them, so a picture is the same bit for
bit on any number of processes with equally many threads each, interrupted or not.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from featinv_diffusion.backbones import Backbone
from featinv_diffusion.errors import InputError
from featinv_diffusion.files import write_text
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.inverters.diffusion import DiffusionInverter
from featinv_diffusion.runs.record import read_environment
from featinv_diffusion.runs.samples import Manifest
from featinv_diffusion.runs.sampling import Job, Score, reconstruct
from featinv_diffusion.settings import SampleSettings

RUN, RECORDS, SHARDS = "run.json", "records.jsonl", "shards"


@dataclass(frozen=True)
class Shard:
    """A slice of the jobs and its folder, relative to the output folder."""

    folder: str
    jobs: tuple[Job, ...]

    def is_done(self, output: Path) -> bool:
        return (output / self.folder / RECORDS).is_file()


def make_shards(jobs: Sequence[Job], size: int) -> list[Shard]:
    """Cuts the jobs into slices of `size`; their outputs move into the shard's folder."""
    if size < 1:
        raise InputError(f"A shard must hold at least 1 image, but {size} came.")
    shards = []
    for number, first in enumerate(range(0, len(jobs), size)):
        folder = f"{SHARDS}/{number:05d}"
        moved = [
            replace(job, outputs=tuple(f"{folder}/{name}" for name in job.outputs))
            for job in jobs[first : first + size]
        ]
        shards.append(Shard(folder, tuple(moved)))
    return shards


def begin_run(
    settings: SampleSettings, shards: Sequence[Shard], output: Path, *, write: bool
) -> None:
    """Compares with the run that `output` holds; where it holds none, `write` begins one.

    Raises:
        InputError: `output` holds a run with other settings or other images.
    """
    check_run(_identity(settings, shards), output, write=write)


def check_run(identity: Mapping[str, Any], output: Path, *, write: bool) -> None:
    """Compares what decides a run with that of the run in `output`; see `begin_run`."""
    now = json.loads(json.dumps(identity))  # as it is read back: lists for tuples
    path = output / RUN
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [f"{k}: {before.get(k)} → {now[k]}" for k in now if before.get(k) != now[k]]
        if changed:
            raise InputError(
                f"{output} holds a run that began otherwise ({', '.join(changed)}). "
                "Resume it with the same settings and images, or use another output folder."
            )
    elif write:
        write_text(path, json.dumps(now, indent=2) + "\n")


def run_shard(
    inverter: Inverter, shard: Shard, batch_size: int, output: Path, score: Score | None = None
) -> None:
    """Samples a shard; a killed one leaves no records and is done again from its beginning."""
    folder = output / shard.folder
    for partial in folder.rglob(".*.part"):
        partial.unlink()
    manifest = Manifest(SampleSettings())
    for done in reconstruct(inverter, shard.jobs, batch_size, manifest.fail, score):
        write_samples(done, output)
        manifest.add(done)
    records = [json.dumps(record) for record in (*manifest.images, *manifest.failures)]
    write_text(folder / RECORDS, "".join(f"{record}\n" for record in records))


def merge_shards(settings: SampleSettings, shards: Sequence[Shard], output: Path) -> Manifest:
    """Joins the records of finished shards, in the order of the jobs."""
    manifest = Manifest(settings, environment=read_environment(settings.device))
    for shard in shards:
        text = (output / shard.folder / RECORDS).read_text(encoding="utf-8")
        for record in map(json.loads, text.splitlines()):
            (manifest.failures if "error" in record else manifest.images).append(record)
    return manifest


def _identity(settings: SampleSettings, shards: Sequence[Shard]) -> dict[str, Any]:
    jobs = [(str(job.input.absolute()), job.outputs, job.seeds) for s in shards for job in s.jobs]
    kind = settings.device.partition(":")[0]  # the index of a GPU differs between processes
    return {
        **asdict(replace(settings, device=kind)),
        "n_images": len(jobs),
        "images_sha256": hashlib.sha256(json.dumps(jobs).encode()).hexdigest(),
    }


# ---- What tells one set of weights from another, whatever file they came from --------------------


def describe_inverter(inverter: Inverter, own: Backbone) -> dict[str, Any]:
    """Returns what decides samples beside the settings: weights as loaded, prompt and schedule."""
    if inverter.is_deterministic:
        return {"modules_sha256": weights_sha256({**inverter.networks, "backbone": own.model})}
    if not isinstance(inverter, DiffusionInverter):
        raise TypeError(f"No fingerprint is known of a {type(inverter).__name__}.")
    pipeline = inverter.pipeline
    parts = {n: part for n, part in pipeline.components.items() if isinstance(part, nn.Module)}
    schedule = {k: v for k, v in pipeline.scheduler.config.items() if not k.startswith("_")}
    return {
        "pipeline_sha256": weights_sha256({**parts, "backbone": own.model}),
        "prompt": pipeline.config["default_prompt"],
        "scheduler_config": {key: _to_json(value) for key, value in schedule.items()},
    }


def _to_json(value: Any) -> Any:
    """JSON has no infinity, which DPM-Solver's config holds."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
