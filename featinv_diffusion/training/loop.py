"""One training loop for every network: accelerate, exact resume, tracker, validation pictures."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import (
    DataLoaderConfiguration,
    ProjectConfiguration,
    gather_object,
    is_tensorboard_available,
    is_wandb_available,
)
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor, nn

from featinv_diffusion.data.crops import CropDataset
from featinv_diffusion.data.streams import StreamedCrops
from featinv_diffusion.errors import InputError
from featinv_diffusion.files import holding, write_text
from featinv_diffusion.processes import check_process_group
from featinv_diffusion.seeds import derive_seed
from featinv_diffusion.training.batches import Epochs, Stream
from featinv_diffusion.training.checkpoint import (
    FINAL_PARTIAL,
    Progress,
    TrainingBar,
    check_resumable,
    list_checkpoints,
    load_checkpoint,
    remove_partial,
    replace_final,
    save_checkpoint,
)
from featinv_diffusion.training.config import OptimConfig, RunConfig
from featinv_diffusion.training.group_norm import speed_up_group_norms
from featinv_diffusion.training.muon import Muon

logger = logging.getLogger(__name__)

ONE_CYCLE_RISE, ONE_CYCLE_START, ONE_CYCLE_END = 0.05, 1 / 25, 1 / 250_000
"""Share of the steps in which the learning rate rises, and its two ends as shares of the peak."""


@runtime_checkable
class Task(Protocol):
    """What a training run trains: one module with a loss, frozen companions and a file format."""

    module: nn.Module

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Moves the frozen companions; `dtype` is the reduced precision they may run in."""
        ...

    def loss(self, module: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss and scalars to log; randomness comes from `batch["seed"]`."""
        ...

    def validate(self, module: nn.Module) -> tuple[dict[str, float], dict[str, Image.Image]]:
        """Returns scalars and pictures from the fixed validation images."""
        ...

    def save(self, module: nn.Module, folder: Path) -> None: ...

    def load(self, module: nn.Module, folder: Path) -> None: ...


def make_accelerator(optim: OptimConfig, run: RunConfig) -> Accelerator:
    """The one accelerator of a run; refuses a launch that quietly became several runs of one."""
    _check_settings(optim, run)
    for name in SHARDING:  # before accelerate looks for packages
        if os.environ.get(f"ACCELERATE_USE_{name.upper()}", "false").lower() == "true":
            raise _untested(name)
    accelerator = Accelerator(
        mixed_precision="no" if run.mixed_precision == "fp32" else run.mixed_precision,
        gradient_accumulation_steps=optim.gradient_accumulation_steps,
        cpu=run.cpu,
        log_with=find_tracker(run),
        project_config=ProjectConfiguration(project_dir=run.output),
        # From pinned memory, so that copies to a GPU overlap with its work.
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
    )
    for name in SHARDING:
        if accelerator.distributed_type == name.upper():
            raise _untested(name)
    check_process_group(accelerator)
    return accelerator


SHARDING = ("FSDP", "DeepSpeed")
"""What divides one model among processes; its checkpoints have not been tested."""


def _untested(name: str) -> InputError:
    return InputError(
        f"Each process must hold the whole model, but accelerate was asked for {name}, with which "
        "training and its checkpoints are not tested. Use distributed_type: MULTI_GPU, as in "
        "configs/accelerate/multi_node.yaml."
    )


def find_tracker(run: RunConfig) -> str | None:
    """Returns the tracker that a run writes to; None without one."""
    if run.tracker == "auto":
        return "tensorboard" if is_tensorboard_available() else None
    return None if run.tracker == "none" else run.tracker


def _check_settings(optim: OptimConfig, run: RunConfig) -> None:
    if optim.schedule == "one_cycle" and optim.warmup_steps:
        raise InputError(
            "optim.schedule=one_cycle has its own warm-up, but optim.warmup_steps is "
            f"{optim.warmup_steps}. Leave that at 0."
        )
    if run.tracker == "wandb" and not is_wandb_available():
        raise InputError("run.tracker=wandb needs its package: pip install wandb.")
    if run.tracker == "tensorboard" and not is_tensorboard_available():
        raise InputError(
            "run.tracker=tensorboard needs its package: pip install 'featinv-diffusion[train]'. "
            "Or set run.tracker=none."
        )


def fit(
    task: Task,
    dataset: CropDataset | StreamedCrops,
    accelerator: Accelerator,
    optim: OptimConfig,
    run: RunConfig,
    config_text: str,
) -> Path:
    """Trains `task` to the end, resuming from the newest checkpoint, and returns `output/final`.

    A run that is killed and started again gives the same sample order, losses and weights as one
    that was never interrupted: every random number derives from (seed, epoch, index) or from
    (seed, step, rank), never from the state of a global generator.
    """
    return _Run(task, dataset, accelerator, optim, run, config_text).train()


def learning_rate(config: OptimConfig, step: int, n_steps: int) -> float:
    """The learning rate of optimizer step `step` (counted from 0) of `n_steps`."""
    if config.schedule == "one_cycle":
        return config.lr * _one_cycle(step + 1, n_steps)
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    share = (step - config.warmup_steps) / max(1, n_steps - config.warmup_steps)
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * share))
    return config.lr * (1 - share) if config.schedule == "linear" else config.lr


def _one_cycle(done: int, n_steps: int) -> float:
    """The share of the peak after `done` of `n_steps`; the end is reached at the last step."""
    n_rising = int(ONE_CYCLE_RISE * n_steps)
    if done <= n_rising:
        return ONE_CYCLE_START + (1 - ONE_CYCLE_START) * done / n_rising
    falling = (1 + math.cos(math.pi * (done - n_rising) / (n_steps - n_rising))) / 2
    return ONE_CYCLE_END + (1 - ONE_CYCLE_END) * falling


class _Run:
    def __init__(
        self,
        task: Task,
        dataset: CropDataset | StreamedCrops,
        accelerator: Accelerator,
        optim: OptimConfig,
        run: RunConfig,
        config_text: str,
    ):
        self.task, self.dataset, self.optim, self.run = task, dataset, optim, run
        self.tracker = find_tracker(run)
        self.config_text, self.output, self.progress = config_text, Path(run.output), Progress()
        self.accelerator = accelerator
        task.to(self.accelerator.device, frozen_dtype(run))
        if run.channels_last:
            task.module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
            speed_up_group_norms(task.module)
        if run.compile:
            task.module.compile()  # in place: the names of its weights stay
        self._prepare()
        self.n_steps = self._count_steps()

    def _prepare(self) -> None:
        parameters = _trainable(self.task.module)
        optimizer = make_optimizer(parameters, self.optim)
        self.module: Any
        self.optimizer: Any
        self.module, self.optimizer = self.accelerator.prepare(self.task.module, optimizer)
        batch_size = self.optim.batch_size
        self.batches: Epochs | Stream
        if isinstance(self.dataset, StreamedCrops):
            self.batches = Stream(self.dataset, batch_size, self.accelerator)
        else:
            self.batches = Epochs(self.dataset, batch_size, self.accelerator)
        self.ema = None
        if self.optim.ema_decay is not None:
            self.ema = EMAModel(parameters, decay=self.optim.ema_decay)
            self.ema.to(self.accelerator.device)
        self.accelerator.register_save_state_pre_hook(self._save_hook)
        self.accelerator.register_load_state_pre_hook(self._load_hook)

    def _count_steps(self) -> int:
        if isinstance(self.batches, Stream):
            if self.optim.max_steps is None:
                raise InputError("data.streaming has no known length: set optim.max_steps.")
            return self.optim.max_steps
        if len(self.batches) == 0:
            raise InputError(
                f"The data must fill one batch per process, got {self.batches.n_images} images "
                f"for batches of {self.optim.batch_size}. Lower optim.batch_size."
            )
        per_epoch = math.ceil(len(self.batches) / self.optim.gradient_accumulation_steps)
        return min(
            self.optim.max_steps or self.optim.epochs * per_epoch, self.optim.epochs * per_epoch
        )

    def _save_hook(self, models: list[nn.Module], weights: list[Any], folder: str) -> None:
        if self.accelerator.is_main_process:
            self.task.save(self.accelerator.unwrap_model(models[0]), Path(folder))
        weights.clear()  # else accelerate writes a second copy

    def _load_hook(self, models: list[nn.Module], folder: str) -> None:
        self.task.load(self.accelerator.unwrap_model(models.pop()), Path(folder))

    def train(self) -> Path:
        if self.run.dry_run:
            return self._dry_run()
        if not self.accelerator.is_main_process:
            return self._train()
        self.output.mkdir(parents=True, exist_ok=True)
        with holding(self.output):
            remove_partial(self.output)
            return self._train()

    def _train(self) -> Path:
        self.accelerator.wait_for_everyone()  # until the folder is held
        self.accelerator.print(f"world size {self.accelerator.num_processes}")
        self._resume()
        self._start_tracker()
        self.started = time.monotonic() - self.progress.seconds
        resumed_at = self.progress.step
        if self.accelerator.is_main_process:
            for name in ("losses.jsonl", "validation.jsonl"):
                _cut_back(self.output / name, resumed_at)
        self.accelerator.wait_for_everyone()
        validated = _last_step(self.output / "validation.jsonl") == resumed_at
        self.log = _LossLog(self.output / "losses.jsonl")
        bar = TrainingBar(
            self.n_steps,
            self.progress.step,
            self._samples_per_batch() * self.optim.gradient_accumulation_steps,
            enabled=self.accelerator.is_main_process,
        )
        with bar:
            for batch in self._batches():
                self._micro_step(batch, bar)
        self._list_unreadable()
        if self.progress.step > resumed_at or not validated:
            self._validate()
        if self.progress.step > resumed_at:
            self._checkpoint()
        final = self.output / "final"
        if self.accelerator.is_main_process:
            with self._averaged_weights():
                self._check_finite()
                self.task.save(
                    self.accelerator.unwrap_model(self.module), self.output / FINAL_PARTIAL
                )
            replace_final(self.output)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        return final

    def _samples_per_batch(self) -> int:
        return self.optim.batch_size * self.accelerator.num_processes

    def _batches(self) -> Iterator[dict[str, Any]]:
        if self.progress.step >= self.n_steps:
            return
        for batch in self.batches.read(self.progress):
            self.progress.micro_step += 1
            yield batch
            if self.progress.step >= self.n_steps:
                return

    def _check_finite(self) -> None:
        """Raises `InputError` where a weight is infinite or not a number, before it is saved."""
        module = self.accelerator.unwrap_model(self.module)
        for name, weight in module.state_dict().items():
            if not bool(weight.isfinite().all()):
                raise InputError(
                    f"The weights must be finite, but {name!r} is not after step "
                    f"{self.progress.step}. Nothing of it is saved. Lower optim.lr, or use "
                    "run.mixed_precision=bf16 or fp32 instead of fp16."
                )

    def _micro_step(self, batch: dict[str, Any], bar: TrainingBar) -> None:
        rank = self.accelerator.process_index
        # Dropout draws from the global generator, so it is set anew at each step.
        torch.manual_seed(derive_seed(self.dataset.seed, self.progress.micro_step, rank))
        lr = learning_rate(self.optim, self.progress.step, self.n_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.module.train()
        with self.accelerator.accumulate(self.module):
            with self.accelerator.autocast():
                loss, scalars = self.task.loss(self.module, batch)
            if not bool(loss.isfinite()):
                raise InputError(
                    f"The loss must be finite, but is {loss.item()} at step {self.progress.step}. "
                    "Lower optim.lr, or use run.mixed_precision=bf16 or fp32 instead of fp16."
                )
            self.accelerator.backward(loss)
            if self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self.module.parameters(), self.optim.max_grad_norm)
            try:
                self.optimizer.step()
            except RuntimeError as error:
                if "without overflow" not in str(error):
                    raise
                raise InputError(
                    f"Step {self.progress.step} is too large for the weights' number format. "
                    "Lower optim.lr or optim.weight_decay."
                ) from None
            self.optimizer.zero_grad()
        self._count_unreadable(batch, self.log.add(self.accelerator, loss, scalars, batch))
        if self.accelerator.sync_gradients:
            self._after_step(lr, bar)

    def _count_unreadable(self, batch: dict[str, Any], indices: list[int]) -> None:
        """Remembers the images that could not be read, in checkpoints too."""
        counts: Any = self.accelerator.gather(batch["n_unreadable"])
        for index, n_unreadable in zip(indices, counts.tolist(), strict=True):
            if n_unreadable:
                found = self.batches.unreadable(index, n_unreadable)
                self.progress.unreadable = sorted({*self.progress.unreadable, *found})

    def _list_unreadable(self) -> None:
        if self.accelerator.is_main_process and (found := self.progress.unreadable):
            path = self.output / "unreadable.txt"
            write_text(path, "".join(f"{location}\n" for location in found))
            first = ", ".join(found[:3]) + (", …" if len(found) > 3 else "")
            self.accelerator.print(
                f"{len(found)} images could not be read and were replaced: {first} "
                f"All are listed in {path}."
            )

    def _after_step(self, lr: float, bar: TrainingBar) -> None:
        self.progress.step += 1
        if self.ema is not None:
            self.ema.step(_trainable(self.accelerator.unwrap_model(self.module)))
        values = self.log.write(self.progress.step, lr, main=self.accelerator.is_main_process)
        bar.update(self.progress.step, values["loss"])
        if self.progress.step % self.run.log_every == 0:
            self.accelerator.log({**values, "lr": lr}, step=self.progress.step)
        if self.progress.step == self.n_steps:
            return
        if self.progress.step % self.run.validate_every == 0:
            self._validate()
        if self.progress.step % self.run.checkpoint_every == 0:
            self._checkpoint()

    def _checkpoint(self) -> None:
        self._check_finite()
        self.progress.seconds = time.monotonic() - self.started
        own: Any = [self.batches.state()]
        self.progress.stream = [one for one in gather_object(own) if one is not None]
        save_checkpoint(
            self.accelerator,
            self.output,
            self.progress,
            self.ema,
            self.config_text,
            self.run.checkpoints_total_limit,
        )

    def _resume(self) -> None:
        checkpoints = list_checkpoints(self.output)
        if not checkpoints:
            return
        if not self.run.resume:
            raise InputError(
                f"{self.output} holds checkpoints and run.resume is false. Choose a new run.output."
            )
        newest = checkpoints[-1]
        n_processes = self.accelerator.num_processes
        is_exact = check_resumable(newest, self.config_text, n_processes, self.run)
        self.progress = load_checkpoint(self.accelerator, newest, self.ema)
        if self.ema is not None:
            self.ema.to(self.accelerator.device)  # checkpoints are read to the CPU
        self.accelerator.print(f"Resumed from {newest}")
        if not is_exact and self.accelerator.is_main_process:
            logger.warning(
                "The processes or settings are not those of the checkpoint: the run %s, but does "
                "not equal an uninterrupted one.",
                self.batches.elsewhere,
            )

    def _start_tracker(self) -> None:
        if self.tracker is None:
            if self.run.tracker == "auto":
                self.accelerator.print("No tracker: tensorboard is not installed.")
            return
        # What is logged beyond the checkpoint is logged again.
        options = {"tensorboard": {"purge_step": self.progress.step + 1}}
        self.accelerator.init_trackers(
            "tracker", init_kwargs=options if self.tracker == "tensorboard" else {}
        )

    def _averaged_weights(self):
        return _swapped_in(self.ema, self.accelerator.unwrap_model(self.module))

    def _validate(self) -> None:
        if self.accelerator.is_main_process:
            module = self.accelerator.unwrap_model(self.module)
            module.eval()
            with torch.no_grad(), self._averaged_weights():
                scalars, pictures = self.task.validate(module)
            self.accelerator.log(
                {f"validation/{k}": v for k, v in scalars.items()}, step=self.progress.step
            )
            listing = ", ".join(f"{k} {v:.4f}" for k, v in scalars.items())
            self.accelerator.print(f"step {self.progress.step}: {listing}")
            minutes = round((time.monotonic() - self.started) / 60, 1)
            record = {"step": self.progress.step, "minutes": minutes, **scalars}
            with (self.output / "validation.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")
            for name, picture in pictures.items():
                self._log_picture(name, picture)
        self.accelerator.wait_for_everyone()

    def _log_picture(self, name: str, picture: Image.Image) -> None:
        folder = self.output / "validation"
        folder.mkdir(exist_ok=True)
        picture.save(folder / f"{name}-{self.progress.step:08d}.png")
        if self.tracker is not None:
            tracker: Any = self.accelerator.get_tracker(self.tracker)
            layout = {"dataformats": "NHWC"} if self.tracker == "tensorboard" else {}
            tracker.log_images({name: np.asarray(picture)[None]}, step=self.progress.step, **layout)

    def _dry_run(self) -> Path:
        batch = next(self.batches.read(Progress()))
        trainable = sum(p.numel() for p in _trainable(self.task.module))
        copies = 4 + (self.ema is not None)  # weights, gradient and two Adam moments, in fp32
        self.accelerator.print(self.config_text)
        self.accelerator.print(
            f"trainable parameters: {trainable:,}\n"
            f"weights, gradients and optimizer state: {trainable * 4 * copies / 2**30:.2f} GiB\n"
            f"processes: {self.accelerator.num_processes}, optimizer steps: {self.n_steps:,}"
        )
        for key, value in batch.items():
            self.accelerator.print(f"batch[{key!r}]: {tuple(value.shape)} {value.dtype}")
        return self.output


def make_optimizer(parameters: list[nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    """Returns the optimizer of the settings; its rate is set anew at each step."""
    common = {"lr": config.lr, "betas": config.betas, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **common)
    return Muon(parameters, nesterov=True, adjust_lr_fn="original", fallback_lr_scale=0.1, **common)


class _LossLog:
    """`losses.jsonl`: one line per optimizer step, with a checksum of the sample order."""

    def __init__(self, path: Path):
        self.path, self.pending, self.order = path, [], []

    def add(
        self,
        accelerator: Accelerator,
        loss: Tensor,
        scalars: dict[str, Tensor],
        batch: Mapping[str, Any],
    ) -> list[int]:
        """Returns the indices of the images of all processes."""
        names = ["loss", *scalars]
        values = torch.stack([x.detach().float() for x in (loss, *scalars.values())])
        self.pending.append((names, accelerator.reduce(values, "mean")))
        gathered: Any = accelerator.gather(batch["index"])
        self.order += gathered.tolist()
        return gathered.tolist()

    def write(self, step: int, lr: float, main: bool) -> dict[str, float]:
        names = self.pending[0][0]
        values = torch.stack([v for _, v in self.pending]).mean(0).tolist()
        record = dict(zip(names, values, strict=True))
        if main:
            line = {"step": step, **record, "lr": lr, "order": f"{derive_seed(*self.order):016x}"}
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        self.pending, self.order = [], []
        return record


def _cut_back(path: Path, step: int) -> None:
    """Drops the lines after `step`, which are computed again, and a line cut off by a kill."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        lines = [x for x in path.read_text().splitlines() if x.endswith("}")]
        write_text(path, "".join(x + "\n" for x in lines if json.loads(x)["step"] <= step))


class _swapped_in:
    """Context in which `module` holds the averaged weights; does nothing without an average."""

    def __init__(self, ema: EMAModel | None, module: nn.Module):
        self.ema, self.parameters = ema, _trainable(module)

    def __enter__(self) -> None:
        if self.ema is not None:
            self.ema.store(self.parameters)
            self.ema.copy_to(self.parameters)

    def __exit__(self, *_: object) -> None:
        if self.ema is not None:
            self.ema.restore(self.parameters)


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def frozen_dtype(run: RunConfig) -> torch.dtype:
    """Returns the number format of what is not trained."""
    table = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return table[run.mixed_precision]


def _last_step(path: Path) -> int | None:
    """Returns the step of the last record of a log; None where there is none."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return json.loads(lines[-1])["step"] if lines else None
