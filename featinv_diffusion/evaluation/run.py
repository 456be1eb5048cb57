"""An evaluation from settings to `metrics.json`, on any number of processes."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from featinv_diffusion import __version__
from featinv_diffusion.data import to_images
from featinv_diffusion.errors import InputError
from featinv_diffusion.evaluation.dataset import ImageSet, open_images
from featinv_diffusion.evaluation.distribution import measure_distributions
from featinv_diffusion.evaluation.models import Opened, open_evaluator
from featinv_diffusion.evaluation.report import to_markdown
from featinv_diffusion.evaluation.result import ShardResult
from featinv_diffusion.evaluation.selection import Item, digest, select_items
from featinv_diffusion.evaluation.settings import EvaluationSettings
from featinv_diffusion.evaluation.storage import (
    Shard,
    discard_run,
    make_shards,
    merge_rows,
    write_rows,
    write_shard,
)
from featinv_diffusion.evaluation.summary import summarise
from featinv_diffusion.files import write_text
from featinv_diffusion.images import to_pil, write_png
from featinv_diffusion.manifest import read_environment
from featinv_diffusion.metrics.perceptual import Lpips
from featinv_diffusion.processes import device_name
from featinv_diffusion.shards import check_run

logger = logging.getLogger(__name__)

METRICS, TABLE, IMAGES = "metrics.json", "metrics.md", "images"

ProgressBar = Callable[[int], AbstractContextManager[Callable[[float], None]]]
"""From the number of samples to a bar that is advanced by samples."""


def evaluate(
    settings: EvaluationSettings,
    output: Path,
    accelerator: Accelerator,
    progress_bar: ProgressBar,
    command: str = "",
) -> dict[str, Any] | None:
    """Does this process's share; writes and returns the figures on the main process, else None.

    The same call again finishes what was interrupted and tries again what failed.

    Raises:
        InputError: settings, data or models that cannot be used, or not one image that could.
    """
    settings = replace(settings, device=_choose_device(settings.device, accelerator))
    with accelerator.main_process_first():  # one builds caches, the others find them
        images = open_images(settings.data, settings.split, settings.classes, exclude=output)
    items = select_items(images, settings)
    shards = make_shards(items, settings.shard_size, output)
    mine = [s for s in shards if not s.is_done][accelerator.process_index :: _n(accelerator)]
    taken = [item for shard in mine for item in shard.items]
    with progress_bar(len(taken) + 2 * sum(item.has_null for item in taken)) as advance:
        with accelerator.main_process_first():
            opened = open_evaluator(settings, images, advance)
        identity = {
            **opened.settings.identity(),
            **opened.weights,
            "ids_sha256": digest(item.id for item in items),
            "data_fingerprint": images.fingerprint,
        }
        check_run(identity, output, write=accelerator.is_main_process)
        accelerator.wait_for_everyone()  # all have counted what is done before any does more
        for shard in mine:
            result = opened.evaluator.run(shard.items)
            if settings.save_images:
                _save_images(result, output)
            write_shard(result, shard)
        accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return None
    return _finish(opened, images, items, shards, output, command)


def _finish(
    opened: Opened,
    images: ImageSet,
    items: list[Item],
    shards: list[Shard],
    output: Path,
    command: str,
) -> dict[str, Any]:
    for note in (notes := [*images.notes, *opened.notes]):
        logger.warning("%s", note)
    rows = merge_rows(shards)
    if not rows.ids:
        discard_run(output)
        reasons = "\n".join(failure["error"] for failure in rows.failures)
        raise InputError(f"No image could be evaluated.\n{reasons}")
    settings, evaluator = opened.settings, opened.evaluator
    figures = summarise(rows.columns, settings.evaluated_by)
    figures["label_accuracy"]["labels_matched_by"] = opened.labels_matched_by
    if figures.get("lpips") and isinstance(lpips := evaluator.observers.lpips, Lpips):
        figures["lpips"]["conventions"] = lpips.conventions
    data = {
        "name": settings.data,
        "split": images.split,
        "n_available": len(images),
        "n_classes": len({item.label for item in items if item.label is not None}) or None,
        "ids_sha256": digest(item.id for item in items),
        "pixels_sha256": digest(rows.digests),
        "fingerprint": images.fingerprint,
    }
    distribution = measure_distributions(
        shards,
        evaluator.extractors,
        {**data, "preparation": f"centre squares scaled to {evaluator.image_size} pixels"},
        reference=settings.reference,
        size=evaluator.image_size,
        batch_size=settings.batch_size,
    )
    metrics = {
        **figures,
        "distribution": distribution,
        "n_images": len(rows.ids),
        "failures": rows.failures,
        "partial_failures": rows.partial_failures,
        "notes": notes,
        "data": data,
        "settings": asdict(settings),
        **opened.weights,
        "version": __version__,
        "command": command,
        "environment": read_environment(settings.device),
    }
    write_rows(rows, output)
    write_text(output / TABLE, to_markdown(metrics))
    write_text(output / METRICS, json.dumps(metrics, indent=2, allow_nan=False) + "\n")
    return metrics


def _choose_device(asked: str, accelerator: Accelerator) -> str:
    """One process runs where it is told, several where accelerate put them."""
    if _n(accelerator) == 1:
        return asked
    given = device_name(accelerator)
    if asked not in ("auto", accelerator.device.type):
        raise InputError(
            f"Several processes run on the devices that accelerate gives them, here {given!r}, but "
            f"the device {asked!r} was asked for. Leave it out."
        )
    return given


def _n(accelerator: Accelerator) -> int:
    return accelerator.num_processes


def _save_images(result: ShardResult, output: Path) -> None:
    if result.pixels is None:
        return
    for item, picture in zip(result.items, to_pil(to_images(result.pixels)), strict=True):
        write_png(picture, output / IMAGES / f"{item.id.replace(':', '-')}.png")
