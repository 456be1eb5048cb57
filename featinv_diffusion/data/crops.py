"""Training and evaluation images: a folder, parquet, webdataset or Hub data set → uint8 crops.

Every random choice of a crop derives from (seed, epoch, index), so the order of workers and
processes does not matter and a resumed run sees the same pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode, RandomResizedCrop, functional

from featinv_diffusion.errors import InputError
from featinv_diffusion.seeds import make_generator

TF: Any = functional  # torchvision annotates tensors only, and takes pictures too


@dataclass(frozen=True)
class DataConfig:
    """Which images, and how they are cropped.

    Args:
        root: image folder (`CLASS/**/*.jpg`, or with a `split` folder of those), parquet file,
            webdataset tar pattern, or Hub id such as `ILSVRC/imagenet-1k`.
        split: split of a Hub data set, or the folder below `root` that holds the classes.
        classes: text file with one class folder or class name per line: only these, in this
            order; None takes all, sorted.
        held_back_per_class: the last k images of each class are the validation set.
        size: side of the square crop in pixels.
        crop: `random_resized` (area `scale`, aspect 3/4 to 4/3), `shift` (by up to `shift`
            pixels, edges reflected), `center`, or `squash` (the whole image, whatever its aspect).
        in_memory: decode once and keep the pixels; needs images of one size.
        streaming: read a Hub data set or tar shards in passing, shuffled within a buffer of
            `shuffle_buffer` images, by one worker. Such a run needs `optim.max_steps`, has no
            latent cache, and resumes by reading again, and dropping, what it has already used.
    """

    root: str | None = None
    split: str = "train"
    classes: str | None = None
    held_back_per_class: int = 0
    size: int = 288
    crop: Literal["random_resized", "shift", "center", "squash"] = "random_resized"
    scale: tuple[float, float] = (0.08, 1.0)
    shift: int = 4
    hflip: bool = True
    vflip: bool = False
    in_memory: bool = False
    streaming: bool = False
    shuffle_buffer: int = 1000
    num_workers: int = 2


@runtime_checkable
class Records(Protocol):
    """Decoded images with labels and stable ids."""

    class_names: list[str]
    labels: list[int]

    def __len__(self) -> int: ...
    def id(self, index: int) -> str: ...
    def image(self, index: int) -> Image.Image: ...


class FolderRecords:
    """`root/CLASS/**/*.jpg`; the id is the path relative to root."""

    def __init__(self, root: Path, classes: Sequence[str] | None = None):
        if not root.is_dir():
            raise InputError(f"An image folder must exist at {root}; set data.root.")
        if classes is not None:
            missing = [name for name in classes if not (root / name).is_dir()]
            if missing:
                raise InputError(
                    f"{root} must hold a folder for each listed class, "
                    f"but {len(missing)} are missing, e.g. {missing[0]!r}."
                )
        try:
            folder = _SelectedFolder(str(root), classes)
        except FileNotFoundError as error:
            raise InputError(f"{root} must hold folders of images, one a class: {error}") from None
        self.root = root
        self.class_names = list(folder.classes)
        self.paths = [Path(path) for path, _ in folder.samples]
        self.labels = [label for _, label in folder.samples]

    def __len__(self) -> int:
        return len(self.paths)

    def id(self, index: int) -> str:
        return self.paths[index].relative_to(self.root).as_posix()

    def image(self, index: int) -> Image.Image:
        try:
            with Image.open(self.paths[index]) as image:
                return image.convert("RGB")
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise InputError(
                f"{self.paths[index]} must be a readable image, but decoding failed ({error}). "
                "Replace or remove the file."
            ) from error


class _SelectedFolder(ImageFolder):
    def __init__(self, root: str, selected: Sequence[str] | None):
        self.selected = selected
        super().__init__(root)

    def find_classes(self, directory: Any) -> tuple[list[str], dict[str, int]]:
        names = list(self.selected or super().find_classes(directory)[0])
        return names, {name: i for i, name in enumerate(names)}


class TableRecords:
    """A map-style `datasets.Dataset` with an `image` and perhaps a `label` column."""

    def __init__(self, table: Any, name: str):
        self.name = name
        self.image_column, label_column = _image_and_label_columns(table.column_names, name)
        self.table = table
        self.labels = list(table[label_column]) if label_column else [0] * len(table)
        feature = table.features[label_column] if label_column else None
        self.class_names = list(
            getattr(feature, "names", None) or map(str, range(max(self.labels, default=0) + 1))
        )

    def __len__(self) -> int:
        return len(self.table)

    def id(self, index: int) -> str:
        return f"{self.name}/{index}"

    def image(self, index: int) -> Image.Image:
        return self.table[index][self.image_column].convert("RGB")


def _image_and_label_columns(columns: Sequence[str], name: str) -> tuple[str, str | None]:
    image_column = next((c for c in ("image", "jpg", "jpeg", "png") if c in columns), None)
    if image_column is None:
        raise InputError(f"{name} must have an `image` column, but has {list(columns)}.")
    return image_column, next((c for c in ("label", "cls") if c in columns), None)


class MemoryRecords:
    """Other records, decoded once; all images must have one size."""

    def __init__(self, records: Records):
        first = np.asarray(records.image(0))
        pixels = np.empty((len(records), *first.shape), np.uint8)
        for i in range(len(records)):
            image = np.asarray(records.image(i))
            if image.shape != first.shape:
                raise InputError(
                    f"data.in_memory needs images of one size, but {records.id(0)} is "
                    f"{first.shape[1]}×{first.shape[0]} and {records.id(i)} is "
                    f"{image.shape[1]}×{image.shape[0]}. Set data.in_memory=false."
                )
            pixels[i] = image
        self.pixels, self.labels, self.class_names = pixels, records.labels, records.class_names
        self.id = records.id

    def __len__(self) -> int:
        return len(self.pixels)

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])


def load_records(config: DataConfig) -> Records:
    """Opens the data set that `config.root` names, restricted to `config.classes`."""
    if not config.root:
        raise InputError("data.root must name an image folder, parquet file, tar files or Hub id.")
    classes = read_classes(config.classes)
    root = Path(config.root).expanduser()
    if root.is_dir():
        split = root / config.split
        records: Records = FolderRecords(split if split.is_dir() else root, classes)
    else:
        records = TableRecords(_load_table(config), Path(config.root).stem)
        if classes is not None and records.class_names != classes:
            raise InputError("data.classes selects folders; this data set is not a folder.")
    return MemoryRecords(records) if config.in_memory else records


def _load_table(config: DataConfig) -> Any:
    from datasets import load_dataset

    root, streaming = str(config.root), config.streaming
    try:
        for suffix, builder in ((".parquet", "parquet"), (".tar", "webdataset")):
            if root.endswith(suffix):
                return load_dataset(builder, data_files=root, split="train", streaming=streaming)
        return load_dataset(root, split=config.split, streaming=streaming)
    except Exception as error:
        raise InputError(
            f"data.root must be a folder, parquet file, tar pattern or reachable Hub data set, "
            f"but {root!r} could not be opened: {str(error).splitlines()[0]}"
        ) from error


def read_classes(path: str | None) -> list[str] | None:
    """Reads the first word of each line that is no comment; None without a file."""
    if path is None:
        return None
    try:
        lines = Path(path).read_text().splitlines()
    except OSError as error:
        raise InputError(f"data.classes must be a readable text file: {error}") from None
    return [line.split()[0] for line in lines if line.strip() and not line.startswith("#")]


def split_held_back(labels: Sequence[int], per_class: int) -> tuple[list[int], list[int]]:
    """Returns (training, held-back) indices; the last `per_class` of each class are held back."""
    by_class: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        by_class.setdefault(label, []).append(index)
    held = sorted(
        i for group in by_class.values() for i in (group[-per_class:] if per_class else [])
    )
    kept = set(held)
    return [i for i in range(len(labels)) if i not in kept], held


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


class CropDataset(Dataset):
    """Crops of the chosen records, drawn afresh in each epoch.

    Items are dicts with `pixels` uint8 `[3, size, size]`, `label`, `index` (into the records) and
    `seed`, from which the training step derives this sample's noise.
    """

    def __init__(self, records: Records, indices: Sequence[int], config: DataConfig, seed: int):
        self.records, self.indices, self.config, self.seed = records, list(indices), config, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> dict[str, Any]:
        index = self.indices[position]
        generator = make_generator(self.seed, self.epoch, index)
        image = self.records.image(index)
        crop = draw_crop(self.config, *image.size, generator)
        return {
            "pixels": TF.pil_to_tensor(crop.apply(image, self.config.size)),
            "label": self.records.labels[index],
            "index": index,
            "seed": int(torch.randint(0, 2**62, (1,), generator=generator)),
        }


class StreamedCrops(IterableDataset):
    """The items of `CropDataset` from a `datasets.IterableDataset`, in its shuffled order.

    `index` counts the images of the stream; the first `n_skipped` are left to validation.
    """

    def __init__(self, config: DataConfig, seed: int, n_skipped: int = 0):
        self.config, self.seed, self.epoch = config, seed, 0
        stream = _load_table(config)
        columns = stream.column_names or list(next(iter(stream)))
        self.columns = _image_and_label_columns(columns, str(config.root))
        self.held = stream.take(n_skipped)
        self.stream = stream.skip(n_skipped).shuffle(seed=seed, buffer_size=config.shuffle_buffer)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.stream.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for index, row in enumerate(self.stream):
            yield self._item(row, index, self.config)

    def held_back_images(self) -> Tensor:
        """Central crops of the skipped images as `Images`."""
        central = replace(self.config, crop="center")
        items = [self._item(row, i, central)["pixels"] for i, row in enumerate(self.held)]
        return to_images(torch.stack(items))

    def _item(self, row: dict[str, Any], index: int, config: DataConfig) -> dict[str, Any]:
        image_column, label_column = self.columns
        generator = make_generator(self.seed, self.epoch, index)
        image: Image.Image = row[image_column].convert("RGB")
        crop = draw_crop(config, *image.size, generator)
        return {
            "pixels": TF.pil_to_tensor(crop.apply(image, config.size)),
            "label": row[label_column] if label_column else 0,
            "index": index,
            "seed": int(torch.randint(0, 2**62, (1,), generator=generator)),
        }


def to_images(pixels: Tensor) -> Tensor:
    """uint8 `[b, 3, h, w]` to float `Images` in [0, 1]."""
    return pixels.float() / 255


def read_class_titles(path: str | None) -> dict[str, str]:
    """Reads `FOLDER readable name` lines to a mapping; empty without a file."""
    if path is None:
        return {}
    pairs = (line.split(maxsplit=1) for line in Path(path).read_text().splitlines())
    return {pair[0]: pair[1].strip() for pair in pairs if len(pair) == 2 and pair[0] != "#"}
