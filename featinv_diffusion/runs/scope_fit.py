"""Fitting the statistics that tell natural feature maps from others, on many images."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from featinv_diffusion.backbones.base import weights_sha256
from featinv_diffusion.data.crops import split_held_back
from featinv_diffusion.data.selection import digest
from featinv_diffusion.data.sets import ImageSet
from featinv_diffusion.errors import InputError
from featinv_diffusion.features.natural_maps import (
    MIN_CALIBRATION,
    Calibration,
    NaturalMaps,
    fit_density,
)
from featinv_diffusion.images import center_square, to_tensor
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.metrics import feature_cosine
from featinv_diffusion.runs.parts import WHOLE, Division, Part, describe_sampling
from featinv_diffusion.runs.progress import Advance
from featinv_diffusion.runs.sampling import batched, sample_each
from featinv_diffusion.runs.scope import sampling_of
from featinv_diffusion.seeds import derive_seed
from featinv_diffusion.types import Features

_CALIBRATION_SHARE = 5  # one image of five, if none are held back by class


@dataclass(frozen=True)
class ScopeSplit:
    """Indices of the images to fit on and of those for calibration, in random order."""

    fitted: list[int]
    held_out: list[int]


def split_images(
    images: ImageSet, held_back_per_class: int = 0, n_images: int | None = None
) -> ScopeSplit:
    """Draws the images of both parts with a fixed seed.

    Args:
        held_back_per_class: hold out the last k images of each class, as training does, so that
            calibration uses images that the backbone was not trained on; 0 holds out a fifth of
            all images.
        n_images: largest number of images to fit on.

    Raises:
        InputError: too few images, or `held_back_per_class` for images without classes.
    """
    if held_back_per_class < 0 or (n_images is not None and n_images < 1):
        raise InputError(
            "held_back_per_class must be at least 0 and n_images at least 1, "
            f"got {held_back_per_class} and {n_images}."
        )
    generator = torch.Generator().manual_seed(derive_seed("scope"))
    order = torch.randperm(len(images), generator=generator).tolist()
    if held_back_per_class:
        if images.labels is None:
            raise InputError(
                "Images must have classes to hold some of each back, but these have none. Leave "
                "--held-back-per-class out, or give a folder with a folder for each class."
            )
        held = set(split_held_back(images.labels, held_back_per_class)[1])
    else:
        held = set(order[: len(order) // _CALIBRATION_SHARE])
    fitted, held_out = ([i for i in order if (i in held) == side] for side in (False, True))
    if len(held_out) < MIN_CALIBRATION:
        raise InputError(
            f"At least {MIN_CALIBRATION} images must be held out to calibrate p-values, got "
            f"{len(held_out)} of {len(images)}. Give more images."
        )
    return ScopeSplit(fitted[:n_images], held_out)


def fit_scope(
    inverter: Inverter,
    images: ImageSet,
    split: ScopeSplit,
    n_reconstructions: int = 256,
    batch_size: int = 8,
    advance: Advance = lambda n: None,
    others: Sequence[Inverter] = (),
    division: Division = WHOLE,
) -> NaturalMaps:
    """Fits the distribution of natural maps, and calibrates p-values on held-out images.

    Args:
        others: the inverter with other settings, for which cosines are calibrated too.
        n_reconstructions: number of held-out images to sample once each, with the inverter's
            settings, which shows how well natural maps come back; 0 leaves reconstructions out of
            the score.
        advance: called with the number of images that are done.
        division: of the images among processes.

    Raises:
        InputError: too few images, one that cannot be read, or maps that are not finite.
    """
    if n_reconstructions < 0 or 0 < n_reconstructions < MIN_CALIBRATION:
        raise InputError(
            f"There must be no reconstructions or at least {MIN_CALIBRATION}, got "
            f"{n_reconstructions}."
        )
    inverters = [inverter, *others] if n_reconstructions else []
    sampled = split.held_out[:n_reconstructions]
    fitted, held_out = (
        list(batched(part, batch_size * _BATCHES)) for part in (split.fitted, split.held_out)
    )
    chunks = [(_ENCODE, part) for part in (*fitted, *held_out)]
    chunks += [(_SAMPLE, part) for part in batched(sampled, batch_size)]

    def measure(chunk: tuple[str, list[int]]) -> Part:
        kind, indices = chunk
        if kind == _SAMPLE:
            return Part(_cosines(inverters, images, indices))
        looked = _look(inverter, images, indices, batch_size, advance)
        return Part({"maps": torch.cat([maps.cpu() for _, maps in looked])})

    def describe() -> dict[str, Any]:
        return {
            **describe_sampling(inverter),
            "samplings": [sampling_of(one) for one in inverters],
            "batch_size": batch_size,
            "images_sha256": digest(images.ids),
            "data_fingerprint": images.fingerprint,
        }

    parts = iter(division.each(chunks, measure, describe))
    density = fit_density(_maps_of(parts, len(fitted), batch_size))
    distances = [density.distance(maps) for maps in _maps_of(parts, len(held_out), batch_size)]
    cosines = [part.tensors for part in parts]
    found = [torch.cat([one[str(i)] for one in cosines]) for i in range(len(inverters))]
    first, *more = found or [torch.zeros(0)]
    samplings = [sampling_of(one) for one in inverters]
    return NaturalMaps(
        inverter.spec,
        weights_sha256({"": inverter.require_backbone().model}),
        density,
        Calibration(torch.cat(distances), first),
        samplings[0] if samplings else None,
        len(split.fitted),
        tuple(zip(samplings[1:], more, strict=True)),
    )


_ENCODE, _SAMPLE = "encode", "sample"
_BATCHES = 8
"""Batches of a chunk of images that are only encoded."""


def _maps_of(parts: Iterator[Part], n: int, size: int) -> Iterator[Features]:
    """Yields the maps of the next n parts, in batches as they were encoded."""
    for part in itertools.islice(parts, n):
        yield from part.tensors["maps"].split(size)


def _cosines(
    inverters: Sequence[Inverter], images: ImageSet, indices: Sequence[int]
) -> dict[str, Tensor]:
    """Returns how well the maps of one batch of images come back, by the number of the inverter."""
    ((_, maps),) = _look(inverters[0], images, indices, len(indices), lambda n: None)
    seeds = [derive_seed(0, images.ids[i], 0) for i in indices]
    return {str(i): _self_consistency(one, maps, seeds) for i, one in enumerate(inverters)}


def recalibrate(
    natural: NaturalMaps,
    inverters: Sequence[Inverter],
    images: ImageSet,
    split: ScopeSplit,
    n_reconstructions: int = 256,
    batch_size: int = 8,
) -> NaturalMaps:
    """Takes the cosines of reconstructions anew, by each of the settings of an inverter.

    Raises:
        InputError: other held-out images than those of the statistics.
    """
    found: list[tuple[dict[str, Any], Tensor]] = []
    for inverter in inverters:
        cosines: list[Tensor] = []
        chosen = split.held_out[:n_reconstructions]
        for indices, maps in _look(inverter, images, chosen, batch_size, lambda n: None):
            done = sum(map(len, cosines))
            wanted = natural.calibration.distances[done : done + len(maps)]
            if not torch.allclose(natural.density.distance(maps), wanted, rtol=1e-2, atol=1e-2):
                raise InputError(
                    "Statistics are calibrated anew on the images that they were calibrated on, "
                    "but these are others. Give those, or fit the statistics again."
                )
            seeds = [derive_seed(0, images.ids[i], 0) for i in indices]
            cosines.append(_self_consistency(inverter, maps, seeds))
        found.append((sampling_of(inverter), torch.cat(cosines)))
    (sampling, first), *others = found
    calibration = replace(natural.calibration, cosines=first)
    return replace(natural, calibration=calibration, sampling=sampling, others=tuple(others))


@torch.no_grad()
def _look(
    inverter: Inverter, images: ImageSet, indices: Iterable[int], size: int, advance: Advance
) -> Iterator[tuple[list[int], Features]]:
    backbone = inverter.require_backbone()
    for chosen in batched(indices, size):
        squares = [center_square(images.read(i), max(backbone.picture_size)) for i in chosen]
        maps = backbone.features(to_tensor(squares).to(backbone.device))
        backbone.spec.check_features(maps)
        yield chosen, maps
        advance(len(chosen))


def _self_consistency(inverter: Inverter, maps: Features, seeds: Sequence[int]) -> Tensor:
    """Returns the cosine between each map and the features of one sample of it."""
    backbone = inverter.require_backbone()
    images = sample_each(inverter, maps, seeds).to(backbone.device)
    return feature_cosine(maps, backbone.features(images)).cpu()
