"""Measure FeatInv-Viz on some classes: concepts against their nulls, as Markdown tables.

    python benchmarks/concepts_study.py --data tiny-imagenet-val.parquet

Concepts are fitted on all but the last `--n-images` pictures of each class, with the default and
the published basis; in each of those last pictures the concept with the most energy is attenuated.
Two edits that mean nothing for a concept are held against the same nulls, and must raise an alarm
in one picture of twenty at most: an edit of nothing, and the removal of an equally long part in a
random subspace of the cells of another class. Intervals are over pictures (95 %); `--json` keeps
every row.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pages import table
from torch import Tensor

from featinv_diffusion.backbones import Backbone
from featinv_diffusion.cli.run import quiet_libraries
from featinv_diffusion.data.sets import ImageSet, open_images
from featinv_diffusion.features.edits import random_part, scale_part
from featinv_diffusion.files import write_text
from featinv_diffusion.images import center_square, to_tensor
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.inverters.open import open_inverter
from featinv_diffusion.metrics.statistics import Interval, bootstrap_mean, share
from featinv_diffusion.runs.sampling import batched, sample_all
from featinv_diffusion.seeds import derive_seed, make_generator
from featinv_diffusion.settings import SampleSettings
from featinv_diffusion.studies.concepts import FoundConcepts, find_concepts
from featinv_diffusion.studies.featinv_viz import ConceptViz, show_concept
from featinv_diffusion.studies.viz_measures import (
    MEASURES,
    THRESHOLD,
    EditEffect,
    OverImages,
    measure_edit,
    normalise,
    over_images,
    p_value,
)

BASES = ("uncentred", "centred")
LEVEL = 0.05


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", required=True, help="parquet file or folder with labels")
    parser.add_argument("--n-classes", type=int, default=8, help="spread evenly over the data's")
    parser.add_argument("--backbone", default="convnext")
    parser.add_argument("--quality", default="draft")
    parser.add_argument("--n-concepts", type=int, default=3)
    parser.add_argument("--factor", type=float, default=0.25)
    parser.add_argument("--n-images", type=int, default=5, help="attenuated of each class")
    parser.add_argument("--n-samples", type=int, default=3)
    parser.add_argument("--n-directions", type=int, default=19)
    parser.add_argument("--n-controls", type=int, default=2, help="of each picture")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where every row goes")
    return parser.parse_args()


def main() -> None:
    arguments = read_arguments()
    quiet_libraries()
    inverter = open_inverter(SampleSettings(backbone=arguments.backbone, quality=arguments.quality))
    settings = inverter.settings
    assert settings is not None
    data = open_images(arguments.data, "validation")
    names = list(data.class_names or ())
    step = max(1, len(names) // arguments.n_classes)
    rows: list[dict[str, Any]] = []
    for label in range(0, step * arguments.n_classes, step):
        rows += measure_class(inverter, data, label, (label + step) % len(names), arguments)
    classes = {row["class"]: None for row in rows}
    print(
        f"{settings.pipeline}, {settings.steps} steps of {settings.scheduler}, guidance "
        f"{settings.guidance} {settings.guidance_scale:g}; factor {arguments.factor:g}, "
        f"{arguments.n_images} pictures of each of {len(classes)} classes ({', '.join(classes)}), "
        f"{arguments.n_samples} samples, {arguments.n_directions} null subspaces.\n"
    )
    for basis in BASES:
        chosen = [row for row in rows if row["basis"] == basis]
        print(f"{basis}: {describe(chosen)}\n\n{measures_table(chosen, arguments)}\n")
    print(classes_table([row for row in rows if row["basis"] == BASES[0]], arguments))
    if arguments.json:
        plain = [{k: v for k, v in row.items() if k != "effects"} for row in rows]
        write_text(arguments.json, json.dumps(plain, indent=2) + "\n")


# ---- Measuring -----------------------------------------------------------------------------------


def measure_class(
    inverter: Inverter, data: ImageSet, label: int, other: int, arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Yields one row per picture and basis."""
    backbone = inverter.require_backbone()
    names, labels = list(data.class_names or ()), list(data.labels or ())
    own, others = ([i for i, each in enumerate(labels) if each == k] for k in (label, other))
    if len(own) <= arguments.n_images:
        sys.exit(f"{arguments.data} must hold more than {arguments.n_images} of {names[label]!r}.")
    start = time.perf_counter()
    size = max(backbone.input_size)
    fitted = [center_square(data.read(i), size) for i in own[: -arguments.n_images]]
    frame = encode(backbone, data, others).permute(1, 0, 2, 3).flatten(1)
    for basis in BASES:
        concepts = find_concepts(
            backbone, fitted, target=names[label], n_concepts=arguments.n_concepts, basis=basis
        )
        for i in own[-arguments.n_images :]:
            maps = encode(backbone, data, [i]).to(backbone.device)
            yield {
                "class": names[label],
                "image": data.ids[i],
                "basis": basis,
                **measure_one(inverter, concepts, maps, frame, data.ids[i], arguments),
            }
            done = f"{names[label]} {basis} {data.ids[i]}"
            print(f"{done} at {time.perf_counter() - start:.0f} s", file=sys.stderr)


@torch.no_grad()
def encode(backbone: Backbone, data: ImageSet, chosen: Sequence[int]) -> Tensor:
    size = max(backbone.input_size)
    squares = ([center_square(data.read(i), size) for i in batch] for batch in batched(chosen, 32))
    maps = [backbone.features(to_tensor(each).to(backbone.device)).cpu() for each in squares]
    return torch.cat(maps).as_subclass(Tensor)


def measure_one(
    inverter: Inverter,
    concepts: FoundConcepts,
    features: Tensor,
    frame: Tensor,
    name: str,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Returns the numbers of a picture's concept with most energy, and alarms of controls."""
    seeds = [derive_seed(arguments.seed, name, j) for j in range(arguments.n_samples)]
    common: dict[str, Any] = {"film": [], "seeds": seeds}
    is_default = concepts.concepts.report["basis"] == BASES[0]
    n_directions = arguments.n_directions if is_default else 3  # these hardly have a null
    found = show_concept(
        inverter,
        features,
        concepts,
        factor=arguments.factor,
        n_directions=n_directions,
        **common,
    )
    row = {
        "concept": found.arguments["concept"],
        "effects": (found.own_effect, found.null_effects),
        "controls": [],
        "null_as_published": marked_as_published(found.null_maps),
        **found.main_figures(),
    }
    if not is_default or not found.has_null:
        return row
    nothing = show_concept(
        inverter, features, concepts, factor=1, n_directions=1, **common
    ).main_figures()["p_values"]
    row["nothing"] = nothing
    for k in range(arguments.n_controls):
        generator = make_generator(arguments.seed, "control", name, k)
        effect = control(inverter, found, features, concepts, frame, generator, seeds)
        row["controls"].append(
            {m: p_value(m, effect, found.null_effects, found.factor) for m in MEASURES}
            | {f"{m}_value": effect.mean(m) for m in MEASURES}
        )
    return row


def marked_as_published(maps: Tensor) -> float:
    """Returns the mean share of the pixels that the published threshold marks in maps."""
    shares = [(normalise(each) >= THRESHOLD).double().mean().item() for each in maps]
    return sum(shares) / len(shares)


def control(
    inverter: Inverter,
    found: ConceptViz,
    features: Tensor,
    concepts: FoundConcepts,
    frame: Tensor,
    generator: torch.Generator,
    seeds: Sequence[int],
) -> EditEffect:
    """Measures the picture's concept where a part in cells of another class is attenuated."""
    concept = found.arguments["concept"]
    part = concepts.concepts.part(features, concept)
    n_dimensions = concepts.concepts.sizes[concept]
    other, _ = random_part(features, part, frame, generator, n_dimensions)
    edited = scale_part(features, other, found.factor)
    after = sample_all(inverter, edited, seeds, 8)
    return measure_edit(
        found.before.samples,
        after,
        edited - features,
        concepts.concepts,
        concept,
        found.cells,
        found.class_index,
    )


# ---- Tables --------------------------------------------------------------------------------------


def describe(rows: Sequence[Mapping[str, Any]]) -> str:
    energy, area = (
        bootstrap_mean([row[k] for row in rows]) for k in ("part_energy", "area_inside")
    )
    keys = ("affected_as_published", "null_as_published", "affected")
    published, null, affected = (bootstrap_mean([row[key] for row in rows]) for key in keys)
    n_none = sum(row["p_values"]["effect"] is None for row in rows)
    return (
        f"the concept's part holds {in_words(energy, 2)} of the map's energy and is active in "
        f"{in_words(area, 2)} of the picture; {n_none} of {len(rows)} parts are as long as all of "
        "the map in the natural span, so that they have no null. Pixels marked as published: "
        f"{in_words(published, 2)}, with null subspaces {in_words(null, 2)}; above the null: "
        f"{in_words(affected, 2)}."
    )


def measures_table(rows: Sequence[Mapping[str, Any]], arguments: argparse.Namespace) -> str:
    lines = []
    for measure in MEASURES:
        pairs = [row["effects"] for row in rows]
        found = over_images(measure, pairs, arguments.factor)
        lines.append([f"`{measure}`", *cells_of(measure, found, rows)])
    header = "measure|concept|null|difference|pictures above all nulls|alarms: nothing|other class"
    return table(header, lines)


def cells_of(
    measure: str, found: OverImages | None, rows: Sequence[Mapping[str, Any]]
) -> list[str]:
    if found is None:
        return ["–"] * 6
    digits = 3 if measure in ("effect", "signed_change") else 2
    null = f"{found.null.value:.{digits}f}"
    cells = [in_words(found.value, digits), null, in_words(found.difference, digits)]
    has_null = [row for row in rows if "nothing" in row and row["p_values"][measure] is not None]
    if not has_null:
        return [*cells, "–", "–", "–"]
    n_above = sum(row["p_values"][measure] <= LEVEL for row in has_null)
    nothing = [row["nothing"][measure] for row in has_null]
    controls = [each[measure] for row in has_null for each in row["controls"]]
    return [
        *cells,
        f"{n_above} of {len(has_null)}",
        alarms(nothing),
        alarms(controls),
    ]


def alarms(p_values: Sequence[float | None]) -> str:
    known = [p for p in p_values if p is not None]
    if not known:
        return "–"
    found = share(sum(p <= LEVEL for p in known), len(known))
    return f"{found.value:.1%} [{100 * found.low:.0f}, {100 * found.high:.0f}]"


def classes_table(rows: Sequence[Mapping[str, Any]], arguments: argparse.Namespace) -> str:
    shown = ("activation_ratio", "realised_change", "class_probability_change", "effect")
    lines = []
    for name in {row["class"]: None for row in rows}:
        pairs = [row["effects"] for row in rows if row["class"] == name]
        cells = [name]
        for measure in shown:
            found = over_images(measure, pairs, arguments.factor)
            digits = 3 if measure == "effect" else 2
            both = [] if found is None else [found.value.value, found.null.value]
            cells.append(" / ".join(f"{value:.{digits}f}" for value in both) or "–")
        lines.append(cells)
    return table("class|" + "|".join(f"`{name}`, null" for name in shown), lines)


def in_words(found: Interval, digits: int) -> str:
    value, low, high = (f"{asdict(found)[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


if __name__ == "__main__":
    main()
