"""Checkpoints that are whole or absent: written beside their place, then renamed."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from omegaconf import OmegaConf
from rich import progress as rich_progress
from rich.console import Console
from safetensors import SafetensorError

from featinv_diffusion.errors import InputError

RUN_KEYS_THAT_MATTER = ("run.mixed_precision", "run.n_validation_images")


class Progress:
    """How far a run is.

    `batch` counts micro-batches of the current epoch, on each process; `seconds` are those of all
    sittings that led to the last checkpoint; `unreadable` are the images that were replaced.
    """

    def __init__(self) -> None:
        self.step = self.epoch = self.batch = self.micro_step = 0
        self.seconds = 0.0
        self.unreadable: list[str] = []

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
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
        partial.rename(final)
        for old in list_checkpoints(output)[:-total_limit]:
            # Renamed first: a deletion that is killed must not look like a checkpoint.
            old.rename(old.with_name(old.name.replace("step-", "partial-")))
        remove_partial(output)
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


def remove_partial(output: Path) -> None:
    """Removes what killed runs left half-written or half-deleted."""
    for folder in (output / "checkpoints").glob("partial-*"):
        shutil.rmtree(folder)


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
    changed = [k for k in changed if not k.startswith("run.") or k in RUN_KEYS_THAT_MATTER]
    if changed and not allow_changed_config:
        listing = ", ".join(f"{k}: {before.get(k)} → {after.get(k)}" for k in changed)
        raise InputError(
            f"A resumed run must have the settings it began with, but these changed: {listing}. "
            "Use a new run.output, or set run.allow_changed_config=true."
        )


def environment(n_processes: int) -> dict[str, Any]:
    """Library versions, the commit and the number of processes."""
    names = ("torch", "diffusers", "transformers", "accelerate", "timm", "datasets")
    return {
        "versions": {name: _version(name) for name in names},
        "commit": _commit(),
        "n_processes": n_processes,
    }


def _version(package: str) -> str | None:
    """The installed version of a package; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout this file is in; None elsewhere or without git."""
    package = Path(__file__).parents[1]
    command = ["git", "rev-parse", "--show-toplevel", "HEAD"]
    try:
        done = subprocess.run(command, cwd=package, capture_output=True, text=True, check=False)
    except OSError:
        return None
    lines = done.stdout.split("\n")
    return lines[1] if done.returncode == 0 and Path(lines[0]) == package.parent else None


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


# ---- A progress bar with images per second and time left -----------------------------------------


class TrainingBar:
    """Shows optimizer steps, the loss, images per second and the time left."""

    def __init__(self, n_steps: int, step: int, images_per_step: int, enabled: bool):
        self.images_per_step, self.enabled, self.first = images_per_step, enabled, step
        self.terminal = sys.stderr.isatty()
        self.start = self.last_line = time.monotonic()
        self.n_steps = n_steps
        self.bar = rich_progress.Progress(
            rich_progress.TextColumn("training"),
            rich_progress.BarColumn(),
            rich_progress.MofNCompleteColumn(),
            rich_progress.TextColumn(
                "loss {task.fields[loss]:.4f} · {task.fields[rate]:.0f} images/s"
            ),
            rich_progress.TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not (enabled and self.terminal),
        )
        self.task = self.bar.add_task("training", total=n_steps, completed=step, loss=0.0, rate=0.0)

    def __enter__(self) -> TrainingBar:
        self.bar.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.__exit__(None, None, None)

    def update(self, step: int, loss: float) -> None:
        now = time.monotonic()
        rate = (step - self.first) * self.images_per_step / max(now - self.start, 1e-9)
        self.bar.update(self.task, completed=step, loss=loss, rate=rate)
        if self.enabled and not self.terminal and now - self.last_line > 30:
            left = (self.n_steps - step) * self.images_per_step / max(rate, 1e-9)
            print(
                f"step {step}/{self.n_steps} loss {loss:.4f} {rate:.0f} images/s, "
                f"{left / 60:.0f} min left",
                file=sys.stderr,
                flush=True,
            )
            self.last_line = now
