"""FeatInv-Viz in numbers: the maps against their nulls, and where the change lies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from featinv_diffusion.analysis.featinv_viz import ConceptEffect, Dose
from featinv_diffusion.features.masks import CellMask, to_pixels

THRESHOLD = 0.33
"""Of the normalised map, as published: pixels below count as unaffected."""
HIGH = 0.5
"""Share of the greatest activation from which on cells count as the concept's own."""


def summarise(found: ConceptEffect, cells: CellMask) -> dict[str, Any]:
    """Returns the figures of a manifest; shares and ratios of nothing are None.

    `effect`, `null` and `null_random` are the means over pixels of the three maps; `dominance`
    compares the mean distances of single samples, see there.

    Args:
        cells: where the concept is active.
    """
    effect, null, null_random = (
        values.double().mean().item() for values in (found.map, found.null_map, found.random_map)
    )
    means = found.distance.mean(dim=(1, 2))
    size = (found.map.shape[0], found.map.shape[1])
    return {
        "factors": [dose.factor for dose in found.doses],
        "class_probabilities": _mean_probabilities(found.doses),
        "class_probabilities_random": _mean_probabilities(found.random_doses),
        "cosines": [dose.cosine.double().mean().item() for dose in found.doses],
        "effect": effect,
        "null": null,
        "null_random": null_random,
        "effect_over_null": effect / null if null > 0 else None,
        "effect_over_null_random": effect / null_random if null_random > 0 else None,
        "dominance": dominance(means, found.seed_noise.mean(dim=(1, 2))),
        "dominance_random": dominance(means, found.random.mean(dim=(2, 3))),
        "affected": (normalise(found.map) >= THRESHOLD).double().mean().item(),
        "area_inside": to_pixels(cells, size).double().mean().item(),
        "energy_inside": energy_inside(found.distance, cells),
        "energy_inside_null": energy_inside(found.seed_noise, cells),
        "energy_inside_null_random": energy_inside(found.random, cells),
    }


def _mean_probabilities(doses: Sequence[Dose]) -> list[float] | None:
    means = [
        dose.probability.double().mean().item() for dose in doses if dose.probability is not None
    ]
    return means or None


def normalise(values: Float[Tensor, "height width"]) -> Float[Tensor, "height width"]:
    """Divides a map by its maximum; one of zeros stays zero."""
    high = values.max()
    return values / high if high > 0 else torch.zeros_like(values)


def dominance(values: Float[Tensor, ...], null: Float[Tensor, ...]) -> float:
    """Returns how much oftener values lie above those of a null than below, −1 … 1.

    Cliff's delta (1993): P(value > null) − P(value < null) over all pairs.
    """
    return (values.flatten()[:, None] - null.flatten()).sign().double().mean().item()


def high_cells(activation: Float[Tensor, "h w"]) -> CellMask:
    """Marks the cells with at least `HIGH` of the greatest activation; none where all are zero."""
    return (activation >= HIGH * activation.max()) & (activation > 0)


def energy_inside(distance: Float[Tensor, "... height width"], cells: CellMask) -> float | None:
    """Returns the share of the summed squared distance that lies under cells; None of nothing.

    Args:
        distance: with one leading axis at least, over which energies add up.
    """
    energy = distance.double().square().flatten(0, -3).sum(dim=0)
    total = energy.sum().item()
    inside: Bool[Tensor, "height width"] = to_pixels(cells, (energy.shape[0], energy.shape[1]))
    return energy[inside].sum().item() / total if total > 0 else None
