"""The study of `featinv compose`: a region of one picture's features, from another picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, ClassVar

from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from torch import Tensor

from featinv_diffusion.errors import InputError
from featinv_diffusion.features import box_mask, paste, picture_mask
from featinv_diffusion.features.edits import CellMask, to_pixels
from featinv_diffusion.figures import board as figures
from featinv_diffusion.figures.board import Board
from featinv_diffusion.images import read_image, to_pil
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.runs.sampling import Encoded, encode_picture, sample_all, to_list
from featinv_diffusion.runs.scope import Scope, caption
from featinv_diffusion.settings import SampleSettings
from featinv_diffusion.studies.study import Outcome, Study, settings_line
from featinv_diffusion.types import Features, Images

# ---- Feature maps composed of regions of others, seen (FeatInv, section 4.3 and figure 6) --------


@dataclass(frozen=True, eq=False)
class Composition:
    """Pairs of samples of a map and of its edit, of the same seeds.

    Args:
        edited: the map after the edit, `[1, c, h, w]`.
        before: samples of the map as it was.
        after: samples of the edited map.
        cosine_before: of each sample's features to the map as it was.
        cosine: of each sample's features to the edited map.
        change: absolute difference of RGB, mean over the three channels.
        region: the pixels under the edited cells.
    """

    edited: Float[Tensor, "1 c h w"]
    before: Images
    after: Images
    cosine_before: Float[Tensor, " seeds"]
    cosine: Float[Tensor, " seeds"]
    change: Float[Tensor, "seeds height width"]
    region: Bool[Tensor, "height width"]

    @property
    def change_inside(self) -> list[float] | None:
        """Mean change of each pair under the edited cells; None where there are none."""
        return _means(self.change, self.region)

    @property
    def change_outside(self) -> list[float] | None:
        """Mean change of each pair elsewhere; None where all cells were edited."""
        return _means(self.change, ~self.region)


def compose(
    inverter: Inverter,
    features: Features,
    other: Features,
    mask: CellMask,
    seeds: Sequence[int],
    batch_size: int = 8,
) -> Composition:
    """Samples a map before and after the cells in `mask` come from `other`, with the same seeds.

    Args:
        features: `[1, c, h, w]`.
        other: `[1, c, h, w]`.
        mask: `[h, w]`; see `features.box_mask` and `features.picture_mask`.

    Raises:
        InputError: as `paste` and `sample_map`.
    """
    edited = paste(features, other, mask)
    before = sample_all(inverter, features, seeds, batch_size)
    after = sample_all(inverter, edited, seeds, batch_size)
    height, width = before.images.shape[2:]
    return Composition(
        edited=edited,
        before=before.images,
        after=after.images,
        cosine_before=before.cosine.mean(dim=(1, 2)),
        cosine=after.cosine.mean(dim=(1, 2)),
        change=(after.images - before.images).abs().mean(dim=1),
        region=to_pixels(mask, (height, width)),
    )


def _means(
    change: Float[Tensor, "seeds height width"], where: Bool[Tensor, "height width"]
) -> list[float] | None:
    return change[:, where].double().mean(dim=1).tolist() if bool(where.any()) else None


MAX_COLUMNS = 6


@dataclass(frozen=True)
class SpatialComposition(Study):
    """Samples of A's map before and after some of its cells come from B's.

    Args:
        a: path of the picture that is edited, and whose name the seeds derive from.
        b: path of the picture that the cells come from, at the same places.
        box: the region, see `box_mask`.
        mask: path of a picture of the region instead, see `picture_mask`.
    """

    command: ClassVar[str] = "compose"

    a: str
    b: str
    box: list[float] | None
    mask: str | None

    def __post_init__(self) -> None:
        figures.check_name(self.figure)
        if (self.box is None) == (self.mask is None):
            came = "none" if self.box is None else "both"
            raise InputError(f"Exactly one of a box and a mask must be given, but {came} came.")
        if self.box is not None:
            box_mask(self.box, (1, 1))  # a bad one is said before anything is loaded

    @property
    def n_samples(self) -> int:
        return 2 * len(self.seeds)

    def run(self, inverter: Inverter, settings: SampleSettings, scope: Scope) -> Outcome:
        a, b = encode_picture(inverter, self.a), encode_picture(inverter, self.b)
        cells = self._cells(a, inverter.spec.grid)
        found = compose(inverter, a.features, b.features, cells, self.seeds, settings.batch_size)
        rows = self._rows(found)
        p_value = scope.p_value(found.edited, found.cosine.double().mean().item())
        held = {
            "cosines": [found.cosine.double().mean().item()],
            "cosines_unedited": [found.cosine_before.double().mean().item()],
            "change_inside": _mean(found.change_inside),
            "change_outside": _mean(found.change_outside),
        }
        pictures = [*to_pil(found.after), *to_pil(found.before)]
        names = [row[key] for key in ("output", "output_unedited") for row in rows]
        return Outcome(
            figures=held,
            numbers={**held, "cells": cells.int().tolist(), "samples": rows},
            rows=rows,
            pictures=dict(zip(names, pictures, strict=True)),
            drawing=self._draw(a, b, cells, found, settings, scope, p_value),
            summary=_summary(cells, held),
            scope_p_value=p_value,
        )

    def _cells(self, a: Encoded, grid: tuple[int, int]) -> CellMask:
        if self.box is not None:
            return box_mask(self.box, grid)
        return picture_mask(read_image(self.mask or ""), grid, a.size)

    def _rows(self, found: Composition) -> list[dict[str, Any]]:
        nothing = [None] * len(self.seeds)
        columns = zip(
            self.seeds,
            to_list(found.cosine),
            to_list(found.cosine_before),
            found.change_inside or nothing,
            found.change_outside or nothing,
            strict=True,
        )
        return [
            {
                "sample": j,
                "seed": seed,
                "output": f"composed_{j}.png",
                "output_unedited": f"unedited_{j}.png",
                "cosine": cosine,
                "cosine_unedited": before,
                "change_inside": inside,
                "change_outside": outside,
            }
            for j, (seed, cosine, before, inside, outside) in enumerate(columns)
        ]

    def _draw(
        self,
        a: Encoded,
        b: Encoded,
        cells: CellMask,
        found: Composition,
        settings: SampleSettings,
        scope: Scope,
        p_value: float | None,
    ) -> Figure:
        """Draws A above B at the left; then of each seed before, after, and what changed."""
        n_columns = min(len(self.seeds), MAX_COLUMNS)
        shown = f" · first {n_columns} of {len(self.seeds)} seeds"
        board = Board(
            3,
            1 + n_columns,
            "One feature map with cells of another",
            [
                settings_line(settings) + (shown if n_columns < len(self.seeds) else ""),
                "Outlined: the cells of A's map that come from B's. Under each picture the cosine "
                "of its features to the map it was sampled from; one column per seed.",
                *scope.notes,
            ],
            after_first=0.22,
            right=0.75,
        )
        figure = board.make()
        self._draw_originals(board, figure, a, b, cells)
        high = max(found.change.max().item(), 1e-3)
        for j in range(n_columns):
            before, after, change = (board.tile_axes(figure, row, j + 1) for row in range(3))
            figures.show_picture(before, found.before[j])
            figures.caption(before, figures.number(found.cosine_before[j].item()))
            figures.show_picture(after, found.after[j])
            caption(after, figures.number(found.cosine[j].item()), p_value)
            image = figures.show_map(change, found.change[j], 0, high)
            figures.caption(change, _change_text(found, j))
            for axes in (before, after, change):
                figures.outline(axes, cells)
            if j == 0:
                figures.side_label(before, "A's map")
                figures.side_label(after, "composed map")
                figures.side_label(change, "change")
            if j == n_columns - 1:
                figures.add_colour_bar(board, figure, 2, image, "mean |ΔRGB|")
        return figure

    def _draw_originals(
        self, board: Board, figure: Figure, a: Encoded, b: Encoded, cells: CellMask
    ) -> None:
        for row, (picture, letter, path) in enumerate(((a, "A", self.a), (b, "B", self.b))):
            axes = board.tile_axes(figure, row, 0)
            figures.show_picture(axes, picture.square)
            figures.outline(axes, cells)
            figures.label(axes, f"{letter} (original)", weight="bold")
            figures.caption(axes, figures.short_name(path), color=figures.GREY)


def _mean(values: list[float] | None) -> float | None:
    return None if values is None else fmean(values)


def _change_text(found: Composition, j: int) -> str:
    parts = []
    if found.change_inside is not None:
        parts.append(f"in {found.change_inside[j]:.2f}")
    if found.change_outside is not None:
        parts.append(f"out {found.change_outside[j]:.2f}")
    return " · ".join(parts)


def _summary(cells: CellMask, held: dict[str, Any]) -> str:
    changes = [
        f"{held[key]:.3f} {where}"
        for key, where in (("change_inside", "inside"), ("change_outside", "outside"))
        if held[key] is not None
    ]
    return (
        f"{int(cells.sum())} of {cells.numel()} cells come from B: cosine to the composed map "
        f"{figures.number(held['cosines'][0])} (A's own map: "
        f"{figures.number(held['cosines_unedited'][0])}), mean RGB change {', '.join(changes)}."
    )
