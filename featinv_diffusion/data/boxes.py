"""Images with boxes: Tiny-ImageNet's and COCO's annotations → crops with targets for a detector."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional

from featinv_diffusion.data.crops import (
    Crop,
    CropDataset,
    DataConfig,
    FolderRecords,
    MemoryRecords,
    Records,
    draw_crop,
    read_classes,
)
from featinv_diffusion.errors import InputError
from featinv_diffusion.images import read_image
from featinv_diffusion.seeds import make_generator

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


@runtime_checkable
class BoxRecords(Records, Protocol):
    """Decoded images with labels, stable ids and boxes."""

    def boxes(self, index: int) -> list[Box]: ...


class TinyImageNetBoxes(FolderRecords):
    """Tiny-ImageNet's training folder: `WNID/images/*.JPEG` and `WNID/WNID_boxes.txt`."""

    def __init__(self, root: Path, classes: Sequence[str] | None = None):
        super().__init__(root, classes)
        self.by_name: dict[str, tuple[int, int, int, int]] = {}
        for name in self.class_names:
            self.by_name |= _read_box_file(root / name / f"{name}_boxes.txt")
        missing = [path for path in self.paths if path.name not in self.by_name]
        if missing:
            raise InputError(f"Each image must have a box, but {missing[0]} has none.")

    def boxes(self, index: int) -> list[Box]:
        """Returns the one box of the image."""
        left, top, right, bottom = self.by_name[self.paths[index].name]
        return [Box(left, top, right + 1, bottom + 1, self.labels[index])]


class CocoRecords:
    """COCO: a folder of images and `instances_SPLIT.json`; classes are the category ids.

    Crowds are left out. Masks need pycocotools.

    Args:
        root: with `annotations/` and a folder of images named after the split.
        split: such as `val2017`.
    """

    def __init__(self, root: Path, split: str):
        path = coco_annotations(root, split)
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise InputError(f"{path} must be COCO's annotations of instances: {error}") from None
        self.folder = root / split
        self.images: list[dict[str, Any]] = sorted(content["images"], key=lambda x: x["id"])
        titles = {category["id"]: category["name"] for category in content["categories"]}
        self.class_names = [titles.get(i, f"unused {i}") for i in range(max(titles) + 1)]
        self.annotations: dict[int, list[dict[str, Any]]] = {}
        for entry in content["annotations"]:
            if not entry.get("iscrowd", 0):
                self.annotations.setdefault(entry["image_id"], []).append(entry)
        self.labels = [0] * len(self.images)

    def __len__(self) -> int:
        return len(self.images)

    def id(self, index: int) -> str:
        return self.images[index]["file_name"]

    def image(self, index: int) -> Image.Image:
        return read_image(self.folder / self.id(index))

    def boxes(self, index: int) -> list[Box]:
        """Returns the objects of the image."""
        found = []
        for entry in self._entries(index):
            left, top, width, height = entry["bbox"]
            found.append(Box(left, top, left + width, top + height, entry["category_id"]))
        return found

    def masks(self, index: int) -> Bool[np.ndarray, "n h w"]:
        """Returns a mask per box, in the order of `boxes`.

        Raises:
            InputError: pycocotools is not installed.
        """
        coco = import_pycocotools("mask")
        size = self.images[index]["height"], self.images[index]["width"]
        masks = [_decode_mask(coco, e["segmentation"], size) for e in self._entries(index)]
        return np.stack(masks) if masks else np.zeros((0, *size), bool)

    def _entries(self, index: int) -> list[dict[str, Any]]:
        return self.annotations.get(self.images[index]["id"], [])


class _MemoryBoxRecords(MemoryRecords):
    def __init__(self, records: BoxRecords):
        super().__init__(records)
        self.boxes = records.boxes


class BoxDataset(CropDataset):
    """Crops whose items also hold their objects, as a detector's targets.

    To the items of `CropDataset` it adds `boxes` `[max_boxes, 4]` (centre x, centre y, width,
    height, as shares of the crop) and `box_labels` `[max_boxes]`, filled up with zeros and −1.
    """

    def __init__(
        self,
        records: BoxRecords,
        indices: Sequence[int],
        config: DataConfig,
        seed: int,
        max_boxes: int = 100,
    ):
        super().__init__(records, indices, config, seed)
        self.box_records, self.max_boxes = records, max_boxes

    def __getitem__(self, position: int) -> dict[str, Any]:
        index = self.indices[position]
        generator = make_generator(self.seed, self.epoch, index)
        image = self.records.image(index)
        crop = draw_crop(self.config, *image.size, generator)
        seen = crop_boxes(self.box_records.boxes(index), crop)[: self.max_boxes]
        boxes = torch.zeros(self.max_boxes, 4)
        labels = torch.full((self.max_boxes,), -1)
        for i, (box, label) in enumerate(seen):
            boxes[i], labels[i] = torch.tensor(box), label
        return {
            "pixels": _to_tensor(crop.apply(image, self.config.size)),
            "label": self.records.labels[index],
            "index": index,
            "seed": int(torch.randint(0, 2**62, (1,), generator=generator)),
            "boxes": boxes,
            "box_labels": labels,
        }


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


def load_box_records(config: DataConfig) -> BoxRecords:
    """Opens COCO or Tiny-ImageNet, whichever `config.root` holds.

    Raises:
        InputError: neither is there.
    """
    if not config.root:
        raise InputError("data.root must name the folder of COCO or of Tiny-ImageNet-200.")
    root = Path(config.root).expanduser()
    if coco_annotations(root, config.split).is_file():
        records: BoxRecords = CocoRecords(root, config.split)
    else:
        folder = root / config.split if (root / config.split).is_dir() else root
        records = TinyImageNetBoxes(folder, read_classes(config.classes))
    return _MemoryBoxRecords(records) if config.in_memory else records


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


def _to_tensor(image: Image.Image) -> Tensor:
    convert: Any = functional.pil_to_tensor
    return convert(image)
