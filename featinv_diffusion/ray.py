"""Ray Data: feature inversion as a stateful actor, on any number of machines. Extra `ray`.

    import featinv_diffusion.ray as fr

    pictures = fr.read("s3://bucket/photos.parquet")          # or tars, or any Ray data set
    done = pictures.map_batches(
        fr.Inverter, fn_constructor_kwargs={"name": "tiny/convnext"}, batch_size=16, concurrency=4
    )
    fr.write(done.drop_columns(["image"]), "s3://bucket/reconstructions")

Ray starts an actor that dies again, and gives its batch to another.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from io import BytesIO
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import fsspec
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from featinv_diffusion.data.places import expand, is_folder, to_place
from featinv_diffusion.errors import InputError
from featinv_diffusion.images import as_picture, center_square, decode_image, to_pil, to_tensor
from featinv_diffusion.inverters.open import load_inverter
from featinv_diffusion.metrics import feature_cosine
from featinv_diffusion.runs.sampling import batched, sample_maps
from featinv_diffusion.seeds import derive_seed

if TYPE_CHECKING:
    from ray.data import Dataset  # pyright: ignore[reportMissingImports]

Batch = Mapping[str, np.ndarray]
IDS, FEATURES, IMAGES = ("id", "__key__"), "features", ("image", "jpg", "jpeg", "png", "webp")
RECONSTRUCTION, COSINE, ERROR = "reconstruction", "cosine", "error"
KINDS = ("parquet", "webdataset")


class Inverter:
    """Adds a reconstruction to every row of a batch; for `Dataset.map_batches`.

    A batch holds `id` (or `__key__`, as in tars) and either `features`, maps `[c, h, w]`, or
    `image` (or `jpg`, `png` …): the bytes of picture files, arrays `[h, w, 3]`, or the structs of
    `datasets`. Added are `reconstruction`, the bytes of a PNG, `cosine` of its features to those
    that were inverted, and `error`: the sentence about a row that could not be used, else "".
    Without a reconstruction that is empty and the cosine is NaN.

    The noise of a row depends on the seed and the last part of its id, as that of `featinv sample`
    on the file name. Ray decides which rows a batch holds; with `batch_size` 1 no bit of a row
    depends on the others, and larger ones change the last bits.

    Args:
        name: what `load_inverter` takes.
        seed: random seed.
        batch_size: maps that are sampled at once, whatever the batches of Ray are.
        **options: any other argument of `load_inverter`, such as `steps` or `device`.

    Raises:
        InputError: see `load_inverter`.
    """

    def __init__(
        self, name: str | None = None, *, seed: int = 0, batch_size: int = 1, **options: Any
    ):
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}.")
        self.inverter = load_inverter(name, **options)
        self.seed, self.batch_size = seed, batch_size

    def __call__(self, batch: Batch) -> dict[str, np.ndarray]:
        """Returns the batch with three columns more.

        Raises:
            InputError: no ids, or neither pictures nor features.
        """
        names = [PurePosixPath(str(one)).name for one in _column(batch, IDS, "the id of each row")]
        n = len(names)
        pictures, cosine = np.full(n, b"", dtype=object), np.full(n, np.nan)
        errors = np.full(n, "", dtype=object)
        good = self._maps(batch, names, errors)
        for members in batched(good, self.batch_size):
            todo = [(one, derive_seed(self.seed, names[row], 0)) for row, one in members]
            (done,) = sample_maps(self.inverter, todo, len(todo))
            found = feature_cosine(done.maps, done.features).tolist()
            for i, (row, _) in enumerate(members):
                if done.finite[i]:
                    pictures[row] = _to_png(to_pil(done.images[i : i + 1])[0])
                    cosine[row] = found[i]
                else:
                    errors[row] = f"{names[row]} gave samples with NaN values."
        return {**batch, RECONSTRUCTION: pictures, COSINE: cosine, ERROR: errors}

    @torch.no_grad()
    def _maps(self, batch: Batch, names: list[str], errors: np.ndarray) -> list[tuple[int, Tensor]]:
        """Returns the row and the map of each row that can be used; notes why others cannot."""
        backbone = self.inverter.require_backbone()
        given = batch.get(FEATURES)
        column = _column(batch, IMAGES, "pictures or features") if given is None else given
        found: list[tuple[int, Tensor]] = []
        for row, value in enumerate(column):
            try:
                if given is not None:
                    one = torch.as_tensor(np.asarray(value), dtype=torch.float32)[None]
                else:
                    square = center_square(
                        _to_picture(value, names[row]), max(backbone.picture_size)
                    )
                    one = backbone.features(to_tensor(square).to(backbone.device))
                self.inverter.spec.check_features(one)
                found.append((row, one[0]))
            except InputError as error:
                errors[row] = str(error)
        return found


def _column(batch: Batch, names: tuple[str, ...], what: str) -> np.ndarray:
    for name in names:
        if name in batch:
            return batch[name]
    raise InputError(
        f"A batch must hold {what}, in a column called {' or '.join(names)}, got the columns "
        f"{', '.join(map(str, batch))}. Rename one with Dataset.rename_columns."
    )


def _to_picture(value: Any, name: str) -> Image.Image:
    if isinstance(value, Mapping):
        value = value.get("bytes")
    if isinstance(value, bytes | bytearray | memoryview):
        return decode_image(bytes(value), name)
    return as_picture(value)


def _to_png(picture: Image.Image) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


# ---- Parquet files and tars behind fsspec URLs ---------------------------------------------------


def read(place: str, **options: Any) -> Dataset:
    """Opens parquet files or webdataset tars as a data set of Ray; pictures stay encoded.

    Args:
        place: a file, a pattern of files or a folder of parquet files; a path or an fsspec URL
            that all machines reach.
        **options: of `ray.data.read_parquet` or `read_webdataset`.

    Raises:
        InputError: nothing there.
    """
    import ray.data  # pyright: ignore[reportMissingImports]

    place = to_place(place)
    files = [place] if is_folder(place) else expand(place) or [place]
    system, _ = fsspec.core.url_to_fs(place)
    paths = [system._strip_protocol(file) for file in files]
    if not all(map(system.exists, paths)):
        raise InputError(f"Parquet files or tars must be at {place}, but nothing is there.")
    if str(paths[0]).endswith(".tar"):
        return ray.data.read_webdataset(paths, filesystem=system, decoder=None, **options)
    return ray.data.read_parquet(paths, filesystem=system, **options)


def write(dataset: Dataset, place: str, kind: str = "parquet") -> None:
    """Writes what `Inverter` made, a file for each block.

    Args:
        place: a folder; a path or an fsspec URL that all machines reach.
        kind: `parquet` with all columns; or `webdataset`, tars of KEY.png and KEY.json, where KEY
            is the id with `-` for its dots, and the JSON holds the id, the cosine and the error.

    Raises:
        InputError: another kind.
    """
    if kind not in KINDS:
        raise InputError(f"kind must be {' or '.join(KINDS)}, got {kind!r}.")
    system, path = fsspec.core.url_to_fs(to_place(place))
    if kind == "parquet":
        dataset.write_parquet(path, filesystem=system)
    else:
        dataset.map(_to_member).write_webdataset(path, filesystem=system, encoder=None)


def _to_member(row: dict[str, Any]) -> dict[str, Any]:
    name = next(str(row[name]) for name in IDS if name in row)
    cosine = None if np.isnan(row[COSINE]) else float(row[COSINE])  # JSON has no NaN
    told = json.dumps({"id": name, COSINE: cosine, ERROR: row[ERROR]}).encode()
    return {"__key__": name.replace(".", "-"), "png": row[RECONSTRUCTION] or None, "json": told}
