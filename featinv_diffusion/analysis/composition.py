"""Feature maps composed of regions of others, seen (FeatInv, section 4.3 and figure 6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from featinv_diffusion.analysis.sampling import sample_all
from featinv_diffusion.features import paste
from featinv_diffusion.features.masks import CellMask, to_pixels
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.types import Features, Images


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
