"""Training images: any `ImageSet` → uint8 crops.

Every random choice of a crop derives from (seed, epoch, index), so the order of workers and
processes does not matter and a resumed run sees the same pixels.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode, RandomResizedCrop, functional

from featinv_diffusion.data.sets import ImageSet, open_images
from featinv_diffusion.errors import InputError
from featinv_diffusion.images import without_notes
from featinv_diffusion.seeds import derive_seed, make_generator
from featinv_diffusion.settings import Count, Number, Pictures, Probability, Size, Workers, check

logger = logging.getLogger(__name__)

TF: Any = functional  # torchvision annotates tensors only, and takes pictures too
AnySet = TypeVar("AnySet", bound=ImageSet)

N_ATTEMPTS = 10
"""Images that are tried in place of one that cannot be read."""


@dataclass(frozen=True)
class DataConfig:
    """Which images, and how they are cropped.

    Args:
        root: folder of pictures (with class folders or without), parquet file, webdataset tar or
            pattern of tars, an fsspec URL of any of these, or a Hub id such as
            `ILSVRC/imagenet-1k`.
        split: split of a Hub data set, or the folder below `root` that holds the classes.
        classes: text file with one class folder or class name per line: only these, in this
            order; None takes all, sorted.
        held_back_per_class: the last k images of each class are the validation set.
        train_per_class: the first k others of each class are trained on; None takes all.
        size: side of the square crop in pixels.
        crop: `random_resized` (area `scale`, aspect 3/4 to 4/3), `shift` (by up to `shift`
            pixels, edges reflected), `center`, or `squash` (the whole image, whatever its aspect).
        in_memory: decode once and keep the pixels; needs images of one size.
        streaming: read a Hub data set, parquet files or tars in passing, shuffled in blocks of
            `shuffle_buffer` images, see `data.streams`. Such a run needs `optim.max_steps` and has
            no latent cache. Files are divided among processes and their workers: best are as many
            as both together, or a multiple.
        on_bad_image: what happens to an image that cannot be read: `replace` takes another one
            in its place, the same in a resumed run, and lists it at the end; `error` stops.
    """

    root: str | None = None
    split: str = "train"
    classes: str | None = None
    held_back_per_class: Number = 0
    train_per_class: Count | None = None
    size: Size = 288
    crop: Literal["random_resized", "shift", "center", "squash"] = "random_resized"
    scale: tuple[Probability, Probability] = (0.08, 1.0)
    shift: Number = 4
    hflip: bool = True
    vflip: bool = False
    in_memory: bool = False
    streaming: bool = False
    shuffle_buffer: Pictures = 1000
    num_workers: Workers = 2
    on_bad_image: Literal["replace", "error"] = "replace"

    def __post_init__(self) -> None:
        check(self)
        if self.streaming and self.train_per_class is not None:
            raise InputError(
                "data.train_per_class counts images before they are read, but data.streaming is "
                "true. Unset one of the two."
            )
        if not 0 < self.scale[0] <= self.scale[1]:
            raise InputError(
                "data.scale must be the smallest and the largest share of the area, more than 0 "
                f"and in this order, got {list(self.scale)}."
            )


def open_training_images(config: DataConfig) -> ImageSet:
    """Opens the images that `config.root` names, which all have labels: 0 where they have none.

    Pictures are in the order of their top folder, then their whole folder, then their name, which
    decides their crops.

    Raises:
        InputError: no such images.
    """
    if not config.root:
        raise InputError("data.root must name an image folder, parquet file, tar files or Hub id.")
    try:
        images = open_images(config.root, config.split, config.classes)
    except InputError as error:
        raise InputError(f"data.root cannot be opened. {error}") from error
    for note in images.notes:
        logger.warning("%s", note)
    labels = images.labels or [0] * len(images)
    names = images.class_names or [str(i) for i in range(max(labels) + 1)]
    images = replace(images, labels=labels, class_names=names)
    if images.locations[0].endswith(f"/{images.ids[0]}"):
        parts = [(i.partition("/")[0], *i.rpartition("/")[::2]) for i in images.ids]
        images = images.pick(sorted(range(len(images)), key=parts.__getitem__))
    return in_memory(images) if config.in_memory else images


def in_memory(images: AnySet) -> AnySet:
    """Decodes all images once; one that cannot be read stays one that cannot be read.

    Raises:
        InputError: the images are not of one size.
    """
    pixels: np.ndarray | None = None
    first, reasons = 0, {}
    for i, image_id in enumerate(images.ids):
        try:
            with without_notes():
                image = np.asarray(images.read(i))
        except InputError as error:
            reasons[i] = str(error)
            continue
        if pixels is None:
            pixels, first = np.empty((len(images), *image.shape), np.uint8), i
        if image.shape != pixels.shape[1:]:
            raise InputError(
                f"data.in_memory needs images of one size, but {images.ids[first]} is "
                f"{pixels.shape[2]}×{pixels.shape[1]} and {image_id} is "
                f"{image.shape[1]}×{image.shape[0]}. Set data.in_memory=false."
            )
        pixels[i] = image
    return replace(images, read=partial(_from_memory, pixels, reasons))


def _from_memory(pixels: np.ndarray | None, reasons: Mapping[int, str], index: int) -> Image.Image:
    if pixels is None or index in reasons:
        raise InputError(reasons[index])
    return Image.fromarray(pixels[index])


def split_held_back(
    labels: Sequence[int], per_class: int, train_per_class: int | None = None
) -> tuple[list[int], list[int]]:
    """Returns (training, held-back) indices: of each class the last `per_class` are held back, and
    of the others all, or the first `train_per_class`, are for training."""
    by_class: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        by_class.setdefault(label, []).append(index)
    kept, held = [], []
    for group in by_class.values():
        end = max(len(group) - per_class, 0)
        kept += group[:end][:train_per_class]
        held += group[end:]
    return sorted(kept), sorted(held)


@dataclass(frozen=True)
class Crop:
    """A square crop: box (top, left, height, width) in source pixels, then flips, then resize."""

    box: tuple[int, int, int, int]
    hflip: bool
    vflip: bool

    def apply(self, image: Image.Image, size: int) -> Image.Image:
        top, left, height, width = self.box
        inside = top >= 0 and left >= 0
        if inside and top + height <= image.height and left + width <= image.width:
            if (height, width) == (size, size):
                image = TF.crop(image, top, left, height, width)
            else:
                image = TF.resized_crop(
                    image, top, left, height, width, [size, size], InterpolationMode.BICUBIC
                )
        else:
            image = _crop_reflected(image, self.box, size)
        if self.hflip:
            image = TF.hflip(image)
        return TF.vflip(image) if self.vflip else image


def _crop_reflected(image: Image.Image, box: tuple[int, int, int, int], size: int) -> Image.Image:
    top, left, height, width = box
    pad = [
        max(0, -left),
        max(0, -top),
        max(0, left + width - image.width),
        max(0, top + height - image.height),
    ]
    padded = TF.pad(image, pad, padding_mode="reflect")
    return TF.resized_crop(padded, top + pad[1], left + pad[0], height, width, [size, size])


def draw_crop(config: DataConfig, width: int, height: int, generator: torch.Generator) -> Crop:
    """Draws the crop of one image; `center` takes the largest central square and never flips."""
    short = min(width, height)
    top, left = (height - short) // 2, (width - short) // 2
    if config.crop == "center":
        return Crop((top, left, short, short), False, False)
    flips = torch.rand(2, generator=generator)
    hflip, vflip = bool(config.hflip and flips[0] < 0.5), bool(config.vflip and flips[1] < 0.5)
    if config.crop == "squash":
        return Crop((0, 0, height, width), hflip, vflip)
    if config.crop == "shift":
        reach = 2 * config.shift + 1
        dy, dx = torch.randint(0, reach, (2,), generator=generator).tolist()
        box = (top + dy - config.shift, left + dx - config.shift, short, short)
    else:
        box = _random_resized_box(width, height, config.scale, generator)
    return Crop(box, hflip, vflip)


def _random_resized_box(
    width: int, height: int, scale: tuple[float, float], generator: torch.Generator
) -> tuple[int, int, int, int]:
    # torchvision draws from the global generator; it is borrowed, seeded from ours, and put back.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(0, 2**62, (1,), generator=generator)))
        shape_only = torch.empty(1, height, width, device="meta")
        box = RandomResizedCrop.get_params(shape_only, list(scale), [3 / 4, 4 / 3])
    return box[0], box[1], box[2], box[3]


def make_item(
    image: Image.Image, config: DataConfig, seed: int, epoch: int, index: int
) -> tuple[dict[str, Any], Crop]:
    """Returns an item with a crop of an image, and which crop it is."""
    generator = make_generator(seed, epoch, index)
    crop = draw_crop(config, *image.size, generator)
    item = {
        "pixels": TF.pil_to_tensor(crop.apply(image, config.size)),
        "index": index,
        "seed": int(torch.randint(0, 2**62, (1,), generator=generator)),
    }
    return item, crop


class CropDataset(Dataset):
    """Crops of the chosen images, drawn afresh in each epoch.

    Items are dicts with `pixels` uint8 `[3, size, size]`, `label`, `index` (into the images),
    `seed`, from which the training step derives this sample's noise, and `n_unreadable`: how many
    images were tried in vain, as `substitute` numbers them.
    """

    def __init__(self, images: ImageSet, indices: Sequence[int], config: DataConfig, seed: int):
        self.images, self.indices, self.config, self.seed = images, list(indices), config, seed
        self.labels = images.labels or [0] * len(images)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> dict[str, Any]:
        index = self.indices[position]
        image, attempt = self.read(index)
        item, crop = make_item(image, self.config, self.seed, self.epoch, index)
        used = self.substitute(index, attempt)
        more = {"label": self.labels[used], "n_unreadable": attempt}
        return {**item, **more, **self.targets(used, crop)}

    def targets(self, index: int, crop: Crop) -> dict[str, Any]:
        """What else an item holds."""
        return {}

    def substitute(self, index: int, attempt: int) -> int:
        """The image itself, or that which is tried as the `attempt`-th in its place."""
        if attempt == 0:
            return index
        place = derive_seed(self.seed, "replacement", index, attempt) % len(self.indices)
        return self.indices[place]

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Returns an image, or the first that can be read in its place, and its attempt.

        Raises:
            InputError: none can be read, or `on_bad_image` is `error` and the image cannot.
        """
        reason = None
        for attempt in range(1 + N_ATTEMPTS):
            try:
                with without_notes():
                    return self.images.read(self.substitute(index, attempt)), attempt
            except InputError as error:
                if self.config.on_bad_image == "error":
                    raise
                reason = reason or error
        raise InputError(
            f"Of {1 + N_ATTEMPTS} images none can be read, so that none is taken in place of "
            f"another. The first: {reason}"
        )

    def unreadable(self, index: int, n_unreadable: int) -> list[str]:
        """Where the images lie that were tried in vain."""
        found = [self.substitute(index, attempt) for attempt in range(n_unreadable)]
        return [self.images.locations[i] for i in found]


def to_images(pixels: Tensor) -> Tensor:
    """uint8 `[b, 3, h, w]` to float `Images` in [0, 1]."""
    return pixels.float() / 255
