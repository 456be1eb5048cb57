"""Images with boxes: Tiny-ImageNet's and COCO's annotations → crops with targets for a detector."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from msgspec import Meta
from PIL import Image
from torch import Tensor

from featinv_diffusion import schema
from featinv_diffusion.data.crops import (
    Crop,
    CropDataset,
    DataConfig,
    in_memory,
    open_training_images,
)
from featinv_diffusion.data.sets import ImageSet
from featinv_diffusion.errors import InputError
from featinv_diffusion.images import read_image

MIN_VISIBLE = 0.25
"""A box of which a crop leaves a smaller share of the area is no target."""


@dataclass(frozen=True)
class Box:
    """One object: edges in pixels of the source image, right and bottom exclusive, and class."""

    left: float
    top: float
    right: float
    bottom: float
    label: int

    @property
    def area(self) -> float:
        """In square pixels."""
        return (self.right - self.left) * (self.bottom - self.top)


@dataclass(frozen=True)
class _Picture:
    id: int
    file_name: str
    height: int
    width: int


@dataclass(frozen=True)
class _Category:
    id: int
    name: str


@dataclass(frozen=True)
class _Instance:
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]


@dataclass(frozen=True)
class _Annotations:
    """The schema of COCO's annotations."""

    images: Annotated[list[_Picture], Meta(min_length=1)]
    categories: Annotated[list[_Category], Meta(min_length=1)]
    annotations: list[_Instance]


@dataclass(frozen=True)
class BoxedImages(ImageSet):
    """Images with boxes.

    Args:
        boxes: returns the objects of an image.
        masks: returns a mask per box, in the order of `boxes`; None where there are none. It
            raises an `InputError` where pycocotools is not installed.
    """

    boxes: Callable[[int], list[Box]] = field(kw_only=True)
    masks: Callable[[int], Bool[np.ndarray, "n h w"]] | None = field(default=None, kw_only=True)


def open_boxed_images(config: DataConfig) -> BoxedImages:
    """Opens COCO or Tiny-ImageNet, whichever `config.root` holds.

    Raises:
        InputError: neither is there, or an image has no box that should have one.
    """
    if not config.root:
        raise InputError("data.root must name the folder of COCO or of Tiny-ImageNet-200.")
    root = Path(config.root).expanduser()
    is_coco = coco_annotations(root, config.split).is_file()
    images = _open_coco(root, config.split) if is_coco else _open_tiny_imagenet(config)
    return in_memory(images) if config.in_memory else images


def _open_tiny_imagenet(config: DataConfig) -> BoxedImages:
    """Opens `WNID/images/*.JPEG` and `WNID/WNID_boxes.txt`, the training folder."""
    images = open_training_images(replace(config, in_memory=False))
    edges: dict[str, tuple[int, int, int, int]] = {}
    for folder in {Path(location).parents[1] for location in images.locations}:
        edges |= _read_box_file(folder / f"{folder.name}_boxes.txt")
    boxes: list[list[Box]] = []
    for location, label in zip(images.locations, images.labels or [], strict=True):
        found = edges.get(Path(location).name)
        if found is None:
            raise InputError(f"Each image must have a box, but {location} has none.")
        left, top, right, bottom = found
        boxes.append([Box(left, top, right + 1, bottom + 1, label)])
    return BoxedImages(**vars(images), boxes=boxes.__getitem__)


def _open_coco(root: Path, split: str) -> BoxedImages:
    """Opens a folder of images and `instances_SPLIT.json`; classes are the category ids.

    Crowds are left out.

    Args:
        root: with `annotations/` and a folder of images named after the split.
        split: such as `val2017`.
    """
    path = coco_annotations(root, split)
    advice = "It must be COCO's annotations of instances."
    try:
        content = json.loads(path.read_text())  # of more bytes than other files that travel
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}. {advice}") from None
    schema.convert(content, _Annotations, str(path), advice)
    files: list[dict[str, Any]] = sorted(content["images"], key=lambda x: x["id"])
    titles = {category["id"]: category["name"] for category in content["categories"]}
    by_image: dict[int, list[dict[str, Any]]] = {file["id"]: [] for file in files}
    for entry in content["annotations"]:
        if not entry.get("iscrowd", 0):
            by_image.setdefault(entry["image_id"], []).append(entry)
    entries = [by_image[file["id"]] for file in files]
    locations = [str((root / split / file["file_name"]).absolute()) for file in files]
    return BoxedImages(
        ids=[file["file_name"] for file in files],
        labels=[0] * len(files),
        class_names=[titles.get(i, f"unused {i}") for i in range(max(titles) + 1)],
        read=partial(_read_file, locations),
        locations=locations,
        boxes=partial(_coco_boxes, entries),
        masks=partial(_coco_masks, entries, [(file["height"], file["width"]) for file in files]),
    )


def _read_file(paths: Sequence[str], index: int) -> Image.Image:
    return read_image(paths[index])


def _coco_boxes(entries: Sequence[Sequence[dict[str, Any]]], index: int) -> list[Box]:
    found = []
    for entry in entries[index]:
        left, top, width, height = entry["bbox"]
        found.append(Box(left, top, left + width, top + height, entry["category_id"]))
    return found


def _coco_masks(
    entries: Sequence[Sequence[dict[str, Any]]], sizes: Sequence[tuple[int, int]], index: int
) -> Bool[np.ndarray, "n h w"]:
    coco = import_pycocotools("mask")
    masks = [_decode_mask(coco, e["segmentation"], sizes[index]) for e in entries[index]]
    return np.stack(masks) if masks else np.zeros((0, *sizes[index]), bool)


class BoxDataset(CropDataset):
    """Crops whose items also hold their objects, as a detector's targets.

    To the items of `CropDataset` it adds `boxes` `[max_boxes, 4]` (centre x, centre y, width,
    height, as shares of the crop) and `box_labels` `[max_boxes]`, filled up with zeros and −1.
    """

    def __init__(
        self,
        images: BoxedImages,
        indices: Sequence[int],
        config: DataConfig,
        seed: int,
        max_boxes: int = 100,
    ):
        super().__init__(images, indices, config, seed)
        self.boxes_of, self.max_boxes = images.boxes, max_boxes

    def targets(self, index: int, crop: Crop) -> dict[str, Tensor]:
        """Returns the boxes that are left in the crop."""
        boxes = torch.zeros(self.max_boxes, 4)
        labels = torch.full((self.max_boxes,), -1)
        seen = crop_boxes(self.boxes_of(index), crop)[: self.max_boxes]
        for i, (box, label) in enumerate(seen):
            boxes[i], labels[i] = torch.tensor(box), label
        return {"boxes": boxes, "box_labels": labels}


def crop_boxes(
    boxes: Sequence[Box], crop: Crop
) -> list[tuple[tuple[float, float, float, float], int]]:
    """Returns ((centre x, centre y, width, height) as shares of the crop, class) of each box.

    Boxes are cut at the edges of the crop; those of which too little is left are dropped.
    """
    top, left, height, width = crop.box
    found = []
    for box in boxes:
        x0, x1 = (min(max((x - left) / width, 0), 1) for x in (box.left, box.right))
        y0, y1 = (min(max((y - top) / height, 0), 1) for y in (box.top, box.bottom))
        if (x1 - x0) * (y1 - y0) * width * height < MIN_VISIBLE * box.area or x0 >= x1 or y0 >= y1:
            continue
        x, y = (x0 + x1) / 2, (y0 + y1) / 2
        centre = (1 - x if crop.hflip else x, 1 - y if crop.vflip else y)
        found.append(((*centre, x1 - x0, y1 - y0), box.label))
    return found


def coco_annotations(root: Path, split: str) -> Path:
    """Returns where COCO keeps the instances of a split."""
    return root / "annotations" / f"instances_{split}.json"


def import_pycocotools(module: str) -> Any:
    """Returns a module of pycocotools.

    Raises:
        InputError: it is not installed.
    """
    from importlib import import_module

    try:
        return import_module(f"pycocotools.{module}")
    except ImportError:
        raise InputError(
            "Masks of COCO and average precision need pycocotools, which is not installed: "
            "pip install 'featinv-diffusion[coco]'."
        ) from None


def targets_of(
    boxes: Float[Tensor, "b n 4"], labels: Int[Tensor, "b n"]
) -> list[dict[str, Tensor]]:
    """Returns boxes and classes of each image without the filling, as transformers names them."""
    return [
        {"class_labels": label[label >= 0], "boxes": box[label >= 0]}
        for box, label in zip(boxes, labels, strict=True)
    ]


def _read_box_file(path: Path) -> dict[str, tuple[int, int, int, int]]:
    try:
        rows = [line.split() for line in path.read_text().splitlines() if line.strip()]
        return {name: (int(a), int(b), int(c), int(d)) for name, a, b, c, d in rows}
    except (OSError, ValueError) as error:
        raise InputError(f"{path} must hold lines `NAME LEFT TOP RIGHT BOTTOM`: {error}") from None


def _decode_mask(coco: Any, segmentation: Any, size: tuple[int, int]) -> np.ndarray:
    if isinstance(segmentation, list):
        segmentation = coco.merge(coco.frPyObjects(segmentation, *size))
    elif isinstance(segmentation["counts"], list):
        segmentation = coco.frPyObjects(segmentation, *size)
    return coco.decode(segmentation).astype(bool)
