"""The figure of `featinv viz`, after figure 4 of FeatInv: the effect, its nulls, and the film."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from featinv_diffusion.analysis import figures
from featinv_diffusion.analysis.featinv_viz import ConceptEffect
from featinv_diffusion.analysis.featinv_viz_numbers import THRESHOLD, high_cells, normalise
from featinv_diffusion.analysis.figures import Board
from featinv_diffusion.analysis.scope import caption
from featinv_diffusion.analysis.study import settings_line
from featinv_diffusion.sampling import SampleSettings

_CURVE = 1.0  # inches
_FADED = 0.8  # towards white
_CLIPPED = 0.99  # of a map's pixels lie on the scale, so that single ones do not darken the rest


@dataclass(frozen=True, eq=False)
class Shown:
    """What is drawn beside the samples.

    Args:
        activation: of the concept in the picture.
        held: the figures of the manifest.
        p_values: of each dose; None where the scope is unknown.
    """

    image: str
    square: Image.Image
    concept: int
    activation: Float[Tensor, "h w"]
    held: dict[str, Any]
    p_values: list[float] | None


def draw_effect(
    shown: Shown, found: ConceptEffect, settings: SampleSettings, notes: Sequence[str]
) -> Figure:
    """Draws pictures above maps at one scale above the film of doses, and its probabilities."""
    has_classes = found.before.probability is not None
    board = Board(
        3,
        max(6, len(found.doses)),
        f"Concept {shown.concept} at factor {found.factor:g}: where the picture changes",
        [
            f"{settings_line(settings)} · {len(found.before.cosine)} samples, of which the first "
            "is shown",
            "Outlined: cells with at least half of the concept's greatest activation. Maps: RGB "
            "distance of samples, median over seeds, at one scale; the brightest 1 % are clipped.",
            *notes,
        ],
        tile=1.25,
        gap=0.1,
        right=0.1,
        extra=_CURVE + 0.65 if has_classes else 0.0,
    )
    figure = board.make()
    _draw_pictures(board, figure, shown, found)
    _draw_maps(board, figure, shown, found)
    _draw_means(board, figure, found)
    _draw_film(board, figure, shown, found)
    if has_classes:
        _draw_curve(board, figure, shown, found)
    return figure


def fade(
    picture: Float[Tensor, "3 height width"], distance: Float[Tensor, "height width"]
) -> Float[Tensor, "3 height width"]:
    """Pales the pixels whose normalised distance is below the threshold."""
    kept = (normalise(distance) >= THRESHOLD).to(picture)
    return picture * kept + (1 - kept) * (picture * (1 - _FADED) + _FADED)


def _draw_pictures(board: Board, figure: Figure, shown: Shown, found: ConceptEffect) -> None:
    tiles = [board.tile_axes(figure, 0, column) for column in range(5)]
    before, after = found.before, found.after
    titles = ("original", "concept activation", "reconstruction", f"at factor {found.factor:g}")
    for axes, title in zip(tiles, (*titles, "affected"), strict=True):
        figures.label(axes, title)
    figures.show_picture(tiles[0], shown.square)
    figures.outline(tiles[0], high_cells(shown.activation))
    figures.caption(tiles[0], figures.short_name(shown.image), color=figures.GREY)
    high = shown.activation.max().item()
    figures.show_map(tiles[1], shown.activation, 0, max(high, 1e-6))
    figures.caption(tiles[1], f"0 … {high:.2f}")
    figures.show_picture(tiles[2], before.images[0])
    figures.caption(tiles[2], f"cos {figures.number(before.cosine[0].item())}")
    figures.show_picture(tiles[3], after.images[0])
    place = found.doses.index(after)
    caption(tiles[3], f"cos {figures.number(after.cosine[0].item())}", _at(shown, place))
    figures.show_picture(tiles[4], fade(before.images[0], found.map))
    figures.caption(tiles[4], f"≥ {THRESHOLD} of max: {shown.held['affected']:.0%}")


def _draw_maps(board: Board, figure: Figure, shown: Shown, found: ConceptEffect) -> None:
    maps = (found.map, found.null_map, found.random_map)
    titles = ("concept", "null: other noise", "null: random")
    shares = ("energy_inside", "energy_inside_null", "energy_inside_null_random")
    high = max(1e-3, *(float(np.quantile(values.numpy(), _CLIPPED)) for values in maps))
    image: Any = None
    for column, (values, title, share) in enumerate(zip(maps, titles, shares, strict=True)):
        axes = board.tile_axes(figure, 1, column)
        image = figures.show_map(axes, values, 0, high)
        figures.outline(axes, high_cells(shown.activation))
        figures.label(axes, title)
        inside = shown.held[share]
        figures.caption(
            axes,
            f"{values.mean().item():.3f}" + ("" if inside is None else f" · {inside:.0%} inside"),
        )
    figures.add_colour_bar(board, figure, 1, image, "RGB distance", column=3)


def _draw_means(board: Board, figure: Figure, found: ConceptEffect) -> None:
    """Draws the mean distance of every pair of samples, in the columns beside the maps."""
    left = board.left_of(4) + 0.1
    top = board.bottom_of(1) - board.caption - board.tile
    axes = board.axes(figure, left, top, board.left_of(6) - board.gap - left, board.tile)
    groups = (
        ("concept", found.distance, figures.INK, "o"),
        ("noise", found.seed_noise, figures.BLUE, "^"),
        ("random", found.random.flatten(0, 1), figures.ORANGE, "s"),
    )
    for place, (_, distances, colour, marker) in enumerate(groups):
        means = distances.mean(dim=(1, 2)).numpy()
        spots = place + np.linspace(-0.2, 0.2, len(means))
        axes.plot(spots, means, marker, color=colour, ms=3, alpha=0.7, mew=0)
        axes.hlines(means.mean(), place - 0.3, place + 0.3, color=colour, lw=1)
    axes.set(xticks=range(3), xticklabels=[name for name, *_ in groups], xlim=(-0.5, 2.5))
    axes.set_ylim(bottom=0)
    axes.set_ylabel("mean distance")


def _draw_film(board: Board, figure: Figure, shown: Shown, found: ConceptEffect) -> None:
    for column, dose in enumerate(found.doses):
        axes = board.tile_axes(figure, 2, column)
        figures.show_picture(axes, dose.images[0])
        figures.label(axes, f"factor {dose.factor:g}")
        words = (
            f"cos {figures.number(dose.cosine[0].item())}"
            if dose.probability is None
            else f"p = {figures.number(dose.probability[0].item())}"
        )
        caption(axes, words, _at(shown, column))


def _draw_curve(board: Board, figure: Figure, shown: Shown, found: ConceptEffect) -> None:
    """Draws the class probability of every sample as a dot below its dose, and the means."""
    n = len(found.doses)
    width = n * (board.tile + board.gap) - board.gap
    axes: Axes = board.axes(figure, board.left_of(0), board.bottom_of(2) + 0.25, width, _CURVE)
    places = (np.arange(n) + 0.5) / n
    values = np.stack(
        [dose.probability.numpy() for dose in found.doses if dose.probability is not None]
    )
    axes.plot(places, values, "o", color=figures.INK, ms=2, alpha=0.4, mew=0)
    axes.plot(places, values.mean(axis=1), "o-", color=figures.INK, lw=1, ms=4)
    name = shown.held["class_name"] or f"class {shown.held['class_index']}"
    axes.set(xlim=(0, 1), ylim=(-0.03, 1.03), yticks=[0, 0.5, 1], xticks=places)
    axes.set(xticklabels=[f"{dose.factor:g}" for dose in found.doses])
    axes.set_xlabel("factor of the concept")
    axes.set_title(f"p of {name}", size=figures.TEXT, loc="left")


def _at(shown: Shown, place: int) -> float | None:
    return None if shown.p_values is None else shown.p_values[place]
