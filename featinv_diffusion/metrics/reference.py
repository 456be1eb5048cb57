"""The set of images that a distribution is compared with, read once and of known identity."""

from __future__ import annotations

import hashlib
import math
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from featinv_diffusion.data.places import list_pictures
from featinv_diffusion.errors import InputError
from featinv_diffusion.images import center_square, read_image, to_tensor
from featinv_diffusion.metrics.distribution import FeatureSample, Moments, PublishedMoments
from featinv_diffusion.metrics.extractors import ImageFeatures, file_sha256
from featinv_diffusion.metrics.statistics import FeatureMoments
from featinv_diffusion.types import Images

_PUBLISHED = ("adm", "torch-fidelity")
"""Conventions of the Inception network whose moments are published as `mu` and `sigma`."""

_NPY_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_UNREADABLE = (OSError, ValueError, EOFError, zipfile.BadZipFile)


@dataclass(frozen=True)
class Reference:
    """What generated images are compared with; state `source`, `sha256` and `n` with each figure.

    Args:
        source: the folder or file.
        sha256: of the sorted relative paths and bytes of a folder, or of the bytes of a file.
        n: images behind the moments; None where a file of moments does not say.
        preparation: what was done with the images before the extractor saw them.
        moments: for the Fréchet distance.
        sample: vectors for the kernel distance and for precision and recall; None where there are
            moments only.
    """

    source: str
    sha256: str
    n: int | None
    preparation: str
    moments: Moments
    sample: FeatureSample | None


def load_reference(
    path: str | Path,
    extractor: ImageFeatures,
    *,
    size: int,
    batch_size: int = 32,
    sample_size: int = 10_000,
    seed: int = 0,
) -> Reference:
    """Reads a folder of images, or an npz file as the ADM evaluator's reference batches.

    Images stream, so that memory does not grow with their number. Those of a folder are scaled and
    cut to `size`, the resolution that is compared. An npz holds 8-bit images `arr_0`
    `[n, h, w, 3]`, taken as they are, or moments `mu` and `sigma`, or both. Moments are those of
    Inception features with TensorFlow's resize; for such an extractor they serve the Fréchet
    distance and the images the sample, for any other the images serve both.

    Args:
        path: folder or npz file.
        extractor: what describes the images; the same as for the generated ones.
        size: in pixels, of a folder's images.
        batch_size: images described at once.
        sample_size: vectors kept.
        seed: of the sample.

    Raises:
        InputError: nothing there, no images, or moments of another extractor.
    """
    path = Path(path)
    collected = _Collector(extractor, sample_size, seed)
    if path.is_dir():
        files = [path / name for name in list_pictures(path).names]
        digest = _folder_sha256(path, files)
        for batch in _batches(files, batch_size):
            ids = [file.relative_to(path).as_posix() for file in batch]
            collected.add(to_tensor([center_square(read_image(f), size) for f in batch]), ids)
        preparation = f"centre square scaled to {size}×{size}, bilinear with antialiasing"
        return collected.finish(path, digest, preparation)
    if not path.is_file():
        raise InputError(f"A reference must be a folder of images or an npz file, not {path}.")
    return _load_npz(path, collected, batch_size)


def check_reference(path: str | Path, extractor: ImageFeatures) -> None:
    """Finds out whether `load_reference` will succeed, without describing an image.

    Of a folder the first picture is read, of an npz the shapes and the moments.

    Raises:
        InputError: as `load_reference`, and fewer than two images.
    """
    path = Path(path)
    if path.is_dir():
        files = [path / name for name in list_pictures(path).names]
        read_image(files[0])
        _check_count(path, len(files))
        return
    if not path.is_file():
        raise InputError(f"A reference must be a folder of images or an npz file, not {path}.")
    with _open_npz(path) as archive:
        published = _find_moments(archive, path, extractor)
        if "arr_0.npy" in archive.namelist():
            with archive.open("arr_0.npy") as member:
                shape = _read_header(member, path)
            if published is None:
                _check_count(path, shape[0])


def _check_count(path: Path, count: int) -> None:
    if count < 2:
        raise InputError(f"A reference must hold at least 2 images, but {path} holds {count}.")


class _Collector:
    """Moments and a sample of what an extractor says of a stream of images."""

    def __init__(self, extractor: ImageFeatures, sample_size: int, seed: int):
        self.extractor = extractor
        self.moments = FeatureMoments(extractor.dim)
        self.sample = FeatureSample(extractor.dim, sample_size, seed)

    def add(self, images: Images, ids: Sequence[str]) -> None:
        features = self.extractor(images)
        self.moments.update(features)
        self.sample.update(features, ids)

    def finish(
        self, path: Path, sha256: str, preparation: str, published: PublishedMoments | None = None
    ) -> Reference:
        return Reference(
            source=str(path),
            sha256=sha256,
            n=(published or self.moments).count,
            preparation=preparation,
            moments=published or self.moments,
            sample=self.sample if len(self.sample) else None,
        )


def _load_npz(path: Path, collected: _Collector, batch_size: int) -> Reference:
    with _open_npz(path) as archive:
        published = _find_moments(archive, path, collected.extractor)
        if "arr_0.npy" in archive.namelist():
            _collect_array(archive, path, collected, batch_size)
    return collected.finish(path, file_sha256(path), "as the file holds them", published)


@contextmanager
def _open_npz(path: Path) -> Iterator[zipfile.ZipFile]:
    """Opens an archive; what goes wrong while it is read is an `InputError`."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except InputError:
        raise
    except _UNREADABLE as error:
        raise InputError(f"{path} must be an npz file, but cannot be read: {error}.") from error


def _find_moments(
    archive: zipfile.ZipFile, path: Path, extractor: ImageFeatures
) -> PublishedMoments | None:
    """Returns the moments of the file; None where its images must serve instead."""
    names = set(archive.namelist())
    published = _read_moments(path, extractor) if "mu.npy" in names else None
    if published is None and "arr_0.npy" not in names:
        raise InputError(
            f"{path} must hold images arr_0, or moments mu and sigma of {extractor.name} features "
            f"of length {extractor.dim} under the same convention, but holds "
            f"{', '.join(sorted(names)) or 'nothing'}."
        )
    return published


def _read_moments(path: Path, extractor: ImageFeatures) -> PublishedMoments | None:
    """Returns the moments of the file; None where they are not of what `extractor` gives."""
    if extractor.conventions.get("convention") not in _PUBLISHED:
        return None
    with np.load(path, allow_pickle=False) as file:
        if "sigma" not in file:
            raise InputError(f"{path} holds mu without sigma; a Fréchet distance needs both.")
        mean, covariance = (file[name].astype(np.float64) for name in ("mu", "sigma"))
    fits = mean.shape == (extractor.dim,) and covariance.shape == 2 * mean.shape
    if fits and not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise InputError(f"mu and sigma of {path} must be finite, but hold NaN or infinite values.")
    return PublishedMoments(mean, covariance) if fits else None


def _collect_array(
    archive: zipfile.ZipFile, path: Path, collected: _Collector, batch_size: int
) -> None:
    first = 0
    for pixels in _read_array(archive, path, batch_size):
        ids = [str(i) for i in range(first, first + len(pixels))]
        collected.add(pixels.permute(0, 3, 1, 2).float() / 255, ids)
        first += len(pixels)


def _read_array(archive: zipfile.ZipFile, path: Path, batch_size: int) -> Iterator[Tensor]:
    """Yields batches of images, of which all may be larger than memory."""
    with archive.open("arr_0.npy") as member:
        shape = _read_header(member, path)
        for start in range(0, shape[0], batch_size):
            batch = (min(batch_size, shape[0] - start), *shape[1:])
            data = bytearray(member.read(math.prod(batch)))
            yield torch.from_numpy(np.frombuffer(data, dtype=np.uint8).reshape(batch))


def _read_header(member: Any, path: Path) -> tuple[int, ...]:
    """Returns the shape of an array of images, whose bytes come next."""
    version = np.lib.format.read_magic(member)
    if version not in _NPY_HEADERS:
        raise InputError(f"{path} holds an array of npy version {version}, which is unknown.")
    shape, is_fortran, dtype = _NPY_HEADERS[version](member)
    if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8 or is_fortran:
        raise InputError(
            f"arr_0 of {path} must be 8-bit images [n, h, w, 3], but is {dtype} {list(shape)}."
        )
    return shape


def _folder_sha256(folder: Path, files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(folder).as_posix()}\0{file_sha256(file)}\n".encode())
    return digest.hexdigest()


def _batches(files: Sequence[Path], size: int) -> Iterator[Sequence[Path]]:
    for start in range(0, len(files), size):
        yield files[start : start + size]
