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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from accelerate import Accelerator
from accelerate.utils import load
from diffusers.training_utils import EMAModel
from msgspec import Meta
from rich import progress as rich_progress
from rich.console import Console
from safetensors import SafetensorError
from torch import Tensor

from featinv_diffusion.data.streams import Place
from featinv_diffusion.errors import InputError
from featinv_diffusion.files import expand_path, flush_one, flush_to_disk
from featinv_diffusion.schema import parse_yaml, read_json, read_text
from featinv_diffusion.settings import NotNegative, Number
from featinv_diffusion.training.config import RunConfig

RUN_KEYS_THAT_MATTER = ("run.mixed_precision", "run.compile", "run.n_validation_images")
FREE_KEYS = ("run.", "validation.", "data.num_workers", "data.in_memory", "model.attention")
"""Settings that decide no weight."""
ADDED_KEYS: dict[str, Any] = {
    "cache.features": False,
    "cache.features_dtype": "float16",
    "data.train_per_class": None,
    "imitation.pipeline": None,
    "imitation.n_images": 4096,
    "imitation.epochs": 8,
    "imitation.lr": 0.01,
    "model.feature_projection_channels": None,
    "model.trained": ["*"],
    "run.compile": False,
}
"""Settings that earlier versions did not have, with the value that means what those did."""
ELASTIC_KEYS = ("optim.batch_size", "optim.gradient_accumulation_steps")
ENVIRONMENT, PROGRESS, AVERAGE = "environment.json", "progress.json", "average.bin"
FINAL_PARTIAL, FINAL_ASIDE = "final-partial", "final-replaced"
ADVICE = "Remove this checkpoint, and the run resumes from the one before it or begins anew."


@dataclass
class StreamProgress:
    """How far one process is in its part of a stream.

    Args:
        n_workers: data workers that read it; 0 is the process itself.
        turn: the worker of the next batch.
        places: of each worker.
    """

    n_workers: Number
    turn: Number
    places: list[Place]


@dataclass
class Progress:
    """How far a run is.

    Args:
        samples: images of this epoch that all processes together have seen; they are the first of
            the epoch's order, which does not depend on how many processes there are.
        micro_step: batches of each process since the run began.
        seconds: of all sittings that led to the last checkpoint.
        unreadable: images that were replaced.
        stream: of each process, where images are read in passing; then `samples` counts all of
            the run.
    """

    step: Number = 0
    epoch: Number = 0
    samples: Number = 0
    micro_step: Number = 0
    seconds: NotNegative = 0.0
    unreadable: list[str] = field(default_factory=list)
    stream: list[StreamProgress] = field(default_factory=list)


@dataclass
class Environment:
    """What a checkpoint knows of the run that wrote it.

    Args:
        n_processes: how many wrote it.
        folder: the working folder, which relative paths of the config lead from.
    """

    n_processes: Annotated[int, Meta(ge=1)]
    versions: dict[str, str | None]
    commit: str | None = None
    folder: str = "."


def save_checkpoint(
    accelerator: Accelerator,
    output: Path,
    progress: Progress,
    average: EMAModel | None,
    config: str,
    total_limit: int,
) -> Path:
    """Writes `output/checkpoints/step-N`, then removes the oldest beyond `total_limit`."""
    folder = output / "checkpoints"
    final, partial = folder / f"step-{progress.step:08d}", folder / f"partial-{progress.step:08d}"
    if accelerator.is_main_process:
        remove_partial(output)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    with _removed_on_failure(partial):
        accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        with _removed_on_failure(partial):
            (partial / PROGRESS).write_text(json.dumps(asdict(progress)), encoding="utf-8")
            if average is not None:
                torch.save(average.state_dict(), partial / AVERAGE)
            (partial / "config.yaml").write_text(config, encoding="utf-8")
            environment = asdict(read_environment(accelerator.num_processes))
            (partial / ENVIRONMENT).write_text(json.dumps(environment, indent=2), encoding="utf-8")
            flush_to_disk(partial)
            partial.rename(final)
            flush_one(folder)
        for old in list_checkpoints(output)[:-total_limit]:
            # Renamed first: a deletion that is killed must not look like a checkpoint.
            old.rename(old.with_name(old.name.replace("step-", "partial-")))
        remove_partial(output)
    accelerator.wait_for_everyone()
    return final


def load_checkpoint(accelerator: Accelerator, folder: Path, average: EMAModel | None) -> Progress:
    """Reads weights, optimizer and average from a checkpoint, and returns how far the run was.

    Nothing but tensors and plain values is read: a file that holds objects is refused.

    Raises:
        InputError: a file that is missing or damaged.
    """
    progress = read_json(folder / PROGRESS, Progress, ADVICE)
    for path in (folder / "optimizer.bin", *folder.glob("*.pt"), *folder.glob("*.pkl")):
        read_plain(path, mmap=True)
    averaged = read_plain(folder / AVERAGE) if average is not None else {}
    try:
        accelerator.load_state(str(folder))
        if average is not None:
            average.load_state_dict(averaged)
    except (OSError, SafetensorError, RuntimeError, ValueError, LookupError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"{folder} is damaged, or of another network: {reason}. {ADVICE}"
        ) from None
    return progress


def read_plain(path: Path, mmap: bool = False) -> Any:
    """Reads what `torch.save` wrote, and refuses anything but tensors and plain values.

    Raises:
        InputError: a file that is missing, damaged, or holds objects.
    """
    try:
        return load(path, map_location="cpu", mmap=mmap)  # accelerate's: weights only
    except Exception as error:  # whatever the reader of pickles finds wrong is the file's fault
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path} must hold tensors and plain values, but it is damaged or holds something "
            f"else: {reason}. {ADVICE}"
        ) from None


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
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def remove_partial(output: Path) -> None:
    """Removes what killed runs left half-written or half-deleted.

    A run that was killed while it replaced `final` keeps the old one.
    """
    final, aside = output / "final", output / FINAL_ASIDE
    if aside.exists() and not final.exists():
        aside.rename(final)
    for path in [*(output / "checkpoints").glob("partial-*"), *output.glob("final-*")]:
        if path.name in (FINAL_PARTIAL, FINAL_ASIDE) or path.name.startswith("partial-"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def replace_final(output: Path) -> Path:
    """Puts the finished `final-partial` in the place of `final`, and returns that."""
    final, aside, partial = (output / name for name in ("final", FINAL_ASIDE, FINAL_PARTIAL))
    flush_to_disk(partial)
    if final.exists():
        final.rename(aside)
    partial.rename(final)
    flush_one(output)
    remove_partial(output)
    return final


def read_average(folder: Path) -> list[Tensor] | None:
    """Returns the averaged weights of a checkpoint, in the order of the parameters; None without.

    Raises:
        InputError: a damaged file.
    """
    path = folder / AVERAGE
    if not path.is_file():
        return None
    state = read_plain(path)
    average = state.get("shadow_params") if isinstance(state, dict) else None
    if not isinstance(average, list) or not all(isinstance(x, Tensor) for x in average):
        raise InputError(f"{path} must hold averaged weights, but holds something else. {ADVICE}")
    return average


def list_checkpoints(output: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted((output / "checkpoints").glob("step-*"))


def check_resumable(checkpoint: Path, config: str, n_processes: int, run: RunConfig) -> bool:
    """Returns whether resuming continues the very same run.

    Raises:
        InputError: it would not, and `run` does not allow that; or files that are damaged.
    """
    saved = read_json(checkpoint / ENVIRONMENT, Environment, ADVICE)
    is_exact = saved.n_processes == n_processes
    elastic = run.resume == "elastic" or run.allow_changed_config
    if not is_exact and not elastic:
        raise InputError(
            f"{checkpoint} was written by {saved.n_processes} processes and resumes exactly "
            f"only with as many, but {n_processes} run. Start {saved.n_processes}, set "
            "run.resume=elastic, or use a new run.output."
        )
    path = checkpoint / "config.yaml"
    after = _flatten(parse_yaml(config, "the config"))
    added = {key: value for key, value in ADDED_KEYS.items() if key in after}
    before = added | _flatten(parse_yaml(read_text(path, ADVICE), str(path), ADVICE))
    changed = sorted(
        key
        for key in before.keys() | after.keys()
        if before.get(key) != after.get(key)
        and _resolved(before.get(key), Path(saved.folder)) != _resolved(after.get(key), Path.cwd())
    )
    changed = [k for k in changed if not k.startswith(FREE_KEYS) or k in RUN_KEYS_THAT_MATTER]
    refused = [k for k in changed if not (elastic and k in ELASTIC_KEYS)]
    if refused and not run.allow_changed_config:
        listing = ", ".join(f"{k}: {before.get(k)} → {after.get(k)}" for k in refused)
        advice = "Use a new run.output, or set run.allow_changed_config=true."
        if all(k in ELASTIC_KEYS for k in refused):
            advice = "Use a new run.output, or set run.resume=elastic."
        raise InputError(
            f"A resumed run must have the settings it began with, but these changed: {listing}. "
            f"{advice}"
        )
    return is_exact and not changed


def read_environment(n_processes: int) -> Environment:
    """Returns library versions, the commit, the number of processes and the working folder."""
    names = ("torch", "diffusers", "transformers", "accelerate", "timm", "datasets")
    versions = {name: _version(name) for name in names}
    return Environment(n_processes, versions, _commit(), str(Path.cwd()))


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


def _flatten(content: Any) -> dict[str, Any]:
    """Returns values by dotted key."""
    flat: dict[str, Any] = {}

    def walk(node: Any, prefix: str) -> None:
        if isinstance(node, dict) and node:
            for key, value in node.items():
                walk(value, f"{prefix}.{key}" if prefix else str(key))
        else:
            flat[prefix] = node

    walk(content, "")
    return flat


def _resolved(value: Any, folder: Path) -> Any:
    """Returns the file or folder that a value names from `folder`, else the value."""
    try:
        path = folder / expand_path(value)
        return path.resolve() if path.exists() else value
    except (OSError, TypeError, ValueError):  # too long for a path, or no text
        return value


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
