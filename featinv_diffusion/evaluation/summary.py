"""Rows of per-image figures → means with intervals, nulls, ceilings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from featinv_diffusion.errors import InputError
from featinv_diffusion.evaluation.evaluator import CEILINGS, NULLS, OTHER_IMAGE, VAE_ROUND_TRIP
from featinv_diffusion.metrics.statistics import bootstrap_mean, bootstrap_statistic

AGREEMENT = ("cosine", "top1_match", "top5_match")
METRICS = (*AGREEMENT, "psnr", "ssim", "lpips")

Columns = Mapping[str, np.ndarray]
Figure = dict[str, Any]


def summarise(columns: Columns, evaluated_by: Sequence[str] = ()) -> Figure:
    """Returns the figures of `metrics.json`; None stands where something was not measured."""
    figures: Figure = {name: with_nulls(columns, name) for name in METRICS if name in columns}
    figures["normalised_agreement"] = normalised_agreement(columns)
    figures["label_accuracy"] = {
        "original": interval(columns, "label_correct_original"),
        "reconstruction": interval(columns, "label_correct_reconstruction"),
    }
    figures["ceilings"] = {ceiling: _ceiling(columns, ceiling) for ceiling in CEILINGS}
    figures["evaluated_by"] = {
        name: {
            metric: with_nulls(columns, f"evaluated_by_{name}_{metric}")
            for metric in AGREEMENT
            if f"evaluated_by_{name}_{metric}" in columns
        }
        for name in evaluated_by
    }
    return figures


def with_nulls(columns: Columns, name: str) -> Figure | None:
    """Returns the interval of a column's mean, and under `nulls` those of the same on the nulls."""
    figure = interval(columns, name)
    if figure is None:
        return None
    return {**figure, "nulls": {null: interval(columns, f"{null}_{name}") for null in NULLS}}


def interval(columns: Columns, name: str) -> Figure | None:
    """Returns `value`, `low`, `high`, `n` of a column's mean; rows without a value are left out."""
    if name not in columns:
        return None
    values = columns[name][np.isfinite(columns[name])]
    return asdict(bootstrap_mean(values)) if len(values) else None


def normalised_agreement(columns: Columns) -> Figure | None:
    """Returns (cosine − other image) / (VAE round trip − other image), of means.

    0 is what any image of the data agrees, 1 what the autoencoder lets through. None where one of
    the three is missing, or where the round trip is not above another image on every resample of
    the images: a ratio whose denominator may change its sign says nothing.
    """
    names = ("cosine", f"{OTHER_IMAGE}_cosine", f"{VAE_ROUND_TRIP}_cosine")
    if any(name not in columns for name in names):
        return None
    table = np.stack([columns[name] for name in names])
    cosine, other, ceiling = table[:, np.isfinite(table).all(axis=0)]
    if not len(cosine):
        return None
    try:
        return asdict(
            bootstrap_statistic(
                {"cosine": cosine, "other": other, "ceiling": ceiling},
                _share_of_span,
            )
        )
    except InputError:
        return None


def _share_of_span(means: Mapping[str, float]) -> float:
    span = means["ceiling"] - means["other"]
    return (means["cosine"] - means["other"]) / span if span > 0 else float("nan")


def _ceiling(columns: Columns, ceiling: str) -> Figure | None:
    figures = {
        metric: interval(columns, f"{ceiling}_{metric}")
        for metric in METRICS
        if f"{ceiling}_{metric}" in columns
    }
    return figures or None
