"""Many samples of one picture's features: what they fix, and what they leave open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from featinv_diffusion.figures import board as figures
from featinv_diffusion.figures.board import Board
from featinv_diffusion.images import to_pil
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.metrics.certainty import Certainty
from featinv_diffusion.runs.certainty import (
    DRAWN,
    PIXEL_PARTS,
    CertaintyCalibration,
    certainty_notes,
    open_certainty,
)
from featinv_diffusion.runs.progress import advancing
from featinv_diffusion.runs.record import Result
from featinv_diffusion.runs.sampling import read_maps, sample_map, to_list
from featinv_diffusion.runs.scope import caption, open_scope, scope_notes
from featinv_diffusion.studies.study import (
    choose_seeds,
    draw_original,
    pixel_rows,
    settings_line,
    settings_of,
)
from featinv_diffusion.types import Features, Images, Source

LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
SHOWN = (0.05, 0.5, 0.95)
N_EXAMPLES = 2


def variability(
    inverter: Inverter,
    picture: Any,
    *,
    n_samples: int = 32,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    batch_size: int = 8,
    progress: bool = False,
    calibration: CertaintyCalibration | None = None,
) -> Variability:
    """Samples one map many times; holds one batch, and of each sample only its cosines.

    Beside the spread it tells, where that is calibrated, what the features determine: the first
    samples are judged, as many as the calibration had.

    Args:
        picture: a picture or a feature map `[1, c, h, w]`; the noise depends on its file name.
        n_samples: samples, at least 2; deterministic inverters make one, which has no spread.
        seed: random seed.
        seeds: the seed of each sample itself, as a manifest keeps them.
        batch_size: samples per batch.
        progress: show a progress bar on stderr.
        calibration: of the certainty of such samples; None takes that in the inverter's pipeline.

    Raises:
        InputError: too few samples, a picture that cannot be read, a map of another shape, samples
            that are not finite.
    """
    maps = read_maps(inverter, picture)
    seeds = choose_seeds(inverter, maps, seed, n_samples, seeds, least=2)
    features = maps.as_subclass(Tensor)
    scope, judge = open_scope(inverter), open_certainty(inverter, calibration)
    model = judge.model_for(len(seeds))
    judged: list[tuple[Images, Features]] = []
    moments, cosines, examples = RunningMoments(), [], []
    with advancing(inverter, len(seeds), progress):
        for batch in sample_map(inverter, features, seeds, batch_size):
            missing = max(0, N_EXAMPLES - sum(map(len, examples)))
            examples.append(batch.images[:missing])
            missing = (model.n_samples if model else 0) - sum(len(images) for images, _ in judged)
            if missing > 0:
                judged.append((batch.images[:missing], batch.features[:missing].cpu()))
            moments.update(batch.images)
            cosines.append(batch.cosine.float().cpu())
    cosine = torch.cat(cosines)
    return Variability(
        settings=settings_of(inverter, len(seeds), seed, batch_size),
        arguments={"seeds": seeds, "image": maps.sources[0].location},
        scope_p_value=scope.p_value(features, cosine.double().mean().item()),
        scope_basis=scope.basis,
        picture=maps.sources[0],
        mean=moments.mean,
        std=moments.std,
        cosine=cosine,
        examples=torch.cat(examples),
        certainty=None
        if model is None
        else model.judge(*map(torch.cat, zip(*judged, strict=True))),
        certainty_note=judge.note(len(seeds)),
    )


@dataclass(frozen=True, eq=False, repr=False)
class Variability(Result):
    """What many samples of one map have in common.

    Args:
        picture: that the map comes from.
        mean: the mean image, in [0, 1].
        std: of each pixel over samples, root mean square of the three channels' deviations; None
            for the one sample of a deterministic inverter.
        cosine: of each sample's cells to the map.
        examples: the first samples.
        certainty: what the features determine; None where such samples are not calibrated.
        certainty_note: then the reason, a sentence.
    """

    command: ClassVar[str] = "variability"

    picture: Source
    mean: Float[Tensor, "3 height width"]
    std: Float[Tensor, "height width"] | None
    cosine: Float[Tensor, "seeds h w"]
    examples: Images
    certainty: Certainty | None = None
    certainty_note: str = ""

    def cosine_quantiles(self, levels: Sequence[float]) -> Float[Tensor, " levels"]:
        """Returns quantiles of the cosines of all cells of all samples."""
        return _quantiles(self.cosine.flatten()[:, None], levels)[:, 0]

    def cosine_quantiles_per_cell(self, levels: Sequence[float]) -> Float[Tensor, "levels h w"]:
        """Returns quantiles over the samples, of each cell."""
        rows = _quantiles(self.cosine.flatten(1), levels)
        return rows.unflatten(1, self.cosine.shape[1:])

    def main_figures(self) -> dict[str, Any]:
        """Returns the mean deviation of a pixel, quantiles of the cosine of a cell, and the shares
        that the features determine."""
        return {
            "pixel_std_mean": None if self.std is None else self.std.double().mean().item(),
            "cosine_quantiles": _by_level(self.cosine_quantiles(LEVELS)),
            "determined_share": None if self.certainty is None else self.certainty.shares,
        }

    def numbers(self) -> dict[str, Any]:
        """Returns these, the quantiles of each cell over samples, and each sample's cosine."""
        per_cell = None if self.std is None else self.cosine_quantiles_per_cell(LEVELS)
        return {
            **self.main_figures(),
            "cosine_quantiles_per_cell": None if per_cell is None else _by_level(per_cell),
            "cosines": to_list(self.cosine.mean(dim=(1, 2))),
            "seeds": self.arguments["seeds"],
            "certainty": None if self.certainty is None else self.certainty.numbers(),
        }

    def rows(self) -> list[dict[str, Any]]:
        """Returns one dict per pixel; `error_` is what is expected, and the truth lies within
        `radius95_` of the mean of the judged samples at 95 % of the pixels."""
        red, green, blue = self.mean
        columns: dict[str, Tensor | None] = {
            "mean_red": red,
            "mean_green": green,
            "mean_blue": blue,
            "std": self.std,
        }
        if self.certainty is not None:
            for part in PIXEL_PARTS:
                columns[f"determined_{part}"] = self.certainty.determined(part)
                columns[f"error_{part}"] = self.certainty.error[part]
                columns[f"radius95_{part}"] = self.certainty.radii[part][0.95]
        return pixel_rows(**columns)

    def pictures(self) -> dict[str, Image.Image]:
        """Returns the mean image."""
        return {"mean.png": to_pil(self.mean[None])[0]}

    def summary(self) -> str:
        """Returns how much the samples differ and how well the cells come back, in a sentence."""
        found = self.main_figures()
        low, middle = (figures.number(found["cosine_quantiles"][key]) for key in ("0.05", "0.5"))
        deviation = (
            "1 sample of a deterministic inverter, which has no spread:"
            if self.std is None
            else f"{len(self.cosine)} samples: standard deviation of a pixel "
            f"{found['pixel_std_mean']:.3f} on average,"
        )
        certainty = self.certainty_note if self.certainty is None else self.certainty.summary()
        return (
            f"{deviation} cosine of a cell {middle} in the median (5 % of them below {low}).\n"
            f"{certainty}"
        ).rstrip()

    def figure(self) -> Figure:
        """Draws original, samples, their mean and deviation; below, quantiles of the cosine, and
        what is determined where that is known.

        Of a deterministic inverter: original, its sample, and the cosine of each cell.
        """
        return self._draw_one() if self.std is None else self._draw_many(self.std)

    def _draw_one(self) -> Figure:
        notes = "A deterministic inverter makes one sample, which has no spread."
        board = Board(
            1,
            3,
            "What the features fix: one sample",
            [settings_line(self.settings), notes, *scope_notes(self.scope_basis)],
            right=0.8,
        )
        figure = board.make()
        draw_original(board.tile_axes(figure, 0, 0), self.picture)
        self._draw_sample(board.tile_axes(figure, 0, 1), 0)
        self._draw_cosines(board, figure, 0, 2, {"cosine of cells": self.cosine[0]})
        return figure

    def _draw_many(self, std: Float[Tensor, "height width"]) -> Figure:
        notes = [self.certainty_note] if self.certainty is None else certainty_notes(self.certainty)
        board = Board(
            2 if self.certainty is None else 3,
            4,
            f"What the features fix, and what the prior fills in: {len(self.cosine)} samples",
            [
                settings_line(self.settings),
                "Bright in the upper map: pixels at which the samples differ.",
                *filter(None, notes),
                *scope_notes(self.scope_basis),
            ],
            right=0.8,
        )
        figure = board.make()
        tiles = [board.tile_axes(figure, 0, column) for column in range(4)]
        draw_original(tiles[0], self.picture)
        self._draw_sample(tiles[1], 0)
        figures.label(tiles[2], "mean of samples")
        figures.show_picture(tiles[2], self.mean)
        figures.label(tiles[3], "std of pixels")
        image = figures.show_map(tiles[3], std, 0, max(std.max().item(), 1e-3))
        figures.caption(tiles[3], f"mean {std.mean().item():.3f}")
        figures.add_colour_bar(board, figure, 0, image, "std, RGB in 0 … 1")
        self._draw_sample(board.tile_axes(figure, 1, 0), 1)
        levels = (f"cosine, {level:.0%} quantile" for level in SHOWN)
        maps = dict(zip(levels, self.cosine_quantiles_per_cell(SHOWN), strict=True))
        self._draw_cosines(board, figure, 1, 1, maps)
        if self.certainty is not None:
            _draw_certainty(board, figure, 2, self.certainty)
        return figure

    def _draw_sample(self, axes: Axes, j: int) -> None:
        figures.label(axes, f"sample {j}")
        figures.show_picture(axes, self.examples[j])
        words = f"cosine {figures.number(self.cosine[j].mean().item())}"
        caption(axes, words, self.scope_p_value)

    def _draw_cosines(
        self, board: Board, figure: Figure, row: int, first: int, maps: dict[str, Tensor]
    ) -> None:
        """Draws maps of cosines beside each other, at one scale."""
        low = min(values.min().item() for values in maps.values())
        high = max(low + 1e-3, *(values.max().item() for values in maps.values()))
        image: Any = None
        for column, (name, values) in enumerate(maps.items(), start=first):
            axes = board.tile_axes(figure, row, column)
            figures.label(axes, name)
            image = figures.show_map(axes, values, low, high)
            figures.caption(axes, f"mean {figures.number(values.mean().item())}")
        figures.add_colour_bar(board, figure, row, image, "cosine of a cell")


def _draw_certainty(board: Board, figure: Figure, row: int, certainty: Certainty) -> None:
    """Draws what is determined of pixels and of cells, at one scale."""
    image: Any = None
    for column, part in enumerate(DRAWN):
        axes = board.tile_axes(figure, row, column)
        figures.label(axes, DRAWN[part])
        image = figures.show_map(axes, certainty.determined(part), 0, 1)
        figures.caption(axes, f"{certainty.share(part):.0%} determined")
    figures.add_colour_bar(board, figure, row, image, "determined share")


def _by_level(values: Tensor) -> dict[str, Any]:
    return dict(zip(map(str, LEVELS), to_list(values), strict=True))


class RunningMoments:
    """Mean and standard deviation of each pixel of images that come in batches, in float64.

    Memory is that of a few images, whatever their number. Batches are joined by the pairwise
    update of Chan, Golub and LeVeque (1983), which does not cancel where deviations are small.

    Attributes:
        count: images so far.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean = torch.zeros((), dtype=torch.float64)
        self._squares = torch.zeros((), dtype=torch.float64)

    def update(self, images: Images) -> None:
        """Adds a batch of images of the size of those before."""
        batch = images.detach().cpu().double()
        mean, n = batch.mean(dim=0), len(batch)
        shift, total = mean - self._mean, self.count + n
        squares = (batch - mean).square().sum(dim=0)
        self._squares = self._squares + squares + shift.square() * (self.count * n / total)
        self._mean = self._mean + shift * (n / total)
        self.count = total

    @property
    def mean(self) -> Float[Tensor, "3 height width"]:
        """The mean image."""
        return self._mean.float()

    @property
    def std(self) -> Float[Tensor, "height width"] | None:
        """Standard deviation of each pixel, root of the variance (n − 1), mean over channels.

        None for a single image.
        """
        if self.count < 2:
            return None
        return (self._squares / (self.count - 1)).mean(dim=0).sqrt().float()


def _quantiles(
    values: Float[Tensor, "n columns"], levels: Sequence[float]
) -> Float[Tensor, "levels columns"]:
    """Interpolates linearly between order statistics; any number of values, unlike torch's."""
    ordered = values.double().sort(dim=0).values
    places = torch.tensor(list(levels), dtype=torch.float64) * (len(ordered) - 1)
    below = places.floor().long()
    above = (below + 1).clamp(max=len(ordered) - 1)
    share = (places - below)[:, None]
    return ((1 - share) * ordered[below] + share * ordered[above]).float()
