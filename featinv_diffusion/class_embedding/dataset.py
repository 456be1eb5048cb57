"""The images that are read: where they lie, which classes they have, and the model's input."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from featinv_diffusion.backbones.base import Backbone
from featinv_diffusion.errors import InputError, choices_hint
from featinv_diffusion.evaluation.dataset import ImageSet, open_images
from featinv_diffusion.evaluation.models import match_labels
from featinv_diffusion.evaluation.selection import select_items
from featinv_diffusion.evaluation.settings import EvaluationSettings
from featinv_diffusion.images import SUFFIXES, read_image, to_tensor
from featinv_diffusion.types import Images

RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True)
class TokenImages:
    """Images to read, decoded when they are asked for.

    Args:
        labels: class of the backbone of each; None where the predicted class is read.
        label_source: `name`, `number` or `wordnet`: how the data's classes were matched with the
            backbone's; `predicted` where there are none or they cannot be.
        read: decodes one.
        notes: what a user may not expect, a sentence each.
    """

    ids: list[str]
    labels: list[int] | None
    label_source: str
    read: Callable[[int], Image.Image]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)


def open_token_images(
    data: str,
    backbone: Backbone,
    *,
    split: str = "validation",
    classes: str | None = None,
    per_class: int | None = None,
    n_images: int | None = None,
    exclude: Path | None = None,
) -> TokenImages:
    """Opens a picture, or whatever `featinv evaluate --data` reads.

    Args:
        classes: text file with the class folders to take.
        per_class, n_images: at most so many, drawn evenly over classes.
        exclude: folder whose pictures are left out, i.e. the output.

    Raises:
        InputError: nothing there, or fewer images than asked for.
    """
    path = Path(data).expanduser()
    if path.suffix.lower() in SUFFIXES:
        return TokenImages([path.name], None, "predicted", lambda _index: read_image(path))
    images = open_images(data, split, classes, exclude)
    source, class_of_label = match_classes(images, backbone)
    settings = EvaluationSettings(
        data=data,
        n_images=n_images,
        per_class=per_class,
        selection="random" if images.labels is not None else "first",
        n_null_images=0,
    )
    items = select_items(images, settings)
    notes = images.notes
    labels = None
    if class_of_label is not None:
        labels = [class_of_label[item.label] for item in items if item.label is not None]
    elif images.labels is not None:
        notes += (
            f"The classes of the images cannot be matched with those of {backbone.name}, so that "
            "the predicted class is read.",
        )
    return TokenImages(
        ids=[item.id for item in items],
        labels=labels,
        label_source=source,
        read=lambda index: images.read(items[index].index),
        notes=notes,
    )


def match_classes(images: ImageSet, backbone: Backbone) -> tuple[str, list[int] | None]:
    """Returns how classes are matched, and the backbone's class of each label.

    Beside the ways of `match_labels`, folders that are named by WordNet ids are those classes of a
    backbone of ImageNet, also where there are fewer.
    """
    source, class_of_label = match_labels(images, backbone)
    if class_of_label is None and images.labels is not None:
        class_of_label = _by_wordnet(images.class_names or [], backbone)
        source = "wordnet" if class_of_label else None
    return source or "predicted", class_of_label


def _by_wordnet(names: Sequence[str], backbone: Backbone) -> list[int] | None:
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset(backbone.model)
    if not names or subset is None or not all(re.fullmatch(r"n\d{8}", name) for name in names):
        return None
    number = {name: i for i, name in enumerate(ImageNetInfo(subset).label_names())}
    return [number[name] for name in names] if set(names) <= set(number) else None


def to_input(pictures: Sequence[Image.Image], backbone: Backbone) -> Images:
    """Squashes whole pictures to the backbone's input size.

    So were all published models read but MIIL, which had a central crop of 0.875.
    """
    height, width = backbone.input_size
    filter_ = RESAMPLING[backbone.preprocessing.interpolation]
    squashed = [picture.resize((width, height), filter_) for picture in pictures]
    return to_tensor(squashed).to(backbone.device)


def find_class(name: str, backbone: Backbone, n_classes: int) -> int:
    """Returns the number of a class that is given by number or name.

    Raises:
        InputError: no such class.
    """
    if name.isdecimal():
        if int(name) >= n_classes:
            raise InputError(
                f"Classes of {backbone.name} have the numbers 0 to {n_classes - 1}, but {name} "
                "came."
            )
        return int(name)
    labels = [label.casefold() for label in backbone.labels or ()]
    exact = [i for i, label in enumerate(labels) if name.casefold() in (label, *label.split(", "))]
    if not exact:
        hint = choices_hint(name, list(backbone.labels or ())[:20])
        raise InputError(f"{backbone.name} has no class {name!r}; {hint} A number will do too.")
    return exact[0]


def class_name(backbone: Backbone, label: int) -> str:
    """Returns the name of a class, or `class 7`."""
    labels = backbone.labels
    return labels[label].split(",")[0] if labels else f"class {label}"
