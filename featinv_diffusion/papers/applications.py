"""FeatInv's applications over many pictures: figures 4 to 6, A.3, C.1.

Source: "FeatInv: Spatially resolved mapping from feature space to input space", sections 4.2, 4.3.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from featinv_diffusion.errors import InputError
from featinv_diffusion.features.edits import to_pixels
from featinv_diffusion.figures import board as figures
from featinv_diffusion.figures.board import Board
from featinv_diffusion.images import center_square, to_pil, to_tensor
from featinv_diffusion.metrics.statistics import bootstrap_difference, bootstrap_mean
from featinv_diffusion.papers.base import Answer, Finding, Pictures, Request, cell, percent
from featinv_diffusion.papers.reconstruction import open_pipeline, scores_of
from featinv_diffusion.studies.composition import compose
from featinv_diffusion.studies.concepts import find_concepts
from featinv_diffusion.studies.featinv_viz import show_concept
from featinv_diffusion.studies.interpolation import interpolate
from featinv_diffusion.studies.study import to_dicts
from featinv_diffusion.studies.variability import variability
from featinv_diffusion.studies.viz_figure import fade
from featinv_diffusion.studies.viz_measures import THRESHOLD, median, normalise, rgb_distance
from featinv_diffusion.types import Images

N_PAIRS, N_SPREAD = 20, 6
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
BOX = (0.25, 0.25, 0.75, 0.75)
N_CONCEPTS, N_SHOWN, N_SEEDS, N_FIT = 3, 6, 4, 24


def _pairs(pictures: Pictures) -> list[tuple[int, int]]:
    """Returns pairs of neighbours, each picture once; neighbours are of different classes."""
    return [(i, i + 1) for i in range(0, len(pictures) - 1, 2)]


def measure_mixtures(request: Request) -> Finding:
    """Samples mixtures and compositions of the maps of pairs of pictures."""
    inverter = open_pipeline(request.settings.models("tiny/convnext")[0], request.settings.device)
    backbone, size = inverter.require_backbone(), request.settings.batch_size
    pictures = request.pictures(2 * N_PAIRS, 64)
    pairs = _pairs(pictures)
    if not pairs:
        raise InputError("This item needs at least 2 images, got 1. Take more.")
    truth = scores_of(backbone, pictures.images, size).argmax(1)
    shown = to_pil(pictures.images)
    cosines: list[Tensor] = []
    both, in_map, inside, outside = [], [], [], []
    rows: list[Images] = []
    composed: list[Images] = []
    for i, j in pairs:
        given = {"n_samples": 1, "seeds": [pictures.seeds[i]], "batch_size": size}
        mixed = interpolate(inverter, shown[i], shown[j], weights=WEIGHTS, **given)
        cosines.append(mixed.cosine.mean(1))
        top5 = scores_of(backbone, mixed.images[2], size).topk(5, dim=1).indices[0]
        both.append(torch.tensor([bool(truth[i] in top5), bool(truth[j] in top5)]))
        if backbone.head_reads_map:
            said = backbone.logits(mixed.maps[2:3].to(backbone.device)).topk(5, dim=1).indices[0]
            in_map.append(bool(truth[i] in said and truth[j] in said))
        rows.append(mixed.images[:, 0])
        pasted = compose(inverter, shown[i], shown[j], box=BOX, **given)
        inside.append(float(torch.tensor(pasted.change_inside or [0.0]).mean()))
        outside.append(float(torch.tensor(pasted.change_outside or [0.0]).mean()))
        composed.append(pasted.after[:1])
    curve = torch.stack(cosines)
    means = {f"{w:g}": bootstrap_mean(curve[:, k]) for k, w in enumerate(WEIGHTS)}
    dip = bootstrap_difference(curve[:, [0, 4]].mean(1), curve[:, 2])
    lowest = bootstrap_mean(curve.argmin(1) == 2)
    seen = torch.stack(both)
    shares = {
        "one or both": bootstrap_mean(seen.any(1)),
        "both": bootstrap_mean(seen.all(1)),
        # What a picture could show at best: what the mixed map itself says, without one.
        **(
            {"both, of the mixed map itself": bootstrap_mean(torch.tensor(in_map))}
            if in_map
            else {}
        ),
    }
    near = bootstrap_difference(inside, outside)
    change = {"inside": bootstrap_mean(inside), "outside": bootstrap_mean(outside)}
    listed = ", ".join(f"{w}: {v.value:.3f}" for w, v in means.items())
    answers = {
        "featinv-figure-5": Answer(
            f"cosine by weight {listed}; lowest in the middle for {percent(lowest)} of the pairs",
            dip.low > 0,
        ),
        "featinv-figure-6": Answer(
            f"mean change of RGB inside the box {cell(change['inside'])}, outside "
            f"{cell(change['outside'])}",
            near.low > 0,
        ),
        "featinv-mixture": Answer(
            "pairs whose classes are among the top 5 of the sample of 0.5 : 0.5: "
            + ", ".join(f"{name} {percent(v)}" for name, v in shares.items()),
            shares["both"].low > 0.5,
        ),
    }
    tables: list[Any] = [
        (
            "Cosine to the mixed map",
            ("weight of A", "cosine"),
            [[w, cell(v)] for w, v in means.items()],
        ),
        (
            "Classes of A and B among the top 5 of 0.5 : 0.5",
            ("which", "pairs"),
            [[name, percent(v)] for name, v in shares.items()],
        ),
    ]
    firsts, seconds = ([pair[k] for pair in pairs] for k in (0, 1))
    columns: dict[str, Images] = {"A": pictures.images[firsts], "B": pictures.images[seconds]}
    columns |= {f"{w:g} A": torch.stack([row[k] for row in rows]) for k, w in enumerate(WEIGHTS)}
    columns["B in A"] = torch.cat(composed)
    drawn = {"mixtures.png": figures.draw_grid(columns, "Mixed and composed maps", [], 6)}
    metrics = {
        "cosine": to_dicts(means),
        "dip": to_dicts({"dip": dip})["dip"],
        "lowest_in_the_middle": to_dicts({"share": lowest})["share"],
        "classes": to_dicts(shares),
        "change": to_dicts(change),
    }
    return Finding(answers, tables, drawn, metrics, pictures.ids)


def measure_spread(request: Request) -> Finding:
    """Samples each map many times, and compares the spread of samples with that of pictures."""
    inverter = open_pipeline(request.settings.models("tiny/convnext")[0], request.settings.device)
    pictures = request.pictures(N_SPREAD, 64)
    spread, cosine = [], []
    examples: list[Images] = []
    for picture in to_pil(pictures.images):
        found = variability(inverter, picture, n_samples=8, seed=request.settings.seed)
        assert found.std is not None
        spread.append(float(found.std.mean()))
        cosine.append(found.cosine.mean(dim=(1, 2)))
        examples.append(found.examples[:2])
    between = float((pictures.images - pictures.images.mean(0)).square().mean(1).sqrt().mean())
    within = bootstrap_mean(spread)
    agree = torch.stack(cosine)
    answers = {
        "featinv-a3-variability": Answer(
            f"deviation of a pixel over samples of one map {cell(within)}, over pictures "
            f"{between:.3f}; cosine from {float(agree.min()):.3f} to {float(agree.max()):.3f}",
            within.high < between,
        )
    }
    columns: dict[str, Images] = {"original": pictures.images}
    columns |= {f"sample {k + 1}": torch.stack([x[k] for x in examples]) for k in (0, 1)}
    drawn = {"samples.png": figures.draw_grid(columns, "Two samples of each map", [])}
    rows = [
        [i, f"{s:.3f}", f"{float(c.mean()):.3f}"]
        for i, s, c in zip(pictures.ids, spread, cosine, strict=True)
    ]
    metrics = {"std_within": to_dicts({"std": within})["std"], "std_between": between}
    tables = [("Spread of 8 samples", ("picture", "deviation", "cosine"), rows)]
    return Finding(answers, tables, drawn, metrics, pictures.ids)


# ---- Several pictures × several concepts ---------------------------------------------------------


def measure_concepts(request: Request) -> Finding:
    """Finds concepts of one class, and shows each in pictures that they were not found on."""
    inverter = open_pipeline(request.settings.models("tiny/convnext")[0], request.settings.device)
    fit, shown, ids, title = _one_class(request)
    found = find_concepts(inverter, to_pil(fit), n_concepts=N_CONCEPTS)
    maps: list[list[Tensor]] = []
    own, chance, area = [], [], []
    for picture in to_pil(shown):
        row = []
        for concept in range(N_CONCEPTS):
            seen = show_concept(
                inverter,
                picture,
                found,
                concept=concept,
                film=(),
                n_samples=N_SEEDS,
                n_directions=1,
                seed=request.settings.seed,
            )
            change = seen.map
            null = median(rgb_distance(seen.nulls[0].images, seen.before.images))
            active = to_pixels(seen.cells, (change.shape[0], change.shape[1]))
            own.append(_share_inside(change, active))
            chance.append(_share_inside(null, active))
            area.append(float(active.float().mean()))
            row.append(normalise(change))
        maps.append(row)
    # Concepts of one picture are not independent, so that pictures are what is resampled.
    by_picture = [torch.tensor(x).view(len(shown), -1).mean(1) for x in (own, chance, area)]
    names = ("concept", "random subspaces", "area")
    values = {name: bootstrap_mean(x) for name, x in zip(names, by_picture, strict=True)}
    against_null, against_area = (
        bootstrap_difference(by_picture[0], other) for other in by_picture[1:]
    )
    listed = ", ".join(f"{name} {v.value:.2f}" for name, v in values.items())
    words = (
        f"{title}, {len(shown)} pictures × {N_CONCEPTS} concepts: share of the change where the "
        f"concept is active: {listed}; more than random subspaces by {cell(against_null, 2)}, than "
        f"the area by {cell(against_area, 2)}"
    )
    holds = against_area.low > 0 and against_null.low > 0
    answers = {
        "featinv-figure-4": Answer(words, holds),
        "featinv-c1-concepts": Answer(words, holds),
    }
    tables = [
        ("Change where active", ("of", "share"), [[name, cell(v, 2)] for name, v in values.items()])
    ]
    drawn = {"concepts.png": _draw_concepts(shown, maps, title)}
    metrics = {
        "share_inside": to_dicts(values),
        "more_than_random": to_dicts({"d": against_null})["d"],
        "more_than_area": to_dicts({"d": against_area})["d"],
    }
    return Finding(answers, tables, drawn, metrics, ids)


def _one_class(request: Request) -> tuple[Tensor, Images, list[str], str]:
    """Returns pictures of one class to find concepts on, others to show them in, and its name.

    Raises:
        InputError: fewer than two pictures of it.
    """
    images = request.image_set()
    labels = images.labels or [0] * len(images)
    most = min(Counter(labels).items(), key=lambda one: (-one[1], one[0]))[0]
    rows = [i for i, label in enumerate(labels) if label == most]
    rows = rows[: request.settings.n_images or N_FIT + N_SHOWN]
    n_shown = min(N_SHOWN, len(rows) - 1)
    if n_shown < 1:
        raise InputError(f"Concepts need at least two images of one class, got {len(rows)}.")
    pictures = to_tensor([center_square(images.read(i), 64) for i in rows])
    title = images.class_names[most] if images.class_names else "pictures"
    return pictures[:-n_shown], pictures[-n_shown:], [images.ids[i] for i in rows], title


def _share_inside(change: Tensor, active: Tensor) -> float:
    total = float(change.sum())
    return float(change[active].sum()) / total if total > 0 else 0.0


def _draw_concepts(shown: Images, maps: list[list[Tensor]], title: str) -> Any:
    """Draws each picture with what each concept changes in it, pale where the change is small."""
    columns = ["original", *(f"concept {k}" for k in range(N_CONCEPTS))]
    note = "Pale: change below 0.33 of its maximum, when a concept is attenuated to 25 %."
    board = Board(len(shown), len(columns), f"Concepts of {title}", [note], headers="first")
    figure = board.make()
    for i, picture in enumerate(shown):
        tiles = [picture, *(fade(picture, one >= THRESHOLD) for one in maps[i])]
        for j, tile in enumerate(tiles):
            axes = board.tile_axes(figure, i, j)
            figures.show_picture(axes, tile)
            if i == 0:
                figures.label(axes, columns[j])
    return figure
