"""Files that hold many encoded pictures: parquet, webdataset tars, and data sets of the Hub.

Only where each picture lies is kept in memory; its bytes are read when they are asked for. What
reads them can be pickled and holds no open file, so that it works in any number of workers.
"""

from __future__ import annotations

import json
import posixpath
import tarfile
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from featinv_diffusion.data.places import (
    LeftOut,
    absolute,
    exists,
    fingerprint,
    is_hidden,
    open_binary,
    read_bytes,
    suffix_of,
)
from featinv_diffusion.errors import InputError, reason_of

if TYPE_CHECKING:  # slow to import, and most pictures are plain files
    import pyarrow as pa

PARQUET, TAR = (".parquet", ".pq"), (".tar",)
IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "jpg", "jpeg", "png", "webp"), ("label", "cls")
CACHE_BYTES = 256 * 2**20
"""Row groups of parquet files that a process keeps, so that rows nearby are not read again."""


@dataclass(frozen=True)
class Container:
    """Encoded pictures.

    Args:
        ids: file stem or Hub name, and row or key.
        locations: file and row or key of each picture.
        labels: class of each; None where there are no classes.
        content: returns the bytes of one, or the path of the file that holds it.
    """

    source: str
    ids: list[str]
    locations: list[str]
    labels: list[int] | None
    class_names: list[str] | None
    content: Callable[[int], bytes | str]
    fingerprint: str
    left_out: LeftOut = field(default_factory=LeftOut)

    def __post_init__(self) -> None:
        if not self.ids:
            raise InputError(f"{self.source} must hold images, but has no rows.")


def open_container(files: Sequence[str]) -> Container:
    """Opens parquet files, or tars, as one.

    Raises:
        InputError: no such file, one of another kind, or one without images.
    """
    for file in files:
        kind = "parquet" if suffix_of(file) in PARQUET else "tar"
        if not exists(file):
            raise InputError(f"A {kind} file must exist at {file}, but nothing is there.")
    if all(suffix_of(file) in PARQUET for file in files):
        return _open_parquet(files)
    if all(suffix_of(file) in TAR for file in files):
        return _open_tars(files)
    raise InputError(f"The files must be all parquet or all tars, but {files[0]} is beside others.")


def _known_labels(labels: Sequence[Any], column: str, source: str) -> list[int] | None:
    if set(labels) == {-1}:  # as test splits on the Hub have it
        return None
    if not all(isinstance(label, int) and label >= 0 for label in labels):
        raise InputError(
            f"The column {column!r} of {source} must hold class numbers from 0 in every row. "
            "Convert it, or leave it out to evaluate without classes."
        )
    return list(labels)


def _numbered(stem: str, n_rows: int) -> list[str]:
    """Numbers the rows; the zeros in front make their order that of the text."""
    return [f"{stem}:{row:0{len(str(n_rows - 1))}d}" for row in range(n_rows)]


def _cannot_open(what: str, error: Exception) -> InputError:
    return InputError(
        f"{what} could not be opened as a data set: {reason_of(error)}. "
        "Name a parquet file, a tar, a folder, or a Hub data set that is cached or can be reached."
    )


# ---- parquet -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Group:
    """One row group: its file, its number there, and the file's state when it was found."""

    file: str
    number: int
    state: str


def _open_parquet(files: Sequence[str]) -> Container:
    import pyarrow as pa
    from pyarrow import parquet

    source = files[0]
    columns: list[str] = []
    names, labels, starts, groups, locations = None, [], [], [], []
    for file in files:
        try:
            with open_binary(file) as stream, parquet.ParquetFile(stream) as table:
                schema, state = table.schema_arrow, fingerprint([file])
                if file == source:
                    columns = _find_columns(schema, file)
                    names = _read_class_names(schema, columns[-1])
                if not set(columns) <= set(schema.names):
                    raise InputError(f"{file} must have the columns of {source}, but lacks one.")
                sizes = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
                for column in columns[1:]:
                    labels += table.read([column]).column(0).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise _cannot_open(file, error) from error
        starts += [len(locations) + sum(sizes[:i]) for i in range(len(sizes))]
        groups += [_Group(file, i, state) for i in range(len(sizes))]
        locations += [f"{absolute(file)}:{row}" for row in range(sum(sizes))]
    known = _known_labels(labels, columns[-1], source) if labels else None
    return Container(
        source,
        ids=_numbered(PurePosixPath(source).stem, len(locations)),
        locations=locations,
        labels=known,
        class_names=names if known else None,
        content=partial(_read_row, columns[0], starts, groups),
        fingerprint=fingerprint(files),
    )


def _find_columns(schema: pa.Schema, file: str) -> list[str]:
    """Returns the column of pictures and, where there is one, that of labels."""
    import pyarrow as pa

    found = [name for name in IMAGE_COLUMNS if name in schema.names][:1]
    for name in found:
        kind = schema.field(name).type
        is_struct = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
        if is_struct or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            return [name, *[label for label in LABEL_COLUMNS if label in schema.names][:1]]
    raise InputError(
        f"{file} must have a column of encoded pictures named `image`, but has "
        f"{', '.join(f'{column.name} ({column.type})' for column in schema)}."
    )


def _read_class_names(schema: pa.Schema, column: str) -> list[str] | None:
    """Reads the names that Hugging Face's libraries write beside the columns."""
    try:
        content = json.loads((schema.metadata or {})[b"huggingface"])
        return list(content["info"]["features"][column]["names"]) or None
    except (KeyError, TypeError, ValueError):
        return None


_groups: OrderedDict[tuple[str, _Group], pa.ChunkedArray] = OrderedDict()


def _read_row(
    column: str, starts: Sequence[int], groups: Sequence[_Group], index: int
) -> bytes | str:
    place = bisect_right(starts, index) - 1
    return to_content(_read_group(column, groups[place])[index - starts[place]].as_py())


def to_content(value: Any) -> bytes | str:
    """Returns the bytes of a cell, or where it has none the path that it names."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    return value or b""


def _read_group(column: str, group: _Group) -> pa.ChunkedArray:
    import pyarrow as pa
    from pyarrow import parquet

    key = (column, group)
    rows = _groups.pop(key, None)
    if rows is None:
        try:
            with open_binary(group.file) as stream, parquet.ParquetFile(stream) as table:
                rows = table.read_row_group(group.number, [column]).column(0)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{group.file} cannot be read: {error}") from error
    _groups[key] = rows
    while len(_groups) > 1 and sum(other.nbytes for other in _groups.values()) > CACHE_BYTES:
        _groups.popitem(last=False)
    return rows


# ---- webdataset tars -----------------------------------------------------------------------------


def _open_tars(files: Sequence[str]) -> Container:
    left_out = LeftOut()
    ids, locations, spans, labels = [], [], [], []
    for file in files:
        stem = PurePosixPath(file).stem
        for key, span, label in _index_tar(file, left_out):
            ids.append(f"{stem}:{key}")
            locations.append(f"{absolute(file)}:{key}")
            spans.append((file, *span))
            labels.append(label)
    has_labels = any(label is not None for label in labels)
    return Container(
        files[0],
        ids,
        locations,
        labels=_known_labels(labels, "cls", files[0]) if has_labels else None,
        class_names=None,
        content=partial(_read_span, spans),
        fingerprint=fingerprint(files),
        left_out=left_out,
    )


def _read_span(spans: Sequence[tuple[str, int, int]], index: int) -> bytes:
    return read_bytes(*spans[index])


def _index_tar(file: str, left_out: LeftOut) -> Iterator[tuple[str, tuple[int, int], object]]:
    """Yields key, place of the picture in the file, and label of each record in their order."""
    records: dict[str, dict[str, Any]] = {}
    try:
        with open_binary(file) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                name = posixpath.normpath(member.name)
                if not member.isreg():
                    continue
                if is_hidden(name):
                    left_out.hidden += 1
                    continue
                folder, base = posixpath.split(name)
                key, _, kind = base.partition(".")
                record = records.setdefault(posixpath.join(folder, key), {})
                if kind.lower() in IMAGE_COLUMNS:
                    span = (member.offset_data, member.offset_data + member.size)
                    record.setdefault("image", span)
                elif kind.lower() in ("cls", "json"):
                    content = tar.extractfile(member)
                    record["label"] = _read_label(kind.lower(), content.read() if content else b"")
                else:
                    record["other"] = suffix_of(name)
    except (tarfile.TarError, OSError) as error:
        raise _cannot_open(file, error) from error
    for key, record in records.items():
        if "image" in record:
            yield key, record["image"], record.get("label")
        else:
            left_out.suffixes[record.get("other", ".cls")] += 1


def _read_label(kind: str, content: bytes) -> object:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return content.decode(errors="replace") if kind == "cls" else None
    if isinstance(value, dict):
        return next((value[name] for name in LABEL_COLUMNS if name in value), None)
    return value if kind == "cls" else None


# ---- the Hub -------------------------------------------------------------------------------------


def load_hub(kind: str, **options: Any) -> Any:
    """Calls `datasets.load_dataset`; a stream is returned with pictures that are still encoded.

    Raises:
        InputError: `datasets` is not installed, or the data set cannot be opened.
    """
    try:
        from datasets import load_dataset
        from datasets.utils.logging import disable_progress_bar
    except ImportError:
        raise InputError(
            f"{kind!r} is no file or folder here, and a data set of the Hub or a stream needs a "
            "package that is not installed: pip install 'featinv-diffusion[data]'."
        ) from None
    disable_progress_bar()
    try:
        table = load_dataset(kind, **options)
        return table.decode(False) if options.get("streaming") else table
    except Exception as error:  # whatever readers of files and of the network raise
        where = options.get("data_files") or f"{kind!r}, split {options.get('split')!r},"
        raise _cannot_open(str(where), error) from error


def find_columns(columns: Sequence[str], source: str) -> tuple[str, str | None]:
    """Returns the columns of images and of labels.

    Raises:
        InputError: no column of images.
    """
    image_column = next((c for c in IMAGE_COLUMNS if c in columns), None)
    if image_column is None:
        raise InputError(
            f"{source} must have a column of encoded pictures named `image`, but has "
            f"{', '.join(columns)}."
        )
    return image_column, next((c for c in LABEL_COLUMNS if c in columns), None)


def open_hub(name: str, split: str) -> Container:
    """Opens a data set of the Hugging Face Hub.

    Raises:
        InputError: it cannot be opened, or has no images.
    """
    table = load_hub(name, split=split)
    from datasets import Image as ImageFeature

    image_column, label_column = find_columns(table.column_names, name)
    table = table.cast_column(image_column, ImageFeature(decode=False))
    labels = None
    if label_column:
        labels = _known_labels(list(table[label_column]), label_column, name)
    names = getattr(table.features[label_column], "names", None) if labels else None
    return Container(
        name,
        ids=_numbered(name, len(table)),
        locations=[f"hub:{name}:{split}:{row}" for row in range(len(table))],
        labels=labels,
        class_names=list(names) if names else None,
        content=partial(_read_hub_row, table.select_columns([image_column]), image_column),
        fingerprint=str(table._fingerprint),
    )


def _read_hub_row(table: Any, column: str, index: int) -> bytes | str:
    return to_content(table[index][column])
