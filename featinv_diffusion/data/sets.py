"""The one door for images: a folder, parquet, tars, a Hub data set or a URL, read one by one."""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath

from PIL import Image
from torch import Tensor

from featinv_diffusion.data.classes import read_classes
from featinv_diffusion.data.containers import PARQUET, TAR, Container, open_container, open_hub
from featinv_diffusion.data.places import (
    TABLES,
    LeftOut,
    Listing,
    absolute,
    children,
    exists,
    expand,
    fingerprint,
    has_pictures,
    is_folder,
    is_url,
    join,
    list_pictures,
    made_by_runs,
    read_picture,
    suffix_of,
    to_place,
)
from featinv_diffusion.errors import InputError
from featinv_diffusion.images import decode_image, picture_id
from featinv_diffusion.types import FeatureMaps

EXAMPLE = "e.g. --data validation.parquet, --data photos/ or --data ILSVRC/imagenet-1k"


@dataclass(frozen=True)
class ImageSet:
    """Images with stable ids; pixels are decoded when they are asked for.

    Args:
        ids: file path below the folder, or file stem and row or key.
        labels: index into `class_names` of each; None where there are no classes.
        read: decodes one as 8-bit RGB; an `InputError` where it cannot be.
        split: that was chosen; None where the data have none.
        fingerprint: of the contents: sizes and times of files, or the Hub's revision.
        notes: what a user may not expect, a sentence each.
        locations: where each image is found again with `read_location`: an absolute path,
            `FILE.parquet:ROW`, `FILE.tar:KEY` or a URL.
        maps: feature maps in place of pictures, as `set_of_maps` makes them; such a set has no
            pictures to read.
    """

    ids: list[str]
    labels: list[int] | None
    class_names: list[str] | None
    read: Callable[[int], Image.Image]
    split: str | None = None
    fingerprint: str = ""
    notes: tuple[str, ...] = ()
    locations: list[str] = field(default_factory=list)
    maps: FeatureMaps | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def noise_name(self, index: int) -> str:
        """Returns what the noise of an image's samples depends on: its file name."""
        if self.maps is not None:
            return self.maps.sources[index].name
        return PurePosixPath(self.ids[index]).name

    def pick(self, indices: Sequence[int]) -> ImageSet:
        """Returns these images in this order."""
        return replace(
            self,
            ids=[self.ids[i] for i in indices],
            labels=None if self.labels is None else [self.labels[i] for i in indices],
            read=partial(_read_picked, self.read, indices),
            locations=[self.locations[i] for i in indices],
            maps=None if self.maps is None else self.maps[list(indices)],
        )


def set_of_maps(maps: FeatureMaps) -> ImageSet:
    """Returns feature maps as a set whose members have no pictures."""

    def read(_index: int) -> Image.Image:
        raise InputError("Feature maps have no pictures to read.")

    content = maps.as_subclass(Tensor).cpu().contiguous().numpy()
    names = [source.name for source in maps.sources]
    return ImageSet(
        ids=[f"map-{i:05d}" for i in range(len(maps))],  # names of a foreign file may be anything
        labels=None,
        class_names=None,
        read=read,
        fingerprint=hashlib.sha256("\n".join(names).encode() + content.tobytes()).hexdigest(),
        notes=(
            "Feature maps were given instead of pictures. There is nothing to compare pixels with, "
            "so PSNR, SSIM, the ceilings and normalised agreement are missing.",
        ),
        locations=[source.location or "" for source in maps.sources],
        maps=maps,
    )


def open_images(
    data: str | None, split: str, classes: str | None = None, exclude: Path | None = None
) -> ImageSet:
    """Opens the images that `data` names.

    Args:
        data: folder of pictures, with or without a folder for each class; parquet file or
            webdataset tar, a pattern of such files (`{000..003}`, `*`) or a folder of them; an
            fsspec URL of any of these; or the name of a Hub data set.
        split: of a Hub data set; of a folder, the folder or the files of that name, where it has
            splits.
        classes: text file with one class folder and perhaps its name per line: only these, in
            this order.
        exclude: folder whose pictures are left out, i.e. the output.

    Raises:
        InputError: nothing there, no images in it, no columns with images, or other splits than
            the one asked for.
    """
    if not data:
        raise InputError(f"The images to evaluate on must be named, {EXAMPLE}.")
    place = to_place(data)
    if is_folder(place):
        part = find_split(place, split)
        if not part.files:
            return replace(open_folder(part.folder, classes, exclude), split=part.split)
        return _to_set(open_container(part.files), part.split, classes)
    if not exists(place) and (files := expand(place)):
        return _to_set(open_container(files), None, classes)
    if suffix_of(place) in PARQUET + TAR:
        return _to_set(open_container([place]), None, classes)
    if exists(place) or is_url(place):
        raise InputError(
            "--data must be a parquet file, a tar, a folder or a Hub name, but "
            f"{place} is {'another file' if exists(place) else 'not there'}."
        )
    return _to_set(open_hub(data, split), split, classes)


def open_pictures(paths: Iterable[str | Path], exclude: str | Path | None = None) -> ImageSet:
    """Opens picture files, all pictures below folders, parquet files, tars, and URLs of these.

    The id is the path relative to the given folder, or the name of a file that was given itself;
    outputs are named after it. Noise derives from its last part, the file name, so that a picture
    is the same alone and in a folder. A file that is named twice is taken once.

    Args:
        exclude: folder whose pictures are left out, i.e. the output, unless they are named
            themselves.

    Raises:
        InputError: a path where nothing is, or a folder without pictures.
    """
    found: dict[str, tuple[str, str, Callable[[], Image.Image]]] = {}
    left_out, files = LeftOut(), []

    def add(key: str, image_id: str, location: str, read: Callable[[], Image.Image]) -> None:
        left_out.repeated += key in found
        found.setdefault(key, (image_id, location, read))

    def add_file(name: str, place: str) -> None:
        files.append(place)
        key = place if is_url(place) else os.path.realpath(place)
        add(key, picture_id(name), absolute(place), partial(read_picture, place))

    def add_container(names: Sequence[str]) -> None:
        files.extend(names)
        container = open_container(names)
        left_out.add(container.left_out)
        for i, location in enumerate(container.locations):
            add(location, container.ids[i], location, partial(_decode, container, i))

    given = [(place, exists(place)) for place in map(to_place, paths)]
    places = [x for place, is_there in given for x in (not is_there and expand(place)) or [place]]
    for place in places:
        if is_folder(place):
            if not has_pictures(place) and (packed := _packed_files(place, children(place)[1])):
                add_container(packed)
                continue
            listing = list_pictures(place)
            left_out.add(listing.left_out)
            for name in _outside(listing, exclude):
                add_file(name, join(place, name))
        elif not exists(place):
            raise InputError(f"A picture or a folder must exist at {place}, but nothing is there.")
        elif suffix_of(place) in PARQUET + TAR:
            add_container([place])
        else:
            add_file(posixpath.basename(place), place)
    return ImageSet(
        ids=[image_id for image_id, _, _ in found.values()],
        labels=None,
        class_names=None,
        read=partial(_call, [read for _, _, read in found.values()]),
        fingerprint=fingerprint(dict.fromkeys(files)),
        notes=left_out.notes(),
        locations=[location for _, location, _ in found.values()],
    )


def read_location(location: str) -> Image.Image:
    """Reads the image that `ImageSet.locations` names.

    Raises:
        InputError: it is not there any more, or cannot be read.
    """
    if location.startswith("hub:"):
        name, split, row = location.removeprefix("hub:").rsplit(":", 2)
        return _decode(open_hub(name, split), int(row))
    packed = re.fullmatch(r"(.+?\.(?:parquet|pq|tar)):(.+)", location, re.IGNORECASE)
    if packed is None or exists(location):
        return read_picture(location)
    file = packed[1]
    if not exists(file):
        raise InputError(f"The file of {location} must exist, but nothing is there.")
    container, index = _indexed(file, fingerprint([file]))
    if (row := index.get(absolute(location))) is None:
        raise InputError(f"{file} must hold {packed[2]!r}, but does not.")
    return _decode(container, row)


@lru_cache(maxsize=16)
def _indexed(file: str, state: str) -> tuple[Container, dict[str, int]]:
    container = open_container([file])
    return container, {location: i for i, location in enumerate(container.locations)}


# ---- Which part of a folder is the split that was asked for --------------------------------------

SPLITS = ("train", "validation", "val", "test")
_SAME = ("validation", "val")


@dataclass(frozen=True)
class SplitPart:
    """Where the images of a split are.

    Args:
        split: by the name it has there; None where the folder has no splits.
        files: parquet files or tars; where there are none, the images are pictures in `folder`.
    """

    folder: str
    split: str | None
    files: tuple[str, ...] = ()


def find_split(folder: str | Path, asked: str) -> SplitPart:
    """Finds the folder or the files of a split; `val` and `validation` are the same.

    A folder without any name like `train`, `val`, `validation` or `test` has no splits and is
    taken whole.

    Raises:
        InputError: the folder has splits, but not the one asked for.
    """
    place = to_place(folder)
    names = (asked, *(_SAME if asked in _SAME else ()))
    inner, files = children(place)
    for name in names:
        if name in inner:
            within = join(place, name)
            return SplitPart(within, name, _packed_files(within, children(within)[1]))
    packed = _packed_files(place, files)
    of_file = {file: _split_of(posixpath.basename(file), (*names, *SPLITS)) for file in packed}
    for name in names:
        if chosen := tuple(file for file in packed if of_file[file] == name):
            return SplitPart(place, name, chosen)
    found = [name for name in SPLITS if name in inner]
    found += [split for split in of_file.values() if split]
    if found:
        raise InputError(
            f"{place} must hold the split {asked!r}, but holds {', '.join(dict.fromkeys(found))}. "
            "Choose one of them with --split, or name its folder or file with --data."
        )
    return SplitPart(place, None, packed)


def _split_of(name: str, splits: Iterable[str]) -> str | None:
    """Returns the split that a file's name begins with, as in `train-00000-of-00003`."""
    begins = (split for split in splits if re.match(rf"{re.escape(split)}(?![a-zA-Z])", name))
    return next(begins, None)


def _packed_files(folder: str, names: Sequence[str]) -> tuple[str, ...]:
    """Returns the parquet files among the names, else tars where the folder holds no picture.

    Tables that runs of this program wrote are none of them.
    """
    packed = [name for name in names if suffix_of(name) in PARQUET]
    if packed and has_pictures(folder):
        made = made_by_runs(folder, names) | {f"{table}{PARQUET[0]}" for table in TABLES}
        packed = [name for name in packed if name not in made]
    tars = [name for name in names if suffix_of(name) in TAR]
    if not packed and tars and not has_pictures(folder):
        packed = tars
    return tuple(join(folder, name) for name in packed)


# ---- Folders of pictures, and files that hold many -----------------------------------------------


def open_folder(
    folder: str | Path, classes: str | None = None, exclude: str | Path | None = None
) -> ImageSet:
    """Opens `CLASS/**/*.jpg`, or pictures without classes where one lies beside such folders."""
    listing = list_pictures(folder)
    names = _outside(listing, exclude)
    state = fingerprint(join(listing.folder, name) for name in names)
    n_loose = sum("/" not in name for name in names)
    notes: tuple[str, ...] = ()
    label_of: dict[str, int] | None = None
    class_names = None
    if classes is None and n_loose:
        notes = _note_of_loose(listing.folder, n_loose) if n_loose < len(names) else ()
    else:
        there = {_top(name) for name in names}
        titles = dict.fromkeys(sorted(there), "") if classes is None else read_classes(classes)
        if missing := titles.keys() - there:
            raise InputError(
                f"{listing.folder} must hold a folder with pictures for each listed class, but "
                f"{len(missing)} are missing, e.g. {min(missing)!r}."
            )
        label_of = {name: i for i, name in enumerate(titles)}
        class_names = [title or name for name, title in titles.items()]
        names = [name for name in names if _top(name) in label_of]
    if listing.has_links:  # of links to one file the first of each class counts
        once = {
            (os.path.realpath(join(listing.folder, name)), label_of and _top(name)): name
            for name in reversed(names)
        }
        listing.left_out.repeated += len(names) - len(once)
        names = sorted(once.values())
    places = [join(listing.folder, name) for name in names]
    return ImageSet(
        ids=names,
        labels=None if label_of is None else [label_of[_top(name)] for name in names],
        class_names=class_names,
        read=partial(_read_file, places),
        fingerprint=state,
        notes=(*notes, *listing.left_out.notes()),
        locations=[absolute(place) for place in places],
    )


def _top(name: str) -> str:
    return name.partition("/")[0]


def _note_of_loose(folder: str, n_loose: int) -> tuple[str]:
    lie = "picture lies" if n_loose == 1 else "pictures lie"
    return (
        f"{n_loose} {lie} in {folder} itself, beside folders, so that the folders are not taken "
        "for classes and the images have no labels.",
    )


def _outside(listing: Listing, exclude: str | Path | None) -> list[str]:
    """Returns the names of the pictures that are not below `exclude`.

    Raises:
        InputError: all of them are.
    """
    if exclude is None or is_url(listing.folder):
        return listing.names
    left_out = os.path.join(os.path.realpath(exclude), "")
    real_folder = lru_cache(maxsize=None)(os.path.realpath)

    def is_outside(name: str) -> bool:
        place = os.path.join(listing.folder, name)
        if listing.has_links:
            return not os.path.realpath(place).startswith(left_out)
        return not os.path.join(real_folder(os.path.dirname(place)), "").startswith(left_out)

    names = [name for name in listing.names if is_outside(name)]
    if not names:
        raise InputError(
            f"The pictures of {listing.folder!r} must lie outside of the output folder, but all "
            f"are in {str(exclude)!r}. Name another output folder, or the pictures themselves."
        )
    return names


def _to_set(container: Container, split: str | None, classes: str | None) -> ImageSet:
    if classes is not None:
        listed = read_classes(classes)
        if container.class_names not in (list(listed), list(listed.values())):
            raise InputError("The option --classes selects folders, but the data are a table.")
    return ImageSet(
        ids=container.ids,
        labels=container.labels,
        class_names=container.class_names,
        read=partial(_decode, container),
        split=split,
        fingerprint=container.fingerprint,
        notes=container.left_out.notes(),
        locations=container.locations,
    )


# Readers are functions of this module, so that workers of a data loader can be sent them.


def _read_file(places: Sequence[str], index: int) -> Image.Image:
    return read_picture(places[index])


def _decode(container: Container, index: int) -> Image.Image:
    content = container.content(index)
    if isinstance(content, str):
        return read_picture(content)
    return decode_image(content, f"{container.source}, {container.ids[index]}")


def _read_picked(
    read: Callable[[int], Image.Image], indices: Sequence[int], index: int
) -> Image.Image:
    return read(indices[index])


def _call(readers: Sequence[Callable[[], Image.Image]], index: int) -> Image.Image:
    return readers[index]()
