"""The figure of FeatInv-Viz."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from featinv_diffusion.figures import board as figures
from featinv_diffusion.figures.board import Board
from featinv_diffusion.runs.scope import caption, scope_notes
from featinv_diffusion.studies.study import draw_original, settings_line
from featinv_diffusion.studies.viz_measures import THRESHOLD, normalise

if TYPE_CHECKING:
    from featinv_diffusion.studies.featinv_viz import ConceptViz

_FADED = 0.8  # towards white
_STRIP, _CURVE = 1.15, 1.0  # inches
_CLIPPED = 0.99  # of a map's pixels lie on the scale, so that single ones do not darken the rest
_STRIPS = {
    "activation_ratio": "activation, after ÷ before",
    "realised_change": "cosine of change to asked",
    "arrived": "share of change arrived",
    "class_probability_change": "Δ class probability",
    "effect": "mean RGB distance",
    "energy_inside": "share of change inside",
}


def draw(found: ConceptViz) -> Figure:
    """Draws pictures above maps, above the measures with their nulls, above the doses."""
    has_class = found.class_index is not None
    board = Board(
        3,
        max(6, len(found.doses)),
        f"Concept {found.arguments['concept']} at factor {found.factor:g}"
        + (f", {found.concept_basis}" if found.concept_basis else ""),
        [
            f"{settings_line(found.settings)} · {_made(found)}",
            f"Outlined: where the concept is active ({found.active_rule}). Maps: RGB distance of "
            "paired samples, median over seeds, at one scale, of which the brightest 1 % are "
            "clipped; the signed map is the mean over seeds of after − before.",
            _verdict(found),
            *scope_notes(found.scope_basis),
        ],
        tile=1.25,
        gap=0.1,
        right=0.1,
        extra=_STRIP + 0.5 + (_CURVE + 0.65 if has_class else 0.0),
    )
    figure = board.make()
    _draw_pictures(found, board, figure)
    _draw_maps(found, board, figure)
    _draw_film(found, board, figure)
    top = board.bottom_of(2) + 0.3
    _draw_strips(found, board, figure, top)
    if has_class:
        _draw_curve(found, board, figure, top + _STRIP + 0.45)
    return figure


def fade(
    picture: Float[Tensor, "3 height width"], kept: Bool[Tensor, "height width"]
) -> Float[Tensor, "3 height width"]:
    """Pales all pixels but those to be kept."""
    shown = kept.to(picture)
    return picture * shown + (1 - shown) * (picture * (1 - _FADED) + _FADED)


def _made(found: ConceptViz) -> str:
    n = len(found.before.images)
    return "1 sample" if n == 1 else f"{n} samples of each map, of which sample 0 is shown"


def _verdict(found: ConceptViz) -> str:
    n = len(found.nulls)
    if not found.has_null:
        return "No null: the concept's part is as long as all of the map in the natural span."
    null = f"Null: equally long parts in {n} random subspaces of {found.span}."
    if found.is_above_null:
        return f"{null} Affected: pixels that move more than with each of them."
    return f"{null} The mean RGB distance is not above it, so that nothing is marked as affected."


def _draw_pictures(found: ConceptViz, board: Board, figure: Figure) -> None:
    tiles = [board.tile_axes(figure, 0, column) for column in range(6)]
    titles = (
        "concept activation",
        "sample 0",
        f"sample 0, factor {found.factor:g}",
        "as published",
        "affected",
    )
    for axes, title in zip(tiles[1:], titles, strict=True):
        figures.label(axes, title)
    draw_original(tiles[0], found.picture)
    figures.outline(tiles[0], found.cells)
    high = found.activation.max().item()
    figures.show_map(tiles[1], found.activation, 0, max(high, 1e-6))
    figures.caption(tiles[1], f"0 … {high:.2f}")
    before, after = found.before, found.after
    figures.show_picture(tiles[2], before.images[0])
    figures.caption(tiles[2], f"cos {figures.number(before.cosine[0].item())}")
    figures.show_picture(tiles[3], after.images[0])
    words = f"cos {figures.number(after.cosine[0].item())}"
    caption(tiles[3], words, _scope_p(found, found.doses.index(after)))
    published = normalise(found.map) >= THRESHOLD
    figures.show_picture(tiles[4], fade(before.images[0], published))
    figures.caption(tiles[4], f"≥ {THRESHOLD} of max: {published.double().mean().item():.0%}")
    figures.show_picture(tiles[5], fade(before.images[0], found.affected))
    marked = f"above null: {found.affected.double().mean().item():.0%}"
    figures.caption(tiles[5], marked if found.is_above_null else "not above its null")


def _draw_maps(found: ConceptViz, board: Board, figure: Figure) -> None:
    maps = {"concept": found.map, "null, mean": found.null_maps.mean(dim=0)}
    high = max(1e-3, *(float(np.quantile(values.numpy(), _CLIPPED)) for values in maps.values()))
    shares = {name: found.own_effect.mean("energy_inside") for name in maps}
    shares["null, mean"] = found.null_mean("energy_inside")
    image: Any = None
    for column, (title, values) in enumerate(maps.items()):
        axes = board.tile_axes(figure, 1, column)
        image = figures.show_map(axes, values, 0, high)
        figures.outline(axes, found.cells)
        figures.label(axes, title)
        inside = shares[title]
        share = "" if inside is None else f" · {inside:.0%} inside"
        figures.caption(axes, f"{values.mean().item():.3f}{share}")
    noise = found.other_noise
    label = "RGB distance" if noise is None else "RGB distance\n(line: other noise)"
    figures.add_colour_bar(board, figure, 1, image, label, column=2, mark=noise)
    axes = board.tile_axes(figure, 1, 3)
    signed = found.signed_map
    high = max(1e-3, float(np.quantile(signed.abs().numpy(), _CLIPPED)))
    image = figures.show_signed(axes, signed, high)
    figures.outline(axes, found.cells)
    figures.label(axes, "signed change")
    figures.caption(axes, f"mean {signed.mean().item():+.3f}")
    figures.add_colour_bar(board, figure, 1, image, "after − before", column=4)


def _draw_film(found: ConceptViz, board: Board, figure: Figure) -> None:
    for column, dose in enumerate(found.doses):
        axes = board.tile_axes(figure, 2, column)
        figures.show_picture(axes, dose.images[0])
        figures.label(axes, f"factor {dose.factor:g}")
        caption(axes, f"cos {figures.number(dose.cosine[0].item())}", _scope_p(found, column))


def _draw_strips(found: ConceptViz, board: Board, figure: Figure, top: float) -> None:
    """Draws each measure of the concept with its interval beside those of the nulls."""
    for column, (measure, title) in enumerate(_STRIPS.items()):
        left = board.left_of(column) + 0.32
        axes = board.axes(figure, left, top, board.tile - 0.32, _STRIP)
        axes.set_title(title, size=figures.TEXT - 1, loc="right")
        axes.set(xticks=[0, 1], xticklabels=["concept", "nulls"], xlim=(-0.6, 1.5))
        nulls = [null.mean(measure) for null in found.null_effects]
        own = found.own_effect.interval(measure)
        value = found.own_effect.mean(measure)
        if own is None or value is None or None in nulls:
            axes.set(yticks=[])
            continue
        places = 1 + np.linspace(-0.2, 0.2, len(nulls))
        heights = [value for value in nulls if value is not None]
        axes.plot(places, heights, "s", color=figures.GREY, ms=2.5, alpha=0.7, mew=0)
        axes.vlines(0, own.low, own.high, color=figures.INK, lw=1)
        axes.plot([0], [value], "o", color=figures.INK, ms=4)
        if measure in ("realised_change", "class_probability_change"):
            axes.axhline(0, color=figures.GREY, lw=0.5)


def _draw_curve(found: ConceptViz, board: Board, figure: Figure, top: float) -> None:
    """Draws the class probability of every sample as a dot below its dose, and the means."""
    n = len(found.doses)
    width = n * (board.tile + board.gap) - board.gap
    axes: Axes = board.axes(figure, board.left_of(0), top, width, _CURVE)
    places = (np.arange(n) + 0.5) / n
    values = np.array([dose.probability(found.class_index) for dose in found.doses])
    axes.plot(places, values, "o", color=figures.INK, ms=2, alpha=0.4, mew=0)
    axes.plot(places, values.mean(axis=1), "o-", color=figures.INK, lw=1, ms=4)
    axes.set(xlim=(0, 1), ylim=(-0.03, 1.03), yticks=[0, 0.5, 1], xticks=places)
    axes.set(xticklabels=[f"{dose.factor:g}" for dose in found.doses])
    axes.set_xlabel("factor of the concept")
    axes.set_title(f"class probability of {found.class_words}", size=figures.TEXT, loc="left")


def _scope_p(found: ConceptViz, place: int) -> float | None:
    return None if found.scope_p_values is None else found.scope_p_values[place]
