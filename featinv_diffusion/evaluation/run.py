"""An evaluation from settings to `metrics.json`, on any number of processes."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from torch import nn

from featinv_diffusion import __version__
from featinv_diffusion.backbones import SHORT_NAMES, Backbone, list_backbones, load_backbone
from featinv_diffusion.backbones.base import LAST
from featinv_diffusion.data.crops import to_images
from featinv_diffusion.data.selection import Item, digest, select_items
from featinv_diffusion.data.sets import ImageSet, open_images
from featinv_diffusion.diffusion.folders import without_progress_bars
from featinv_diffusion.errors import InputError
from featinv_diffusion.evaluation.evaluator import OWN, Evaluator, Observers, ShardResult
from featinv_diffusion.evaluation.report import summarise, to_markdown
from featinv_diffusion.evaluation.settings import EvaluationSettings
from featinv_diffusion.files import replacing, write_text
from featinv_diffusion.images import to_pil, write_png
from featinv_diffusion.inverters.open import BUNDLED, open_chosen
from featinv_diffusion.metrics.distribution import (
    FeatureSample,
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from featinv_diffusion.metrics.extractors import (
    ClassifierFeatures,
    ImageFeatures,
    InceptionFeatures,
    load_dinov2,
)
from featinv_diffusion.metrics.perceptual import Lpips
from featinv_diffusion.metrics.reference import check_reference, load_reference
from featinv_diffusion.metrics.statistics import FeatureMoments
from featinv_diffusion.processes import device_name
from featinv_diffusion.runs.record import read_environment
from featinv_diffusion.runs.shards import RUN, check_run, describe_inverter, weights_sha256

# ---- What an evaluation keeps on disk while it runs, and reads back at its end -------------------

SHARDS, ROWS, FEATURES = "shards", "rows.parquet", "features.npz"
PER_IMAGE = "per_image.parquet"
RECONSTRUCTED, ORIGINAL = "reconstructed", "original"
_FAILURES, _PARTIAL = b"failures", b"partial_failures"


@dataclass(frozen=True)
class Shard:
    """A slice of the items and its folder."""

    folder: Path
    items: tuple[Item, ...]

    @property
    def is_done(self) -> bool:
        """Whether it was measured and nothing failed."""
        path = self.folder / ROWS
        return path.is_file() and not any(_read_failures(pq.read_schema(path)))


@dataclass(frozen=True)
class Rows:
    """The rows of all shards in the order of the items.

    Args:
        table: of `per_image.parquet`.
        failures: images that could not be measured.
        partial_failures: figures of single images that could not be.
    """

    table: pa.Table
    ids: list[str]
    digests: list[str]
    columns: dict[str, np.ndarray]
    failures: list[dict[str, str]]
    partial_failures: list[dict[str, str]]


def make_shards(items: Sequence[Item], size: int, output: Path) -> list[Shard]:
    """Cuts the items into slices of `size`; a single last one joins the slice before it."""
    firsts = list(range(0, len(items), size))
    if len(firsts) > 1 and len(items) - firsts[-1] == 1:
        firsts.pop()
    ends = [*firsts[1:], len(items)]
    return [
        Shard(output / SHARDS / f"{number:05d}", tuple(items[first:end]))
        for number, (first, end) in enumerate(zip(firsts, ends, strict=True))
    ]


def write_shard(result: ShardResult, shard: Shard) -> None:
    """Writes a shard; it is done once its rows are there."""
    for name in (ROWS, FEATURES):  # of a time before, when something failed
        (shard.folder / name).unlink(missing_ok=True)
    if result.reconstructed:
        arrays = {f"{RECONSTRUCTED}/{name}": v for name, v in result.reconstructed.items()}
        arrays |= {f"{ORIGINAL}/{name}": v for name, v in result.original.items()}
        with replacing(shard.folder / FEATURES) as partial, partial.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
    table = pa.table(
        {
            "id": pa.array([item.id for item in result.items], pa.string()),
            "label": pa.array([item.label for item in result.items], pa.int64()),
            "seed": pa.array([item.seed for item in result.items], pa.int64()),
            "original_sha256": pa.array(result.digests, pa.string()),
            **{name: pa.array(values, pa.float64()) for name, values in result.columns.items()},
        }
    )
    failed = {_FAILURES: result.failures, _PARTIAL: result.partial_failures}
    table = table.replace_schema_metadata({k: json.dumps(v).encode() for k, v in failed.items()})
    with replacing(shard.folder / ROWS) as partial:
        pq.write_table(table, partial)


def merge_rows(shards: Sequence[Shard]) -> Rows:
    """Joins the rows of finished shards."""
    tables = [pq.read_table(shard.folder / ROWS) for shard in shards]
    failed = [_read_failures(table.schema) for table in tables]
    joined = pa.concat_tables(
        [table.replace_schema_metadata(None) for table in tables], promote_options="default"
    )
    columns = {
        name: joined[name].to_numpy().astype(np.float64)
        for name in joined.column_names
        if pa.types.is_float64(joined.schema.field(name).type)
    }
    for name, values in columns.items():  # a shard without a figure leaves nulls
        place = joined.column_names.index(name)
        joined = joined.set_column(place, name, pa.array(values, pa.float64()))
    return Rows(
        table=joined,
        ids=joined["id"].to_pylist(),
        digests=joined["original_sha256"].to_pylist(),
        columns=columns,
        failures=[failure for whole, _ in failed for failure in whole],
        partial_failures=[failure for _, partial in failed for failure in partial],
    )


def write_rows(rows: Rows, output: Path) -> None:
    """Writes `per_image.parquet`."""
    with replacing(output / PER_IMAGE) as partial:
        pq.write_table(rows.table, partial)


def discard_run(output: Path) -> None:
    """Removes what a run left that measured nothing, and the folder where nothing else is in it."""
    shutil.rmtree(output / SHARDS, ignore_errors=True)
    (output / RUN).unlink(missing_ok=True)
    if output.is_dir() and not any(output.iterdir()):
        output.rmdir()


def read_features(
    shards: Sequence[Shard], side: str, name: str
) -> Iterator[tuple[list[str], np.ndarray]]:
    """Yields the ids and vectors `[n, d]` of each shard that an extractor gave of one side."""
    for shard in shards:
        path = shard.folder / FEATURES
        if path.is_file():
            ids = pq.read_table(shard.folder / ROWS, columns=["id"])["id"].to_pylist()
            with np.load(path) as arrays:
                yield ids, arrays[f"{side}/{name}"]


def _read_failures(schema: pa.Schema) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Returns the images that failed, and the figures of single images that did."""
    kept = schema.metadata or {}
    whole, partial = (json.loads(kept.get(key, b"[]")) for key in (_FAILURES, _PARTIAL))
    return whole, partial


# ---- Distances between the distributions of reconstructions and of a reference -------------------

CLASSIFIER, INCEPTION, DINOV2 = "classifier", "inception", "dinov2"
KID_SUBSET, KID_SUBSETS, NEIGHBOUR = 1000, 100, 3

Figure = dict[str, Any]


@dataclass(frozen=True, eq=False)
class _Spread:
    """What is kept of a stream of vectors: moments of all, and a sample of bounded size."""

    moments: FeatureMoments
    sample: FeatureSample


def load_extractors(settings: EvaluationSettings, backbone: Backbone) -> dict[str, ImageFeatures]:
    """Loads what the settings ask for; the pooled features of the backbone need nothing more.

    Raises:
        InputError: weights that are not there; says where they are looked for.
    """
    extractors: dict[str, ImageFeatures] = {CLASSIFIER: ClassifierFeatures(backbone)}
    if settings.fid:
        extractors[INCEPTION] = InceptionFeatures(settings.fid, settings.inception_weights)
    if settings.fd_dinov2:
        extractors[DINOV2] = load_dinov2(settings.fd_dinov2)
    return {name: extractor.to(backbone.device) for name, extractor in extractors.items()}


def check_references(path: str | None, extractors: Mapping[str, ImageFeatures]) -> None:
    """Finds out before any sampling whether a reference can serve.

    Raises:
        InputError: nothing there, a file of another kind, or moments of other features.
    """
    if path is not None:
        for name, extractor in extractors.items():
            if name != CLASSIFIER:
                check_reference(path, extractor)


def measure_distributions(
    shards: Sequence[Shard],
    extractors: Mapping[str, ImageFeatures],
    originals: Figure,
    *,
    reference: str | None = None,
    size: int,
    batch_size: int,
) -> Figure:
    """Returns each distance from the reconstructions, with all that it rests on.

    Args:
        originals: what is stated of the evaluated originals, which are the reference for the
            classifier, and for all where none is given.
        reference: folder or npz for the others.
        size: side in pixels to which the images of a folder are scaled.
        batch_size: images of the reference that are described at once.
    """
    figures: Figure = {}
    for name, extractor in extractors.items():
        made = _fold(read_features(shards, RECONSTRUCTED, name), extractor.dim)
        if reference is None or name == CLASSIFIER:
            real = _fold(read_features(shards, ORIGINAL, name), extractor.dim)
            stated = originals
        else:
            real = load_reference(reference, extractor, size=size, batch_size=batch_size)
            stated = {"name": real.source, "sha256": real.sha256, "preparation": real.preparation}
        basis = {"reference": stated, "conventions": extractor.conventions}
        if made.moments.count < 2 or real.moments.count in (0, 1):
            continue
        distance = frechet_distance(made.moments, real.moments)
        figures[extractor.distance_name] = {**asdict(distance), **basis}
        if name == INCEPTION and real.sample is not None:
            figures |= {k: {**v, **basis} for k, v in _of_vectors(made.sample, real.sample).items()}
    return figures


def _fold(parts: Iterable[tuple[list[str], np.ndarray]], dim: int) -> _Spread:
    """Folds parts of a stream, in the memory of a sample and a covariance.

    Vectors of NaN, which the evaluator has reported, are left out.
    """
    spread = _Spread(FeatureMoments(dim), FeatureSample(dim))
    for ids, vectors in parts:
        fine = np.flatnonzero(np.isfinite(vectors).all(axis=1)).tolist()
        features = torch.from_numpy(vectors[fine])
        spread.moments.update(features)
        spread.sample.update(features, [ids[i] for i in fine])
    return spread


def _of_vectors(made: FeatureSample, real: FeatureSample) -> Figure:
    """KID, precision and recall, which read vectors."""
    a, b = made.features, real.features
    sizes: Figure = {"n": len(a), "n_reference": len(b)}
    n_least = min(len(a), len(b))
    figures: Figure = {"kid": {**_kid(a, b), **sizes}} if n_least >= 2 else {}
    if n_least > NEIGHBOUR:
        for key, value in precision_recall(a, b, k=NEIGHBOUR)._asdict().items():
            figures[key] = {"value": value, "k": NEIGHBOUR, **sizes}
    return figures


def _kid(made: torch.Tensor, real: torch.Tensor) -> Figure:
    """The KID; `std` is None where a subset is a whole set, so that subsets do not differ in it."""
    sizes = len(made), len(real)
    subset = min(KID_SUBSET, *sizes)
    n_subsets = 1 if subset == max(sizes) else KID_SUBSETS
    kid = kernel_distance(made, real, subset_size=subset, n_subsets=n_subsets)
    std = None if subset == min(sizes) else kid.std
    return {"value": kid.mean, "std": std, "subset_size": subset, "n_subsets": n_subsets}


# ---- Loads what an evaluation needs: the inverter, other backbones, extractors -------------------

_NUMBER_LIKE = re.compile(r"n\d{8}|((label|class)[ _-]?)?\d+")
"""Names of classes that say no more than a number: WordNet ids, `LABEL_3`, `class 3`, `3`."""


@dataclass(frozen=True, eq=False)
class Opened:
    """What is loaded.

    Args:
        settings: with nothing left to a default of the pipeline.
        labels_matched_by: `name`, `number`, or None where labels are not the backbone's classes.
        weights: digests of the weights and what else decides samples; see `describe_inverter`.
        notes: what a user may not expect, a sentence each.
    """

    evaluator: Evaluator
    settings: EvaluationSettings
    labels_matched_by: str | None
    weights: dict[str, Any]
    notes: tuple[str, ...] = ()


def open_evaluator(
    settings: EvaluationSettings,
    images: ImageSet,
    on_progress: Callable[[float], None] | None = None,
) -> Opened:
    """Loads all models.

    Raises:
        InputError: unknown names, weights that are not there, a device that is not there.
    """
    inverter, sampling = open_chosen(settings.sampling, on_progress)
    own = inverter.backbone
    assert own is not None
    resolved = replace(
        settings,
        inverter=sampling.inverter,
        stage=sampling.stage,
        pipeline=sampling.pipeline,
        backbone=sampling.backbone,
        layer=sampling.layer,
        steps=sampling.steps,
        scheduler=sampling.scheduler,
        guidance_scale=sampling.guidance_scale,
        guidance=sampling.guidance,
        device=sampling.device,
    )
    resolved, notes = _without_own(resolved, own)
    others = _load_others(resolved, own.device)
    matched_by, class_of_label = match_labels(images, own)
    lpips = Lpips(settings.lpips, settings.lpips_weights).to(own.device) if settings.lpips else None
    extractors = load_extractors(settings, own)
    check_references(settings.reference, extractors)
    evaluator = Evaluator(
        inverter=inverter,
        observers=Observers({OWN: own, **others}, lpips),
        images=images,
        batch_size=settings.batch_size,
        seed=settings.seed,
        extractors=extractors,
        class_of_label=class_of_label,
    )
    evaluators: dict[str, nn.Module] = {name: other.model for name, other in others.items()}
    evaluators |= {name: e for name, e in extractors.items() if name != CLASSIFIER}
    evaluators |= {} if lpips is None else {"lpips": lpips}
    digests = {name: weights_sha256({"": model}) for name, model in evaluators.items()}
    weights = {**describe_inverter(inverter, own), "evaluators_sha256": digests}
    return Opened(evaluator, resolved, matched_by, weights, notes)


def match_labels(images: ImageSet, backbone: Backbone) -> tuple[str | None, list[int] | None]:
    """Returns how labels are matched with the backbone's classes, and the class of each label.

    By name, where each name is that of one class. By number, where there are as many of both and
    either the names are equal in their order (two classes may share one) or one side has no names
    that say more than a number; equally many other names are no reason to think that they
    correspond.
    """
    if images.labels is None or not backbone.has_head:
        return None, None
    names, known = (_fold_case(n) for n in (images.class_names, backbone.labels))
    n_labels = len(names) if names else max(images.labels) + 1
    if names and known and len(set(names)) == len(names):
        found = [i for name in names for i, other in enumerate(known) if other == name]
        if [known[i] for i in found] == names:
            return "name", found
    by_number = list(range(n_labels))
    if n_labels != (len(known) if known else _count_classes(backbone)):
        return None, None
    says_nothing = any(not n or all(map(_NUMBER_LIKE.fullmatch, n)) for n in (names, known))
    return ("number", by_number) if says_nothing or names == known else (None, None)


def _fold_case(names: Sequence[str] | None) -> list[str] | None:
    return None if names is None else [name.casefold() for name in names]


@torch.no_grad()
def _count_classes(backbone: Backbone) -> int:
    blank = torch.zeros(1, 3, *backbone.input_size, device=backbone.device)
    return backbone.classify(blank).shape[1]


def _without_own(
    settings: EvaluationSettings, own: Backbone
) -> tuple[EvaluationSettings, tuple[str, ...]]:
    """Leaves out the backbone that is looked through anyway; at an earlier layer it is another."""
    if own.spec.layer != LAST:
        return settings, ()

    def identify(name: str) -> str:
        full = _full_name(name, settings.pipeline).removeprefix("timm/")
        return SHORT_NAMES.get(full, full).removeprefix("timm/")

    is_own = [identify(name) == identify(own.name) for name in settings.evaluated_by]
    left_out = [name for name, same in zip(settings.evaluated_by, is_own, strict=True) if same]
    others = tuple(n for n, same in zip(settings.evaluated_by, is_own, strict=True) if not same)
    notes = tuple(
        f"{name} is the backbone that is inverted and is left out of those that evaluate."
        for name in left_out
    )
    return replace(settings, evaluated_by=others), notes


def _load_others(settings: EvaluationSettings, device: torch.device) -> dict[str, Backbone]:
    others: dict[str, Backbone] = {}
    for name in settings.evaluated_by:
        with without_progress_bars():
            others[name] = load_backbone(_full_name(name, settings.pipeline)).to(device)
        if others[name].input_size[0] != others[name].input_size[1]:
            raise InputError(
                f"A backbone that evaluates must read squares, but {name!r} reads "
                f"{'×'.join(map(str, others[name].input_size))} pixels."
            )
    return others


def _full_name(name: str, pipeline: str | None) -> str:
    """Beside a bundled pipeline, a short name means the bundled backbone, as in `--backbone`."""
    bundled = BUNDLED + name
    is_bundled = (pipeline or "").startswith(BUNDLED) and bundled in list_backbones()
    return bundled if is_bundled else name


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
    items = select_items(images, settings.chosen)
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
