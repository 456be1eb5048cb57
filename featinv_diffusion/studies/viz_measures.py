"""What the attenuation of a concept does to samples, in numbers that a null can be held against."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from featinv_diffusion.concepts import ConceptDictionary
from featinv_diffusion.features.edits import CellMask, to_pixels
from featinv_diffusion.metrics.statistics import (
    Interval,
    bootstrap_difference,
    bootstrap_mean,
    bootstrap_statistic,
)
from featinv_diffusion.runs.sampling import SampleBatch
from featinv_diffusion.types import Features

MEASURES = (
    "effect",
    "activation_ratio",
    "realised_change",
    "arrived",
    "class_probability_change",
    "signed_change",
    "energy_inside",
)
"""What is measured of the concept and of each null, by the names in `viz.json`."""


THRESHOLD = 0.33
"""Of the normalised map, as published: pixels below count as unaffected."""

# ---- Pixels --------------------------------------------------------------------------------------


def rgb_distance(
    images: Float[Tensor, "b 3 height width"], others: Float[Tensor, "b 3 height width"]
) -> Float[Tensor, "b height width"]:
    """Returns the Euclidean distance over RGB of each pixel, 0 … √3."""
    return (images - others).norm(dim=1)


def median(values: Float[Tensor, "n height width"]) -> Float[Tensor, "height width"]:
    """Returns the median over the first axis; of an even number the mean of the middle two."""
    ordered = values.sort(dim=0).values
    return (ordered[(len(values) - 1) // 2] + ordered[len(values) // 2]) / 2


def normalise(values: Float[Tensor, "height width"]) -> Float[Tensor, "height width"]:
    """Divides a map by its maximum; one of zeros stays zero."""
    high = values.max()
    return values / high if high > 0 else torch.zeros_like(values)


def energy_inside(distance: Float[Tensor, "... height width"], cells: CellMask) -> float | None:
    """Returns the share of the summed squared distance that lies under cells; None of nothing.

    Args:
        distance: with one leading axis at least, over which energies add up.
    """
    energy = distance.double().square().flatten(0, -3).sum(dim=0)
    total = energy.sum().item()
    inside = to_pixels(cells, (energy.shape[0], energy.shape[1]))
    return energy[inside].sum().item() / total if total > 0 else None


# ---- One edit ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EditEffect:
    """What an edit did to the samples of a map; every list has one value per seed.

    Args:
        distance: ‖x' − x‖ over RGB, mean over pixels.
        activation_before, activation: of the concept in the samples' own features, the mean length
            of its part over cells, before and after the edit.
        realised_change: cosine of the change of the samples' own features to the one asked for.
        arrived: projection of this change on the one asked for, where 1 is all of it.
        class_probability_change: None without a head.
        signed_change: x' − x, mean over channels and the pixels where the concept is active; None
            where it is active nowhere.
        energy_inside: share of the squared distance that lies where the concept is active; None
            where nothing changes.
        effect: mean over pixels of the median over seeds of the distance.
    """

    distance: list[float]
    activation_before: list[float]
    activation: list[float]
    realised_change: list[float]
    arrived: list[float]
    class_probability_change: list[float] | None
    signed_change: list[float] | None
    energy_inside: list[float] | None
    effect: float

    def interval(self, measure: str) -> Interval | None:
        """Returns the mean over seeds with its 95 % interval; None where there is none.

        The interval of `effect` is that of the mean distance.
        """
        if measure == "activation_ratio":
            if not any(self.activation_before):
                return None
            columns = {"after": self.activation, "before": self.activation_before}
            return bootstrap_statistic(columns, lambda mean: mean["after"] / mean["before"])
        values = self.distance if measure == "effect" else getattr(self, measure)
        return None if values is None else bootstrap_mean(values)

    def mean(self, measure: str) -> float | None:
        """Returns the mean over seeds, of `activation_ratio` the ratio of means."""
        if measure == "effect":
            return self.effect
        if measure == "activation_ratio":
            before = sum(self.activation_before)
            return sum(self.activation) / before if before else None
        values = getattr(self, measure)
        return None if values is None else sum(values) / len(values)


def measure_edit(
    before: SampleBatch,
    after: SampleBatch,
    asked: Features,
    concepts: ConceptDictionary,
    concept: int,
    cells: CellMask,
    class_index: int | None,
) -> EditEffect:
    """Compares paired samples of a map before and after an edit.

    Args:
        asked: the change of the map, edited minus unedited.
        concepts: with the concept whose activation is read, whatever the edit was.
        cells: where the concept is active.
    """
    change = (after.features - before.features).flatten(1).double().cpu()
    wanted = asked.flatten(1).double().cpu().expand_as(change)
    dot = (change * wanted).sum(dim=1)
    norms = change.norm(dim=1) * wanted.norm(dim=1)
    distance = rgb_distance(after.images, before.images)
    inside = to_pixels(cells, (distance.shape[1], distance.shape[2]))
    probability = None
    if class_index is not None and before.logits is not None and after.logits is not None:
        shares = [class_share(logits, class_index) for logits in (after.logits, before.logits)]
        probability = (shares[0] - shares[1]).tolist()
    moved = (after.images - before.images).double().mean(dim=1)
    energies = [energy_inside(each[None], cells) for each in distance]
    return EditEffect(
        distance.double().mean(dim=(1, 2)).tolist(),
        read_activation(concepts, concept, before.features),
        read_activation(concepts, concept, after.features),
        (dot / norms.clamp_min(1e-30)).tolist(),
        (dot / wanted.square().sum(dim=1).clamp_min(1e-30)).tolist(),
        probability,
        moved[:, inside].mean(dim=1).tolist() if inside.any() else None,
        None if None in energies else [each for each in energies if each is not None],
        median(distance).double().mean().item(),
    )


def class_share(logits: Float[Tensor, "b k"], class_index: int) -> Float[Tensor, " b"]:
    """Returns the probability of a class."""
    return logits.double().softmax(dim=1)[:, class_index].cpu()


def read_activation(concepts: ConceptDictionary, concept: int, features: Features) -> list[float]:
    """Returns the mean length over cells of a concept's part of each map."""
    norms = concepts.activations(features, "none")[:, concept]
    return norms.double().mean(dim=(1, 2)).tolist()


# ---- An edit beside its null ---------------------------------------------------------------------


def strength(measure: str, value: float, factor: float) -> float:
    """Returns a value so that what an effect of the concept would show is the larger one.

    Attenuation should lower the activation and amplification raise it; the class probability and
    the pixels may go either way.
    """
    if measure == "activation_ratio":
        return math.copysign(value, factor - 1) if factor != 1 else 0.0
    if measure in ("class_probability_change", "signed_change"):
        return abs(value)
    return value


def p_value(
    measure: str, own: EditEffect, nulls: Sequence[EditEffect], factor: float
) -> float | None:
    """Returns (1 + #{null ≥ own}) / (n + 1), by the strength of a measure; None without one."""
    values = [each.mean(measure) for each in (own, *nulls)]
    known = [strength(measure, value, factor) for value in values if value is not None]
    if len(known) < len(values):
        return None
    return (1 + sum(value >= known[0] for value in known[1:])) / len(known)


def mean_of_nulls(measure: str, nulls: Sequence[EditEffect]) -> float | None:
    """Returns the mean of a measure over the nulls; None where one of them has none."""
    values = [null.mean(measure) for null in nulls]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


@dataclass(frozen=True)
class OverImages:
    """A measure over images, the seeds of each averaged first.

    Args:
        value: of the concept.
        null: of the nulls of each image, averaged.
        difference: of the two, paired.
        n_above: images whose concept is above each of its nulls.
    """

    value: Interval
    null: Interval
    difference: Interval
    n_above: int


def over_images(
    measure: str, pairs: Sequence[tuple[EditEffect, Sequence[EditEffect]]], factor: float
) -> OverImages | None:
    """Returns a measure with its 95 % intervals over images; None where no image has it.

    Args:
        pairs: of each image the edit's effect and those of its nulls.
    """
    known = []
    n_above = 0
    for own, nulls in pairs:
        value, null = own.mean(measure), mean_of_nulls(measure, nulls)
        if value is not None and null is not None:
            known.append((value, null))
            n_above += p_value(measure, own, nulls, factor) == 1 / (len(nulls) + 1)
    if not known:
        return None
    own_values, null_values = ([pair[i] for pair in known] for i in range(2))
    return OverImages(
        bootstrap_mean(own_values),
        bootstrap_mean(null_values),
        bootstrap_difference(own_values, null_values),
        n_above,
    )
