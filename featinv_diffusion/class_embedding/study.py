"""`featinv classemb` without the terminal: images → measures in one pass, and what is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from featinv_diffusion.class_embedding.ablations import STATES, read_ablated, read_tokens_alone
from featinv_diffusion.class_embedding.anatomy import Anatomy, make_random
from featinv_diffusion.class_embedding.context import class_context_difference
from featinv_diffusion.class_embedding.dataset import TokenImages, to_input
from featinv_diffusion.class_embedding.measures import class_identifiability, identified
from featinv_diffusion.class_embedding.reading import Reading, read_images
from featinv_diffusion.class_embedding.removal import RemovalTest
from featinv_diffusion.class_embedding.summary import (
    MemoryTables,
    Tally,
    memory_metrics,
    null_metrics,
    to_metrics,
)
from featinv_diffusion.errors import InputError
from featinv_diffusion.metrics.statistics import bootstrap_mean
from featinv_diffusion.types import Images

FindMask = Callable[[int], Tensor | None]
"""From the number of an image to its patches on the object `[h, w]`; None where it has no mask."""


@dataclass(frozen=True)
class TokenSettings:
    """What is measured beside the pass that every run takes.

    Args:
        ablations: attention ablations, two more passes.
        null: the same model with random weights, one more pass.
        perturbation: the perturbation test, many more passes.
        n_points: counts of kept tokens in it; None is all, as published.
        n_random: random orders in it.
        target: read this class in all images instead of their own.
    """

    batch_size: int = 16
    ablations: bool = False
    null: bool = False
    perturbation: bool = False
    n_points: int | None = None
    n_random: int = 3
    seed: int = 0
    target: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "n_random"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, but {getattr(self, name)} came.")


@dataclass(frozen=True, eq=False)
class Batch:
    """Images `[b, 3, h, w]` at the model's input size, and which they are."""

    indices: list[int]
    ids: list[str]
    images: Images
    labels: Tensor | None


def read_batches(images: TokenImages, anatomy: Anatomy, settings: TokenSettings) -> Iterator[Batch]:
    """Yields the images in order, decoded and squashed."""
    for start in range(0, len(images), settings.batch_size):
        indices = list(range(start, min(start + settings.batch_size, len(images))))
        pictures: list[Image.Image] = [images.read(i) for i in indices]
        labels = images.labels
        if settings.target is not None:
            chosen = torch.full((len(indices),), settings.target)
        else:
            chosen = None if labels is None else torch.tensor([labels[i] for i in indices])
        ids = [images.ids[i] for i in indices]
        yield Batch(indices, ids, to_input(pictures, anatomy.backbone), chosen)


def measure_tokens(
    anatomy: Anatomy,
    images: TokenImages,
    settings: TokenSettings,
    find_mask: FindMask | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> tuple[Tally, dict[str, Any]]:
    """Measures all images; returns values per image and figures for `metrics.json`.

    Raises:
        InputError: images that cannot be read, masks that fit none.
    """
    tally = Tally(anatomy)
    random = make_random(anatomy, settings.seed) if settings.null else None
    random_tally = Tally(random) if random else None
    ablations = _ablations(anatomy, settings, tally.tables)
    removal = RemovalTest(anatomy, settings.n_points, settings.n_random, settings.seed)
    contexts: list[_Context] = []
    for batch in read_batches(images, anatomy, settings):
        reading = read_images(anatomy, batch.images, batch.labels)
        tally.add(reading)
        if random and random_tally:
            random_tally.add(read_images(random, batch.images, reading.labels, STATES))
        for kind, found in ablations.items():
            found.add(read_ablated(anatomy, batch.images, reading.labels, kind, STATES))
        if settings.perturbation:
            removal.add(batch.images, reading, batch.ids)
        if find_mask is not None:
            contexts += _read_context(anatomy, batch, reading, find_mask)
        if on_progress is not None:
            on_progress(len(batch.indices))
    has_labels = settings.target is None and images.labels is not None
    metrics = to_metrics(tally, has_labels=has_labels)
    metrics["class_value_agreement"] = memory_metrics(anatomy, random)
    metrics["ablations"] = {
        kind: found.interval("identifiability_rate") for kind, found in ablations.items()
    }
    metrics["random_model"] = null_metrics(random_tally) if random_tally else None
    metrics["perturbation"] = removal.to_metrics() if settings.perturbation else None
    metrics["context"] = _context_metrics(contexts) if find_mask is not None else None
    return tally, metrics


def _ablations(anatomy: Anatomy, settings: TokenSettings, tables: MemoryTables) -> dict[str, Tally]:
    if not settings.ablations:
        return {}
    kinds = ["self_only", "no_cls"] if anatomy.has_class_token else ["self_only"]
    return {kind: Tally(anatomy, tables) for kind in kinds}


@dataclass(frozen=True, eq=False)
class _Context:
    """One image with a mask.

    Args:
        identifiability, attention: of its patches, `[blocks, patches]`.
        rates: shares by name, NaN where there is no such token.
    """

    is_class: Tensor
    identifiability: Tensor
    attention: Tensor
    rates: dict[str, float]


def _read_context(
    anatomy: Anatomy, batch: Batch, reading: Reading, find_mask: FindMask
) -> list[_Context]:
    looked_up = {i: find_mask(index) for i, index in enumerate(batch.indices)}
    masks = {i: mask for i, mask in looked_up.items() if mask is not None}
    if not masks:
        return []
    assert reading.states is not None
    assert reading.attention is not None
    rows = list(masks)
    is_class = torch.stack([mask.flatten() for mask in masks.values()])
    labels = reading.labels[rows]
    unperturbed = identified(reading.states.rank[rows], anatomy.n_prefix).float()
    columns: dict[str, Tensor] = {}
    for name, kept in (("class_tokens", is_class), ("context_tokens", ~is_class)):
        alone = read_tokens_alone(anatomy, batch.images[rows], labels, kept)
        columns[f"{name}/alone"] = alone.rate
        columns[f"{name}/in_whole_image"] = (unperturbed * kept).sum(dim=1) / kept.sum(dim=1)
    image = slice(anatomy.n_prefix, None)
    ranks = reading.states.rank[rows, 1:, image]
    identifiability = class_identifiability(ranks, anatomy.n_classes)
    return [
        _Context(
            is_class[i],
            identifiability[i],
            reading.attention.score[row][:, image],
            {name: float(values[i]) for name, values in columns.items()},
        )
        for i, row in enumerate(rows)
    ]


def _context_metrics(found: list[_Context]) -> dict[str, Any]:
    if not found:
        return {"n_images": 0}
    is_class = torch.stack([context.is_class for context in found])
    is_mixed = bool((is_class.any(dim=1) & ~is_class.all(dim=1)).any())
    result: dict[str, Any] = {"n_images": len(found)}
    for name in ("identifiability", "attention"):
        values = torch.stack([getattr(context, name) for context in found])
        result[f"{name}_difference_by_block"] = (
            [asdict(class_context_difference(row, is_class)) for row in values.unbind(dim=1)]
            if is_mixed
            else None
        )
    for name in found[0].rates:
        rates = [c.rates[name] for c in found if c.rates[name] == c.rates[name]]
        result[name] = asdict(bootstrap_mean(rates)) if rates else None
    return result
