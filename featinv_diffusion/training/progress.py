"""A progress bar with images per second and time left; plain lines where there is no terminal."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class TrainingBar:
    """Shows optimizer steps, the loss, images per second and the time left."""

    def __init__(self, n_steps: int, step: int, images_per_step: int, enabled: bool):
        self.images_per_step, self.enabled, self.first = images_per_step, enabled, step
        self.terminal = sys.stderr.isatty()
        self.start = self.last_line = time.monotonic()
        self.n_steps = n_steps
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f} · {task.fields[rate]:.0f} images/s"),
            TimeRemainingColumn(),
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
