"""Measure FeatInv-Viz on some classes: the concept maps against their nulls, as a Markdown table.

    python benchmarks/concepts_study.py --data tiny-imagenet-val.parquet

Concepts are fitted on all but the last `--n-images` pictures of each class, and those last ones
are visualised. Intervals are over these pictures (95 %, bootstrap); `--json` keeps every row.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featinv_diffusion.backbones import Backbone
from featinv_diffusion.cli.run import quiet_libraries
from featinv_diffusion.concepts import MCD, ConceptDictionary, read_head
from featinv_diffusion.data.sets import ImageSet, open_images
from featinv_diffusion.files import write_text
from featinv_diffusion.images import center_square, to_tensor
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.inverters.open import open_inverter
from featinv_diffusion.metrics.statistics import bootstrap_mean
from featinv_diffusion.runs.sampling import batched
from featinv_diffusion.seeds import derive_seed
from featinv_diffusion.settings import SampleSettings
from featinv_diffusion.studies.featinv_viz import show_concept

COLUMNS = {
    "effect": "concept map",
    "null_random": "random directions",
    "null": "other noise",
    "effect_over_null_random": "concept / random",
    "energy_inside": "change where active",
    "energy_inside_null_random": "of random directions",
    "energy_inside_null": "of other noise",
    "area_inside": "area where active",
    "probability_before": "p before",
    "probability_after": "p after",
}


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", required=True, help="parquet file or folder with labels")
    parser.add_argument("--classes", default="goldfish,brown bear,acorn", help="names with commas")
    parser.add_argument("--backbone", default="convnext")
    parser.add_argument("--pipeline")
    parser.add_argument("--n-concepts", type=int, default=3)
    parser.add_argument("--factor", type=float, default=0.25)
    parser.add_argument("--n-images", type=int, default=5, help="visualised of each class")
    parser.add_argument("--n-samples", type=int, default=8)
    parser.add_argument("--n-directions", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where every row goes")
    return parser.parse_args()


def main() -> None:
    arguments = read_arguments()
    quiet_libraries()
    backbone = None if arguments.pipeline else arguments.backbone
    settings = SampleSettings(pipeline=arguments.pipeline, backbone=backbone)
    inverter = open_inverter(settings)
    settings = inverter.settings or settings
    data = open_images(arguments.data, "validation")
    rows: list[dict[str, Any]] = []
    for name in arguments.classes.split(","):
        rows += measure_class(inverter, data, name.strip(), arguments)
    print(
        f"{settings.pipeline}, {settings.steps} steps of {settings.scheduler}, guidance "
        f"{settings.guidance} {settings.guidance_scale:g}; factor {arguments.factor:g}, "
        f"{arguments.n_images} pictures a class, {arguments.n_samples} samples, "
        f"{arguments.n_directions} random directions.\n"
    )
    print(to_table(rows))
    if arguments.json:
        write_text(arguments.json, json.dumps(rows, indent=2) + "\n")


def measure_class(
    inverter: Inverter, data: ImageSet, name: str, arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Yields one row per visualised picture and concept."""
    backbone = inverter.require_backbone()
    names = list(data.class_names or ())
    chosen = [i for i, label in enumerate(data.labels or ()) if names[label] == name]
    if len(chosen) <= arguments.n_images:
        sys.exit(f"{arguments.data} must hold more than {arguments.n_images} images of {name!r}.")
    target = list(backbone.labels or names).index(name)
    start = time.perf_counter()
    features = encode(backbone, data, chosen[: -arguments.n_images])
    concepts = MCD(arguments.n_concepts, spec=backbone.spec)
    concepts.fit(features, direction=read_head(backbone).direction(target).float().cpu())
    concepts.origin = {"class_index": target}
    print(f"{name}: concepts in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    for i in chosen[-arguments.n_images :]:
        maps = encode(backbone, data, [i]).to(backbone.device)
        seeds = [derive_seed(arguments.seed, data.ids[i], j) for j in range(arguments.n_samples)]
        for k in range(arguments.n_concepts):
            figures = measure_one(inverter, concepts, maps, k, seeds, arguments)
            yield {"class": name, "image": data.ids[i], "concept": k, **figures}
        print(f"{data.ids[i]} at {time.perf_counter() - start:.0f} s", file=sys.stderr)


@torch.no_grad()
def encode(backbone: Backbone, data: ImageSet, chosen: Sequence[int]) -> Tensor:
    size = max(backbone.input_size)
    return torch.cat(
        [
            backbone.features(
                to_tensor([center_square(data.read(i), size) for i in batch]).to(backbone.device)
            ).cpu()
            for batch in batched(chosen, 32)
        ]
    )


def measure_one(
    inverter: Inverter,
    concepts: ConceptDictionary,
    features: Tensor,
    concept: int,
    seeds: Sequence[int],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    found = show_concept(
        inverter,
        features,
        concepts,
        concept=concept,
        factor=arguments.factor,
        film=[],
        n_directions=arguments.n_directions,
        seeds=seeds,
    )
    return found.main_figures() | {
        "probability_before": found.before.mean_probability,
        "probability_after": found.after.mean_probability,
    }


def to_table(rows: Sequence[dict[str, Any]]) -> str:
    groups: dict[tuple[str, object], list[dict[str, Any]]] = {}
    for row in rows:
        for key in ((row["class"], row["concept"]), (row["class"], "all"), ("all", "all")):
            groups.setdefault(key, []).append(row)
    order = sorted(groups, key=lambda key: (key[0] == "all", key[0], str(key[1])))
    lines = [["class", "concept", *COLUMNS.values()], ["---"] * (2 + len(COLUMNS))]
    lines += [[*map(str, key), *(to_cell(groups[key], name) for name in COLUMNS)] for key in order]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def to_cell(rows: Sequence[dict[str, Any]], name: str) -> str:
    """Mean over pictures, the concepts of one picture averaged first, with its interval."""
    by_image: dict[str, list[float]] = {}
    for row in rows:
        if row[name] is not None:
            by_image.setdefault(row["image"], []).append(row[name])
    if not by_image:
        return "–"
    found = bootstrap_mean([sum(values) / len(values) for values in by_image.values()])
    digits = 3 if name in ("effect", "null", "null_random") else 2
    shown = [f"{value:.{digits}f}" for value in (found.value, found.low, found.high)]
    return shown[0] if found.n == 1 else f"{shown[0]} [{shown[1]}, {shown[2]}]"


if __name__ == "__main__":
    main()
