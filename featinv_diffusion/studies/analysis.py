"""What the studies of many images share: a result with several figures, and how these are drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from featinv_diffusion.metrics.statistics import Interval
from featinv_diffusion.runs.record import RunFolder, to_png

METRICS = "metrics.json"
N_DEFAULT = 250
"""Number of images, if the data have as many and no number is asked for."""


@dataclass(frozen=True, eq=False, repr=False)
class Analysis:
    """What a study of many images found. It shows its first figure in a notebook.

    Args:
        metrics: everything that was measured, as `metrics.json` holds it.
        figures: the figures by file name.
        lines: the main results, a sentence each.
        table: the measurements as rows.
    """

    metrics: dict[str, Any]
    figures: dict[str, Figure]
    lines: list[str] = field(default_factory=list)
    table: list[dict[str, Any]] = field(default_factory=list)

    def figure(self) -> Figure:
        """Returns the first figure; `figures` holds all of them by file name."""
        return next(iter(self.figures.values()))

    def rows(self) -> list[dict[str, Any]]:
        """Returns the measurements as a table, one dict per row."""
        return self.table

    def summary(self) -> str:
        """Returns the main results."""
        return "\n".join(self.lines)

    def save(self, folder: str | Path, **made_by: Any) -> Path:
        """Writes the figures and, last, `metrics.json`.

        Args:
            made_by: further entries, which `metrics.json` holds before the measurements.
        """
        run = RunFolder(folder, METRICS)
        self._write(run, made_by)
        for name, figure in self.figures.items():
            run.figure(name, figure)
        run.complete({**made_by, **self.metrics})
        return run.folder

    def _write(self, run: RunFolder, made_by: Mapping[str, Any]) -> None:
        """Writes what a study has besides."""

    def _repr_png_(self) -> bytes:
        return to_png(self.figure())

    def __repr__(self) -> str:
        return f"{type(self).__name__}: {self.summary()}"


def to_dicts(intervals: Mapping[str, Interval | None]) -> dict[str, Any]:
    """Returns intervals as JSON holds them."""
    return {name: None if value is None else asdict(value) for name, value in intervals.items()}


def to_rows(intervals: Mapping[str, Interval | None], **key: Any) -> list[dict[str, Any]]:
    """Returns intervals as rows of a table, after a key that they share; None is left out."""
    known = {name: value for name, value in intervals.items() if value is not None}
    return [{**key, "name": name, **asdict(value)} for name, value in known.items()]
