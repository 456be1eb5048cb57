"""Figures of all images together: retrieval of the own original, and linear CKA."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from featinv_diffusion.data.selection import Item
from featinv_diffusion.evaluation.evaluator import MAP, OTHER_IMAGE, VAE_ROUND_TRIP, find_partners
from featinv_diffusion.evaluation.report import mean_of
from featinv_diffusion.evaluation.storage import ORIGINAL, RECONSTRUCTED, ROUND_TRIP, read_features
from featinv_diffusion.metrics.similarity import linear_cka, retrieval_ranks
from featinv_diffusion.runs.units import Unit

MAX_GALLERY, MAX_CKA = 10_000, 2000
"""Images that compete, and those whose distances to each other are in memory; the first ones."""

Figure = dict[str, Any]


def measure_similarity(
    units: Sequence[Unit[Item]],
    labels: Sequence[int | None],
    gallery: Iterable[tuple[Item, Tensor]] = (),
) -> Figure:
    """Returns `retrieval` and `linear_cka`, each None where no vectors of maps were kept.

    Args:
        labels: of the rows of all units.
        gallery: more originals that compete, with the vectors of their maps.
    """
    original, made, trip = (_read(units, x) for x in (ORIGINAL, RECONSTRUCTED, ROUND_TRIP))
    if original is None or made is None or len(original) < 2:
        return {"retrieval": None, "linear_cka": None}
    given = (x.isfinite().all(1) for x in (original, made, trip) if x is not None)
    fine = torch.stack(list(given)).all(0)
    kept = fine.nonzero().flatten()[:MAX_GALLERY].tolist()
    known = [labels[i] for i in kept]
    original, made = original[kept], made[kept]
    trip = None if trip is None else trip[kept]
    more = list(islice(gallery, MAX_GALLERY - len(kept)))
    competing = torch.cat([original, *(vector[None].float() for _, vector in more)])
    classes = [*known, *(item.label for item, _ in more)]
    retrieval = {
        **_retrieval(competing, made, classes),
        "n_gallery": len(competing),
        "nulls": {OTHER_IMAGE: _retrieval(competing, made[find_partners(known)], classes)},
        "ceilings": {
            VAE_ROUND_TRIP: None if trip is None else _retrieval(competing, trip, classes)
        },
    }
    cka = linear_cka(original[:MAX_CKA], made[:MAX_CKA])
    if cka is None:
        return {"retrieval": retrieval, "linear_cka": None}
    others = find_partners(known[:MAX_CKA])
    null = linear_cka(original[:MAX_CKA], made[:MAX_CKA][others])
    ceiling = None if trip is None else linear_cka(original[:MAX_CKA], trip[:MAX_CKA])
    return {
        "retrieval": retrieval,
        "linear_cka": {
            **asdict(cka),
            "nulls": {OTHER_IMAGE: None if null is None else asdict(null)},
            "ceilings": {VAE_ROUND_TRIP: None if ceiling is None else asdict(ceiling)},
        },
    }


def _read(units: Sequence[Unit[Item]], side: str) -> Tensor | None:
    parts = [vectors for _, vectors in read_features(units, side, MAP, optional=True)]
    return torch.from_numpy(np.concatenate(parts)).float() if parts else None


def _retrieval(original: Tensor, made: Tensor, labels: Sequence[int | None]) -> Figure:
    """Returns how often the own original is the first of all, or among five, and of its class."""
    ranks = retrieval_ranks(original, made)
    figure: Figure = {f"top{k}": mean_of((ranks < k).double().numpy(), True) for k in (1, 5)}
    count = Counter(labels)
    rivals = [0 if label is None else count[label] - 1 for label in labels[: len(made)]]
    rows = [i for i, n in enumerate(rivals) if n]
    if not rows:
        return {**figure, "same_class": None}
    among = (retrieval_ranks(original, made, labels)[rows] == 0).double().numpy()
    n_gallery = sum(rivals[i] + 1 for i in rows) / len(rows)
    chance = sum(1 / (rivals[i] + 1) for i in rows) / len(rows)
    same_class = {"top1": mean_of(among, True), "mean_gallery": n_gallery, "chance": chance}
    return {**figure, "same_class": same_class}
