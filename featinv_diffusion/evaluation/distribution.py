"""Distances between the distributions of reconstructions and of a reference."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from featinv_diffusion.backbones import Backbone
from featinv_diffusion.evaluation.settings import EvaluationSettings
from featinv_diffusion.evaluation.storage import ORIGINAL, RECONSTRUCTED, Shard, read_features
from featinv_diffusion.metrics.dinov2 import load_dinov2
from featinv_diffusion.metrics.distribution import (
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from featinv_diffusion.metrics.extractors import ClassifierFeatures, ImageFeatures
from featinv_diffusion.metrics.inception import InceptionFeatures
from featinv_diffusion.metrics.reference import check_reference, load_reference
from featinv_diffusion.metrics.samples import FeatureSample
from featinv_diffusion.metrics.statistics import FeatureMoments

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
