"""Activation patching between two pictures, seen in the decoded picture and in the class.

Each cell of an earlier layer is taken from B while the model computes the rest from A
(Meng et al. 2022 and Zhang & Nanda 2024 for language models).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from featinv_diffusion.backbones import Backbone
from featinv_diffusion.errors import InputError
from featinv_diffusion.features.edits import frame_of_cells, random_like
from featinv_diffusion.figures import board as figures
from featinv_diffusion.figures.board import Board
from featinv_diffusion.images import to_pil
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.runs.progress import advancing
from featinv_diffusion.runs.record import Result
from featinv_diffusion.runs.sampling import read_maps, sample_maps, seeds_of
from featinv_diffusion.runs.scope import open_scope
from featinv_diffusion.seeds import make_generator
from featinv_diffusion.studies.edit import check_picture, map_of
from featinv_diffusion.studies.study import choose_seeds, draw_original, settings_line, settings_of
from featinv_diffusion.types import Features, Images, Source


def patch_tokens(
    inverter: Inverter,
    a: Any,
    b: Any,
    *,
    at: str,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    n_samples: int = 1,
    batch_size: int = 8,
    progress: bool = False,
) -> Patching:
    """Puts each cell of B's map at an earlier layer into A's, one at a time, and decodes.

    The null changes each cell as much, along one random direction of the two maps' cells.

    Args:
        a: a picture; the noise depends on its file name.
        b: another one, whose cells are taken at the same places.
        at: the layer; prefix tokens, such as the class token, are left as they are.
        seed: random seed; all samples have the same noise.
        seeds: that noise itself, as a manifest keeps it.
        n_samples: of each cell; more than 1 is refused.
        batch_size: samples per batch.
        progress: show a progress bar on stderr.

    Raises:
        InputError: no such layer or none that is reached, pictures that cannot be read, or samples
            that are not finite.
    """
    if n_samples != 1:
        raise InputError(f"Each cell is sampled once, so n_samples must be 1, got {n_samples}.")
    backbone = inverter.require_backbone()
    for picture in (a, b):
        check_picture(picture, at)
    maps, other = read_maps(inverter, a), read_maps(inverter, b)
    seeds = choose_seeds(inverter, maps, seed, n_samples, seeds)[:1]
    seeds_of(other, seed, 1)
    own, others = map_of(backbone, a, at), map_of(backbone, b, at)
    change = others - own
    frame = torch.cat([frame_of_cells(own), frame_of_cells(others)], dim=1)
    random = random_like(change, frame, make_generator(seeds[0], "null"))
    image = backbone.read(a)[0]
    n_cells = own.shape[2] * own.shape[3]
    scope = open_scope(inverter)
    with advancing(inverter, 2 * n_cells + 2, progress):
        plain = _run(inverter, image, at, [torch.zeros_like(own)], seeds[0], batch_size)
        whole = _run(inverter, image, at, [change], seeds[0], batch_size)
        patched = _run(inverter, image, at, _single_cells(change), seeds[0], batch_size)
        null = _run(inverter, image, at, _single_cells(random), seeds[0], batch_size)
    class_index = None if plain.probability is None else int(plain.probability[0].argmax())
    labels = backbone.labels
    grid = (own.shape[2], own.shape[3])
    return Patching(
        settings=settings_of(inverter, 1, seed, batch_size),
        arguments={
            "seeds": seeds,
            "a": maps.sources[0].location,
            "b": other.sources[0].location,
            "at": at,
        },
        scope_p_value=scope.p_value(whole.maps, whole.cosine[0]),
        scope_basis=scope.basis,
        a=maps.sources[0],
        b=other.sources[0],
        before=plain.images,
        after=whole.images,
        effect=_rgb(patched.images, plain.images).reshape(grid),
        null=_rgb(null.images, plain.images).reshape(grid),
        class_effect=_class_change(patched, plain, class_index, grid),
        class_null=_class_change(null, plain, class_index, grid),
        class_name=None if class_index is None or labels is None else labels[class_index],
    )


def _single_cells(change: Features) -> list[Features]:
    """Returns a change of each cell alone, in raster order."""
    found = []
    for y in range(change.shape[2]):
        for x in range(change.shape[3]):
            one = torch.zeros_like(change)
            one[:, :, y, x] = change[:, :, y, x]
            found.append(one)
    return found


@dataclass(frozen=True)
class _Decoded:
    """Maps, samples, their cosines to the maps, and class probabilities of the patched model."""

    maps: Features
    images: Images
    cosine: list[float]
    probability: Float[Tensor, "b k"] | None


@torch.no_grad()
def _run(
    inverter: Inverter, image: Images, at: str, changes: list[Features], seed: int, batch_size: int
) -> _Decoded:
    backbone = inverter.require_backbone()
    maps, scores = [], []
    for start in range(0, len(changes), batch_size):
        batch = torch.cat(changes[start : start + batch_size])
        edit = adding(backbone, at, batch)
        with backbone.intervene({at: edit}):
            found, logits = backbone.features_and_logits(image.expand(len(batch), -1, -1, -1))
        maps.append(found)
        scores.append(logits)
    features = torch.cat(maps)
    samples = list(sample_maps(inverter, ((one, seed) for one in features), batch_size))
    known = [score for score in scores if score is not None]
    return _Decoded(
        features,
        torch.cat([sample.images for sample in samples]),
        [cosine for sample in samples for cosine in sample.cosine.mean(dim=(1, 2)).tolist()],
        torch.cat(known).float().softmax(1).cpu() if known else None,
    )


def adding(backbone: Backbone, at: str, change: Features) -> Callable[[Tensor], Tensor]:
    """Returns the edit that adds a change of maps to a layer's output, in the layer's layout."""
    layout = backbone.layout(at)
    return lambda output: output + layout.from_map(change).to(output)


def _rgb(images: Images, before: Float[Tensor, "_ 3 height width"]) -> Float[Tensor, " b"]:
    return (images - before).abs().double().mean(dim=(1, 2, 3))


def _class_change(
    found: _Decoded, plain: _Decoded, class_index: int | None, grid: tuple[int, int]
) -> Float[Tensor, "h w"] | None:
    if class_index is None or found.probability is None or plain.probability is None:
        return None
    change = found.probability[:, class_index] - plain.probability[:, class_index]
    return change.double().reshape(grid)


@dataclass(frozen=True, eq=False, repr=False)
class Patching(Result):
    """What each cell of an earlier layer does when it comes from B.

    Args:
        a, b: the two pictures.
        before: sample of A's map; after: of the map when all cells come from B.
        effect: mean absolute change of RGB of the sample, by the cell that was patched.
        null: the same for a random change of each cell that is equally long.
        class_effect, class_null: change of the probability of A's class in the patched model; None
            without a head.
    """

    command: ClassVar[str] = "patch"

    a: Source
    b: Source
    before: Images
    after: Images
    effect: Float[Tensor, "h w"]
    null: Float[Tensor, "h w"]
    class_effect: Float[Tensor, "h w"] | None
    class_null: Float[Tensor, "h w"] | None
    class_name: str | None

    @property
    def share_beyond_null(self) -> float:
        """Share of the cells whose patch moves the picture more than nineteen in twenty nulls."""
        return (self.effect > self.null.flatten().quantile(0.95)).double().mean().item()

    def main_figures(self) -> dict[str, Any]:
        """Returns the mean effects, and how many cells go beyond their null."""
        return {
            "effect": self.effect.mean().item(),
            "null": self.null.mean().item(),
            "effect_of_all": _rgb(self.after, self.before).item(),
            "share_beyond_null": self.share_beyond_null,
            "class_name": self.class_name,
            "class_effect": None if self.class_effect is None else self.class_effect.mean().item(),
            "class_null": None if self.class_null is None else self.class_null.mean().item(),
        }

    def numbers(self) -> dict[str, Any]:
        """Returns the means and the values of each cell."""
        return {**self.main_figures(), "cells": self.rows()}

    def rows(self) -> list[dict[str, Any]]:
        """Returns one dict per cell."""
        names = ("effect", "null", "class_effect", "class_null")
        return [
            {
                "y": y,
                "x": x,
                **{
                    name: None if (m := getattr(self, name)) is None else m[y, x].item()
                    for name in names
                },
            }
            for y in range(self.effect.shape[0])
            for x in range(self.effect.shape[1])
        ]

    def pictures(self) -> dict[str, Image.Image]:
        """Returns the samples of A's map and of the map with all cells of B."""
        names = ("unpatched_0.png", "patched_0.png")
        return dict(zip(names, to_pil(torch.cat([self.before, self.after])), strict=True))

    def summary(self) -> str:
        """Returns how much single cells do, beside their null."""
        found = self.main_figures()
        words = (
            f"One cell of B at {self.arguments['at']} changes the picture by {found['effect']:.3f} "
            f"in mean RGB (a random change as long: {found['null']:.3f}); all cells together by "
            f"{found['effect_of_all']:.3f}. {found['share_beyond_null']:.0%} of the cells go "
            "beyond 19 in 20 random changes."
        )
        if found["class_effect"] is not None:
            words += (
                f" The model's probability of {self.class_name or 'its class'} changes by "
                f"{found['class_effect']:+.3f} per cell (random: {found['class_null']:+.3f})."
            )
        return words

    def figure(self) -> Figure:
        """Draws the pictures and samples, then the maps of effects above those of the null."""
        has_class = self.class_effect is not None
        board = Board(
            2,
            5 if has_class else 3,
            f"Cells of {self.arguments['at']} that come from B",
            [
                settings_line(self.settings),
                self.summary(),
                "Maps by cell: change of the picture; change of the class probability of A; each "
                "pair at one scale.",
            ],
            right=0.75,
            after_first=0.22,
        )
        figure = board.make()
        draw_original(board.tile_axes(figure, 0, 0), self.a, "A")
        draw_original(board.tile_axes(figure, 1, 0), self.b, "B")
        for row, (name, picture) in enumerate(
            (("A decoded", self.before[0]), ("all cells of B", self.after[0]))
        ):
            axes = board.tile_axes(figure, row, 1)
            figures.show_picture(axes, picture)
            figures.label(axes, name)
        high = max(self.effect.max().item(), self.null.max().item(), 1e-3)
        image = None
        for row, (values, name) in enumerate(((self.effect, "patched"), (self.null, "random"))):
            axes = board.tile_axes(figure, row, 2)
            image = figures.show_map(axes, values, 0, high)
            figures.label(axes, f"picture, {name}")
            figures.caption(axes, f"mean {fmean(values.flatten().tolist()):.3f}")
        pairs = ((self.class_effect, "patched"), (self.class_null, "random"))
        for row, (values, name) in enumerate(pairs):
            if values is None:
                continue
            axes = board.tile_axes(figure, row, 4)
            highest = max(float(m.abs().max()) for m, _ in pairs if m is not None)
            shown = figures.show_signed(axes, values, max(highest, 1e-3))
            figures.label(axes, f"class probability, {name}")
            figures.caption(axes, f"mean {fmean(values.flatten().tolist()):+.3f}")
            figures.add_colour_bar(board, figure, row, shown, "Δ class probability")
        figures.add_colour_bar(board, figure, 0, image, "mean |ΔRGB|", column=3)
        return figure
