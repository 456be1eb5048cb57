"""How much the samples of one map differ: what its features fix, and what the prior fills in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from featinv_diffusion.analysis.sampling import sample_map
from featinv_diffusion.errors import InputError
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.types import Features, Images


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
