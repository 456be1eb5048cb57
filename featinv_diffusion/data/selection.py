"""Which images of a data set are evaluated, and in which order."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from featinv_diffusion.data.sets import ImageSet
from featinv_diffusion.errors import InputError
from featinv_diffusion.seeds import derive_seed
from featinv_diffusion.settings import Selection


@dataclass(frozen=True)
class Item:
    """One image to evaluate.

    Args:
        index: into the image set.
        label: None where there are no classes.
        seed: of its noise; that of its first sample in `featinv sample`.
        has_null: whether the nulls that cost a sample are taken on it.
    """

    index: int
    id: str
    label: int | None
    seed: int
    has_null: bool


def select_items(images: ImageSet, selection: Selection, seed: int = 0) -> list[Item]:
    """Draws the images evenly over classes: first one of each class, then a second one …

    So neighbours are of different classes, and the first n of a larger selection are the
    selection of n.

    Args:
        seed: random seed of the noise.

    Raises:
        InputError: fewer images than asked for, or a number per class without classes.
    """
    for name in ("per_class", "held_back_per_class"):
        if getattr(selection, name) and images.labels is None:
            raise InputError(
                f"--{name.replace('_', '-')} needs images with classes, but these have none: no "
                "label column and no folder for each class."
            )
    drawn = _draw(images, selection)
    n_images = selection.n_images or len(drawn)
    if n_images > len(drawn):
        limit = f", at most {selection.per_class} of each class" if selection.per_class else ""
        raise InputError(
            f"There are {len(drawn)} images to choose from{limit}, but {n_images} were asked for."
        )
    drawn = drawn[:n_images]
    n_null = min(selection.n_null_images, n_images)
    with_null = {i * n_images // n_null for i in range(n_null)}
    return [
        Item(
            index=index,
            id=images.ids[index],
            label=None if images.labels is None else images.labels[index],
            seed=derive_seed(seed, images.noise_name(index), 0),
            has_null=position in with_null,
        )
        for position, index in enumerate(drawn)
    ]


def digest(parts: Iterable[str]) -> str:
    """Returns the SHA-256 of ids, or of digests, in their order."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _draw(images: ImageSet, selection: Selection) -> list[int]:
    """Returns indices by (rank within the class, class)."""
    by_class: defaultdict[int, list[int]] = defaultdict(list)
    for index in sorted(range(len(images)), key=images.ids.__getitem__):
        by_class[images.labels[index] if images.labels else 0].append(index)
    is_random = selection.selection == "random"
    ranked = []
    for label, members in by_class.items():
        if selection.held_back_per_class:
            members = members[-selection.held_back_per_class :]
        if is_random:
            members = sorted(members, key=lambda i: derive_seed("selection", images.ids[i]))
        place = derive_seed("selection", "class", label) if is_random else label
        ranked += [(rank, place, i) for rank, i in enumerate(members[: selection.per_class])]
    return [index for _, _, index in sorted(ranked)]
