"""The study of `featinv variability`: many samples of one picture's features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from featinv_diffusion.errors import InputError
from featinv_diffusion.figures import board as figures
from featinv_diffusion.figures.board import Board
from featinv_diffusion.images import to_pil
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.runs.sampling import Encoded, encode_picture, sample_map, to_list
from featinv_diffusion.runs.scope import Scope, caption
from featinv_diffusion.settings import SampleSettings
from featinv_diffusion.studies.study import Outcome, Study, settings_line
from featinv_diffusion.types import Features, Images

# ---- How much the samples of one map differ ----


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
    def std(self) -> Float[Tensor, "height width"]:
        """Standard deviation of each pixel: root of the variance (n − 1), mean over channels."""
        return (self._squares / (self.count - 1)).mean(dim=0).sqrt().float()


@dataclass(frozen=True, eq=False)
class Variability:
    """What many samples of one map have in common.

    Args:
        mean: the mean image.
        std: of each pixel over samples, root mean square of the three channels' deviations.
        cosine: of each sample's cells to the map.
        examples: the first samples.
    """

    mean: Float[Tensor, "3 height width"]
    std: Float[Tensor, "height width"]
    cosine: Float[Tensor, "seeds h w"]
    examples: Images

    def cosine_quantiles(self, levels: Sequence[float]) -> Float[Tensor, " levels"]:
        """Returns quantiles of the cosines of all cells of all samples."""
        return _quantiles(self.cosine.flatten()[:, None], levels)[:, 0]

    def cosine_quantiles_per_cell(self, levels: Sequence[float]) -> Float[Tensor, "levels h w"]:
        """Returns quantiles over the samples, of each cell."""
        rows = _quantiles(self.cosine.flatten(1), levels)
        return rows.unflatten(1, self.cosine.shape[1:])


def measure_variability(
    inverter: Inverter,
    features: Features,
    seeds: Sequence[int],
    batch_size: int = 8,
    n_examples: int = 0,
) -> Variability:
    """Samples one map with many seeds; holds one batch, and of each sample only its cosines.

    Args:
        features: `[1, c, h, w]`.
        n_examples: how many of the samples are kept.

    Raises:
        InputError: fewer than two seeds; as `sample_map`.
    """
    if len(seeds) < 2:
        raise InputError(f"Variability needs at least 2 samples, but {len(seeds)} came.")
    moments, cosines, examples = RunningMoments(), [], []
    for batch in sample_map(inverter, features, seeds, batch_size):
        missing = max(0, n_examples - sum(map(len, examples)))
        examples.append(batch.images[:missing])
        moments.update(batch.images)
        cosines.append(batch.cosine.float().cpu())
    return Variability(moments.mean, moments.std, torch.cat(cosines), torch.cat(examples))


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


LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
SHOWN = (0.05, 0.5, 0.95)
N_EXAMPLES = 2


@dataclass(frozen=True)
class SampleVariability(Study):
    """Mean, standard deviation and cosine quantiles of the samples of one map.

    Args:
        image: path of the picture.
    """

    command: ClassVar[str] = "variability"

    image: str

    def __post_init__(self) -> None:
        figures.check_name(self.figure)
        if len(self.seeds) < 2:
            raise InputError(f"n_samples must be at least 2 here, but {len(self.seeds)} came.")

    @property
    def n_samples(self) -> int:
        return len(self.seeds)

    def run(self, inverter: Inverter, settings: SampleSettings, scope: Scope) -> Outcome:
        picture = encode_picture(inverter, self.image)
        found = measure_variability(
            inverter, picture.features, self.seeds, settings.batch_size, N_EXAMPLES
        )
        quantiles = _by_level(found.cosine_quantiles(LEVELS))
        p_value = scope.p_value(picture.features, found.cosine.double().mean().item())
        held = {"pixel_std_mean": found.std.double().mean().item(), "cosine_quantiles": quantiles}
        return Outcome(
            figures=held,
            numbers={
                **held,
                "cosine_quantiles_per_cell": _by_level(found.cosine_quantiles_per_cell(LEVELS)),
                "cosines": to_list(found.cosine.mean(dim=(1, 2))),
                "seeds": self.seeds,
            },
            rows=_rows(found),
            pictures={"mean.png": to_pil(found.mean[None])[0]},
            drawing=self._draw(picture, found, settings, scope, p_value),
            summary=(
                f"{self.n_samples} samples: standard deviation of a pixel "
                f"{held['pixel_std_mean']:.3f} on average, cosine of a cell "
                f"{figures.number(quantiles['0.5'])} in the median (5 % of them below "
                f"{figures.number(quantiles['0.05'])})."
            ),
            scope_p_value=p_value,
        )

    def _draw(
        self,
        picture: Encoded,
        found: Variability,
        settings: SampleSettings,
        scope: Scope,
        p_value: float | None,
    ) -> Figure:
        """Draws original, samples, their mean and deviation; below, quantiles of the cosine."""
        board = Board(
            2,
            4,
            f"What the features fix, and what the prior fills in: {self.n_samples} samples",
            [
                settings_line(settings),
                "Bright in the upper map: pixels that the features leave open.",
                *scope.notes,
            ],
            right=0.8,
        )
        figure = board.make()
        titles = ("original", "sample 0", "mean of samples", "std of pixels")
        tiles = [board.tile_axes(figure, 0, column) for column in range(4)]
        for axes, title in zip(tiles, titles, strict=True):
            figures.label(axes, title)
        figures.show_picture(tiles[0], picture.square)
        figures.caption(tiles[0], figures.short_name(self.image), color=figures.GREY)
        _show_sample(tiles[1], found, 0, p_value)
        figures.show_picture(tiles[2], found.mean)
        image = figures.show_map(tiles[3], found.std, 0, max(found.std.max().item(), 1e-3))
        figures.caption(tiles[3], f"mean {found.std.mean().item():.3f}")
        figures.add_colour_bar(board, figure, 0, image, "std, RGB in 0 … 1")
        self._draw_cosines(board, figure, found, p_value)
        return figure

    def _draw_cosines(
        self, board: Board, figure: Figure, found: Variability, p_value: float | None
    ) -> None:
        maps = found.cosine_quantiles_per_cell(SHOWN)
        low, high = maps.min().item(), max(maps.max().item(), maps.min().item() + 1e-3)
        axes = board.tile_axes(figure, 1, 0)
        figures.label(axes, "sample 1")
        _show_sample(axes, found, 1, p_value)
        image: Any = None
        for column, (level, values) in enumerate(zip(SHOWN, maps, strict=True), start=1):
            axes = board.tile_axes(figure, 1, column)
            figures.label(axes, f"cosine, {level:.0%} quantile")
            image = figures.show_map(axes, values, low, high)
            figures.caption(axes, f"mean {figures.number(values.mean().item())}")
        figures.add_colour_bar(board, figure, 1, image, "cosine of a cell")


def _show_sample(axes: Axes, found: Variability, j: int, p_value: float | None) -> None:
    figures.show_picture(axes, found.examples[j])
    caption(axes, f"cosine {figures.number(found.cosine[j].mean().item())}", p_value)


def _by_level(values: torch.Tensor) -> dict[str, Any]:
    return dict(zip(map(str, LEVELS), to_list(values), strict=True))


def _rows(found: Variability) -> list[dict[str, Any]]:
    """One row per pixel."""
    red, green, blue = (to_list(channel.flatten()) for channel in found.mean)
    height, width = found.std.shape
    places = [(y, x) for y in range(height) for x in range(width)]
    columns = zip(places, red, green, blue, to_list(found.std.flatten()), strict=True)
    return [
        {"y": y, "x": x, "mean_red": r, "mean_green": g, "mean_blue": b, "std": std}
        for (y, x), r, g, b, std in columns
    ]
