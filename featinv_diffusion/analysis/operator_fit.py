"""Fits operators on images: which images, their features before and after, and the solution."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass

import torch
from PIL import Image

from featinv_diffusion.backbones.base import Backbone
from featinv_diffusion.errors import InputError
from featinv_diffusion.evaluation.dataset import ImageSet
from featinv_diffusion.evaluation.fingerprints import weights_sha256
from featinv_diffusion.features.operator_methods import DEFAULT_RIDGE, solve
from featinv_diffusion.features.operator_moments import PairMoments
from featinv_diffusion.features.operators import Operator
from featinv_diffusion.images import center_square, to_tensor
from featinv_diffusion.pixel_operations import PixelOperation
from featinv_diffusion.reconstruction import batched
from featinv_diffusion.seeds import make_generator

Advance = Callable[[float], None]
"""Called with the number of images that are done."""


@dataclass(frozen=True)
class Drawn:
    """An image that was drawn.

    Args:
        id: within its data set.
        picture: as it was decoded.
        square: its centre square at the size that the backbone takes.
        digest: of the pixels of the square, whatever the image is called and wherever it lies.
    """

    id: str
    picture: Image.Image
    square: Image.Image
    digest: str


def draw_images(
    images: ImageSet, n_images: int, seed: int, side: int, exclude: Collection[str] = ()
) -> Iterator[Drawn]:
    """Yields images in an order that the seed draws, without those whose digest is excluded.

    Args:
        side: of the squares, in pixels.
        exclude: digests, such as those of the images that an operator was fitted on.

    Raises:
        InputError: fewer images than asked for, or one that cannot be read.
    """
    if n_images < 1:
        raise InputError(f"At least one image must be drawn, but {n_images} were asked for.")
    order = torch.randperm(len(images), generator=make_generator(seed, "operator")).tolist()
    left_out, n_drawn = set(exclude), 0
    for index in order:
        if n_drawn == n_images:
            return
        picture = images.read(index)
        square = center_square(picture, side)
        digest = hashlib.sha256(square.tobytes()).hexdigest()[:16]
        if digest not in left_out:
            n_drawn += 1
            yield Drawn(images.ids[index], picture, square, digest)
    if n_drawn < n_images:
        besides = " that the operator was not fitted on" if left_out else ""
        raise InputError(
            f"{n_images} images{besides} were asked for, but there are {n_drawn} "
            f"among {len(images)}. Give more images or ask for fewer."
        )


def check_batch_size(batch_size: int) -> None:
    """Raises `InputError` unless a batch holds an image."""
    if batch_size < 1:
        raise InputError(f"A batch must hold at least one image, but a size of {batch_size} came.")


@torch.no_grad()
def measure_moments(
    backbone: Backbone,
    drawn: Iterable[Drawn],
    operation: PixelOperation,
    batch_size: int = 32,
    advance: Advance = lambda n: None,
) -> tuple[PairMoments, tuple[str, ...]]:
    """Returns the moments of features before and after the operation, and the images' digests.

    Images are encoded both times; no inverter is involved.

    Raises:
        InputError: batches of no image, or features that are not finite.
    """
    check_batch_size(batch_size)
    moments, digests = PairMoments(backbone.spec.channels), []
    for batch in batched(drawn, batch_size):
        pixels = to_tensor([image.square for image in batch]).to(backbone.device)
        before, after = operation.source(pixels), operation.target(pixels)
        moments.update(backbone.features(before), backbone.features(after))
        digests += [image.digest for image in batch]
        advance(len(batch))
    return moments, tuple(digests)


def fit_operator(
    backbone: Backbone,
    drawn: Iterable[Drawn],
    operation: PixelOperation,
    method: str = "orthogonal",
    *,
    ridge: float = DEFAULT_RIDGE,
    batch_size: int = 32,
    advance: Advance = lambda n: None,
) -> Operator:
    """Fits the operator on a backbone's features that does what the operation does to pixels.

    For several methods take `measure_moments` once and `features.operators.solve` for each.

    Raises:
        InputError: as `measure_moments` and `solve`.
    """
    moments, digests = measure_moments(backbone, drawn, operation, batch_size, advance)
    return solve(
        moments,
        backbone.spec,
        operation.name,
        method,
        ridge=ridge,
        parameters=operation.parameters,
        backbone_sha256=weights_sha256({"": backbone.model}),
        image_digests=digests,
    )
