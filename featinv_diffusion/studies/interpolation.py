"""Two feature maps mixed by several weights, seen (FeatInv, section 4.3 and figure 5)."""

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
from PIL import Image
from torch import Tensor

from featinv_diffusion.errors import InputError
from featinv_diffusion.features import mix
from featinv_diffusion.figures import board as figures
from featinv_diffusion.figures.board import Board
from featinv_diffusion.images import to_pil
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.metrics import feature_cosine
from featinv_diffusion.runs.progress import advancing
from featinv_diffusion.runs.record import Result
from featinv_diffusion.runs.sampling import read_maps, sample_all, seeds_of, to_list
from featinv_diffusion.runs.scope import caption, open_scope, scope_notes
from featinv_diffusion.studies.study import choose_seeds, draw_original, settings_line, settings_of
from featinv_diffusion.types import Features, Source

MAX_ROWS = 8
_CURVE = 1.25  # inches


def interpolate(
    inverter: Inverter,
    a: Any,
    b: Any,
    *,
    weights: Sequence[float] = (0, 0.25, 0.5, 0.75, 1),
    n_samples: int = 4,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    batch_size: int = 8,
    progress: bool = False,
) -> Interpolation:
    """Samples weight · A + (1 − weight) · B for each of the weights, with the same noise.

    Args:
        a: a picture or a feature map `[1, c, h, w]`; the noise depends on its file name.
        b: another one.
        weights: weights of A in any order; below 0 and above 1 they extrapolate.
        n_samples: samples of each mixture; deterministic inverters make one.
        seed: random seed.
        seeds: the seed of each sample itself, as a manifest keeps them.
        batch_size: samples per batch.
        progress: show a progress bar on stderr.

    Raises:
        InputError: weights that are not finite or given twice, pictures that cannot be read, maps
            of another shape, samples that are not finite.
    """
    weights = check_weights(weights)
    a, b = read_maps(inverter, a), read_maps(inverter, b)
    seeds = choose_seeds(inverter, a, seed, n_samples, seeds)
    seeds_of(b, seed, 1)
    scope = open_scope(inverter)
    pairs = [(weight, 1 - weight) for weight in weights]
    with advancing(inverter, len(weights) * len(seeds), progress):
        found = sample_mixtures(inverter, [a, b], pairs, seeds, batch_size)
    return Interpolation(
        settings=settings_of(inverter, len(seeds), seed, batch_size),
        arguments={
            "seeds": seeds,
            "a": a.sources[0].location,
            "b": b.sources[0].location,
            "weights": weights,
        },
        scope_p_value=scope.p_values(found.maps, to_list(found.cosine.mean(dim=1))),
        scope_basis=scope.basis,
        a=a.sources[0],
        b=b.sources[0],
        **vars(found),
    )


def check_weights(weights: Sequence[float]) -> list[float]:
    """Returns the weights as numbers.

    Raises:
        InputError: no weights, one that is not finite, or one that is given twice.
    """
    given = [float(weight) for weight in weights]
    finite = all(map(math.isfinite, given))
    if not given or not finite or len(set(map(figures.exact_number, given))) != len(given):
        listed = ",".join(f"{weight:g}" for weight in given)
        raise InputError(
            f"Weights must be finite numbers, each given once, got {listed or 'none'}."
        )
    return given


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
    maps = [one.as_subclass(Tensor) for one in maps]
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


@dataclass(frozen=True, eq=False, repr=False)
class Interpolation(Result):
    """Samples of mixtures of two maps; its fields are also those of `Mixtures`.

    Args:
        a, b: the two pictures.
    """

    command: ClassVar[str] = "interpolate"

    a: Source
    b: Source
    maps: Float[Tensor, "n c h w"]
    images: Float[Tensor, "n seeds 3 height width"]
    cosine: Float[Tensor, "n seeds"]
    cosine_to_maps: Float[Tensor, "n seeds 2"]

    @property
    def weights(self) -> list[float]:
        """The weights of A."""
        return self.arguments["weights"]

    @property
    def n_samples(self) -> int:
        """Samples of each mixture."""
        return len(self.arguments["seeds"])

    def main_figures(self) -> dict[str, Any]:
        """Returns the mean cosine of each mixture."""
        return {"cosines": to_list(self.cosine.mean(dim=1))}

    def numbers(self) -> dict[str, Any]:
        """Returns the cosines by weight and of each sample."""
        return {
            "weights": self.weights,
            **self.main_figures(),
            "cosines_to_a": to_list(self.cosine_to_maps[..., 0].mean(dim=1)),
            "cosines_to_b": to_list(self.cosine_to_maps[..., 1].mean(dim=1)),
            "samples": self.rows(),
        }

    def rows(self) -> list[dict[str, Any]]:
        """Returns one dict per sample."""
        return [
            {
                "weight": weight,
                "sample": j,
                "seed": seed,
                "output": f"weight_{figures.exact_number(weight)}_{j}.png",
                "cosine": self.cosine[i, j].item(),
                "cosine_to_a": self.cosine_to_maps[i, j, 0].item(),
                "cosine_to_b": self.cosine_to_maps[i, j, 1].item(),
                "scope_p_value": None if self.scope_p_value is None else self.scope_p_value[i],
            }
            for i, weight in enumerate(self.weights)
            for j, seed in enumerate(self.arguments["seeds"])
        ]

    def pictures(self) -> dict[str, Image.Image]:
        """Returns the samples by file name."""
        names = (row["output"] for row in self.rows())
        return dict(zip(names, to_pil(self.images.flatten(0, 1)), strict=True))

    def summary(self) -> str:
        """Returns the cosine of each mixture in one sentence."""
        parts = [
            f"{figures.exact_number(weight)}: {figures.number(cosine)}"
            for weight, cosine in zip(self.weights, self.main_figures()["cosines"], strict=True)
        ]
        return f"Cosine to the mixed map by weight of A: {', '.join(parts)}."

    def figure(self) -> Figure:
        """Draws A | samples by falling weight of A | B, and the cosines by weight below."""
        order = sorted(range(len(self.weights)), key=lambda i: -self.weights[i])
        n_rows = min(self.n_samples, MAX_ROWS)
        shown = f" · first {n_rows} of {self.n_samples} seeds" if n_rows < self.n_samples else ""
        board = Board(
            n_rows,
            len(order) + 2,
            "Mixtures of two feature maps, as pictures",
            [
                f"{settings_line(self.settings)}{shown}",
                "One row per sample; below each picture: cosine of its features to the mixed map.",
                *scope_notes(self.scope_basis),
            ],
            after_first=0.15,
            headers="first",
            extra=_CURVE + 0.5,
        )
        figure = board.make()
        ends = zip((0, len(order) + 1), "AB", (self.a, self.b), strict=True)
        for column, letter, source in ends:
            draw_original(board.tile_axes(figure, 0, column), source, letter)
        for row in range(n_rows):
            for column, i in enumerate(order, start=1):
                self._draw_sample(board.tile_axes(figure, row, column), i, row)
        width = len(order) * (board.tile + board.gap) - board.gap
        top = board.bottom_of(n_rows - 1) + 0.15
        self._draw_curve(board.axes(figure, board.left_of(1), top, width, _CURVE), order)
        return figure

    def _draw_sample(self, axes: Axes, i: int, row: int) -> None:
        p_value = None if self.scope_p_value is None else self.scope_p_value[i]
        figures.show_picture(axes, self.images[i, row])
        caption(axes, figures.number(self.cosine[i, row].item()), p_value)
        if i == max(range(len(self.weights)), key=lambda i: self.weights[i]):
            figures.side_label(axes, f"sample {row}")
        if row == 0:
            of_a, of_b = map(figures.exact_number, (self.weights[i], 1 - self.weights[i]))
            figures.label(axes, f"{of_a} A + {of_b} B")

    def _draw_curve(self, axes: Axes, order: Sequence[int]) -> None:
        """The means as lines and every sample as a dot, each weight below its own column."""
        weights = np.array([self.weights[i] for i in order])
        places = (np.arange(len(order)) + 0.5) / len(order)
        columns = (
            ("to the mixed map", self.cosine, figures.INK, "o"),
            ("to A", self.cosine_to_maps[..., 0], figures.BLUE, "^"),
            ("to B", self.cosine_to_maps[..., 1], figures.GREEN, "s"),
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
