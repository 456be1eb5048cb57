"""One sample of each image from every backbone: tables 1 and 2, figures 1 and 3, A.2 to A.4, B.

Source: "FeatInv: Spatially resolved mapping from feature space to input space", section 4.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from featinv_diffusion.backbones import Backbone, load_backbone
from featinv_diffusion.figures import board as figures
from featinv_diffusion.figures.board import Board
from featinv_diffusion.inverters.diffusion import DiffusionInverter
from featinv_diffusion.inverters.open import load_inverter
from featinv_diffusion.metrics import (
    ClassifierFeatures,
    FeatureMoments,
    frechet_distance,
    top_k_match,
)
from featinv_diffusion.metrics.colour import delta_e_2000
from featinv_diffusion.metrics.features import psnr
from featinv_diffusion.metrics.statistics import (
    Interval,
    bootstrap_difference,
    bootstrap_mean,
)
from featinv_diffusion.papers.base import Answer, Finding, Pictures, Request, cell, percent
from featinv_diffusion.runs.sampling import sample_maps, to_pixels
from featinv_diffusion.studies.study import to_dicts
from featinv_diffusion.types import Features, Images

MEMBERS = ("tiny/resnet", "tiny/convnext", "tiny/swin", "tiny/convnext-pooled")
"""Pipelines in the order of the published figure 3."""
POOLED = "pooled"
N_DEFAULT, N_ROWS = 100, 6
EXTRACTOR = "tiny/vit"
"""Reads none of the features that are inverted."""
PUBLISHED = {
    "resnet": ("0.46", "91 (70)", "11.49"),
    "convnext": ("0.61", "94 (77)", "8.20"),
    "swin": ("0.53", "95 (80)", "12.69"),
    "convnext-pooled": ("0.19", "44 (20)", "31.67"),
}
"""Cosine, top-5 (top-1) match and FID of table 1, by the name of the bundled namesake."""
PROMPT = "a photo of a {}"


@dataclass(frozen=True, eq=False)
class Made:
    """Samples of one pipeline, one of each image.

    Args:
        original, seen: features of images and samples, by the pipeline's own backbone.
        match: whether the top-1 class is among the top k, by the backbone that looks.
    """

    images: Images
    cosine: Float[Tensor, " b"]
    match: Mapping[str, Mapping[int, Float[Tensor, " b"]]]


def open_pipeline(name: str, device: str, **settings: Any) -> DiffusionInverter:
    """Opens a diffusion pipeline."""
    inverter = load_inverter(pipeline=name, device=device, **settings)
    assert isinstance(inverter, DiffusionInverter)
    return inverter


@torch.no_grad()
def scores_of(backbone: Backbone, images: Images, batch_size: int) -> Float[Tensor, "b k"]:
    """Returns class scores on the CPU."""
    return torch.cat(
        [backbone.classify(x.to(backbone.device)).cpu() for x in images.split(batch_size)]
    )


@torch.no_grad()
def features_of(backbone: Backbone, images: Images, batch_size: int) -> Features:
    """Returns features on the CPU."""
    return torch.cat(
        [backbone.features(x.to(backbone.device)).cpu() for x in images.split(batch_size)]
    )


def draw_samples(
    inverter: DiffusionInverter, features: Features, seeds: Sequence[int], batch_size: int
) -> tuple[Images, Float[Tensor, " b"]]:
    """Returns one sample of each map, and the cosine of its features to the map."""
    pairs = zip(features, seeds, strict=True)
    images, cosines = [], []
    for batch in sample_maps(inverter, pairs, batch_size):
        images.append(batch.images)
        cosines.append(batch.cosine.mean(dim=(1, 2)).cpu())
    return torch.cat(images).contiguous(), torch.cat(cosines)


def sample_members(
    names: Sequence[str], pictures: Pictures, request: Request
) -> tuple[dict[str, Made], dict[str, Backbone]]:
    """Returns the samples of every pipeline, and the backbones that looked at them."""
    size = request.settings.batch_size
    inverters = {name: open_pipeline(name, request.settings.device) for name in names}
    eyes = {one.spec.backbone: one.require_backbone() for one in inverters.values()}
    truth = {name: scores_of(eye, pictures.images, size) for name, eye in eyes.items()}
    made = {}
    for name, inverter in inverters.items():
        features = features_of(inverter.require_backbone(), pictures.images, size)
        images, cosine = draw_samples(inverter, features, pictures.seeds, size)
        match: dict[str, dict[int, Tensor]] = {}
        for other, eye in eyes.items():
            scores = scores_of(eye, images, size)
            match[other] = {k: top_k_match(truth[other], scores, k).float() for k in (1, 5)}
        made[name] = Made(images, cosine, match)
    return made, eyes


def measure_reconstruction(request: Request) -> Finding:
    """Samples every backbone's maps, pooled ones too, and from the names of classes alone."""
    names = request.settings.models(*MEMBERS)
    pictures = request.pictures(N_DEFAULT, 64)
    made, _ = sample_members(names, pictures, request)
    owner = {name: open_pipeline(name, request.settings.device).spec.backbone for name in names}
    extractor = ClassifierFeatures(load_backbone(EXTRACTOR))
    real = _moments(extractor, pictures.images)
    distance = {
        n: frechet_distance(_moments(extractor, m.images), real).value for n, m in made.items()
    }
    by_name = _from_class_names(request, names[0], pictures)
    if by_name is not None:
        distance["class names"] = frechet_distance(_moments(extractor, by_name), real).value
    cosine = {n: bootstrap_mean(m.cosine) for n, m in made.items()}
    match = {n: {k: bootstrap_mean(m.match[owner[n]][k]) for k in (1, 5)} for n, m in made.items()}
    ties = {n: correlation(m.match[owner[n]][1], m.cosine) for n, m in made.items()}
    sharp = {n: psnr(m.images, pictures.images) for n, m in made.items()}
    colour = {n: delta_e_2000(m.images, pictures.images) for n, m in made.items()}
    answers = _answers(names, made, owner, cosine, match, distance, ties, sharp, colour)
    tables = _tables(names, made, cosine, match, distance, ties, sharp, colour)
    columns = {"original": pictures.images, **{n: m.images for n, m in made.items()}}
    drawn = {"grid.png": draw_columns(columns, {n: m.cosine for n, m in made.items()})}
    if by_name is not None:
        drawn["class-names.png"] = figures.draw_grid(
            {"original": pictures.images, "by its name": by_name},
            "Samples of class names alone",
            [],
        )
    metrics = {
        "cosine": to_dicts(cosine),
        "match": {
            n: {
                f"top{k}": v
                for k, v in zip(
                    m, to_dicts({str(k): x for k, x in m.items()}).values(), strict=True
                )
            }
            for n, m in match.items()
        },
        "frechet_distance": distance,
        "extractor": EXTRACTOR,
        "match_cosine_correlation": ties,
        "psnr": to_dicts({n: bootstrap_mean(v) for n, v in sharp.items()}),
        "delta_e_2000": to_dicts({n: bootstrap_mean(v) for n, v in colour.items()}),
    }
    notes = [
        f"Distances are Fréchet distances in the features of {EXTRACTOR} to these very images: of "
        "another extractor and number of images than FID, comparable only among themselves."
    ]
    return Finding(answers, tables, drawn, metrics, pictures.ids, notes)


def short(name: str) -> str:
    """Returns the name without that of the family."""
    return name.removeprefix("tiny/")


def _moments(extractor: ClassifierFeatures, images: Images) -> FeatureMoments:
    vectors = torch.cat([extractor(x) for x in images.split(64)])
    moments = FeatureMoments(vectors.shape[1])
    moments.update(vectors)
    return moments


@torch.no_grad()
def _from_class_names(request: Request, name: str, pictures: Pictures) -> Images | None:
    """Returns samples of the text-to-image model from the names of the classes; None without."""
    if pictures.labels is None or pictures.class_names is None:
        return None
    inverter = open_pipeline(name, request.settings.device)
    spec, parts = inverter.spec, []
    size = request.settings.batch_size
    for begin in range(0, len(pictures), size):
        rows = range(begin, min(begin + size, len(pictures)))
        titles = [pictures.class_names[pictures.labels[i]] for i in rows]
        unseen = torch.zeros(len(rows), spec.channels, *spec.grid, device=inverter.pipeline.device)
        (images,) = inverter.pipeline(
            features=unseen,
            prompt=[PROMPT.format(title) for title in titles],
            controlnet_conditioning_scale=0.0,
            num_inference_steps=inverter.num_inference_steps,
            guidance_scale=inverter.guidance_scale,
            guidance="text",
            generator=[torch.Generator().manual_seed(pictures.seeds[i]) for i in rows],
            output_type="pt",
            return_dict=False,
        )
        parts.append(to_pixels(images).float() / 255)
    return torch.cat(parts)


def correlation(a: Tensor, b: Tensor) -> float | None:
    """Returns Pearson's correlation; None where one is constant."""
    if len(a) < 3 or float(a.std()) == 0 or float(b.std()) == 0:
        return None
    return float(np.corrcoef(a.numpy(), b.numpy())[0, 1])


def _answers(
    names: Sequence[str],
    made: Mapping[str, Made],
    owner: Mapping[str, str],
    cosine: Mapping[str, Interval],
    match: Mapping[str, Mapping[int, Interval]],
    distance: Mapping[str, float],
    ties: Mapping[str, float | None],
    sharp: Mapping[str, Tensor],
    colour: Mapping[str, Tensor],
) -> dict[str, Answer]:
    spatial = [n for n in names if POOLED not in n]
    pooled = [n for n in names if POOLED in n]
    agree = ", ".join(
        f"{short(n)} {cosine[n].value:.2f}, {100 * match[n][5].value:.0f} "
        f"({100 * match[n][1].value:.0f}) %"
        for n in names
    )
    gaps = [
        bootstrap_difference(made[n].match[owner[n]][5], made[p].match[owner[p]][5])
        for p in pooled
        for n in spatial
        if owner[n] == owner[p]
    ]
    better = bool(gaps) and all(gap.low > 0 for gap in gaps)
    listed = ", ".join(f"{short(n)} {v:.1f}" for n, v in distance.items())
    names_only = distance.get("class names")
    ordered = names_only is None or all(distance[n] < names_only for n in spatial)
    pooled_worse = all(distance[p] > distance[n] for p in pooled for n in spatial)
    cross = [100 * made[n].match[e][5].mean() for n in spatial for e in set(owner.values())]
    lowest = min(float(v) for v in cross)
    known = [v for v in ties.values() if v is not None]
    tied = ", ".join(f"{short(n)} {v:.2f}" for n, v in ties.items() if v is not None)
    old = next((n for n in spatial if "resnet" in n), None)
    new = [n for n in spatial if n != old]
    modern = bool(old) and all(
        bootstrap_difference(sharp[n], sharp[str(old)]).low > 0
        and bootstrap_difference(colour[n], colour[str(old)]).high < 0
        for n in new
    )
    detail = ", ".join(
        f"{short(n)} {float(sharp[n].mean()):.1f} dB, ΔE {float(colour[n].mean()):.1f}"
        for n in names
    )
    return {
        "featinv-figure-1": Answer(agree, better),
        "featinv-figure-3": Answer(agree, better),
        "featinv-table-1": Answer(
            f"{agree}; Fréchet distance by {EXTRACTOR}: {listed}", better and pooled_worse
        ),
        "featinv-a4-pooled-pictures": Answer(agree, better),
        "featinv-class-names": Answer(
            f"Fréchet distance by {EXTRACTOR}: {listed}", names_only is not None and ordered
        ),
        "featinv-table-2": Answer(
            f"lowest top-5 match that another backbone sees: {lowest:.0f} %; {agree}", lowest > 50
        ),
        "featinv-match-cosine": Answer(
            f"correlation of match and cosine over images: {tied or 'not defined'}",
            bool(known) and min(known) > 0.3,
        ),
        "featinv-backbones": Answer(detail, modern),
    }


def _tables(
    names: Sequence[str],
    made: Mapping[str, Made],
    cosine: Mapping[str, Interval],
    match: Mapping[str, Mapping[int, Interval]],
    distance: Mapping[str, float],
    ties: Mapping[str, float | None],
    sharp: Mapping[str, Tensor],
    colour: Mapping[str, Tensor],
) -> list[Any]:
    rows = []
    for name in names:
        published = PUBLISHED.get(short(name), ("–", "–", "–"))
        tie = ties[name]
        rows.append(
            [
                short(name),
                cell(cosine[name]),
                published[0],
                f"{percent(match[name][5])} ({percent(match[name][1])})",
                published[1],
                f"{distance[name]:.2f}",
                published[2],
                "–" if tie is None else f"{tie:.2f}",
                cell(bootstrap_mean(sharp[name]), 2),
                cell(bootstrap_mean(colour[name]), 2),
            ]
        )
    if "class names" in distance:
        blank = ["–"] * 4
        rows.append(
            ["class names", *blank, f"{distance['class names']:.2f}", "about 29", *blank[:3]]
        )
    header = (
        "features of",
        "cosine",
        "published",
        "top-5 (top-1)",
        "published, %",
        "distance",
        "published FID",
        "match and cosine, r",
        "PSNR, dB",
        "ΔE2000",
    )
    eyes = list(next(iter(made.values())).match)
    cross = [
        [
            short(n),
            *(
                f"{100 * made[n].match[e][5].mean():.0f} / {100 * made[n].match[e][1].mean():.0f}"
                for e in eyes
            ),
        ]
        for n in names
    ]
    return [
        ("Table 1", header, rows),
        (
            "Table 2: top-5 / top-1 match, %",
            ("features of", *(f"seen by {e}" for e in eyes)),
            cross,
        ),
    ]


def draw_columns(columns: Mapping[str, Images], cosines: Mapping[str, Tensor]) -> Figure:
    """Draws one sample of each backbone beside the original, with its cosine below."""
    n = min(N_ROWS, len(next(iter(columns.values()))))
    board = Board(n, len(columns), "One sample of each backbone", [], headers="first", caption=0.16)
    figure = board.make()
    for column, (name, images) in enumerate(columns.items()):
        for row in range(n):
            axes = board.tile_axes(figure, row, column)
            figures.show_picture(axes, images[row])
            if row == 0:
                figures.label(axes, short(name))
            if name in cosines:
                figures.caption(axes, f"{float(cosines[name][row]):.2f}", color=figures.GREY)
    return figure
