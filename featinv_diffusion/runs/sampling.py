"""Pictures → features → samples → metrics, image by image in batches of samples.

The whole is a chain of generators, so a set of any size runs in the memory of one batch. What a
sample is, its noise and its place in a batch, depends on the list of jobs and the batch size.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from statistics import fmean
from typing import TypeVar

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from featinv_diffusion.backbones.base import Backbone
from featinv_diffusion.data.places import list_pictures
from featinv_diffusion.errors import InputError
from featinv_diffusion.images import (
    center_square,
    read_image,
    to_pil,
    to_tensor,
    write_png,
)
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.metrics import feature_cosine, shuffled_cosine, top_k_match
from featinv_diffusion.seeds import derive_seed, make_generator
from featinv_diffusion.types import Features, Images

# ---- What studies of edits share: one picture's features, and the samples of one map -------------


@dataclass(frozen=True, eq=False)
class Encoded:
    """A picture as the backbone sees it.

    Args:
        size: (width, height) of the picture in its file.
        square: its centre square.
        features: `[1, c, h, w]`.
    """

    size: tuple[int, int]
    square: Image.Image
    features: Features


@dataclass(frozen=True, eq=False)
class SampleBatch:
    """Samples of one feature map.

    Args:
        images: rounded to 8 bits, as a PNG holds them; float32 on the CPU.
        features: what the backbone sees in them.
        cosine: of each cell to the map that was inverted.
    """

    images: Images
    features: Features
    cosine: Float[Tensor, "b h w"]


def backbone_of(inverter: Inverter) -> Backbone:
    """Returns the inverter's backbone.

    Raises:
        InputError: it has none.
    """
    if inverter.backbone is None:
        raise InputError("The inverter must have its backbone to read pictures, but has none.")
    return inverter.backbone


@torch.no_grad()
def encode_picture(inverter: Inverter, path: str | Path) -> Encoded:
    """Reads a picture and returns its features, bit for bit those that `reconstruct` inverts.

    Raises:
        InputError: no picture that can be read, or features that are not finite.
    """
    backbone = backbone_of(inverter)
    picture = read_image(path)
    square = center_square(picture, max(backbone.input_size))
    features, _ = backbone.features_and_logits(to_tensor(square).to(backbone.device))
    if not bool(features.isfinite().all()):
        raise InputError(f"The features of {path} hold NaN or infinite values.")
    return Encoded(picture.size, square, features)


@torch.no_grad()
def sample_map(
    inverter: Inverter, features: Features, seeds: Sequence[int], batch_size: int
) -> Iterator[SampleBatch]:
    """Yields samples of one map, one per seed and in batches, so that any number fits in memory.

    Batches are those that `featinv sample` makes of a single picture, so an edit that changes
    nothing gives its very samples, bit for bit.

    Raises:
        InputError: not one map, no seed, or samples that are not finite.
    """
    if len(features) != 1 or not seeds:
        raise InputError(
            "Samples need one feature map and at least one seed, "
            f"but {len(features)} maps and {len(seeds)} seeds came."
        )
    backbone = backbone_of(inverter)
    for start in range(0, len(seeds), batch_size):
        chosen = seeds[start : start + batch_size]
        generators = [torch.Generator().manual_seed(seed) for seed in chosen]
        repeated = features.expand(len(chosen), -1, -1, -1).contiguous()
        images = inverter.invert(repeated, generator=generators)
        if not bool(images.isfinite().all()):
            raise InputError("The samples hold NaN or infinite values; use --dtype float32.")
        images = to_tensor(to_pil(images))
        seen = backbone.features(images.to(backbone.device))
        yield SampleBatch(images, seen, cell_cosine(features, seen))


def sample_all(
    inverter: Inverter, features: Features, seeds: Sequence[int], batch_size: int
) -> SampleBatch:
    """Returns the samples of one map, one per seed, all at once."""
    batches = list(sample_map(inverter, features, seeds, batch_size))
    return SampleBatch(
        torch.cat([batch.images for batch in batches]),
        torch.cat([batch.features for batch in batches]),
        torch.cat([batch.cosine for batch in batches]),
    )


def cell_cosine(features: Float[Tensor, "#b c h w"], seen: Features) -> Float[Tensor, "b h w"]:
    """Returns the cosine of each cell of the maps seen to the same cell of `features`."""
    return F.cosine_similarity(features.float(), seen.float(), dim=1)


def to_list(values: Float[Tensor, ...]) -> list:
    """Returns plain numbers, nested as the tensor is."""
    return values.double().cpu().tolist()


T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """One image to reconstruct: where it lies, where its samples go, and the seed of each.

    Args:
        outputs: paths relative to the output folder, with forward slashes.
    """

    input: Path
    outputs: tuple[str, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Reconstruction:
    """The samples of one image; every list has one value per sample.

    Args:
        original: the square that the backbone saw.
        top1_match, top5_match: None where the backbone has no head.
        scope_p_value: of the image's features; None where it was not asked for or is not known.
    """

    job: Job
    original: Image.Image
    samples: list[Image.Image]
    cosine: list[float]
    cosine_shuffled: list[float]
    top1_match: list[bool | None]
    top5_match: list[bool | None]
    scope_p_value: float | None = None


@dataclass(frozen=True, eq=False)
class _Encoded:
    job: Job
    original: Image.Image
    features: Tensor
    logits: Tensor | None


@dataclass(frozen=True)
class _Sample:
    source: _Encoded
    picture: Image.Image | None
    cosine: float
    cosine_shuffled: float
    top1_match: bool | None
    top5_match: bool | None


OnFailure = Callable[[Job, str], None]
Score = Callable[[Features, float], float | None]
"""From a map and the mean cosine of its samples to a p-value, see `analysis.scope`."""


def find_images(paths: Sequence[Path], exclude: Path | None = None) -> list[tuple[str, Path]]:
    """Lists (image id, path) of files and, below folders, of all pictures.

    The id is the path relative to the given folder, or the name of a file that was given itself;
    outputs are named after it. Noise derives from its last part, the file name, so that a picture
    is the same alone and in a folder. A file that is named twice is taken once.

    Args:
        exclude: folder whose pictures are left out, i.e. the output.

    Raises:
        InputError: a path where nothing is, or a folder without pictures.
    """
    found: dict[Path, tuple[str, Path]] = {}
    for path in paths:
        if not path.exists():
            raise InputError(f"A picture or a folder must exist at {path}, but nothing is there.")
        files = [path]
        if path.is_dir():
            files = [path / name for name in list_pictures(path).names]
        for file in files:
            if exclude is None or exclude.resolve() not in file.resolve().parents:
                name = file.relative_to(path).as_posix() if path.is_dir() else file.name
                found.setdefault(file.resolve(), (_image_id(name), file))
    return list(found.values())


def make_jobs(images: Sequence[tuple[str, Path]], seed: int, n_samples: int) -> list[Job]:
    """Derives each sample's seed from (seed, file name, sample number) and names its output."""
    stems = output_stems([image_id for image_id, _ in images])
    return [
        Job(
            input=path,
            outputs=tuple(f"{stem}_{j}.png" for j in range(n_samples)),
            seeds=tuple(
                derive_seed(seed, PurePosixPath(image_id).name, j) for j in range(n_samples)
            ),
        )
        for (image_id, path), stem in zip(images, stems, strict=True)
    ]


def reconstruct(
    inverter: Inverter,
    jobs: Iterable[Job],
    batch_size: int,
    on_failure: OnFailure,
    score: Score | None = None,
) -> Iterator[Reconstruction]:
    """Yields the reconstructions of the jobs in order; an image that fails is reported instead.

    Metrics are taken on the 8-bit pictures, so that they can be had again from the files.

    Args:
        batch_size: samples per batch of the inverter, images per batch of the backbone.
        on_failure: called with the job and a sentence where a picture cannot be read, or where
            its features or samples are not finite.
        score: of each image's features.
    """
    if inverter.backbone is None:
        raise InputError("The inverter must have its backbone to read pictures, but has none.")
    readable = _read(jobs, max(inverter.backbone.input_size), on_failure)
    encoded = _encode(inverter.backbone, readable, batch_size, on_failure)
    samples = _sample(inverter, inverter.backbone, encoded, batch_size)
    for _, group in itertools.groupby(samples, key=lambda sample: sample.source):
        members = list(group)
        job = members[0].source.job
        if any(sample.picture is None for sample in members):
            on_failure(job, f"{job.input} gave samples with NaN values; use --dtype float32.")
        else:
            yield _joined(members, score)


def write_samples(done: Reconstruction, folder: Path) -> None:
    """Writes the samples as PNGs at their job's outputs below the folder."""
    for name, picture in zip(done.job.outputs, done.samples, strict=True):
        write_png(picture, folder / name)


def _read(
    jobs: Iterable[Job], size: int, on_failure: OnFailure
) -> Iterator[tuple[Job, Image.Image]]:
    for job in jobs:
        try:
            yield job, center_square(read_image(job.input), size)
        except InputError as error:
            on_failure(job, str(error))


@torch.no_grad()
def _encode(
    backbone: Backbone,
    pictures: Iterable[tuple[Job, Image.Image]],
    batch_size: int,
    on_failure: OnFailure,
) -> Iterator[_Encoded]:
    for batch in batched(pictures, batch_size):
        features, logits = _look(backbone, [original for _, original in batch])
        for i, (job, original) in enumerate(batch):
            if features[i].isfinite().all():
                yield _Encoded(job, original, features[i], None if logits is None else logits[i])
            else:
                on_failure(job, f"The features of {job.input} hold NaN or infinite values.")


def _sample(
    inverter: Inverter, backbone: Backbone, encoded: Iterable[_Encoded], batch_size: int
) -> Iterator[_Sample]:
    pairs = ((source, seed) for source in encoded for seed in source.job.seeds)
    for batch in batched(pairs, batch_size):
        sources, seeds = [source for source, _ in batch], [seed for _, seed in batch]
        features = torch.stack([source.features for source in sources])
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        images = inverter.invert(features, generator=generators)
        finite = images.isfinite().flatten(1).all(dim=1).tolist()
        pictures = to_pil(images.nan_to_num())
        metrics = _measure(backbone, sources, features, pictures, seeds)
        for source, picture, is_finite, values in zip(
            sources, pictures, finite, metrics, strict=True
        ):
            yield _Sample(source, picture if is_finite else None, *values)


@torch.no_grad()
def _measure(
    backbone: Backbone,
    sources: Sequence[_Encoded],
    features: Tensor,
    pictures: Sequence[Image.Image],
    seeds: Sequence[int],
) -> list[tuple[float, float, bool | None, bool | None]]:
    """Re-encodes the pictures; returns the four metrics of each, as `_Sample` has them."""
    seen, logits = _look(backbone, pictures)
    cosine = feature_cosine(features, seen).tolist()
    shuffled = shuffled_cosine(features, seen, [make_generator(s, "shuffle") for s in seeds])
    if logits is None:
        top1 = top5 = [None] * len(pictures)
    else:
        wanted = torch.stack([s.logits for s in sources if s.logits is not None])
        top1 = top_k_match(wanted, logits, 1).tolist()
        top5 = top_k_match(wanted, logits, min(5, logits.shape[1])).tolist()
    return list(zip(cosine, shuffled.tolist(), top1, top5, strict=True))


def _look(backbone: Backbone, pictures: Sequence[Image.Image]) -> tuple[Tensor, Tensor | None]:
    return backbone.features_and_logits(to_tensor(pictures).to(backbone.device))


def _joined(samples: Sequence[_Sample], score: Score | None) -> Reconstruction:
    cosine = [s.cosine for s in samples]
    features = samples[0].source.features[None]
    return Reconstruction(
        job=samples[0].source.job,
        original=samples[0].source.original,
        samples=[s.picture for s in samples if s.picture is not None],
        cosine=cosine,
        cosine_shuffled=[s.cosine_shuffled for s in samples],
        top1_match=[s.top1_match for s in samples],
        top5_match=[s.top5_match for s in samples],
        scope_p_value=None if score is None else score(features, fmean(cosine)),
    )


def _image_id(name: str) -> str:
    # One spelling of accents on every file system; bytes that are no UTF-8 stay distinct.
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return unicodedata.normalize("NFC", text)


def output_stems(ids: Sequence[str]) -> Iterator[str]:
    """Names outputs by id without suffix; where two would collide, with it, then with a number."""
    short = [PurePosixPath(image_id).with_suffix("").as_posix() for image_id in ids]
    count = Counter(stem.casefold() for stem in short)
    taken: set[str] = set()
    for image_id, stem in zip(ids, short, strict=True):
        stem = base = stem if count[stem.casefold()] == 1 else image_id
        number = 1
        while stem.casefold() in taken:
            number += 1
            stem = f"{base}-{number}"
        taken.add(stem.casefold())
        yield stem


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yields lists of `size`, the last one shorter."""
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
