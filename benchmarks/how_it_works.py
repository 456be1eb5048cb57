"""Draw the pictures of docs/how-it-works.md from the package's own photos.

    python benchmarks/how_it_works.py

Two crops of scikit-learn's photos, `tiny/convnext`, its shipped settings, one seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from pages import crops
from torch import Tensor

from featinv_diffusion.features.edits import permute_cells
from featinv_diffusion.figures.board import (
    Board,
    add_colour_bar,
    caption,
    label,
    number,
    show_map,
    show_picture,
    write_figure,
)
from featinv_diffusion.images import read_image, to_tensor, write_png
from featinv_diffusion.inverters.diffusion import DiffusionInverter
from featinv_diffusion.inverters.open import load_inverter
from featinv_diffusion.metrics.features import feature_cosine
from featinv_diffusion.types import Features, Images

FOLDER = Path("docs/figures")
WIDTH = 1200
"""Pixels of a figure on the page."""
SEED = 1


def main() -> None:
    torch.set_num_threads(1)
    inverter = load_inverter("tiny/convnext")
    assert isinstance(inverter, DiffusionInverter)
    backbone = inverter.require_backbone()
    pictures = [crop for name, crop in crops(3) if name in ("flower-01", "china-01")]
    images = to_tensor(pictures)
    with torch.no_grad():
        maps = backbone.features(images)
        steps = denoise(inverter, maps)
        samples = steps[-1]
        draw_map(images, maps, samples, backbone.features(samples))
        draw_steps(images, steps)
        draw_ruler(inverter, images, maps, samples)


def write(figure: Figure, name: str) -> None:
    write_figure(figure, FOLDER / name)
    picture = read_image(FOLDER / name)
    picture.thumbnail((WIDTH, WIDTH))
    write_png(picture, FOLDER / name)


def seeds(n: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(SEED + i) for i in range(n)]


def denoise(inverter: DiffusionInverter, maps: Features) -> list[Images]:
    """Returns the decoded latents before denoising and after each step."""
    pipeline = inverter.pipeline
    factor = pipeline.vae.config.scaling_factor
    found: list[Images] = []

    def keep(pipe: Any, step: int, t: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        latents = tensors["latents"]
        found.append((pipe.vae.decode(latents / factor).sample / 2 + 0.5).clamp(0, 1))
        return {}

    images = pipeline(
        features=maps,
        num_inference_steps=inverter.num_inference_steps,
        guidance_scale=inverter.guidance_scale,
        guidance=inverter.guidance,
        generator=seeds(len(maps)),
        output_type="pt",
        callback_on_step_end=keep,
    ).images
    return [*found[:-1], images.float()]


def to_colours(maps: Features, seen: Features) -> tuple[Images, Images]:
    """Returns both in the colours of the three principal axes of the first's cells."""
    cells = maps.permute(0, 2, 3, 1).flatten(0, 2)
    mean = cells.mean(0)
    axes = torch.linalg.svd(cells - mean, full_matrices=False)[2][:3]

    def project(features: Features) -> Float[Tensor, "b 3 h w"]:
        return torch.einsum("bchw,kc->bkhw", features - mean[:, None, None], axes)

    spread = 2.5 * project(maps).std((0, 2, 3), keepdim=True)
    return tuple((project(f) / (2 * spread) + 0.5).clamp(0, 1) for f in (maps, seen))  # type: ignore[return-value]


def draw_map(images: Images, maps: Features, samples: Images, seen: Features) -> None:
    """Draws photo, map, sample, its map, and the agreement of the two by cell."""
    n, c, h, w = maps.shape
    colours, colours_seen = to_colours(maps, seen)
    cosine = feature_cosine(maps, seen)
    cells = torch.nn.functional.cosine_similarity(maps, seen, dim=1)
    board = Board(
        n,
        5,
        "From a picture to a map, and back",
        [
            f"The map has {h}×{w} cells of {c} numbers each; the three directions in which the "
            "cells differ most are shown as red, green and blue."
        ],
        headers="first",
        right=0.7,
        tile=1.3,
    )
    figure = board.make()
    titles = ("picture", "its map", "sample of the map", "map of the sample", "agreement")
    for i in range(n):
        shown = (images[i], colours[i], samples[i], colours_seen[i])
        for j, one in enumerate(shown):
            axes = board.tile_axes(figure, i, j)
            if j in (1, 3):
                one = one.repeat_interleave(16, 1).repeat_interleave(16, 2)
            show_picture(axes, one)
            if i == 0:
                label(axes, titles[j])
        axes = board.tile_axes(figure, i, 4)
        heat = show_map(axes, cells[i], 0, 1)
        caption(axes, f"cosine, mean {number(float(cosine[i]))}")
        if i == 0:
            label(axes, titles[4])
    add_colour_bar(board, figure, 0, heat, "cosine")
    write(figure, "how-map.png")


def draw_steps(images: Images, steps: Sequence[Images]) -> None:
    """Draws a sample while it is made."""
    chosen = sorted({*range(0, len(steps), 2), len(steps) - 1})
    board = Board(
        len(images),
        len(chosen) + 1,
        "Noise becomes a picture",
        ["The ControlNet sees the map in every step; the text-to-image model never changes."],
        headers="first",
        caption=0.05,
        after_first=0.2,
    )
    figure = board.make()
    for i, image in enumerate(images):
        axes = board.tile_axes(figure, i, 0)
        show_picture(axes, image)
        if i == 0:
            label(axes, "picture")
        for j, k in enumerate(chosen, start=1):
            axes = board.tile_axes(figure, i, j)
            show_picture(axes, steps[k][i])
            if i == 0:
                label(axes, f"step {k + 1} of {len(steps)}")
    write(figure, "how-steps.png")


def draw_ruler(
    inverter: DiffusionInverter, images: Images, maps: Features, samples: Images
) -> None:
    """Draws what a cosine is compared with: ceiling, sample and nulls."""
    n = len(images)
    permuted = permute_cells(maps, seeds(n))
    columns = {
        "picture": images,
        "ceiling:\nautoencoder alone": inverter.round_trip(images),
        "sample of the map": samples,
        "null: cells\nof the map permuted": inverter.invert(permuted, generator=seeds(n)),
        "null: no map at all": inverter.sample_prior(n, generator=seeds(n)),
        "null: another picture": images.flip(0),
    }
    board = Board(
        n,
        len(columns),
        "What a cosine is to be compared with",
        ["Below each picture: the cosine of its map to the map of the first picture of the row."],
        headers="first",
        header=0.34,
        after_first=0.2,
    )
    figure = board.make()
    backbone = inverter.require_backbone()
    for j, (name, column) in enumerate(columns.items()):
        cosine = feature_cosine(maps, backbone.features(column))
        for i in range(n):
            axes = board.tile_axes(figure, i, j)
            show_picture(axes, column[i])
            caption(axes, number(float(cosine[i])))
            if i == 0:
                label(axes, name)
    write(figure, "how-ruler.png")


if __name__ == "__main__":
    main()
