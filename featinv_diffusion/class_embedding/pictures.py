"""Figures: what each block says and shows of a picture, identifiability, the perturbation test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from featinv_diffusion.backbones import same_backbone, wrap_model
from featinv_diffusion.backbones.base import LAST, Backbone
from featinv_diffusion.class_embedding.anatomy import Anatomy
from featinv_diffusion.class_embedding.measures import chance_identifiability, class_identifiability
from featinv_diffusion.class_embedding.reading import Reading
from featinv_diffusion.class_embedding.removal import PREDICTED, PROBE, WRONG
from featinv_diffusion.errors import InputError
from featinv_diffusion.figures import board as figures
from featinv_diffusion.figures.board import Board
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.inverters.chain import MapChain
from featinv_diffusion.runs.record import count
from featinv_diffusion.runs.sampling import sample_all
from featinv_diffusion.seeds import derive_seed
from featinv_diffusion.types import FeatureSpec

MAX_BLOCKS = 8
OVERLAY = 0.55
_CLIPPED = 0.99  # of the relevances lie on the scale
LINES = {"negative": "-", "positive": "--", "": ":"}
COLOURS = {
    "gradient": figures.BLUE,
    "gradient_of_probability": figures.GREEN,
    "chefer": figures.PURPLE,
    PROBE: figures.INK,
    "random": figures.GREY,
}
PANELS = {
    "": "by the label",
    PREDICTED: "by the predicted class",
    WRONG: "by a wrong class",
}
NO_INVERTER = "No inverter of this backbone's blocks is at hand: what they show is left out."


# ---- Inverters of the blocks ---------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class BlockInverter:
    """An inverter and the block whose patches it reads.

    Args:
        block: from 1; the last one also stands for the layer `last`, after the final norm.
        backbone: the model of the anatomy at that layer.
    """

    block: int
    backbone: Backbone
    inverter: Inverter

    def reconstruct(
        self, image: Float[Tensor, "1 3 h w"], name: str, seed: int = 0
    ) -> Float[Tensor, "3 height width"]:
        """Returns an image made from the patches, with the noise of the first sample of `name`."""
        features = self.backbone.features(image)
        return sample_all(self.inverter, features, [derive_seed(seed, name, 0)], 1).images[0]


def match_inverters(anatomy: Anatomy, inverters: Sequence[Inverter]) -> dict[int, BlockInverter]:
    """Finds the block that each inverter reads.

    Raises:
        InputError: an inverter of another backbone, of no block, or two of one block.
    """
    found: dict[int, BlockInverter] = {}
    for inverter in inverters:
        matched = _match(anatomy, inverter)
        if matched.block in found:
            raise InputError(
                f"There must be one inverter per block, but two read block {matched.block}: "
                f"{found[matched.block].inverter.spec} and {inverter.spec}."
            )
        found[matched.block] = matched
    return found


def _match(anatomy: Anatomy, inverter: Inverter) -> BlockInverter:
    own, spec = anatomy.backbone, inverter.spec
    if not same_backbone(spec.backbone, own.name):
        raise InputError(
            f"The inverter reads a {spec}, but the tokens are those of {own.name!r}. Use an "
            "inverter that was trained on this backbone."
        )
    if isinstance(inverter, MapChain):
        return BlockInverter(_block_of_stage(anatomy, spec), inverter.require_backbone(), inverter)
    backbone = wrap_model(own.model, name=own.name, layer=spec.layer, input_size=own.input_size)
    backbone.preprocessing = own.preprocessing
    spec.check_matches(backbone.spec)
    if spec.layer == LAST:
        return BlockInverter(len(anatomy.blocks), backbone, inverter)
    layer = own.model.get_submodule(spec.layer)
    blocks = [b for b, parts in enumerate(anatomy.blocks, start=1) if parts.block is layer]
    if not blocks:
        raise InputError(
            f"The inverter must read a block, but reads a {spec}. Use one of a block, such as the "
            "layer 'blocks.5', or of the layer 'last'."
        )
    return BlockInverter(blocks[0], backbone, inverter)


def _block_of_stage(anatomy: Anatomy, spec: FeatureSpec) -> int:
    """A chain names the blocks as `VitPath` does, and reads tokens of a model of its own."""
    last = len(anatomy.blocks)
    stages = {f"blocks.{b}": b + 1 for b in range(last)} | {"encoder": last, LAST: last}
    if spec.layer not in stages:
        raise InputError(
            f"The inverter must read a block, but reads a {spec}. Take the stage of one: "
            f"{', '.join(stages)}."
        )
    return stages[spec.layer]


# ---- The figure of one picture -------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TokenPicture:
    """One image with its reading (a batch of one) and reconstructions `[3, h, w]` by block."""

    picture: Image.Image
    name: str
    class_name: str
    predicted_name: str
    reading: Reading
    shown: Mapping[int, Tensor] = field(default_factory=dict)


def identifiability_maps(anatomy: Anatomy, reading: Reading) -> Float[Tensor, "b blocks h w"]:
    """Returns the identifiability of the read class at each patch after each block."""
    assert reading.states is not None
    ranks = reading.states.rank[:, 1:, anatomy.n_prefix :]
    return class_identifiability(ranks, anatomy.n_classes).unflatten(2, anatomy.grid)


def relevance_maps(anatomy: Anatomy, reading: Reading) -> Float[Tensor, "b blocks h w"]:
    """Returns the relevance of each patch at each block."""
    assert reading.relevance is not None
    return reading.relevance[:, :, anatomy.n_prefix :].unflatten(2, anatomy.grid)


def shown_blocks(n_blocks: int, inverted: Sequence[int], most: int = MAX_BLOCKS) -> list[int]:
    """Returns blocks from 1 that fit in a figure: evenly spread, the last, those with inverters."""
    spread = torch.linspace(1, n_blocks, min(n_blocks, most)).round().int().tolist()
    return sorted({*spread, *inverted})


def draw_blocks(anatomy: Anatomy, item: TokenPicture) -> Figure:
    """Draws identifiability, relevance and, where there are inverters, reconstructions by block."""
    blocks = shown_blocks(len(anatomy.blocks), list(item.shown))
    notes = [
        f"{figures.short_name(item.name, 60)} · {anatomy.backbone.name} predicts "
        f"{item.predicted_name}",
        "Says: identifiability of the class at each patch, 1 − rank / number of classes; chance is "
        f"{chance_identifiability(anatomy.n_classes):.3g}. "
        "Relevance: −∂ cross-entropy / ∂ attention to each patch, red where attention speaks for "
        "the class and blue where against it, all at one scale, of which the strongest 1 % are "
        "clipped; left, the mean over blocks. Class probability: in what the attention adds.",
        "Shows: an image made from the patches of that block." if item.shown else NO_INVERTER,
    ]
    n_rows = 3 if item.shown else 2
    title = f"What the blocks say of {item.class_name!r}"
    title += " and what they show" if item.shown else ""
    board = Board(n_rows, 1 + len(blocks), title, notes, right=0.7, headers="first")
    figure = board.make()
    _draw_says(board, figure, anatomy, item, blocks)
    _draw_relevance(board, figure, anatomy, item, blocks)
    if item.shown:
        _draw_shows(board, figure, item, blocks)
    return figure


def _draw_says(
    board: Board, figure: Figure, anatomy: Anatomy, item: TokenPicture, blocks: list[int]
) -> None:
    first = board.tile_axes(figure, 0, 0)
    figures.show_picture(first, item.picture)
    figures.label(first, "picture")
    figures.side_label(first, "says")
    maps = identifiability_maps(anatomy, item.reading)[0]
    image: Any = None
    for column, block in enumerate(blocks, start=1):
        axes = board.tile_axes(figure, 0, column)
        figures.label(axes, f"block {block}")
        image = figures.show_map(axes, maps[block - 1], 0, 1)
        figures.caption(axes, f"mean {figures.number(maps[block - 1].mean().item())}")
    figures.add_colour_bar(board, figure, 0, image, "identifiability")


def _draw_relevance(
    board: Board, figure: Figure, anatomy: Anatomy, item: TokenPicture, blocks: list[int]
) -> None:
    maps = relevance_maps(anatomy, item.reading)[0]
    assert item.reading.confidence is not None
    first = board.tile_axes(figure, 1, 0)
    figures.side_label(first, "relevance")
    high = max(float(np.quantile(maps.abs().numpy(), _CLIPPED)), 1e-12)
    image = show_overlay(first, item.picture, maps.mean(dim=0), high)
    figures.caption(first, "mean over blocks")
    for column, block in enumerate(blocks, start=1):
        axes = board.tile_axes(figure, 1, column)
        show_overlay(axes, item.picture, maps[block - 1], high)
        confidence = item.reading.confidence[0, block - 1].item()
        words = f"class probability {figures.number(confidence)}"
        figures.caption(axes, words, color=figures.GREY)
    figures.add_colour_bar(board, figure, 1, image, "relevance")


def _draw_shows(board: Board, figure: Figure, item: TokenPicture, blocks: list[int]) -> None:
    for column, block in enumerate(blocks, start=1):
        axes = board.tile_axes(figure, 2, column)
        if column == 1:
            figures.side_label(axes, "shows")
        if block in item.shown:
            figures.show_picture(axes, item.shown[block])
        else:
            axes.text(
                0.5,
                0.5,
                "no inverter",
                ha="center",
                va="center",
                color=figures.GREY,
                size=figures.TEXT,
            )


def show_overlay(
    axes: Axes, picture: Image.Image, values: Float[Tensor, "h w"], high: float
) -> Any:
    """Lays a signed map from −high to high, bilinearly enlarged, over a grey picture.

    Returns what a colour bar needs.
    """
    given = values[None, None]
    smooth = F.interpolate(given, (224, 224), mode="bilinear", align_corners=False)[0, 0]
    figures.show_picture(axes, picture.convert("L").convert("RGB"))
    image = figures.show_signed(axes, smooth, high)
    image.set_alpha(OVERLAY)
    return image


# ---- Figures of all images -----------------------------------------------------------------------


def draw_identifiability(
    anatomy: Anatomy,
    tokens: Float[Tensor, "blocks n"],
    curves: Mapping[str, Sequence[Mapping[str, float]]],
    n_images: int,
) -> Figure:
    """Draws mean identifiability by token and block, and its course for image and class tokens.

    Args:
        tokens: mean over images, the embeddings first.
        curves: intervals by block, of `image` and perhaps `cls`.
    """
    title = f"Class identifiability in {anatomy.backbone.name}, {count(n_images, 'image')}"
    note = (
        "Left: mean over images at each token, prefix tokens first, patches in raster order. "
        "Right: means with 95 % bootstrap intervals over images; dotted: chance."
    )
    board = Board(1, 2, title, [note], tile=2.7, gap=1.25, margin=0.5, caption=0.45)
    figure = board.make()
    top = board.bottom_of(0) - board.caption - board.tile
    _draw_tokens(board, figure, tokens, top)
    right = board.axes(figure, board.left_of(1), top, board.tile, board.tile)
    _draw_curves(right, curves, chance_identifiability(anatomy.n_classes))
    return figure


def _draw_tokens(board: Board, figure: Figure, tokens: Tensor, top: float) -> None:
    left = board.axes(figure, board.left_of(0), top, board.tile, board.tile)
    style: Any = {"aspect": "auto", "interpolation": "nearest", "origin": "lower"}
    image = left.imshow(tokens.numpy(), cmap=figures.HEAT, vmin=0, vmax=1, **style)
    left.set_xlabel("token", size=figures.TEXT)
    left.set_ylabel("block (0: embeddings)", size=figures.TEXT)
    left.yaxis.set_major_locator(MaxNLocator(integer=True))
    beside = board.left_of(0) + board.tile + 0.1
    bar = figure.colorbar(image, cax=board.axes(figure, beside, top, 0.09, board.tile))
    bar.set_label("identifiability", size=figures.TEXT)
    bar.ax.tick_params(labelsize=figures.TEXT)
    bar.ax.spines[:].set_visible(False)


def _draw_curves(
    axes: Axes, curves: Mapping[str, Sequence[Mapping[str, float]]], chance: float
) -> None:
    styles = {"image": ("image tokens", figures.BLUE), "cls": ("class token", figures.GREEN)}
    for kind, points in curves.items():
        name, colour = styles[kind]
        blocks = list(range(1, len(points) + 1))
        axes.plot(blocks, [p["value"] for p in points], color=colour, label=name, linewidth=1.3)
        axes.fill_between(
            blocks,
            [p["low"] for p in points],
            [p["high"] for p in points],
            color=colour,
            alpha=0.2,
            linewidth=0,
        )
    axes.axhline(chance, color=figures.GREY, linestyle=":", linewidth=0.8)
    axes.set_xlabel("block", size=figures.TEXT)
    axes.set_ylabel("identifiability", size=figures.TEXT)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(None, 1.01)
    axes.legend(frameon=False, fontsize=figures.TEXT, loc="lower right")


def draw_removal(perturbation: Mapping[str, Any], n_images: int) -> Figure:
    """Draws accuracy over the number of kept tokens: a panel per class that orders the patches."""
    curves = {name: row for name, row in perturbation.items() if name != "n_kept"}
    panels = [source for source in PANELS if any(_source_of(name) == source for name in curves)]
    note = (
        "Accuracy with so many patches left, ordered by their relevance for a class. Solid: the "
        "least relevant go first (higher is better); dashed: the most relevant go first (lower is "
        "better); dotted: random. The label's order knows the answer; the wrong class is a control."
    )
    title = f"Perturbation test, {count(n_images, 'image')}"
    board = Board(1, len(panels), title, [note], tile=2.6, gap=0.2, margin=0.55, right=1.4)
    figure = board.make()
    highest = max(max(row["accuracy"]) for row in curves.values())
    for column, source in enumerate(panels):
        top = board.bottom_of(0) - board.caption - board.tile
        axes = board.axes(figure, board.left_of(column), top, board.tile, board.tile)
        for name, row in curves.items():
            if name == "random" or _source_of(name) == source:
                _draw_order(axes, name, perturbation["n_kept"], row["accuracy"])
        axes.set_title(PANELS[source], size=figures.TEXT)
        axes.set_xlabel("patches kept", size=figures.TEXT)
        axes.set_ylim(0, 1.05 * highest or 1)
        if column == 0:
            axes.set_ylabel("accuracy", size=figures.TEXT)
        else:
            axes.tick_params(labelleft=False)
    beside: Any = {"loc": "center left", "bbox_to_anchor": (1.02, 0.5)}
    axes.legend(frameon=False, fontsize=figures.TEXT, **beside)
    return figure


def _source_of(name: str) -> str:
    """Returns the class that orders the patches: that behind method/direction, else the label."""
    return name.split("/")[2] if name.count("/") == 2 else ""


def _draw_order(axes: Axes, name: str, n_kept: Sequence[int], accuracy: Sequence[float]) -> None:
    method, direction = [*name.split("/"), ""][:2]
    label = method.replace("_", " ") if direction != "positive" else None
    axes.plot(
        n_kept,
        accuracy,
        LINES[direction],
        color=COLOURS[method],
        label=label,
        linewidth=1.2,
    )
