"""Where the content of a cell is drawn, and how colour passes: ViT beside DETR.

Source: the follow-up "Understanding Transformer-based Vision Models through Inversion", of which a
summary was at hand: a ViT is said to keep detail and colour at all stages, to correspond better in
space, and to be more sensitive to colour than a DETR. It names no measures; these are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from featinv_diffusion.errors import InputError
from featinv_diffusion.figures.board import draw_bars, draw_grid
from featinv_diffusion.inverters.detr import DetrPath
from featinv_diffusion.inverters.modular import ModularInverter
from featinv_diffusion.metrics.features import ssim
from featinv_diffusion.metrics.statistics import (
    Interval,
    bootstrap_difference,
    bootstrap_mean,
    bootstrap_statistic,
)
from featinv_diffusion.papers.base import Answer, Finding, Request, cell
from featinv_diffusion.papers.layers import shape_correlation
from featinv_diffusion.papers.recolouring import GREY, choose_objects
from featinv_diffusion.papers.stages import STAGES, open_detr, reconstruct_stages
from featinv_diffusion.seeds import make_generator
from featinv_diffusion.studies.stages import AVERAGE, open_modular, recolour, stage_mse
from featinv_diffusion.studies.study import to_dicts
from featinv_diffusion.types import Images

MAIN = {"detr": ("backbone", "encoder", "decoder"), "vit": ("patches", "blocks.2", "encoder")}
"""The stages that are compared, by family."""
GRID = 8
"""Patches of a side in which a change of the input is made."""


def open_pair(request: Request) -> tuple[ModularInverter, ModularInverter]:
    """Opens a DETR and a ViT with their inverses, in this order.

    Raises:
        InputError: not one of each.
    """
    opened = [open_modular(name) for name in request.settings.models("detr", "vit")]
    opened.sort(key=lambda one: not isinstance(one.path, DetrPath))
    kinds = [one.path.family for one in opened]
    if kinds != ["detr", "vit"]:
        raise InputError(f"This item needs a DETR and a ViT as --model A,B, got {kinds}.")
    if opened[0].path.input_size != opened[1].path.input_size:
        raise InputError("The two models must read pictures of one size.")
    return opened[0], opened[1]


@dataclass(frozen=True, eq=False)
class Compared:
    """One stage of one model, measured on each image."""

    mse: Float[Tensor, " b"]
    ssim: Float[Tensor, " b"]
    place: Float[Tensor, " b"]
    inside: Float[Tensor, " b"]
    passed: Mapping[str, Tensor]


def measure_spatial(request: Request) -> Finding:
    """Measures detail, correspondence in space and sensitivity to colour of a DETR and a ViT."""
    pair = open_pair(request)
    pictures = request.staged(pair[0].path.input_size)
    images, size = pictures.images, request.settings.batch_size
    changes = make_changes(images, pictures.inside, request.settings.seed)
    found: dict[str, Compared] = {}
    columns: dict[str, Images] = {
        "original": images,
        "one patch": changes.patched,
        "hue turned": changes.turned,
    }
    for inverter in pair:
        stages = [s for s in MAIN[inverter.path.family] if s in inverter.inverses.chainable()]
        for stage, (one, coloured) in compare_stages(
            inverter, stages, images, changes, request.settings.seed, size
        ).items():
            name = f"{inverter.path.family}: {stage}"
            found[name], columns[name] = one, coloured
    return _report(found, columns, pictures.ids, changes.where)


@dataclass(frozen=True, eq=False)
class Changes:
    """What is done to the pictures: one patch of another picture's, the hue turned by 120°."""

    patched: Images
    where: Float[Tensor, "b 1 height width"]
    turned: Images


def make_changes(images: Images, inside: Tensor, seed: int) -> Changes:
    """Changes a patch of each picture, and the colours of all of it; `inside` has its shape."""
    others = images.roll(max(1, len(images) // 2), 0)
    patched, where = replace_patches(images, others, seed)
    return Changes(patched, where, recolour(images, torch.ones_like(inside), "+120"))


def compare_stages(
    inverter: ModularInverter,
    stages: Sequence[str],
    images: Images,
    changes: Changes,
    seed: int,
    batch_size: int,
) -> dict[str, tuple[Compared, Images]]:
    """Returns what each stage of a model makes of the pictures, and of their turned colours."""
    plain = reconstruct_stages(inverter, images, stages, batch_size)
    patched = reconstruct_stages(inverter, changes.patched, stages, batch_size)
    coloured = reconstruct_stages(inverter, changes.turned, stages, batch_size)
    found = {}
    for stage in stages:
        one = Compared(
            mse=(plain[stage] - images).square().mean(dim=(1, 2, 3)),
            ssim=ssim(plain[stage].clamp(0, 1), images),
            place=follow_cells(inverter, images, stage, seed, batch_size),
            inside=share_inside(patched[stage] - plain[stage], changes.where),
            passed=passed_on(coloured[stage] - plain[stage], changes.turned - images),
        )
        found[stage] = (one, coloured[stage])
    return found


def replace_patches(
    images: Images, others: Float[Tensor, "b 3 height width"], seed: int
) -> tuple[Images, Float[Tensor, "b 1 height width"]]:
    """Replaces one of 8 × 8 patches of each image by another image's; returns also where."""
    height, width = images.shape[-2:]
    rows, columns = height // GRID, width // GRID
    where = torch.zeros(len(images), 1, height, width)
    generator = make_generator(seed, "patch")
    places = torch.randint(0, GRID, (len(images), 2), generator=generator).tolist()
    for i, (y, x) in enumerate(places):
        where[i, :, y * rows : (y + 1) * rows, x * columns : (x + 1) * columns] = 1
    return torch.where(where > 0, others, images), where


def share_inside(
    change: Float[Tensor, "b 3 height width"], where: Float[Tensor, "b 1 height width"]
) -> Float[Tensor, " b"]:
    """Returns the share of the squared change that lies in some pixels; chance is their area."""
    energy = change.square().sum(dim=(1, 2, 3))
    inside = (change.square() * where).sum(dim=(1, 2, 3))
    return inside / energy.clamp_min(1e-12)


@torch.no_grad()
def follow_cells(
    inverter: ModularInverter, images: Images, stage: str, seed: int, batch_size: int
) -> Float[Tensor, " b"]:
    """Returns whether content moves with its cell, 1 entirely, about 0 not at all; NaN of queries.

    The cells of a map are permuted and inverted, and the tiles of the picture are put back. The
    score is the correlation over pixels of R, G and B with the picture of the map as it was, each
    without its mean.
    """
    spec = inverter.path.spec(stage)
    grid = spec.grid if spec.kind == "map" else getattr(inverter.path, "grid", None)
    if grid is None or spec.kind == "queries":
        return torch.full((len(images),), torch.nan)
    n = grid[0] * grid[1]
    order = torch.randperm(n, generator=make_generator(seed, "cells"))
    chain = inverter.chain(stage)
    scores = []
    for batch in images.split(batch_size):
        state = inverter.path.embeddings(batch.to(inverter.path.device), [stage])[stage]
        before = chain.invert(state).cpu()
        after = chain.invert(_permute(state, order)).cpu()
        tiles = _tiles(after, grid)
        back = torch.empty_like(tiles)
        back[:, order] = tiles
        scores.append(_correlation(back, _tiles(before, grid)))
    return torch.cat(scores)


def _permute(state: Tensor, order: Tensor) -> Tensor:
    """Returns a map or tokens with permuted cells; tokens before the patches stay."""
    if state.ndim == 4:
        return state.flatten(2)[:, :, order].unflatten(2, state.shape[2:])
    n_prefix = state.shape[1] - len(order)
    return torch.cat([state[:, :n_prefix], state[:, n_prefix:][:, order]], dim=1)


def _tiles(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """Returns `[b, cells, values]`."""
    b, c, height, width = images.shape
    rows, columns = height // grid[0], width // grid[1]
    parts = images[..., : rows * grid[0], : columns * grid[1]]
    parts = parts.reshape(b, c, grid[0], rows, grid[1], columns)
    return parts.permute(0, 2, 4, 1, 3, 5).reshape(b, grid[0] * grid[1], -1)


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.flatten(1), b.flatten(1)
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp_min(1e-12)


def passed_on(
    change: Float[Tensor, "b 3 height width"], given: Float[Tensor, "b 3 height width"]
) -> dict[str, Tensor]:
    """Returns the products of which w in change ≈ w · given is made, of the colour alone.

    w is 1 where a change of colour in the input comes back whole, and 0 where it is lost.
    """
    across = [x - x.mean(1, keepdim=True) for x in (change, given)]
    return {
        "xy": (across[0] * across[1]).sum(dim=(1, 2, 3)),
        "xx": across[1].square().sum(dim=(1, 2, 3)),
    }


def weight_of(columns: Mapping[str, Tensor]) -> Interval:
    """Returns w with its interval, over images."""
    return bootstrap_statistic(columns, lambda m: m["xy"] / max(m["xx"], 1e-12))


def _report(
    found: Mapping[str, Compared],
    columns: Mapping[str, Images],
    ids: list[str],
    where: Tensor,
) -> Finding:
    chance = float(where.mean())
    mse = {name: bootstrap_mean(one.mse) for name, one in found.items()}
    sharp = {name: bootstrap_mean(one.ssim) for name, one in found.items()}
    place = {
        name: bootstrap_mean(one.place)
        for name, one in found.items()
        if not one.place.isnan().any()
    }
    inside = {name: bootstrap_mean(one.inside) for name, one in found.items()}
    colour = {name: weight_of(one.passed) for name, one in found.items()}
    pairs = [("vit: encoder", "detr: encoder"), ("vit: encoder", "detr: decoder")]
    pairs = [pair for pair in pairs if pair[0] in found and pair[1] in found]
    detail = bootstrap_difference(found["detr: backbone"].mse, found["vit: encoder"].mse)
    nearer = [bootstrap_difference(found[a].inside, found[b].inside) for a, b in pairs]
    follows = place["vit: encoder"].low > place["detr: encoder"].high
    passes = [colour[a].low > colour[b].high for a, b in pairs]
    last = ("vit: encoder", "detr: encoder", "detr: decoder")
    in_words = {
        "detail": ", ".join(f"{n} {mse[n].value:.4f}" for n in mse),
        "inside": ", ".join(f"{n} {inside[n].value:.2f}" for n in last if n in inside),
        "place": ", ".join(f"{n} {place[n].value:.2f}" for n in last if n in place),
        "colour": ", ".join(f"{n} {colour[n].value:.2f}" for n in last if n in colour),
    }
    answers = {
        "vit-detail": Answer(f"MSE {in_words['detail']}", detail.low > 0),
        "vit-spatial": Answer(
            f"content follows its cell: {in_words['place']}; share of a patch's change inside it: "
            f"{in_words['inside']} (chance {chance:.3f})",
            follows and all(one.low > 0 for one in nearer),
        ),
        "vit-colour": Answer(
            f"share of a change of colour passed on: {in_words['colour']}", all(passes)
        ),
    }
    rows = [
        [
            name,
            cell(mse[name], 4),
            cell(sharp[name], 2),
            cell(place[name], 2) if name in place else "–",
            cell(inside[name], 2),
            cell(colour[name], 2),
        ]
        for name in found
    ]
    header = (
        "stage",
        "MSE",
        "SSIM",
        "follows its cell",
        "patch's change inside",
        "colour passed on",
    )
    metrics = {
        "mse": to_dicts(mse),
        "ssim": to_dicts(sharp),
        "follows_its_cell": to_dicts(place),
        "change_inside": {**to_dicts(inside), "chance": chance},
        "colour_passed_on": to_dicts(colour),
    }
    drawn = {
        "colour.png": draw_bars(
            colour, "Share of a change of colour passed on", "w, 95 % interval"
        ),
        "pictures.png": draw_grid(columns, "Hue turned by 120°, through each stage", [], n_rows=4),
    }
    return Finding(answers, [("ViT and DETR", header, rows)], drawn, metrics, ids)


# ---- Contextual shape ----------------------------------------------------------------------------


def measure_shape(request: Request) -> Finding:
    """Measures whether shapes that come from grey images are the image's own or the class's."""
    inverter = open_detr(request)
    pictures = request.staged(inverter.path.input_size, boxed=True)
    rows, labels, masks = choose_objects(pictures)
    images = pictures.images[rows]
    grey = recolour(images, masks, GREY)
    stages = [s for s in STAGES if s in inverter.inverses.chainable()]
    found = reconstruct_stages(inverter, grey, stages, request.settings.batch_size)
    same, other = _partners(labels)
    typical = {
        "own": grey,
        "same class": grey[same],
        "other class": grey[other],
    }
    values = {
        stage: {name: shape_correlation(x, shown) for name, shown in typical.items()}
        for stage, x in found.items()
    }
    means = {s: {n: bootstrap_mean(v) for n, v in one.items()} for s, one in values.items()}
    own = bootstrap_difference(values["decoder"]["own"], values["decoder"]["other class"])
    kind = bootstrap_difference(values["decoder"]["same class"], values["decoder"]["other class"])
    listed = ", ".join(f"{n} {v.value:.2f}" for n, v in means["decoder"].items())
    answers = {
        "detr-figure-11": Answer(
            f"lightness after the decoder, correlation to: {listed}", own.low > 0 and kind.low > 0
        )
    }
    table = [[s, *(cell(v, 2) for v in one.values())] for s, one in means.items()]
    error = stage_mse(found, grey)
    drawn = {"shape.png": draw_grid({"grey": grey, **found}, "Shapes from grey images", [])}
    metrics = {
        "correlation": {s: to_dicts(one) for s, one in means.items()},
        "mse": to_dicts({n: bootstrap_mean(v) for n, v in error.items() if n != AVERAGE}),
    }
    tables = [("Correlation of lightness", ("from", *typical), table)]
    return Finding(answers, tables, drawn, metrics, [pictures.ids[i] for i in rows])


def _partners(labels: list[int]) -> tuple[list[int], list[int]]:
    """Returns another image of the same class, or any other, and one of another class, of each."""
    n = len(labels)
    same, other = [], []
    for i in range(n):
        around = [(i + k) % n for k in range(1, n)] or [i]
        same.append(next((j for j in around if labels[j] == labels[i]), around[0]))
        other.append(next((j for j in around if labels[j] != labels[i]), around[0]))
    return same, other
