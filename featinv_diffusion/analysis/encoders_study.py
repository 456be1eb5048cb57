"""A comparison of encoders from its settings to a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from featinv_diffusion import __version__
from featinv_diffusion.analysis.encoders import Comparison, compare_encoders
from featinv_diffusion.analysis.encoders_figure import write_comparison
from featinv_diffusion.analysis.encoders_scoring import open_scorers
from featinv_diffusion.analysis.encoders_settings import EncoderSettings, open_encoders
from featinv_diffusion.analysis.encoders_summary import summarise, to_markdown
from featinv_diffusion.analysis.modular_figures import write_grid
from featinv_diffusion.analysis.picture_set import N_DEFAULT
from featinv_diffusion.errors import InputError
from featinv_diffusion.evaluation.dataset import open_images
from featinv_diffusion.evaluation.selection import digest, select_items
from featinv_diffusion.files import replacing, write_text
from featinv_diffusion.manifest import read_environment

ProgressBar = Callable[[int], AbstractContextManager[Callable[[float], None]]]
"""From the number of samples to a bar that is advanced by samples."""

TITLE = "Images from the features of each encoder"


def run_comparison(
    settings: EncoderSettings, output: Path, progress_bar: ProgressBar, command: str
) -> dict[str, Any]:
    """Compares, writes metrics.json, metrics.md, per_image.parquet and two figures.

    Raises:
        InputError: settings, images or models that cannot be used.
    """
    images = open_images(settings.data, settings.split, settings.classes, exclude=output)
    items = select_items(images, settings.selection)
    if settings.n_images is None:
        items = items[:N_DEFAULT]
    if len(items) < 2:
        raise InputError("A comparison needs at least 2 images, but 1 was chosen. Take more.")
    encoders = open_encoders(settings)
    backbones = [encoder.inverter.spec.backbone for encoder in encoders]
    scorers = open_scorers(settings.scorers, backbones, settings.grey)
    output.mkdir(parents=True, exist_ok=True)  # a place that refuses is found before the work
    with progress_bar(len(items) * len(encoders)) as advance:
        size = settings.batch_size
        result = compare_encoders(encoders, scorers, images, items, size, advance)
    metrics = {
        "version": __version__,
        "analysis": "encoders",
        "command": command,
        "settings": {**asdict(settings), "scorers": [s.backbone.name for s in scorers]},
        "n_images": len(items),
        "images_sha256": digest(item.id for item in items),
        **summarise(result, settings.seed),
        "environment": read_environment(str(encoders[0].backbone.device)),
    }
    _write(result, metrics, output)
    return metrics


def _write(result: Comparison, metrics: dict[str, Any], output: Path) -> None:
    """metrics.json comes last: it completes the folder."""
    (output / "metrics.json").unlink(missing_ok=True)
    columns = {"original": result.original, **result.examples}
    note = f"{metrics['n_images']} images; pixels are compared at {result.size}×{result.size}."
    write_grid(columns, output / "reconstructions.png", TITLE, [note])
    write_comparison(metrics, output / "encoders.png", TITLE)
    table: dict[str, Any] = {"id": result.ids}
    for label, figures in result.columns.items():
        table |= {f"{label}/{name}": values.tolist() for name, values in figures.items()}
    with replacing(output / "per_image.parquet") as partial:
        parquet.write_table(pa.table(table), partial)
    write_text(output / "metrics.md", to_markdown(metrics))
    write_text(output / "metrics.json", json.dumps(metrics, indent=2) + "\n")
