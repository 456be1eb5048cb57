"""The figure of `featinv concepts`: where each concept is strongest, and where in the picture."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from featinv_diffusion.analysis import figures
from featinv_diffusion.analysis.concept_fit import ConceptFit, Fitted
from featinv_diffusion.analysis.featinv_viz_numbers import high_cells
from featinv_diffusion.analysis.figures import Board
from featinv_diffusion.images import center_square, read_image

MAX_CONCEPTS, N_PICTURES, SIDE = 6, 6, 256


def draw_concepts(fit: ConceptFit, fitted: Fitted) -> Figure:
    """Draws for each concept the pictures with the greatest activation, above their maps."""
    n_concepts = min(fitted.concepts.n_concepts, MAX_CONCEPTS)
    n_pictures = min(len(fitted.images), N_PICTURES)
    board = Board(
        2 * n_concepts,
        n_pictures,
        _title(fitted),
        _notes(fit, fitted, n_concepts),
        headers="first",
        right=0.7,
    )
    figure = board.make()
    greatest = fitted.activations.amax(dim=(2, 3))
    high = max(greatest[:, :n_concepts].max().item(), 1e-6)
    for k in range(n_concepts):
        order = greatest[:, k].argsort(descending=True, stable=True)[:n_pictures]
        for column, i in enumerate(order.tolist()):
            activation = fitted.activations[i, k]
            above, below = (board.tile_axes(figure, 2 * k + row, column) for row in range(2))
            path = Path(fit.folder) / fitted.images[i]
            figures.show_picture(above, center_square(read_image(path), SIDE))
            figures.outline(above, high_cells(activation))
            figures.caption(above, figures.short_name(fitted.images[i]), color=figures.GREY)
            image = figures.show_map(below, activation, 0, high)
            figures.caption(below, f"max {figures.number(activation.max().item())}")
            if column == 0:
                figures.side_label(above, f"concept {k}")
                figures.side_label(below, "activation")
            if column == n_pictures - 1:
                figures.add_colour_bar(board, figure, 2 * k + 1, image, "‖part‖ / max ‖f‖")
    return figure


def _title(fitted: Fitted) -> str:
    what = "these pictures" if fitted.target is None else fitted.target.name
    return f"Concepts of {what} in {fitted.spec.backbone}, layer {fitted.spec.layer}"


def _notes(fit: ConceptFit, fitted: Fitted, n_shown: int) -> list[str]:
    sizes = ", ".join(map(str, fitted.concepts.sizes[:n_shown]))
    shown = "" if n_shown == fitted.concepts.n_concepts else f", first {n_shown} shown"
    head = (
        f"{fit.method}, {len(fitted.images)} pictures, {fitted.concepts.n_concepts} concepts"
        f"{shown}, of {sizes} dimensions"
    )
    direction = None if fitted.target is None else fitted.target.direction
    if direction is not None:
        relevance = fitted.concepts.global_relevance(direction)[:n_shown]
        head += f" · global relevance {', '.join(map(figures.number, relevance.tolist()))}"
    return [
        head,
        "Of each concept the pictures that activate it most, and their activation maps; outlined: "
        "at least half of the picture's own maximum.",
    ]
