"""A bar on stderr while samples are made."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from featinv_diffusion.inverters.base import Inverter

logger = logging.getLogger(__name__)

Advance = Callable[[float], None]
"""Called with the number of samples, or images, that are done."""


@contextmanager
def progress_bar(
    total: float, enabled: bool = True, doing: str = "sampling", noun: str = "samples"
) -> Iterator[Advance]:
    """Yields a function that advances a bar.

    There is none where stderr is no terminal, or where the package's notes are switched off.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn(doing),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("of {task.total:.0f} " + noun),
        TimeRemainingColumn(),
    )
    shown = enabled and console.is_terminal and logger.isEnabledFor(logging.WARNING)
    with Progress(*columns, console=console, disable=not shown) as bar:
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
