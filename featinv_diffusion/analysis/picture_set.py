"""The pictures of an analysis of stages: decoded, with their objects where there are any."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from featinv_diffusion.boxes import (
    BoxRecords,
    CocoRecords,
    coco_annotations,
    crop_boxes,
    load_box_records,
)
from featinv_diffusion.data import Crop, DataConfig, split_held_back
from featinv_diffusion.errors import InputError
from featinv_diffusion.evaluation.dataset import open_images
from featinv_diffusion.images import center_square, to_tensor
from featinv_diffusion.types import Images

N_DEFAULT = 250
"""Images of an analysis, where the data have as many and no number is asked for."""


@dataclass(frozen=True, eq=False)
class PictureSet:
    """Images of one size.

    Args:
        images: 8-bit values in [0, 1].
        objects: per image `class_labels` and `boxes` (centre x, centre y, width, height, as
            shares); None where the data have no boxes.
        inside: where objects are: their masks, or else their boxes, or else everywhere.
    """

    ids: list[str]
    images: Images
    objects: list[dict[str, Tensor]] | None
    inside: Bool[Tensor, "b height width"]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class PictureChoice:
    """Which pictures to take.

    Args:
        data: folder of COCO, or of Tiny-ImageNet-200 for its training images with boxes; else a
            folder of pictures, parquet file or Hub name, without objects.
        split: such as `val2017`; `train` for Tiny-ImageNet's boxes.
        n_images: spread evenly over the data; None takes at most `N_DEFAULT`.
        classes: text file with a class folder per line.
        held_back_per_class: of boxes: only the last k images of each class, as training holds
            back.
    """

    data: str
    split: str = "validation"
    n_images: int | None = None
    classes: str | None = None
    held_back_per_class: int = 0


def load_pictures(choice: PictureChoice, size: tuple[int, int]) -> PictureSet:
    """Decodes the pictures at (h, w) = `size`; those with boxes are squashed, others cut square.

    Raises:
        InputError: no pictures there, or fewer than asked for.
    """
    root = Path(choice.data).expanduser()
    if coco_annotations(root, choice.split).is_file() or _has_boxes(root / choice.split):
        return _load_with_objects(choice, size)
    images = open_images(choice.data, choice.split, choice.classes)
    rows = _spread(range(len(images)), choice.n_images)
    side = max(size)
    pictures = [center_square(images.read(i), side).resize((size[1], size[0])) for i in rows]
    inside = torch.ones(len(rows), *size, dtype=torch.bool)
    return PictureSet([images.ids[i] for i in rows], to_tensor(pictures), None, inside)


def _load_with_objects(choice: PictureChoice, size: tuple[int, int]) -> PictureSet:
    records = load_box_records(
        DataConfig(root=choice.data, split=choice.split, classes=choice.classes)
    )
    held = choice.held_back_per_class
    members = split_held_back(records.labels, held)[1] if held else range(len(records))
    rows = _spread(members, choice.n_images)
    pictures: list[Image.Image] = []
    objects: list[dict[str, Tensor]] = []
    inside: list[Tensor] = []
    for i in rows:
        picture = records.image(i)
        whole = Crop((0, 0, picture.height, picture.width), hflip=False, vflip=False)
        seen = crop_boxes(records.boxes(i), whole)
        boxes = torch.tensor([box for box, _ in seen]).reshape(-1, 4)
        labels = torch.tensor([label for _, label in seen], dtype=torch.long)
        pictures.append(picture.resize((size[1], size[0]), Image.Resampling.BILINEAR))
        objects.append({"class_labels": labels, "boxes": boxes})
        inside.append(_inside(records, i, boxes, size))
    ids = [records.id(i) for i in rows]
    return PictureSet(ids, to_tensor(pictures), objects, torch.stack(inside))


def _inside(records: BoxRecords, index: int, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """The union of the objects: one pixel belongs to it once, however many there are."""
    if isinstance(records, CocoRecords):
        mask = torch.from_numpy(records.masks(index).any(0)).float()[None, None]
        return F.interpolate(mask, size, mode="nearest")[0, 0] > 0.5
    found = np.zeros(size, bool)
    for x, y, width, height in boxes.tolist():
        rows = slice(round((y - height / 2) * size[0]), round((y + height / 2) * size[0]))
        columns = slice(round((x - width / 2) * size[1]), round((x + width / 2) * size[1]))
        found[rows, columns] = True
    return torch.from_numpy(found)


def _has_boxes(folder: Path) -> bool:
    return folder.is_dir() and next(folder.glob("*/*_boxes.txt"), None) is not None


def _spread(members: range | list[int], n: int | None) -> list[int]:
    if n is None:
        n = min(N_DEFAULT, len(members))
    if n > len(members) or n < 1:
        raise InputError(f"There are {len(members)} images to choose from, but {n} came.")
    places = torch.linspace(0, len(members) - 1, n).round().long().tolist()
    return [members[place] for place in places]
