"""The images of an evaluation: a folder, parquet files or a Hub data set, read one by one."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from featinv_diffusion.data.crops import read_class_titles
from featinv_diffusion.errors import InputError
from featinv_diffusion.images import decode_image, list_images, read_image

# ---- Which part of a folder is the split that was asked for --------------------------------------

SPLITS = ("train", "validation", "val", "test")
_SAME = ("validation", "val")


@dataclass(frozen=True)
class SplitPart:
    """Where the images of a split are.

    Args:
        split: by the name it has there; None where the folder has no splits.
        tables: parquet files; where there are none, the images are pictures in `folder`.
    """

    folder: Path
    split: str | None
    tables: tuple[Path, ...] = ()


def find_split(folder: Path, asked: str) -> SplitPart:
    """Finds the folder or the parquet files of a split; `val` and `validation` are the same.

    A folder without any name like `train`, `val`, `validation` or `test` has no splits and is
    taken whole.

    Raises:
        InputError: the folder has splits, but not the one asked for.
    """
    names = (asked, *(_SAME if asked in _SAME else ()))
    for name in names:
        if (folder / name).is_dir():
            return SplitPart(folder / name, name, tuple(sorted((folder / name).glob("*.parquet"))))
    tables = sorted(folder.glob("*.parquet"))
    of_table = {table: _split_of(table.stem, (*names, *SPLITS)) for table in tables}
    for name in names:
        if chosen := tuple(table for table in tables if of_table[table] == name):
            return SplitPart(folder, name, chosen)
    folders = [name for name in SPLITS if (folder / name).is_dir()]
    if found := folders + _unique(split for split in of_table.values() if split):
        raise InputError(
            f"{folder} must hold the split {asked!r}, but holds {', '.join(_unique(found))}. "
            "Choose one of them with --split, or name its folder or file with --data."
        )
    return SplitPart(folder, None, tuple(tables))


def _split_of(stem: str, names: Iterable[str]) -> str | None:
    """Returns the name that a file's begins with, as in `train-00000-of-00003`."""
    begins = (name for name in names if re.match(rf"{re.escape(name)}(?![a-zA-Z])", stem))
    return next(begins, None)


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


EXAMPLE = "e.g. --data validation.parquet, --data photos/ or --data ILSVRC/imagenet-1k"
IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "jpg", "jpeg", "png"), ("label", "cls")


@dataclass(frozen=True)
class ImageSet:
    """Images with stable ids; pixels are decoded when they are asked for.

    Args:
        ids: file path below the folder, or file stem and row.
        labels: index into `class_names` of each; None where there are no classes.
        read: decodes one; an `InputError` where it cannot be.
        split: that was chosen; None where the data have none.
        fingerprint: of the contents: sizes and times of files, or the Hub's revision.
        notes: what a user may not expect, a sentence each.
    """

    ids: list[str]
    labels: list[int] | None
    class_names: list[str] | None
    read: Callable[[int], Image.Image]
    split: str | None = None
    fingerprint: str = ""
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)


def open_images(
    data: str | None, split: str, classes: str | None = None, exclude: Path | None = None
) -> ImageSet:
    """Opens the images that `data` names, see `EvaluationSettings`.

    Args:
        exclude: folder whose pictures are left out, i.e. the output.

    Raises:
        InputError: nothing there, no images in it, no columns with images, or other splits than
            the one asked for.
    """
    if not data:
        raise InputError(f"The images to evaluate on must be named, {EXAMPLE}.")
    path = Path(data).expanduser()
    if path.is_dir():
        part = find_split(path, split)
        if part.tables:
            images = open_table(part.tables, None, split, classes)
        else:
            images = open_folder(part.folder, classes, exclude)
        return replace(images, split=part.split)
    if path.suffix in (".parquet", ".pq"):
        if not path.is_file():
            raise InputError(f"A parquet file must exist at {path}, but nothing is there.")
        return open_table([path], None, split, classes)
    if path.exists():
        raise InputError(
            f"--data must be a parquet file, a folder or a Hub name, but {path} is another file."
        )
    return open_table([], data, split, classes)


def open_folder(folder: Path, classes: str | None = None, exclude: Path | None = None) -> ImageSet:
    """Opens `CLASS/**/*.jpg`, or pictures without classes where one lies beside such folders."""
    left_out = exclude.resolve() if exclude else None
    paths = [path for path in list_images(folder) if left_out not in path.resolve().parents]
    parts = [path.relative_to(folder).parts for path in paths]
    fingerprint = _fingerprint(paths)
    n_loose = sum(len(part) == 1 for part in parts)
    if classes is None and n_loose:
        ids = ["/".join(part) for part in parts]
        notes = _note_of_loose(folder, n_loose) if n_loose < len(parts) else ()
        return ImageSet(
            ids,
            labels=None,
            class_names=None,
            read=lambda index: read_image(paths[index]),
            fingerprint=fingerprint,
            notes=notes,
        )
    titles = _read_titles(classes)
    names = list(titles) if titles else sorted({part[0] for part in parts})
    if missing := set(names) - {part[0] for part in parts}:
        raise InputError(
            f"{folder} must hold a folder with pictures for each listed class, but {len(missing)} "
            f"are missing, e.g. {min(missing)!r}."
        )
    number = {name: i for i, name in enumerate(names)}
    kept = [i for i, part in enumerate(parts) if part[0] in number]
    return ImageSet(
        ids=["/".join(parts[i]) for i in kept],
        labels=[number[parts[i][0]] for i in kept],
        class_names=[titles.get(name) or name for name in names],
        read=lambda index: read_image(paths[kept[index]]),
        fingerprint=fingerprint,
    )


def _note_of_loose(folder: Path, n_loose: int) -> tuple[str]:
    lie = "picture lies" if n_loose == 1 else "pictures lie"
    return (
        f"{n_loose} {lie} in {folder} itself, beside folders, so that the folders are not taken "
        "for classes and the images have no labels.",
    )


def _fingerprint(paths: Iterable[Path]) -> str:
    """Hashes names, sizes and times of change, which a file that is replaced does not keep."""
    digest = hashlib.sha256()
    for path in paths:
        stat = path.stat()
        digest.update(f"{path.name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _read_titles(classes: str | None) -> dict[str, str]:
    """Maps class folders to names; a line may hold a folder alone."""
    if classes is None:
        return {}
    try:
        lines = Path(classes).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The classes must be listed in a readable text file: {error}.") from error
    folders = [line.split()[0] for line in lines if line.strip() and not line.startswith("#")]
    if not folders:
        raise InputError(f"{classes} must list class folders, one a line, but lists none.")
    titles = read_class_titles(classes)
    return {folder: titles.get(folder, "") for folder in folders}


def open_table(
    files: Sequence[Path], name: str | None, split: str, classes: str | None
) -> ImageSet:
    if classes is not None:
        raise InputError("The option --classes selects folders, but the data are a table.")
    source = name or str(files[0])
    table = _load_table(files, name, split)
    image_column = _find_image_column(table)
    if image_column is None:
        raise InputError(
            f"{source} must have a column of encoded pictures named `image`, but has "
            f"{', '.join(f'{key} ({_kind(kind)})' for key, kind in table.features.items())}."
        )
    label_column = next((c for c in LABEL_COLUMNS if c in table.column_names), None)
    labels, class_names = _read_labels(table, label_column, source)
    pictures = table.select_columns([image_column])
    ids = _make_ids(files, name, len(table))

    def read(index: int) -> Image.Image:
        value = pictures[index][image_column]
        content = value.get("bytes") if isinstance(value, dict) else value
        path = value.get("path") if isinstance(value, dict) else None
        if content is None and path and Path(path).is_file():
            return read_image(path)
        return decode_image(content or b"", f"{source}, {ids[index]}")

    fingerprint = _fingerprint(files) if files else str(table._fingerprint)
    split_of_hub = split if name else None
    return ImageSet(ids, labels, class_names, read, split_of_hub, fingerprint)


def _load_table(files: Sequence[Path], name: str | None, split: str) -> Any:
    """Opens a table on disk; rows are read where they lie, never all at once."""
    from datasets import Image as ImageFeature
    from datasets import load_dataset
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        if name is None:
            table = load_dataset("parquet", data_files=[str(f) for f in files], split="train")
        else:
            table = load_dataset(name, split=split)
    except Exception as error:  # whatever readers of files and of the network raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        what = str(files[0]) if name is None else f"{name!r}, split {split!r},"
        raise InputError(
            f"{what} could not be opened as a data set: {reason} "
            "Name a parquet file, a folder, or a Hub data set that is cached or can be reached."
        ) from error
    for column, feature in table.features.items():
        if isinstance(feature, ImageFeature):
            table = table.cast_column(column, ImageFeature(decode=False))
    if len(table) == 0:
        raise InputError(f"{name or files[0]} must hold images, but has no rows.")
    return table


def _find_image_column(table: Any) -> str | None:
    from datasets import Image as ImageFeature

    found = next((c for c in IMAGE_COLUMNS if c in table.column_names), None)
    if found is None:
        return None
    feature = table.features[found]
    is_struct = isinstance(feature, dict) and "bytes" in feature
    is_binary = getattr(feature, "dtype", None) in ("binary", "large_binary")
    return found if isinstance(feature, ImageFeature) or is_struct or is_binary else None


def _kind(feature: Any) -> str:
    return getattr(feature, "dtype", None) or type(feature).__name__


def _read_labels(
    table: Any, column: str | None, source: str
) -> tuple[list[int] | None, list[str] | None]:
    if column is None:
        return None, None
    labels = list(table[column])
    if set(labels) == {-1}:  # as test splits on the Hub have it
        return None, None
    if not all(isinstance(label, int) and label >= 0 for label in labels):
        raise InputError(
            f"The column {column!r} of {source} must hold class numbers from 0 in every row. "
            "Convert it, or leave it out to evaluate without classes."
        )
    names = getattr(table.features[column], "names", None)
    return labels, list(names) if names else None


def _make_ids(files: Sequence[Path], name: str | None, n_rows: int) -> list[str]:
    """Numbers the rows; the zeros in front make their order that of the text."""
    stem = name or "+".join(file.stem for file in files[:1])
    return [f"{stem}:{row:0{len(str(n_rows - 1))}d}" for row in range(n_rows)]
