"""Concepts of this package beside those of the authors' code, on the same features.

    git clone https://github.com/jvielhaben/MCD-XAI
    pip install scikit-dimension numba
    python benchmarks/mcd_reference.py MCD-XAI/code --data validation.parquet

Agreement: the cells of the images of one class, every step of the fit in turn. `--time` instead
takes 20,000 cells of 256 channels, and of 1,024 (2×2 neighbouring cells in one): seconds and peak
memory of a whole fit here, and of the reference's self-representation of every 200th cell over all
others, which is the same work for each cell and nearly all of its time.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from sklearn.metrics import adjusted_rand_score
from torch import Tensor
from torch.nn import functional as F

from featinv_diffusion.backbones import load_backbone
from featinv_diffusion.concepts import MCD, read_head
from featinv_diffusion.concepts.base import principal_angles
from featinv_diffusion.concepts.elastic_net import ElasticNet, self_representation
from featinv_diffusion.concepts.mcd import find_inliers
from featinv_diffusion.data.selection import select_items
from featinv_diffusion.data.sets import open_images
from featinv_diffusion.evaluation.settings import EvaluationSettings
from featinv_diffusion.images import center_square, to_tensor

GAMMA, KEPT, THRESHOLD = 10.0, 0.75, 0.05
N_CELLS, EVERY = 20_000, 200


def read_features(data: str, n_images: int, class_index: int | None) -> tuple[Tensor, Tensor]:
    """Features of `n_images`, of one class or evenly of all, and the direction of the class."""
    settings = EvaluationSettings(data=data, n_images=None)
    images = open_images(data, settings.split, None)
    items = [i for i in select_items(images, settings.chosen) if class_index in (None, i.label)]
    backbone = load_backbone("tiny/convnext")
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(items), generator=generator)[:n_images].tolist()
    maps = []
    for first in range(0, len(order), 64):
        chosen = [items[i] for i in order[first : first + 64]]
        squares = [center_square(images.read(item.index), 64) for item in chosen]
        maps.append(backbone.features(to_tensor(squares)))
    return torch.cat(maps), read_head(backbone).direction(class_index or 0)


def compare(data: str, class_index: int, n_concepts: int) -> None:
    import concept_subspaces  # pyright: ignore[reportMissingImports]
    import ssccd  # pyright: ignore[reportMissingImports]

    features, direction = read_features(data, 30, class_index)
    theirs = ssccd.SSCCD(features.numpy())
    theirs.get_feature_array(1.0)
    with contextlib.redirect_stderr(io.StringIO()):  # a bar of each cell
        theirs.fit_selfrepresentation(gamma=GAMMA, outlier_percentile=KEPT)
    theirs.cluster(n_concepts)
    theirs.conceptspace_bases(ver="FO", alphaFO=THRESHOLD)
    judged = concept_subspaces.TestConceptSubspaces(
        list(theirs.conceptBases), assert_intersection=False
    )
    ours = MCD(n_concepts, basis="centred", gamma=GAMMA, outlier_quantile=KEPT)
    ours.fit(features, direction=direction)

    rows = F.normalize(features.permute(0, 2, 3, 1).flatten(0, 2), dim=1)
    coefficients = self_representation(rows, ElasticNet(GAMMA))
    inliers = find_inliers(coefficients, KEPT)
    refitted = self_representation(rows[torch.from_numpy(inliers)], ElasticNet(GAMMA))
    print(f"{len(rows)} cells of {rows.shape[1]} channels, class {class_index}, K = {n_concepts}")
    same = np.array_equal(inliers, ~theirs.ssc.outlier_mask)
    print(f"the same outliers: {same} ({int((~inliers).sum())} of {len(rows)})")
    difference = abs(refitted - csr_array(theirs.ssc.representation_matrix_)).max()
    print(f"coefficients after the refit: max abs difference {difference:.1e}")
    assert ours.labels is not None
    agreement = adjusted_rand_score(theirs.labels, ours.labels.flatten().numpy())
    print(f"adjusted Rand index of the labels: {agreement:.4f}")
    _compare_bases(ours, judged, direction)


def _compare_bases(ours: MCD, judged: Any, direction: Tensor) -> None:
    bases = [torch.from_numpy(basis) for basis in judged.conceptBases[:-1]]
    own = [ours.basis(k) for k in range(ours.n_concepts)]
    largest = np.array([[float(principal_angles(a, b).max()) for b in bases] for a in own])
    matched = linear_sum_assignment(largest)[1]
    w = direction.double().numpy()
    print(f"dimensions: {[len(b) for b in own]}, theirs {[len(bases[j]) for j in matched]}")
    for k, j in enumerate(matched):
        angles = principal_angles(own[k], bases[j]).rad2deg()
        print(
            f"concept {k}: angles median {angles.median():.3f}°, largest {angles.max():.3f}° "
            f"over {len(angles)}"
        )
    print(
        f"completeness {ours.completeness(direction):.6f}, theirs "
        f"{judged.concept_completeness(w)[0]:.6f}"
    )
    try:
        theirs = judged.conceptspace_global_importance(w)
    except (ValueError, np.linalg.LinAlgError) as error:
        print(f"global relevance: theirs fails where subspaces intersect ({error})")
    else:
        gap = np.abs(ours.global_relevance(direction)[:-1].numpy() - theirs[matched]).max()
        print(f"global relevance: max abs difference {gap:.1e}")


def time_fits(data: str, reference: Path, channels: list[int]) -> None:
    """One process for each figure, so that its peak memory is its own."""
    command = [sys.executable, __file__, str(reference), "--data", data, "--time"]
    for width in channels:
        for who in ("ours", "theirs"):
            done = subprocess.run(
                [*command, who, "--channels", str(width)], check=True, capture_output=True
            )
            print(json.loads(done.stdout.splitlines()[-1]), flush=True)


def time_one(data: str, who: str, channels: int) -> None:
    pool = channels // 256  # 1 or 4 cells in one
    features, direction = read_features(data, -(-N_CELLS // 64) * pool, None)
    if pool > 1:
        features = F.pixel_unshuffle(features, 2)
        direction = direction.repeat_interleave(pool) / pool
    cells = features.permute(0, 2, 3, 1).flatten(0, 2)[:N_CELLS]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, cpu = time.perf_counter(), time.process_time()
    if who == "ours":
        maps = cells.T.reshape(1, channels, 100, -1)
        concepts = MCD(5, gamma=GAMMA, outlier_quantile=KEPT).fit(maps, direction=direction)
        found = {"what": "whole fit, K = 5", "report": concepts.report["dimensions"]}
    else:
        found = _time_reference(F.normalize(cells, dim=1).numpy())
    print(
        json.dumps(
            {
                "who": who,
                "cells": list(cells.shape),
                "seconds": round(time.perf_counter() - start, 1),
                "cpu_seconds": round(time.process_time() - cpu, 1),
                "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
                "peak_before_mib": round(before / 1024),
                **found,
            }
        )
    )


def _time_reference(cells: np.ndarray) -> dict[str, Any]:
    from subspaceclustering.elasticnet_selfrepresentation import (  # pyright: ignore[reportMissingImports]
        active_support_elastic_net,
    )

    rows = range(0, len(cells), EVERY)
    for i in rows:
        y = cells[i : i + 1].copy()
        cells[i] = 0
        alpha = np.abs(cells @ y[0]).max() / GAMMA
        active_support_elastic_net(cells, y, alpha, 1.0, "lasso_lars")
        cells[i] = y
    return {"what": f"self-representation of {len(rows)} of {len(cells)} cells, once"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reference", type=Path, help="the folder code/ of the authors' repository")
    parser.add_argument("--data", required=True)
    parser.add_argument("--class-index", type=int, default=24)
    parser.add_argument("--n-concepts", type=int, default=4)
    parser.add_argument("--time", choices=("all", "ours", "theirs"))
    parser.add_argument("--channels", type=int, nargs="*", choices=(256, 1024), default=[256, 1024])
    arguments = parser.parse_args()
    sys.path.insert(0, str(arguments.reference))
    if arguments.time == "all":
        time_fits(arguments.data, arguments.reference, arguments.channels)
    elif arguments.time:
        time_one(arguments.data, arguments.time, arguments.channels[0])
    else:
        compare(arguments.data, arguments.class_index, arguments.n_concepts)


if __name__ == "__main__":
    main()
