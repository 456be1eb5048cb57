"""The study of `featinv interpolate`: two pictures' features, mixed by several weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from featinv_diffusion.errors import InputError
from featinv_diffusion.features import mix
from featinv_diffusion.figures import board as figures
from featinv_diffusion.figures.board import Board
from featinv_diffusion.images import to_pil
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.inverters.open import SampleSettings
from featinv_diffusion.metrics import feature_cosine
from featinv_diffusion.runs.sampling import Encoded, encode_picture, sample_all, to_list
from featinv_diffusion.runs.scope import Scope, caption
from featinv_diffusion.studies.study import Outcome, Study, settings_line
from featinv_diffusion.types import Features

# ---- Weighted combinations of feature maps, seen (FeatInv, section 4.3 and figure 5) -------------


@dataclass(frozen=True, eq=False)
class Mixtures:
    """The samples of n combinations of k maps, one per seed.

    Args:
        maps: the combinations.
        images: in [0, 1], rounded to 8 bits.
        cosine: of each sample's features to the combination it was sampled from.
        cosine_to_maps: of each sample's features to the k maps that were combined.
    """

    maps: Float[Tensor, "n c h w"]
    images: Float[Tensor, "n seeds 3 height width"]
    cosine: Float[Tensor, "n seeds"]
    cosine_to_maps: Float[Tensor, "n seeds k"]


def sample_mixtures(
    inverter: Inverter,
    maps: Sequence[Features],
    weights: Sequence[Sequence[float]],
    seeds: Sequence[int],
    batch_size: int = 8,
) -> Mixtures:
    """Samples each combination Σ_k weights[i][k] · maps[k] with the same seeds.

    Args:
        maps: k of them, `[1, c, h, w]` each.
        weights: n rows of k; they need not sum to 1.
        seeds: noise of the samples; the same for all combinations, so that only the map differs.

    Raises:
        InputError: as `mix` and `sample_map`.
    """
    combined = [mix(maps, row) for row in weights]
    samples = [sample_all(inverter, features, seeds, batch_size) for features in combined]
    to_maps = [
        [feature_cosine(features.expand_as(done.features), done.features) for features in maps]
        for done in samples
    ]
    return Mixtures(
        torch.cat(combined),
        torch.stack([done.images for done in samples]),
        torch.stack([done.cosine.mean(dim=(1, 2)) for done in samples]),
        torch.stack([torch.stack(columns, dim=1) for columns in to_maps]),
    )


MAX_ROWS = 8
_CURVE = 1.25  # inches


@dataclass(frozen=True)
class Interpolation(Study):
    """Samples of weight · A + (1 − weight) · B for each of the weights.

    Args:
        a: path of the picture whose weights are given, and whose name the seeds derive from.
        b: path of the other one.
        weights: in any order; below 0 and above 1 they extrapolate.
    """

    command: ClassVar[str] = "interpolate"

    a: str
    b: str
    weights: list[float]

    def __post_init__(self) -> None:
        figures.check_name(self.figure)
        finite = all(map(math.isfinite, self.weights))
        n_different = len(set(map(figures.exact_number, self.weights))) if finite else 0
        if not self.weights or n_different != len(self.weights):
            listed = ",".join(f"{weight:g}" for weight in self.weights)
            raise InputError(
                f"Weights must be finite numbers, each given once, but {listed or 'none'} came."
            )

    @property
    def n_samples(self) -> int:
        return len(self.weights) * len(self.seeds)

    def run(self, inverter: Inverter, settings: SampleSettings, scope: Scope) -> Outcome:
        a, b = encode_picture(inverter, self.a), encode_picture(inverter, self.b)
        pairs = [(weight, 1 - weight) for weight in self.weights]
        maps = [a.features, b.features]
        found = sample_mixtures(inverter, maps, pairs, self.seeds, settings.batch_size)
        cosines = to_list(found.cosine.mean(dim=1))
        p_values = scope.p_values(found.maps, cosines)
        rows = self._rows(found, p_values)
        return Outcome(
            figures={"cosines": cosines},
            numbers={
                "weights": self.weights,
                "cosines": cosines,
                "cosines_to_a": to_list(found.cosine_to_maps[..., 0].mean(dim=1)),
                "cosines_to_b": to_list(found.cosine_to_maps[..., 1].mean(dim=1)),
                "samples": rows,
            },
            rows=rows,
            pictures=dict(
                zip((r["output"] for r in rows), to_pil(found.images.flatten(0, 1)), strict=True)
            ),
            drawing=self._draw(a, b, found, settings, scope, p_values),
            summary=self._summary(cosines),
            scope_p_value=p_values,
        )

    def _rows(self, found: Mixtures, p_values: list[float] | None) -> list[dict[str, Any]]:
        return [
            {
                "weight": weight,
                "sample": j,
                "seed": seed,
                "output": f"weight_{figures.exact_number(weight)}_{j}.png",
                "cosine": found.cosine[i, j].item(),
                "cosine_to_a": found.cosine_to_maps[i, j, 0].item(),
                "cosine_to_b": found.cosine_to_maps[i, j, 1].item(),
                "scope_p_value": None if p_values is None else p_values[i],
            }
            for i, weight in enumerate(self.weights)
            for j, seed in enumerate(self.seeds)
        ]

    def _summary(self, cosines: Sequence[float]) -> str:
        parts = [
            f"{figures.exact_number(weight)}: {figures.number(cosine)}"
            for weight, cosine in zip(self.weights, cosines, strict=True)
        ]
        return f"Cosine to the mixed map by weight of A: {', '.join(parts)}."

    def _draw(
        self,
        a: Encoded,
        b: Encoded,
        found: Mixtures,
        settings: SampleSettings,
        scope: Scope,
        p_values: list[float] | None,
    ) -> Figure:
        """Draws A | samples by falling weight of A | B, and the cosines by weight below."""
        order = sorted(range(len(self.weights)), key=lambda i: -self.weights[i])
        n_rows = min(len(self.seeds), MAX_ROWS)
        shown = f" · first {n_rows} of {len(self.seeds)} seeds" if n_rows < len(self.seeds) else ""
        board = Board(
            n_rows,
            len(order) + 2,
            "Mixtures of two feature maps, as pictures",
            [
                f"{settings_line(settings)}{shown}",
                "One row per seed; under each picture the cosine of its features to the mixed map.",
                *scope.notes,
            ],
            headers="first",
            extra=_CURVE + 0.5,
        )
        figure = board.make()
        ends = ((a.square, "A", self.a), (b.square, "B", self.b))
        for column, (square, letter, path) in zip((0, len(order) + 1), ends, strict=True):
            axes = board.tile_axes(figure, 0, column)
            figures.show_picture(axes, square)
            figures.label(axes, f"{letter} (original)", weight="bold")
            figures.caption(axes, figures.short_name(path), color=figures.GREY)
        for row in range(n_rows):
            for column, i in enumerate(order, start=1):
                p_value = None if p_values is None else p_values[i]
                axes = board.tile_axes(figure, row, column)
                self._draw_sample(axes, found, i, row, p_value)
        width = len(order) * (board.tile + board.gap) - board.gap
        top = board.bottom_of(n_rows - 1) + 0.15
        self._draw_curve(board.axes(figure, board.left_of(1), top, width, _CURVE), found, order)
        return figure

    def _draw_sample(
        self, axes: Axes, found: Mixtures, i: int, row: int, p_value: float | None
    ) -> None:
        figures.show_picture(axes, found.images[i, row])
        caption(axes, figures.number(found.cosine[i, row].item()), p_value)
        if row == 0:
            of_a, of_b = map(figures.exact_number, (self.weights[i], 1 - self.weights[i]))
            figures.label(axes, f"{of_a} A + {of_b} B")

    def _draw_curve(self, axes: Axes, found: Mixtures, order: Sequence[int]) -> None:
        """The means as lines and every sample as a dot, each weight below its own column."""
        weights = np.array([self.weights[i] for i in order])
        places = (np.arange(len(order)) + 0.5) / len(order)
        columns = (
            ("to the mixed map", found.cosine, figures.INK, "o"),
            ("to A", found.cosine_to_maps[..., 0], figures.BLUE, "^"),
            ("to B", found.cosine_to_maps[..., 1], figures.ORANGE, "s"),
        )
        for _, cosine, colour, marker in columns:
            values = cosine[list(order)].cpu().numpy()
            axes.plot(places, values, marker, color=colour, ms=2, alpha=0.4, mew=0)
            axes.plot(places, values.mean(axis=1), marker=marker, color=colour, lw=1, ms=4)
        ends = [cosine[order[-1]].mean().item() for _, cosine, _, _ in columns]
        low, high = axes.get_ylim()
        heights = figures.spread(ends, 0.13 / _CURVE * (high - low))
        for (name, _, colour, _), height in zip(columns, heights, strict=True):
            axes.text(1.01, height, name, color=colour, va="center", size=figures.TEXT)
        axes.set(xlim=(0, 1), xticks=places, xticklabels=[figures.exact_number(w) for w in weights])
        axes.set(xlabel="weight of A", ylabel="cosine, mean over cells")
