"""What needs no trained inverter: training images, ridge regressions, a picture by gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from featinv_diffusion.data.selection import select_items
from featinv_diffusion.data.sets import ImageSet
from featinv_diffusion.errors import InputError
from featinv_diffusion.evaluation.views import Natural
from featinv_diffusion.features.ridge import HELD_OUT, LocalRidge, RidgeFit
from featinv_diffusion.images import center_square, to_tensor
from featinv_diffusion.inverters.base import Inverter, LatentInverter
from featinv_diffusion.inverters.optimise import OptimiseInverter
from featinv_diffusion.runs.progress import progress_bar
from featinv_diffusion.runs.sampling import Pixels, batched, finite_rows, to_pixels
from featinv_diffusion.settings import Selection
from featinv_diffusion.types import Features

BASELINES = NEAREST_NEIGHBOUR, RIDGE_LATENTS, RIDGE_PIXELS, OPTIMISE = (
    "nearest_neighbour",
    "ridge_latents",
    "ridge_pixels",
    "optimise",
)
N_RIDGE = 2000
"""Training images that the ridges are fitted on; each gives as many rows as its map has cells."""
_BLOCK = 2048

Made = tuple[Pixels, Bool[Tensor, " b"]]
Baseline = Callable[[Features, Sequence[torch.Generator], Sequence[str]], Made]
"""From maps, the noise of each and the digest of its original to a picture of each."""


@dataclass(frozen=True, eq=False)
class NearestNeighbour:
    """Shows the training image whose centred map has the largest cosine to a map.

    Args:
        vectors: of the centred maps of training images, of unit length.
        digests: of the pixels of each; one of the same pixels as an original is no neighbour.
        read: the picture of a row.
    """

    natural: Natural
    vectors: Float[Tensor, "n k"]
    digests: Sequence[str]
    read: Callable[[int], Image.Image]
    image_size: int

    def __call__(
        self, features: Features, noise: Sequence[torch.Generator], digests: Sequence[str]
    ) -> Made:
        wanted = F.normalize(self.natural.vectors(features).float())
        near = torch.cat([wanted @ rows.float().T for rows in self.vectors.split(_BLOCK)], dim=1)
        for row, digest in enumerate(digests):
            same = [i for i, other in enumerate(self.digests) if other == digest]
            near[row, same] = -torch.inf
        found = [self.read(i) for i in near.argmax(dim=1).tolist()]
        images = to_tensor([center_square(picture, self.image_size) for picture in found])
        return to_pixels(images), torch.ones(len(images), dtype=torch.bool)


@dataclass(frozen=True, eq=False)
class RidgePixels:
    """Shows what a ridge predicts of the pixels."""

    ridge: LocalRidge

    def __call__(
        self, features: Features, noise: Sequence[torch.Generator], digests: Sequence[str]
    ) -> Made:
        images = self.ridge(features).clamp(0, 1)
        return to_pixels(images), finite_rows(images).cpu()


@dataclass(frozen=True, eq=False)
class RidgeLatents:
    """Decodes what a ridge predicts of the latents."""

    ridge: LocalRidge
    inverter: LatentInverter

    def __call__(
        self, features: Features, noise: Sequence[torch.Generator], digests: Sequence[str]
    ) -> Made:
        images = self.inverter.from_latents(self.ridge(features))
        return to_pixels(images), finite_rows(images).cpu()


@dataclass(frozen=True, eq=False)
class Optimise:
    """Makes pictures by gradients through the backbone, which then is no judge of them."""

    inverter: OptimiseInverter
    image_size: int

    @classmethod
    def of(cls, inverter: Inverter, image_size: int) -> Optimise:
        """Optimises the latents of the inverter's autoencoder, and pixels where it has none.

        Raises:
            InputError: a backbone that lets no gradient through.
        """
        vae: Any = inverter.networks.get("vae")
        return cls(OptimiseInverter(inverter.require_backbone(), vae), image_size)

    def __call__(
        self, features: Features, noise: Sequence[torch.Generator], digests: Sequence[str]
    ) -> Made:
        images = self.inverter.invert(features, generator=noise)
        size = (self.image_size, self.image_size)
        if images.shape[2:] != size:
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        return to_pixels(images), finite_rows(images).cpu()


@torch.no_grad()
def fit_baselines(
    inverter: Inverter,
    images: ImageSet,
    natural: Natural,
    *,
    n_images: int,
    image_size: int,
    batch_size: int,
    progress: bool = False,
) -> dict[str, Baseline]:
    """Reads training images once and returns the baselines that they give.

    Memory holds a vector of `metrics.similarity.SKETCH` numbers per image and the products of the
    ridges, but no picture.

    Args:
        images: none of those that are evaluated.
        natural: of the inverter's backbone.
        n_images: drawn evenly over classes; the ridges take the first `N_RIDGE`.
        image_size: side in pixels of the pictures.

    Raises:
        InputError: too few images that can be read.
    """
    backbone = inverter.require_backbone()
    spec, autoencoder = inverter.spec, inverter if isinstance(inverter, LatentInverter) else None
    fit: RidgeFit | None = None
    rows, vectors, digests = [], [], []
    size = min(n_images, len(images))
    items = select_items(images, Selection(n_images=size, n_null_images=0))
    with progress_bar(size, progress, doing="baselines", noun="training images") as advance:
        for batch in batched(items, batch_size):
            advance(len(batch))
            read = [(item.index, _read(images, item.index)) for item in batch]
            known = [(index, picture) for index, picture in read if picture is not None]
            if not known:
                continue
            pictures = [picture for _, picture in known]
            squares = [center_square(picture, max(backbone.picture_size)) for picture in pictures]
            features = backbone.features(to_tensor(squares).to(backbone.device))
            target = to_tensor([center_square(picture, image_size) for picture in pictures])
            rows += [index for index, _ in known]
            digests += [sha256(one.numpy().tobytes()).hexdigest() for one in to_pixels(target)]
            vectors.append(F.normalize(natural.vectors(features).float()).half())
            if len(rows) - len(known) >= N_RIDGE:
                continue
            targets = {RIDGE_PIXELS: target}
            if autoencoder is not None:
                targets[RIDGE_LATENTS] = autoencoder.to_latents(target).float().cpu()
            shapes = {name: (x.shape[1], x.shape[2], x.shape[3]) for name, x in targets.items()}
            fit = fit or RidgeFit((spec.channels, *spec.grid), shapes)
            fit.add(features, targets)
    if fit is None or len(rows) < HELD_OUT:
        raise InputError(
            f"Baselines need at least {HELD_OUT} training images that can be read, but "
            f"--baselines-from gives {len(rows)}."
        )
    found: dict[str, Baseline] = {
        NEAREST_NEIGHBOUR: NearestNeighbour(
            natural, torch.cat(vectors), digests, lambda row: images.read(rows[row]), image_size
        )
    }
    ridges = fit.solve()
    if autoencoder is not None:
        found[RIDGE_LATENTS] = RidgeLatents(ridges[RIDGE_LATENTS], autoencoder)
    return {**found, RIDGE_PIXELS: RidgePixels(ridges[RIDGE_PIXELS])}


def _read(images: ImageSet, index: int) -> Image.Image | None:
    try:
        return images.read(index)
    except InputError:
        return None
