"""Checkpoints that are whole or absent: written beside their place, then renamed."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from omegaconf import OmegaConf
from safetensors import SafetensorError

from featinv_diffusion.errors import InputError


class Progress:
    """How far a run is; `batch` counts micro-batches of the current epoch, on each process."""

    def __init__(self) -> None:
        self.step = self.epoch = self.batch = self.micro_step = 0

    def state_dict(self) -> dict[str, int]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, int]) -> None:
        vars(self).update(state)


def save_checkpoint(
    accelerator: Accelerator, output: Path, step: int, config: str, total_limit: int
) -> Path:
    """Writes `output/checkpoints/step-N`, then removes the oldest beyond `total_limit`."""
    folder = output / "checkpoints"
    final, partial = folder / f"step-{step:08d}", folder / f"partial-{step:08d}"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    with _removed_on_failure(partial):
        accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (partial / "config.yaml").write_text(config)
        (partial / "environment.json").write_text(
            json.dumps(environment(accelerator.num_processes), indent=2)
        )
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        for old in list_checkpoints(output)[:-total_limit]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


@contextmanager
def _removed_on_failure(folder: Path) -> Iterator[None]:
    """Removes a half-written folder and says in one sentence why it could not be written."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:  # torch.save raises RuntimeError
        shutil.rmtree(folder, ignore_errors=True)
        raise InputError(
            f"A checkpoint must be written below {folder.parent}, but that failed: "
            f"{str(error).splitlines()[0]} Make room on the disk or set another run.output; the "
            "run then resumes from its newest checkpoint."
        ) from error


def list_checkpoints(output: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted((output / "checkpoints").glob("step-*"))


def check_resumable(
    checkpoint: Path, config: str, n_processes: int, allow_changed_config: bool
) -> None:
    """Raises `InputError` where resuming would not continue the same run."""
    saved = json.loads((checkpoint / "environment.json").read_text())
    if saved["n_processes"] != n_processes:
        raise InputError(
            f"{checkpoint} was written by {saved['n_processes']} processes and resumes exactly "
            f"only with as many, but {n_processes} run. Start {saved['n_processes']} or use a new "
            "run.output."
        )
    before = _flatten((checkpoint / "config.yaml").read_text())
    after = _flatten(config)
    changed = sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
    changed = [k for k in changed if not k.startswith("run.")]
    if changed and not allow_changed_config:
        listing = ", ".join(f"{k}: {before.get(k)} → {after.get(k)}" for k in changed)
        raise InputError(
            f"A resumed run must have the settings it began with, but these changed: {listing}. "
            "Use a new run.output, or set run.allow_changed_config=true."
        )


def environment(n_processes: int) -> dict[str, Any]:
    """Library versions, the commit and the number of processes."""
    names = ("torch", "diffusers", "transformers", "accelerate", "timm", "datasets")
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "versions": {name: importlib.metadata.version(name) for name in names},
        "commit": commit.stdout.strip() or None,
        "n_processes": n_processes,
    }


def _flatten(yaml_text: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}

    def walk(node: Any, prefix: str) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                walk(value, f"{prefix}.{key}" if prefix else str(key))
        else:
            flat[prefix] = node

    walk(OmegaConf.to_container(OmegaConf.create(yaml_text)), "")
    return flat
