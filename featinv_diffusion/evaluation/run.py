"""`evaluate`: how well the features of a data set come back, beside nulls and ceilings."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from featinv_diffusion import __version__
from featinv_diffusion.data.crops import to_images
from featinv_diffusion.data.selection import Item, digest, select_items
from featinv_diffusion.data.sets import ImageSet, open_images, open_pictures, set_of_maps
from featinv_diffusion.errors import InputError
from featinv_diffusion.evaluation.evaluator import Measured
from featinv_diffusion.evaluation.models import Opened, open_evaluator
from featinv_diffusion.evaluation.report import (
    cosine_bars,
    describe,
    few_images_notes,
    summarise,
    to_markdown,
)
from featinv_diffusion.evaluation.settings import EvaluationSettings
from featinv_diffusion.evaluation.similarity import measure_similarity
from featinv_diffusion.evaluation.storage import measure_distributions, merge_rows, write_unit
from featinv_diffusion.features.maps import is_maps_file, load_maps
from featinv_diffusion.images import Picture, as_picture, to_pil, write_png
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.inverters.diffusion import DiffusionInverter
from featinv_diffusion.inverters.open import open_inverter
from featinv_diffusion.metrics.perceptual import Lpips
from featinv_diffusion.processes import Alone, Processes, Worker, device_name, joins
from featinv_diffusion.runs.progress import advancing
from featinv_diffusion.runs.record import RunFolder, read_environment, reserved
from featinv_diffusion.runs.scope import sampling_of
from featinv_diffusion.runs.units import (
    FILES,
    Unit,
    begin_run,
    discard_run,
    make_units,
    open_units,
    run_units,
    share,
)
from featinv_diffusion.runs.workers import Call, as_recorded, write_call
from featinv_diffusion.settings import SampleSettings, changed, flat_fields, from_flat, to_flat
from featinv_diffusion.types import FeatureMaps, FeatureSpec

logger = logging.getLogger(__name__)

METRICS, TABLE, PER_IMAGE, IMAGES = "metrics.json", "metrics.md", "per_image.parquet", "images"

Data: TypeAlias = "str | Path | ImageSet | FeatureMaps | Picture | Sequence[Picture]"


def evaluate(
    inverter: Inverter,
    data: Data,
    *,
    n_images: int | None = None,
    n_null_images: int = 256,
    evaluated_by: Sequence[str] = (),
    split: str = "validation",
    seed: int = 0,
    batch_size: int = 8,
    output: str | Path | None = None,
    progress: bool = False,
    **options: Any,
) -> Evaluation:
    """Reconstructs a data set once per image and measures how well its features come back.

    Each figure has a bootstrap interval and stands beside nulls (reconstructions from permuted
    cells, of another image, samples without features) and ceilings (the autoencoder's round trip,
    the resized original).

    Args:
        data: a folder of pictures, a parquet file or a Hub name, as of `featinv evaluate --data`;
            or pictures: paths, PIL images, arrays or tensors; or feature maps, a file of them or
            `FeatureMaps`, of which the cosine, matches and their nulls are taken.
        n_images: number of images, drawn evenly over classes; None takes all.
        n_null_images: images for the nulls that cost a sample each.
        evaluated_by: names of other backbones that look at the reconstructions. Where these were
            made by looking through the own one, at least one other looks.
        split: split of the data, where they have any.
        seed: random seed; the noise also depends on the file name.
        batch_size: samples per batch; it decides the last bits.
        output: folder to write to, as the command does; the same call again finishes what was
            interrupted. None works in a temporary folder.
        progress: show a progress bar on stderr.
        **options: any other field of `EvaluationSettings`, such as `per_class`, `lpips`, `fid`,
            `baselines_from`.

    Raises:
        InputError: settings, data or models that cannot be used, or not one image that could.
    """
    if taken := sorted(options.keys() & flat_fields(SampleSettings).keys()):
        raise InputError(f"The inverter decides {', '.join(taken)}: give that to load_inverter.")
    is_named = isinstance(data, str | Path)
    settings = from_flat(
        EvaluationSettings,
        {
            **to_flat(_sampling_of(inverter, seed, batch_size)),
            "data": str(data) if is_named else _in_python(data),
            "n_images": n_images,
            "n_null_images": n_null_images,
            "evaluated_by": tuple(evaluated_by),
            "split": split,
            **options,
        },
    )
    exclude = None if output is None else Path(output)
    images = _open_named(settings, exclude, inverter.spec) if is_named else _to_set(data)
    with _folder(output) as folder:
        result = _measure(inverter, images, settings, folder, Alone(), progress)
        assert result is not None
        if output is not None:
            result.save(output)
    return result


def run_evaluation(
    settings: EvaluationSettings,
    output: Path,
    processes: Processes,
    command: str = "",
    say: Callable[[str], None] = logger.info,
) -> Evaluation | None:
    """Does this process's share; writes and returns the result on the main process, else None.

    The same call again finishes what was interrupted and tries again what failed.

    Args:
        processes: an `Accelerator`; or a `Worker`, which returns None, and then a `Joiner`.
        say: told what this process is about to make.

    Raises:
        InputError: as `evaluate`; a `Joiner` where a worker is not done.
    """
    worker = processes if isinstance(processes, Worker) else None
    with reserved(output, worker=worker) if processes.is_main_process else nullcontext():
        return _run_evaluation(settings, output, processes, command, say)


def _run_evaluation(
    settings: EvaluationSettings,
    output: Path,
    processes: Processes,
    command: str,
    say: Callable[[str], None],
) -> Evaluation | None:
    given = settings
    settings = changed(settings, device=_choose_device(settings.sampling.device, processes))
    with processes.main_process_first():  # one builds caches, the others find them
        images = _open_named(settings, output)
    select_items(images, settings.selected)  # refuses what it cannot before models are loaded
    with processes.main_process_first():
        inverter = open_inverter(settings.sampling)
    assert inverter.settings is not None
    settings = replace(settings, sampling=inverter.settings)
    if images.maps is not None:
        images = _open_named(settings, output, inverter.spec)
    result = _measure(inverter, images, settings, output, processes, True, command, given, say)
    if result is not None:
        result.save(output)
    return result


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation:
    """How well features come back; it shows itself as a table in a notebook.

    Args:
        metrics: what `metrics.json` holds: each figure with its interval, nulls and ceilings.
        table: one row per image, as `per_image.parquet`; NaN where a figure was not taken.
    """

    metrics: dict[str, Any]
    table: pa.Table

    def rows(self) -> list[dict[str, Any]]:
        """Returns one dict per image."""
        return self.table.to_pylist()

    def summary(self) -> str:
        """Returns the main figures in one sentence."""
        return describe(self.metrics)

    def figure(self) -> Figure:
        """Draws the cosine of reconstructions, nulls and ceilings with their intervals."""
        return cosine_bars(self.metrics)

    def save(self, folder: str | Path) -> Path:
        """Writes `per_image.parquet`, `metrics.md` and `metrics.json`."""
        run = RunFolder(folder, METRICS)
        run.table(PER_IMAGE, self.table)
        run.text(TABLE, to_markdown(self.metrics))
        run.complete(self.metrics)
        return run.folder

    def __repr__(self) -> str:
        return f"Evaluation: {self.summary()}"

    def _repr_markdown_(self) -> str:
        return to_markdown(self.metrics)


def _measure(
    inverter: Inverter,
    images: ImageSet,
    settings: EvaluationSettings,
    output: Path,
    processes: Processes,
    progress: bool,
    command: str = "",
    given: EvaluationSettings | None = None,
    say: Callable[[str], None] = logger.info,
) -> Evaluation | None:
    """Does this process's share of the units; returns the result on the main process."""
    items = select_items(images, settings.selected, settings.seed)
    with processes.main_process_first():
        opened = open_evaluator(inverter, images, settings)
    identity = {
        **opened.settings.identity(),
        **opened.weights,
        "ids_sha256": digest(item.id for item in items),
        "data_fingerprint": images.fingerprint,
    }
    identity = as_recorded(identity, output, processes)
    begin_run(identity, output, processes)
    # A single image has no other to be compared with, so that none is left for a unit of its own.
    units = make_units(items, settings.shard_size, output, identity, least=2)
    if isinstance(processes, Worker):
        n_workers, values = processes.num_processes, to_flat(given or settings)
        write_call(output, Call("evaluate", n_workers, values, line=command, n_units=len(units)))
    todo = open_units(units, processes)
    mine = [item for unit in share(todo, processes) for item in unit.items]
    evaluator, shown = opened.evaluator, progress and processes.is_main_process
    if mine:
        if processes.is_main_process:
            say(opened.cost(mine))
        evaluator = opened.ready(items, shown)

    def work(unit: Unit[Item]) -> Mapping[str, Any]:
        result = evaluator.run(unit.items)
        saved = _save_images(result, output) if settings.save_images else []
        return {**write_unit(result, unit), FILES: saved}

    n_samples = len(mine) + 2 * sum(item.has_null for item in mine)
    with advancing(inverter, n_samples, shown):
        run_units(todo, work, processes)
    if not joins(processes):
        return None
    return _join(opened, images, items, units, output, command)


def _join(
    opened: Opened,
    images: ImageSet,
    items: list[Item],
    units: list[Unit[Item]],
    output: Path,
    command: str,
) -> Evaluation:
    """Joins what all processes measured."""
    for note in (notes := [*images.notes, *opened.notes]):
        logger.warning("%s", note)
    rows = merge_rows(units)
    if not rows.ids:
        discard_run(output)
        reasons = "\n".join(failure["error"] for failure in rows.failures)
        raise InputError(f"No image could be evaluated.\n{reasons}")
    settings, evaluator = opened.settings, opened.evaluator
    figures = summarise(rows.columns, settings.evaluated_by)
    figures["label_accuracy"]["labels_matched_by"] = opened.labels_matched_by
    labels = rows.table["label"].to_pylist()
    figures |= measure_similarity(units, labels, opened.gallery(items))
    if figures.get("lpips") and isinstance(lpips := evaluator.lpips, Lpips):
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
        units,
        evaluator.extractors,
        {**data, "preparation": f"centre squares scaled to {evaluator.image_size} pixels"},
        reference=settings.reference,
        size=evaluator.image_size,
        batch_size=settings.sampling.batch_size,
    )
    metrics = {
        **figures,
        "distribution": distribution,
        "n_images": len(rows.ids),
        "optimised_for": opened.evaluator.own.name if evaluator.inverter.is_optimised else None,
        "failures": rows.failures,
        "partial_failures": rows.partial_failures,
        "notes": [*notes, *few_images_notes(rows.columns)],
        "data": data,
        "settings": settings.content(),
        **opened.weights,
        "version": __version__,
        "command": command,
        "environment": read_environment(settings.sampling.device),
    }
    return Evaluation(metrics, rows.table)


def _choose_device(asked: str, processes: Processes) -> str:
    """One process runs where it is told, several run where accelerate put them."""
    if isinstance(processes, Alone) or processes.num_processes == 1:
        return asked
    given = device_name(processes)
    if asked not in ("auto", processes.device.type):
        raise InputError(
            f"Several processes run on the devices that accelerate gives them, here {given!r}, "
            f"got the device {asked!r}. Leave it out."
        )
    return given


def _save_images(result: Measured, output: Path) -> list[Path]:
    if result.pixels is None:
        return []
    paths = [output / IMAGES / f"{item.id.replace(':', '-')}.png" for item in result.items]
    for path, picture in zip(paths, to_pil(to_images(result.pixels)), strict=True):
        write_png(picture, path)
    return paths


@contextmanager
def _folder(output: str | Path | None) -> Iterator[Path]:
    if output is not None:
        with reserved(Path(output)):
            yield Path(output)
        return
    with TemporaryDirectory() as folder:
        yield Path(folder)


# ---- What is evaluated ---------------------------------------------------------------------------


def _open_named(
    settings: EvaluationSettings, output: Path | None, spec: FeatureSpec | None = None
) -> ImageSet:
    if is_maps_file(settings.data):
        return set_of_maps(load_maps(str(settings.data), spec))
    return open_images(settings.data, settings.split, settings.classes, exclude=output)


def _to_set(data: Data) -> ImageSet:
    """Returns pictures as a set without classes; names that are not unique get their number."""
    if isinstance(data, ImageSet):
        return data
    if isinstance(data, FeatureMaps):
        return set_of_maps(data)
    is_one = isinstance(data, Image.Image) or getattr(data, "ndim", 4) == 3
    pictures: list[Any] = [data] if is_one else list(data)  # pyright: ignore[reportArgumentType]
    if not pictures:
        raise InputError("There must be at least one picture to evaluate, got none.")
    if all(isinstance(picture, str | Path) for picture in pictures):
        images = open_pictures(pictures)
    else:
        images = ImageSet(
            ids=[f"picture-{i:05d}" for i in range(len(pictures))],
            labels=None,
            class_names=None,
            read=lambda index: as_picture(pictures[index]),
            fingerprint=digest(map(_content_of, pictures)),
        )
    count = Counter(images.ids)
    ids = [name if count[name] == 1 else f"{i}/{name}" for i, name in enumerate(images.ids)]
    return replace(images, ids=ids)


def _in_python(data: Data) -> str:
    """Returns what the record says of data without a name."""
    maps = isinstance(data, FeatureMaps) or (isinstance(data, ImageSet) and data.maps is not None)
    return f"{'feature maps' if maps else 'pictures'} given in Python"


def _content_of(picture: Picture) -> str:
    """Returns the digest of a picture's pixels."""
    held = as_picture(picture) if isinstance(picture, str | Path) else picture
    array = np.asarray(held.cpu() if isinstance(held, Tensor) else held)
    shape = f"{array.dtype} {array.shape}\n".encode()
    return hashlib.sha256(shape + array.tobytes()).hexdigest()


def _sampling_of(inverter: Inverter, seed: int, batch_size: int) -> SampleSettings:
    """Returns how the inverter samples; of one that was built by hand as far as it is known."""
    settings = inverter.settings
    if settings is None:
        spec, device = inverter.spec, str(inverter.require_backbone().device)
        settings = SampleSettings(backbone=spec.backbone, layer=spec.layer, device=device)
        if isinstance(inverter, DiffusionInverter):
            settings = replace(settings, **sampling_of(inverter))
        else:
            settings = replace(settings, inverter=type(inverter).__name__)
    return replace(settings, n_samples=1, seed=seed, batch_size=batch_size)
