"""`manifest.json`: what was sampled, how, and how well; enough to do it again."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from featinv_diffusion import __version__
from featinv_diffusion.errors import InputError
from featinv_diffusion.files import write_text
from featinv_diffusion.inverters.open import SampleSettings
from featinv_diffusion.runs.sampling import Job, Reconstruction

T = TypeVar("T")

MANIFEST = "manifest.json"
PER_SAMPLE = ("seed", "cosine", "cosine_shuffled", "top1_match", "top5_match")


@dataclass
class Manifest:
    """The settings of a run and one entry per image, in the order in which they were given.

    Args:
        images: dicts with `input`, `outputs`, `scope_p_value`, and the lists `PER_SAMPLE`.
        failures: dicts with `input` and `error`.
        environment: what the last bits of a picture depend on besides the settings.
        scope_basis: what the images' `scope_p_value`s rest on; None where there are none.
    """

    settings: SampleSettings
    images: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, str]] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    scope_basis: str | None = None

    def add(self, done: Reconstruction) -> None:
        self.images.append(to_entry(done))

    def fail(self, job: Job, error: str) -> None:
        self.failures.append({"input": str(job.input.absolute()), "error": error})

    def mean(self, name: str) -> float | None:
        """Mean of one of `PER_SAMPLE` over all samples; None where it has no values."""
        values = [v for entry in self.images for v in entry[name] if v is not None]
        return sum(values) / len(values) if values else None

    def write(self, folder: Path) -> None:
        """Writes `folder/manifest.json`, whole or not at all."""
        content = {
            "version": __version__,
            **asdict(self.settings),
            "environment": self.environment,
            "scope_basis": self.scope_basis,
            "images": self.images,
            "failures": self.failures,
        }
        write_text(folder / MANIFEST, json.dumps(content, indent=2, allow_nan=False) + "\n")


def to_entry(done: Reconstruction) -> dict[str, Any]:
    """Returns the entry of one image in `images`."""
    return {
        "input": str(done.job.input.absolute()),
        "outputs": list(done.job.outputs),
        "seed": list(done.job.seeds),
        "cosine": done.cosine,
        "cosine_shuffled": done.cosine_shuffled,
        "top1_match": done.top1_match,
        "top5_match": done.top5_match,
        "scope_p_value": done.scope_p_value,
    }


def read_manifest(path: Path) -> Manifest:
    """Reads what `Manifest.write` wrote, from the file or the folder that holds it.

    Raises:
        InputError: no such file, no JSON, keys missing or of a wrong kind.
    """
    path = path_of(path)
    content = read_content(path)
    names = [f.name for f in fields(SampleSettings)]
    if not isinstance(content, dict) or not {*names, "images"} <= content.keys():
        missing = sorted({*names, "images"} - set(content)) if isinstance(content, dict) else names
        raise InputError(f"{path} is no manifest of featinv sample; it lacks {', '.join(missing)}.")
    settings = from_values(SampleSettings, {name: content[name] for name in names}, path)
    manifest = Manifest(
        settings,
        content["images"],
        content.get("failures", []),
        content.get("environment", {}),
        content.get("scope_basis"),
    )
    for entry in manifest.images:
        _check_entry(entry, path)
    return manifest


def path_of(path: Path) -> Path:
    """Returns the manifest's own path, of it or of the folder that holds it."""
    return path / MANIFEST if path.is_dir() else path


def read_content(path: Path) -> Any:
    """Returns what a manifest's JSON holds.

    Raises:
        InputError: no such file, or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"A manifest must exist at {path}, but nothing is there.") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} must be a manifest in JSON: {error}.") from error


def from_values(kind: type[T], values: dict[str, Any], path: Path) -> T:
    """Builds a dataclass of what a manifest holds.

    Raises:
        InputError: a value of a wrong type.
    """
    try:
        config = OmegaConf.merge(OmegaConf.structured(kind), values)
        return cast(T, OmegaConf.to_object(config))
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path} holds a setting of a wrong type: {reason}.") from error


def to_jobs(manifest: Manifest) -> list[Job]:
    """Returns the jobs that make the same pictures again."""
    return [
        Job(Path(entry["input"]), tuple(entry["outputs"]), tuple(entry["seed"]))
        for entry in manifest.images
    ]


def _check_entry(entry: Any, path: Path) -> None:
    fine = (
        isinstance(entry, dict)
        and isinstance(entry.get("input"), str)
        and _is_list_of(entry.get("outputs"), str)
        and _is_list_of(entry.get("seed"), int)
        and len(entry["outputs"]) == len(entry["seed"]) > 0
    )
    if not fine:
        raise InputError(
            f"{path} must give each image an input, and as many outputs as seeds, but holds "
            f"{json.dumps(entry)[:120]}."
        )
    for name in entry["outputs"]:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise InputError(f"{path} names an output outside of its folder: {name!r}.")


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def read_environment(device: str) -> dict[str, Any]:
    """Returns the versions, the device and the CPU threads that pictures are made with."""
    is_cuda = device.startswith("cuda")
    libraries = ("torch", "diffusers", "transformers", "timm", "pillow")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in libraries},
        "device_name": torch.cuda.get_device_name(device) if is_cuda else platform.machine(),
        "n_threads": torch.get_num_threads(),
    }
