"""What units keep on disk, and what is measured over all of them: rows and distances."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from featinv_diffusion.backbones import Backbone
from featinv_diffusion.data.selection import Item
from featinv_diffusion.errors import InputError
from featinv_diffusion.evaluation.evaluator import Failure, Measured
from featinv_diffusion.evaluation.settings import EvaluationSettings
from featinv_diffusion.files import replacing
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
from featinv_diffusion.metrics.reference import check_reference, load_reference
from featinv_diffusion.metrics.statistics import FeatureMoments
from featinv_diffusion.runs.units import FAILURES, PARTIAL_FAILURES, Unit, merge_units

ROWS, FEATURES = "rows.parquet", "features.npz"
RECONSTRUCTED, ORIGINAL, ROUND_TRIP = "reconstructed", "original", "round_trip"

Figure = dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """The rows of all units in the order of the items.

    Args:
        table: of `per_image.parquet`.
        failures: images that could not be measured.
        partial_failures: figures of single images that could not be.
    """

    table: pa.Table
    ids: list[str]
    digests: list[str]
    columns: dict[str, np.ndarray]
    failures: list[Failure]
    partial_failures: list[Failure]


def write_unit(result: Measured, unit: Unit[Item]) -> Figure:
    """Writes the rows and vectors of a unit; returns what its completing file is to hold."""
    for name in (ROWS, FEATURES):  # of a time before, when something failed
        (unit.folder / name).unlink(missing_ok=True)
    sides = {
        RECONSTRUCTED: result.reconstructed,
        ORIGINAL: result.original,
        ROUND_TRIP: result.round_trip,
    }
    arrays = {f"{side}/{name}": v for side, found in sides.items() for name, v in found.items()}
    if arrays:
        with replacing(unit.folder / FEATURES) as partial, partial.open("wb") as file:
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
    with replacing(unit.folder / ROWS) as partial:
        pq.write_table(table, partial)
    return {FAILURES: result.failures, PARTIAL_FAILURES: result.partial_failures}


def merge_rows(units: Sequence[Unit[Item]]) -> Rows:
    """Joins the rows of finished units."""
    failures, partial_failures = (merge_units(units, k) for k in (FAILURES, PARTIAL_FAILURES))
    joined = pa.concat_tables([_read_rows(unit) for unit in units], promote_options="default")
    columns = {
        name: joined[name].to_numpy().astype(np.float64)
        for name in joined.column_names
        if pa.types.is_float64(joined.schema.field(name).type)
    }
    for name, values in columns.items():  # a unit without a figure leaves nulls
        place = joined.column_names.index(name)
        joined = joined.set_column(place, name, pa.array(values, pa.float64()))
    return Rows(
        table=joined,
        ids=joined["id"].to_pylist(),
        digests=joined["original_sha256"].to_pylist(),
        columns=columns,
        failures=failures,
        partial_failures=partial_failures,
    )


_IDENTITY = {
    "id": pa.string(),
    "label": pa.int64(),
    "seed": pa.int64(),
    "original_sha256": pa.string(),
}


def _read_rows(unit: Unit[Item]) -> pa.Table:
    """Reads the rows of a unit; the other columns are figures."""
    path = unit.folder / ROWS
    try:
        table = pq.read_table(path, partitioning=None)  # pyright: ignore[reportArgumentType]
    except (OSError, pa.ArrowException) as error:
        raise _damaged(path, unit, str(error)) from None
    for field in table.schema:
        kind = _IDENTITY.get(field.name, pa.float64())
        if field.type != kind:
            raise _damaged(path, unit, f"its column {field.name} holds {field.type}, not {kind}")
    if missing := [name for name in _IDENTITY if name not in table.column_names]:
        raise _damaged(path, unit, f"it lacks the columns {', '.join(missing)}")
    return table


def _damaged(path: Path, unit: Unit[Item], reason: str) -> InputError:
    return InputError(
        f"{path} must be the table of a finished unit, but cannot be used: {reason.rstrip('.')}. "
        f"Remove the folder {unit.folder} and start the command again."
    )


def read_features(
    units: Sequence[Unit[Item]], side: str, name: str, *, optional: bool = False
) -> Iterator[tuple[list[str], np.ndarray]]:
    """Yields the ids and vectors `[n, d]` of each unit that an extractor gave of one side.

    Args:
        optional: pass over units without such vectors.
    """
    for unit in units:
        path = unit.folder / FEATURES
        if path.is_file():
            ids = _read_rows(unit)["id"].to_pylist()
            try:
                with np.load(path, allow_pickle=False) as arrays:
                    if optional and f"{side}/{name}" not in arrays:
                        continue
                    vectors = arrays[f"{side}/{name}"]
            except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
                raise _damaged(path, unit, str(error)) from None
            if vectors.ndim != 2 or len(vectors) != len(ids) or vectors.dtype.kind != "f":
                raise _damaged(path, unit, f"{side}/{name} has shape {vectors.shape}")
            yield ids, vectors


# ---- Distances between the distributions of reconstructions and of a reference -------------------

CLASSIFIER, INCEPTION, DINOV2 = "classifier", "inception", "dinov2"
KID_SUBSET, KID_SUBSETS, NEIGHBOUR = 1000, 100, 3


@dataclass(frozen=True, eq=False)
class _Spread:
    """What is kept of a stream of vectors: moments of all, and a sample of bounded size."""

    moments: FeatureMoments
    sample: FeatureSample


def load_extractors(settings: EvaluationSettings, backbone: Backbone) -> dict[str, ImageFeatures]:
    """Loads what the settings ask for; the pooled features of the backbone need nothing more.

    Raises:
        InputError: weights that are not there; the message says where they are looked for.
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
    units: Sequence[Unit[Item]],
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
        made = _fold(read_features(units, RECONSTRUCTED, name), extractor.dim)
        if reference is None or name == CLASSIFIER:
            real = _fold(read_features(units, ORIGINAL, name), extractor.dim)
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
    """Returns KID, precision and recall, which read vectors."""
    a, b = made.features, real.features
    sizes: Figure = {"n": len(a), "n_reference": len(b)}
    n_least = min(len(a), len(b))
    figures: Figure = {"kid": {**_kid(a, b), **sizes}} if n_least >= 2 else {}
    if n_least > NEIGHBOUR:
        for key, value in precision_recall(a, b, k=NEIGHBOUR)._asdict().items():
            figures[key] = {"value": value, "k": NEIGHBOUR, **sizes}
    return figures


def _kid(made: torch.Tensor, real: torch.Tensor) -> Figure:
    """Returns the KID; `std` is None where a subset is a whole set, which does not vary."""
    sizes = len(made), len(real)
    subset = min(KID_SUBSET, *sizes)
    n_subsets = 1 if subset == max(sizes) else KID_SUBSETS
    kid = kernel_distance(made, real, subset_size=subset, n_subsets=n_subsets)
    std = None if subset == min(sizes) else kid.std
    return {"value": kid.mean, "std": std, "subset_size": subset, "n_subsets": n_subsets}
