"""One feature map with cells of another, seen (FeatInv, section 4.3 and figure 6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from featinv_diffusion.errors import InputError
from featinv_diffusion.features import box_mask, paste, picture_mask
from featinv_diffusion.features.edits import CellMask, to_pixels
from featinv_diffusion.figures import board as figures
from featinv_diffusion.figures.board import Board
from featinv_diffusion.images import read_image, to_pil
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.runs.progress import advancing
from featinv_diffusion.runs.record import Result
from featinv_diffusion.runs.sampling import read_maps, sample_all, seeds_of, to_list
from featinv_diffusion.runs.scope import caption, open_scope, scope_notes
from featinv_diffusion.studies.study import choose_seeds, draw_original, settings_line, settings_of
from featinv_diffusion.types import Images, Source

MAX_COLUMNS = 6


def compose(
    inverter: Inverter,
    a: Any,
    b: Any,
    *,
    box: Sequence[float] | None = None,
    mask: Any = None,
    n_samples: int = 4,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    batch_size: int = 8,
    progress: bool = False,
) -> Composition:
    """Samples A's map before and after some of its cells come from B's, with the same noise.

    Args:
        a: a picture or a feature map `[1, c, h, w]`; the noise depends on its file name.
        b: another one, whose cells are taken at the same places.
        box: the region (y0, x0, y1, x1) in fractions of the centre square, rounded out to cells.
        mask: the region instead: a picture (a path or a PIL image), where it is light; or the
            cells themselves, bool `[h, w]`.
        n_samples: pairs of samples; deterministic inverters make one.
        seed: random seed.
        seeds: the seed of each pair itself, as a manifest keeps them.
        batch_size: samples per batch.
        progress: show a progress bar on stderr.

    Raises:
        InputError: not exactly one region, a region that does not fit the picture or the map,
            pictures that cannot be read, maps of another shape, samples that are not finite.
    """
    check_region(box, mask)
    a, b = read_maps(inverter, a), read_maps(inverter, b)
    seeds = choose_seeds(inverter, a, seed, n_samples, seeds)
    seeds_of(b, seed, 1)
    cells = _to_cells(box, mask, inverter.spec.grid, a.sources[0])
    plain = a.as_subclass(Tensor)
    edited = paste(plain, b.as_subclass(Tensor), cells)
    scope = open_scope(inverter)
    with advancing(inverter, 2 * len(seeds), progress):
        before = sample_all(inverter, plain, seeds, batch_size)
        after = sample_all(inverter, edited, seeds, batch_size)
    cosine = after.cosine.mean(dim=(1, 2))
    return Composition(
        settings=settings_of(inverter, len(seeds), seed, batch_size),
        arguments={
            "seeds": seeds,
            "a": a.sources[0].location,
            "b": b.sources[0].location,
            "box": None if box is None else [float(value) for value in box],
            "mask": str(Path(mask).absolute()) if isinstance(mask, str | Path) else None,
        },
        scope_p_value=scope.p_value(edited, cosine.double().mean().item()),
        scope_basis=scope.basis,
        a=a.sources[0],
        b=b.sources[0],
        cells=cells,
        before=before.images,
        after=after.images,
        cosine_before=before.cosine.mean(dim=(1, 2)),
        cosine=cosine,
        change=(after.images - before.images).abs().mean(dim=1),
    )


def check_region(box: Sequence[float] | None, mask: object) -> None:
    """Raises `InputError` unless exactly one of the two is given, and a box is one."""
    if (box is None) == (mask is None):
        got = "none" if box is None else "both"
        raise InputError(f"Exactly one of a box and a mask must be given, got {got}.")
    if box is not None:
        box_mask(box, (1, 1))


def _to_cells(
    box: Sequence[float] | None, mask: Any, grid: tuple[int, int], source: Source
) -> CellMask:
    if box is not None:
        return box_mask(box, grid)
    if isinstance(mask, str | Path):
        return picture_mask(read_image(mask), grid, source.size)
    if isinstance(mask, Image.Image):
        return picture_mask(mask.convert("RGB"), grid, source.size)
    cells = torch.as_tensor(mask) if isinstance(mask, np.ndarray | Tensor) else None
    if cells is None or cells.dtype != torch.bool or tuple(cells.shape) != grid:
        got = type(mask).__name__ if cells is None else f"{cells.dtype} {list(cells.shape)}"
        raise InputError(f"A mask must be a picture, or cells as bool {list(grid)}, got {got}.")
    return cells.cpu()


@dataclass(frozen=True, eq=False, repr=False)
class Composition(Result):
    """Pairs of samples of A's map and of its edit, of the same seeds.

    Args:
        a, b: the two pictures.
        cells: those of A's map that come from B's.
        before: samples of A's map, in [0, 1], rounded to 8 bits.
        after: samples of the edited map.
        cosine_before: of each sample's features to A's map.
        cosine: of each sample's features to the edited map.
        change: absolute difference of RGB, mean over the three channels.
    """

    command: ClassVar[str] = "compose"

    a: Source
    b: Source
    cells: Bool[Tensor, "h w"]
    before: Images
    after: Images
    cosine_before: Float[Tensor, " seeds"]
    cosine: Float[Tensor, " seeds"]
    change: Float[Tensor, "seeds height width"]

    @property
    def region(self) -> Bool[Tensor, "height width"]:
        """The pixels under the edited cells."""
        height, width = self.change.shape[1:]
        return to_pixels(self.cells, (height, width))

    @property
    def change_inside(self) -> list[float] | None:
        """Mean change of each pair under the edited cells; None where there are none."""
        return self._mean_change(self.region)

    @property
    def change_outside(self) -> list[float] | None:
        """Mean change of each pair elsewhere; None where all cells were edited."""
        return self._mean_change(~self.region)

    def _mean_change(self, where: Bool[Tensor, "height width"]) -> list[float] | None:
        return to_list(self.change[:, where].double().mean(dim=1)) if bool(where.any()) else None

    def main_figures(self) -> dict[str, Any]:
        """Returns the mean cosines and the mean changes."""
        inside, outside = self.change_inside, self.change_outside
        return {
            "cosines": [self.cosine.double().mean().item()],
            "cosines_unedited": [self.cosine_before.double().mean().item()],
            "change_inside": None if inside is None else fmean(inside),
            "change_outside": None if outside is None else fmean(outside),
        }

    def numbers(self) -> dict[str, Any]:
        """Returns the means, the edited cells, and the values of each pair."""
        return {
            **self.main_figures(),
            "cells": self.cells.int().tolist(),
            "samples": self.rows(),
        }

    def rows(self) -> list[dict[str, Any]]:
        """Returns one dict per pair of samples."""
        inside, outside = self.change_inside, self.change_outside
        return [
            {
                "sample": j,
                "seed": seed,
                "output": f"composed_{j}.png",
                "output_unedited": f"unedited_{j}.png",
                "cosine": self.cosine[j].item(),
                "cosine_unedited": self.cosine_before[j].item(),
                "change_inside": None if inside is None else inside[j],
                "change_outside": None if outside is None else outside[j],
            }
            for j, seed in enumerate(self.arguments["seeds"])
        ]

    def pictures(self) -> dict[str, Image.Image]:
        """Returns the samples by file name, the composed ones first."""
        names = [row[key] for key in ("output", "output_unedited") for row in self.rows()]
        return dict(zip(names, [*to_pil(self.after), *to_pil(self.before)], strict=True))

    def summary(self) -> str:
        """Returns the cosines and how much changed where, in one sentence."""
        found = self.main_figures()
        changes = [
            f"{found[key]:.3f} {where}"
            for key, where in (("change_inside", "inside"), ("change_outside", "outside"))
            if found[key] is not None
        ]
        return (
            f"{int(self.cells.sum())} of {self.cells.numel()} cells come from B: cosine to the "
            f"composed map {figures.number(found['cosines'][0])} (A's own map: "
            f"{figures.number(found['cosines_unedited'][0])}), mean RGB change "
            f"{', '.join(changes)}."
        )

    def figure(self) -> Figure:
        """Draws A above B at the left; then of each seed before, after, and what changed."""
        n_columns = min(len(self.cosine), MAX_COLUMNS)
        shown = f" · first {n_columns} of {len(self.cosine)} seeds"
        board = Board(
            3,
            1 + n_columns,
            "One feature map with cells of another",
            [
                settings_line(self.settings) + (shown if n_columns < len(self.cosine) else ""),
                "Outlined: the cells of A's map that come from B's. Under each picture the cosine "
                "of its features to the map it was sampled from.",
                *scope_notes(self.scope_basis),
            ],
            after_first=0.22,
            right=0.75,
        )
        figure = board.make()
        for row, (letter, source) in enumerate((("A", self.a), ("B", self.b))):
            axes = board.tile_axes(figure, row, 0)
            draw_original(axes, source, letter)
            figures.outline(axes, self.cells)
        for j in range(n_columns):
            self._draw_pair(board, figure, j, is_last=j == n_columns - 1)
        return figure

    def _draw_pair(self, board: Board, figure: Figure, j: int, is_last: bool) -> None:
        before, after, change = (board.tile_axes(figure, row, j + 1) for row in range(3))
        figures.show_picture(before, self.before[j])
        figures.caption(before, figures.number(self.cosine_before[j].item()))
        figures.show_picture(after, self.after[j])
        caption(after, figures.number(self.cosine[j].item()), self.scope_p_value)
        image = figures.show_map(change, self.change[j], 0, max(self.change.max().item(), 1e-3))
        inside, outside = self.change_inside, self.change_outside
        both = (("inside", inside), ("outside", outside))
        words = [f"{word} {means[j]:.2f}" for word, means in both if means]
        figures.caption(change, "\n".join(words))
        names = ("A's map", "composed map", "change")
        for axes, name in zip((before, after, change), names, strict=True):
            figures.outline(axes, self.cells)
            if j == 0:
                figures.side_label(axes, name)
        figures.label(before, f"sample {j}")
        if is_last:
            figures.add_colour_bar(board, figure, 2, image, "mean |ΔRGB|")
