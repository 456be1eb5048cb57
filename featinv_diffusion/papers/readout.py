"""How much of the pixels a linear map reads from each layer, encoder and input resolution.

"Image Reconstruction as a Tool for Feature Analysis" trains a reconstructor for each encoder and
resolution. A ridge regression from a cell to the pixels under it takes seconds, so that it can be
fitted for every layer; what a reconstructor adds beyond it is not measured here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from featinv_diffusion.backbones import Backbone, load_backbone
from featinv_diffusion.backbones.objectives import find_objectives, is_image_based
from featinv_diffusion.figures.board import TEXT, draw_bars, plain_figure
from featinv_diffusion.metrics.statistics import Interval, bootstrap_statistic
from featinv_diffusion.papers.base import Answer, Finding, Pictures, Request, cell
from featinv_diffusion.studies.study import to_dicts
from featinv_diffusion.types import Features, Images

N_DEFAULT = 600
PATCH = 8
"""Pixels of a side that are read from a cell; maps of other grids are resized bilinearly."""
RIDGE = 1e-3
ENCODERS = ("tiny/siglip", "tiny/siglip2", "tiny/vit", "tiny/swin", "tiny/convnext", "tiny/resnet")
RESOLUTIONS = (32, 48, 64, 96)


@torch.no_grad()
def read_out(backbone: Backbone, pictures: Images, batch_size: int) -> dict[str, Tensor]:
    """Returns squared errors of each held-out image, of the readout and of its null.

    The null is the mean patch of the fitted half. Half of the images are fitted on.
    """
    side = pictures.shape[-1]
    grid = side // PATCH
    parts = [
        F.interpolate(
            backbone.features(x.to(backbone.device)).float().cpu(),
            (grid, grid),
            mode="bilinear",
            align_corners=False,
            antialias=True,
        )
        for x in pictures.split(batch_size)
    ]
    features = torch.cat(parts)
    n = len(pictures) // 2
    x, y = _cells(features[:n]), _patches(pictures[:n])
    mean, std = x.mean(0), x.std(0).clamp_min(1e-6)
    offset = y.mean(0)
    x = (x - mean) / std
    gram = x.T @ x
    weight = RIDGE * gram.trace() / len(gram)
    matrix = torch.linalg.solve(
        gram + weight * torch.eye(len(gram), dtype=gram.dtype), x.T @ (y - offset)
    )
    true = _patches(pictures[n:])
    made = ((_cells(features[n:]) - mean) / std) @ matrix + offset
    held = len(pictures) - n
    error = (made - true).square().reshape(held, -1).mean(1)
    null = (offset - true).square().reshape(held, -1).mean(1)
    return {"error": error, "null": null}


def _cells(features: Features) -> Float[Tensor, "n c"]:
    return features.movedim(1, -1).flatten(0, 2).double()


def _patches(images: Images) -> Float[Tensor, "n d"]:
    columns = F.unfold(images, PATCH, stride=PATCH)
    return columns.transpose(1, 2).flatten(0, 1).double()


def explained(columns: Mapping[str, Tensor]) -> Interval:
    """Returns the share of the variance of pixels that is read, 1 all, 0 nothing."""
    return bootstrap_statistic(columns, lambda m: 1 - m["error"] / max(m["null"], 1e-12))


def measure_readout(request: Request) -> Finding:
    """Reads pixels from the blocks, the resolutions and the objectives of encoders."""
    size = request.settings.batch_size
    names = request.settings.models(*ENCODERS)
    pictures: Pictures = request.pictures(N_DEFAULT, 64)
    last = {name: _read(name, pictures.images, size) for name in names}
    layers = {name: _read_blocks(name, pictures.images, size) for name in names[:2]}
    resized = names[min(1, len(names) - 1)]
    tried = {side: _read_at(resized, side, pictures.images, size) for side in RESOLUTIONS}
    by_size = {side: value for side, value in tried.items() if value is not None}
    ranked = sorted(last, key=lambda name: -last[name].value)
    falls = {
        name: f"{next(iter(one.values())).value:.2f} → {list(one.values())[-1].value:.2f}"
        for name, one in layers.items()
        if one
    }
    sides = ", ".join(f"{side} px {v.value:.3f}" for side, v in by_size.items())
    ends = list(by_size.values())
    answers = {
        "siglip-layers": Answer(
            "share of pixels read, first to last block: "
            + ", ".join(f"{name} {words}" for name, words in falls.items()),
            all(_falls(list(one.values())) for one in layers.values()),
        ),
        "siglip-resolution": Answer(
            f"share of pixels read from {resized} at {sides}",
            len(ends) > 1 and all(b.value > a.value for a, b in pairwise(ends)),
        ),
    }
    tables: list[Any] = [
        (
            "Encoders by objective",
            ("encoder", "objectives", "looks at places", "share read"),
            [
                [n, ", ".join(find_objectives(n)) or "–", str(is_image_based(n)), cell(last[n])]
                for n in ranked
            ],
        ),
        *(
            (f"Blocks of {name}", ("layer", "share read"), [[k, cell(v)] for k, v in one.items()])
            for name, one in layers.items()
        ),
        ("Resolutions", ("pixels", "share read"), [[str(s), cell(v)] for s, v in by_size.items()]),
    ]
    drawn = {
        "encoders.png": draw_bars(last, "Pixels read from the last map", "share, 95 % interval"),
        "layers.png": _draw_layers(layers),
    }
    metrics = {
        "last": to_dicts(last),
        "layers": {name: to_dicts(one) for name, one in layers.items()},
        "resolutions": to_dicts({str(side): v for side, v in by_size.items()}),
    }
    return Finding(answers, tables, drawn, metrics, pictures.ids)


def _falls(values: Sequence[Interval]) -> bool:
    return values[0].low > values[-1].high


def _read(name: str, images: Images, batch_size: int) -> Interval:
    return explained(read_out(load_backbone(name), images, batch_size))


def _read_blocks(name: str, images: Images, batch_size: int) -> dict[str, Interval]:
    """Returns the share that is read from each block of a transformer, and from its last map."""
    specs = [spec.layer for spec in load_backbone(name).layers()]
    blocks = [layer for layer in specs if _is_block(layer)]
    chosen = [*blocks, "last"] if blocks else specs
    return {
        layer: explained(read_out(load_backbone(name, layer), images, batch_size))
        for layer in chosen
    }


def _is_block(layer: str) -> bool:
    head, _, number = layer.rpartition(".")
    return number.isdigit() and head.rpartition(".")[2] in ("blocks", "layers", "layer")


def _read_at(name: str, side: int, images: Images, batch_size: int) -> Interval | None:
    """Returns the share at an input resolution; None where the encoder does not take it.

    The pictures are resized for the encoder alone; what is read are the pixels as they were.
    """
    from featinv_diffusion.errors import InputError

    try:
        backbone = load_backbone(name, input_size=side)
    except InputError:
        return None
    return explained(read_out(backbone, images, batch_size))


def _draw_layers(layers: Mapping[str, Mapping[str, Interval]]) -> Figure:
    figure, axes = plain_figure(5.2, 3.0)
    for name, one in layers.items():
        values: Sequence[Interval] = list(one.values())
        places = range(1, len(values) + 1)
        errors = [[v.value - v.low for v in values], [v.high - v.value for v in values]]
        axes.errorbar(places, [v.value for v in values], yerr=errors, marker="o", label=name)
    axes.set_xlabel("block; the last point is the map that the model hands on", fontsize=TEXT)
    axes.set_ylabel("share of pixels read", fontsize=TEXT)
    axes.legend(frameon=False, fontsize=TEXT)
    return figure
