"""The images whose tokens are read: their pixels, the class that is read in each, their masks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from featinv_diffusion.backbones.base import Backbone
from featinv_diffusion.class_embedding.settings import ImageChoice
from featinv_diffusion.data.selection import select_items
from featinv_diffusion.data.sets import ImageSet, open_images
from featinv_diffusion.errors import InputError, what_is_at
from featinv_diffusion.evaluation.labels import match_labels
from featinv_diffusion.features.edits import CellMask
from featinv_diffusion.images import (
    SUFFIXES,
    Pictures,
    picture_id,
    read_batch,
    read_image,
    to_pil,
    to_tensor,
    to_upright_rgb,
)
from featinv_diffusion.settings import Selection
from featinv_diffusion.types import FeatureMaps, Images, Source

PREDICTED, TARGET = "predicted", "target"
RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
UNLABELLED = (0, 1000)
"""Background and `ignore` of ImageNet-S."""

FindMask: TypeAlias = Callable[[int], Tensor | None]
"""From the index of an image to its patches on the object `[h, w]`; None where it has no mask."""


@dataclass(frozen=True)
class TokenImages:
    """Images to read, decoded when they are asked for.

    Args:
        labels: the backbone's class to read in each; None reads the predicted class.
        label_source: where the labels come from. `name`, `number` or `wordnet`: how the classes of
            the data were matched with the backbone's; `target`: the user; `predicted`: nowhere.
        read: decodes one.
        notes: what a user may not expect, one sentence each.
    """

    ids: list[str]
    labels: list[int] | None
    label_source: str
    read: Callable[[int], Image.Image]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def has_labels(self) -> bool:
        """Whether the labels say what the images show, so that the model may be right or wrong."""
        return self.label_source not in (PREDICTED, TARGET)

    def with_target(self, label: int) -> TokenImages:
        """Returns the same images, to be read for one class."""
        return replace(self, labels=[label] * len(self), label_source=TARGET)

    def only(self, chosen: Sequence[int]) -> TokenImages:
        """Returns the images of these indices."""
        labels = self.labels
        return replace(
            self,
            ids=[self.ids[i] for i in chosen],
            labels=None if labels is None else [labels[i] for i in chosen],
            read=lambda index: self.read(chosen[index]),
        )

    def batches(self, backbone: Backbone, batch_size: int) -> Iterator[Batch]:
        """Yields the images in order, decoded and squashed."""
        for start in range(0, len(self), batch_size):
            indices = list(range(start, min(start + batch_size, len(self))))
            labels = None
            if self.labels is not None:
                labels = torch.tensor([self.labels[i] for i in indices])
            pixels = to_input([self.read(i) for i in indices], backbone)
            yield Batch(indices, [self.ids[i] for i in indices], pixels, labels)


@dataclass(frozen=True, eq=False)
class Batch:
    """Images `[b, 3, h, w]` at the model's input size, and which they are."""

    indices: list[int]
    ids: list[str]
    images: Images
    labels: Tensor | None


def open_token_images(
    data: str | Path,
    backbone: Backbone,
    choice: ImageChoice | None = None,
    exclude: Path | None = None,
) -> TokenImages:
    """Opens a picture, or whatever `data.sets.open_images` reads.

    Args:
        exclude: folder whose pictures are left out, i.e. the output.

    Raises:
        InputError: nothing there, or fewer images than asked for.
    """
    choice = choice or ImageChoice()
    path = Path(data).expanduser()
    if path.suffix.lower() in SUFFIXES:
        return TokenImages([path.name], None, PREDICTED, lambda _index: read_image(path))
    images = open_images(str(data), choice.split, choice.classes, exclude)
    source, class_of_label = match_classes(images, backbone)
    selection = Selection(
        n_images=choice.n_images,
        per_class=choice.per_class,
        selection="random" if images.labels is not None else "first",
        n_null_images=0,
    )
    items = select_items(images, selection)
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


def hold_pictures(pictures: Pictures | Sequence[Source]) -> TokenImages:
    """Takes pictures that are named or given one by one, or the pictures of feature maps.

    Raises:
        InputError: no picture, something else, or a feature map without its picture.
    """
    if isinstance(pictures, FeatureMaps):
        pictures = pictures.sources
    single = isinstance(pictures, str | Path | Image.Image | np.ndarray | Tensor)
    found = [named for picture in ([pictures] if single else pictures) for named in _name(picture)]
    if not found:
        raise InputError("There must be at least one picture, got none.")
    ids = [name or f"picture-{i}.png" for i, (name, _) in enumerate(found)]
    return TokenImages(ids, None, PREDICTED, lambda index: found[index][1]())


def _name(picture: Any) -> list[tuple[str, Callable[[], Image.Image]]]:
    """Returns the name of a picture, empty where it has none, and what decodes it."""
    if isinstance(picture, np.ndarray | Tensor):
        return [("", lambda image=image: image) for image in to_pil(read_batch(picture, 0)[0])]
    if isinstance(picture, str | Path):
        return [(picture_id(Path(picture).name), lambda: read_image(picture))]
    if isinstance(picture, Image.Image):
        upright = to_upright_rgb(picture)
        return [("", lambda: upright)]
    if not isinstance(picture, Source):
        raise InputError(
            "A picture must be a path, a PIL image, an array or a tensor, got "
            f"{type(picture).__name__}."
        )
    if picture.location is None and picture.square is None:
        raise InputError(
            "Tokens are read in pictures, but a feature map was given without its picture. Give "
            "the picture itself."
        )
    ((_, read),) = _name(picture.location or picture.square)
    return [(picture.name, read)]


def to_input(pictures: Sequence[Image.Image], backbone: Backbone) -> Images:
    """Squashes whole pictures to the backbone's input size.

    All published models were read like this but MIIL, which had a central crop of 0.875.
    """
    height, width = backbone.input_size
    filter_ = RESAMPLING[backbone.preprocessing.interpolation]
    squashed = [picture.resize((width, height), filter_) for picture in pictures]
    return to_tensor(squashed).to(backbone.device)


# ---- Classes -------------------------------------------------------------------------------------


def match_classes(images: ImageSet, backbone: Backbone) -> tuple[str, list[int] | None]:
    """Returns how classes are matched, and the backbone's class of each label.

    In addition to `match_labels`, folders that are named by WordNet ids are matched with the
    classes of an ImageNet backbone, also where there are only some of them.
    """
    source, class_of_label = match_labels(images, backbone)
    if class_of_label is None and images.labels is not None:
        class_of_label = _by_wordnet(images.class_names or [], backbone)
        source = "wordnet" if class_of_label else None
    return source or PREDICTED, class_of_label


def _by_wordnet(names: Sequence[str], backbone: Backbone) -> list[int] | None:
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset(backbone.model)
    if not names or subset is None or not all(re.fullmatch(r"n\d{8}", name) for name in names):
        return None
    number = {name: i for i, name in enumerate(ImageNetInfo(subset).label_names())}
    return [number[name] for name in names] if set(names) <= set(number) else None


def class_name(backbone: Backbone, label: int) -> str:
    """Returns the name of a class, or `class 7`."""
    labels = backbone.labels
    return labels[label].split(",")[0] if labels else f"class {label}"


# ---- Masks ---------------------------------------------------------------------------------------


def find_masks(folder: Path, images: TokenImages, grid: tuple[int, int]) -> FindMask:
    """Returns a finder of the images' masks: PNGs with the paths of the images below `folder`.

    Raises:
        InputError: no such folder, or no mask in it.
    """
    if not folder.is_dir():
        raise InputError(
            f"A folder of masks must exist at {folder}, but there is {what_is_at(folder)}."
        )
    paths = [folder / PurePosixPath(name).with_suffix(".png") for name in images.ids]
    if len(set(paths)) < len(paths) or not any(path.is_file() for path in paths):
        raise InputError(
            "Masks must belong to the images, but none has one of its own: a mask is a PNG with "
            "the path of its image below the folder of masks."
        )

    def find(index: int) -> Tensor | None:
        path = paths[index]
        return token_mask(read_image(path), grid) if path.is_file() else None

    return find


def token_mask(picture: Image.Image, grid: tuple[int, int]) -> CellMask:
    """Marks the patches of which more than half the area belongs to the object.

    Args:
        picture: labels R + 256 G as in ImageNet-S, of which the most frequent other than 0
            (background) and 1000 (ignored) is the object; a black and white mask is one label.
        grid: (h, w) of the patches; the whole mask is laid over it, as images are squashed.
    """
    pixels = torch.from_numpy(np.array(picture.convert("RGB"))).long()
    labels = pixels[..., 0] + 256 * pixels[..., 1]
    known = labels[~torch.isin(labels, torch.tensor(UNLABELLED))]
    found, counts = known.unique(return_counts=True)
    marked = labels == found[counts.argmax()] if len(found) else torch.zeros_like(labels).bool()
    return F.adaptive_avg_pool2d(marked[None].float(), grid)[0] > 0.5


def box_token_mask(
    box: tuple[float, float, float, float], size: tuple[int, int], grid: tuple[int, int]
) -> CellMask:
    """Marks the patches of which more than half the area lies in a box.

    Args:
        box: (x0, y0, x1, y1) in pixels, ends included, as Tiny-ImageNet has them.
        size: (width, height) of the image.
    """
    x0, y0, x1, y1 = box
    marked = torch.zeros(size[1], size[0])
    marked[int(y0) : int(y1) + 1, int(x0) : int(x1) + 1] = 1
    return F.adaptive_avg_pool2d(marked[None], grid)[0] > 0.5
