"""A bar on stderr while samples are made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from featinv_diffusion.inverters.base import Inverter

Advance = Callable[[float], None]
"""Called with the number of samples, or images, that are done."""


@contextmanager
def progress_bar(
    total: float, enabled: bool = True, doing: str = "sampling", noun: str = "samples"
) -> Iterator[Advance]:
    """Yields a function that advances a bar; there is none where stderr is no terminal."""
    console = Console(stderr=True)
    columns = (
        TextColumn(doing),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("of {task.total:.0f} " + noun),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not (enabled and console.is_terminal)) as bar:
        task = bar.add_task(doing, total=total)
        yield lambda share: bar.advance(task, share)


@contextmanager
def advancing(inverter: Inverter, n_samples: float, progress: bool) -> Iterator[None]:
    """Shows a bar while the inverter makes `n_samples`, if `progress`."""
    if not progress:
        yield
        return
    before = inverter.on_progress
    with progress_bar(n_samples) as inverter.on_progress:
        try:
            yield
        finally:
            inverter.on_progress = before
