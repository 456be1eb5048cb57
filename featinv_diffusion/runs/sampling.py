"""Pictures → features → samples → metrics: the one loop that every command and study samples with.

What a sample is, its noise and its place in a batch, depends on the list of maps and the batch
size. Metrics are taken on the 8-bit pictures, so that they can be had again from the files.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import PurePosixPath
from statistics import fmean
from typing import TypeVar

import torch
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from featinv_diffusion.backbones import Backbone
from featinv_diffusion.data.crops import to_images
from featinv_diffusion.data.sets import ImageSet, read_location
from featinv_diffusion.errors import InputError
from featinv_diffusion.features.maps import is_maps_file, load_maps
from featinv_diffusion.images import center_square, to_pil, to_tensor
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.metrics import feature_cosine, shuffled_cosine, top_k_match
from featinv_diffusion.metrics.certainty import Certainty
from featinv_diffusion.seeds import derive_seed, make_generator
from featinv_diffusion.types import FeatureMaps, Features, Images, Source

T = TypeVar("T")

Pixels = UInt8[Tensor, "b 3 height width"]
"""RGB as a PNG holds it."""
OnFailure = Callable[["Job", str], None]
Score = Callable[[Features, float], float | None]
"""From a map and the mean cosine of its samples to a p-value, see `runs.scope`."""


# ---- The loop ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class SampleBatch:
    """Samples of feature maps, one of each.

    Args:
        maps: what was inverted.
        images: in [0, 1], rounded to 8 bits as a PNG holds them; float32 on the CPU.
        features: what the backbone sees in them.
        logits: its class scores of them; None without a head.
        finite: whether the inverter gave numbers; of a sample that is not, the rest means nothing.
    """

    maps: Features
    images: Images
    features: Features
    logits: Float[Tensor, "b k"] | None
    finite: list[bool]

    @property
    def cosine(self) -> Float[Tensor, "b h w"]:
        """Cosine of each cell to the same cell of the map that was inverted."""
        return cell_cosine(self.maps, self.features)


@torch.no_grad()
def sample_maps(
    inverter: Inverter, maps: Iterable[tuple[Float[Tensor, "c h w"], int]], batch_size: int
) -> Iterator[SampleBatch]:
    """Yields a sample of each map with the noise of its seed, in batches.

    Raises:
        InputError: an inverter without its backbone, or maps that do not fit it.
    """
    backbone = inverter.require_backbone()
    for batch in batched(maps, batch_size):
        features = torch.stack([one.as_subclass(Tensor) for one, _ in batch])
        generators = [torch.Generator().manual_seed(seed) for _, seed in batch]
        pixels, finite = decode(inverter, features, generators)
        # The memory layout of pictures that are read from files; it decides the last bits.
        images = to_images(pixels).contiguous(memory_format=torch.channels_last)
        seen, logits = backbone.features_and_logits(images.to(backbone.device))
        yield SampleBatch(features, images, seen, logits, finite.tolist())


def decode(
    inverter: Inverter, features: Features, generators: Sequence[torch.Generator]
) -> tuple[Pixels, Bool[Tensor, " b"]]:
    """Returns one 8-bit picture per map, and whether the inverter gave numbers for it.

    Raises:
        InputError: maps that do not fit the inverter.
    """
    images = inverter.invert(features, generator=generators)
    return to_pixels(images), finite_rows(images)


def to_pixels(images: Images) -> Pixels:
    """Rounds to 8 bits on the CPU, as a PNG does; values beyond [0, 1] are clamped.

    NaN become 0, so look at `finite_rows` first: a sample of NaN is no black picture.
    """
    return (images.float().nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def finite_rows(values: Tensor) -> Bool[Tensor, " b"]:
    """Returns whether each row of a batch holds neither NaN nor infinite values; on the CPU."""
    return values.flatten(1).isfinite().all(dim=1).cpu()


def sample_map(
    inverter: Inverter, features: Features, seeds: Sequence[int], batch_size: int
) -> Iterator[SampleBatch]:
    """Yields samples of one map, one per seed and in batches, so that any number fits in memory.

    Batches are those that `featinv sample` makes of a single picture, so an edit that changes
    nothing gives its very samples, bit for bit.

    Args:
        features: `[1, c, h, w]`.

    Raises:
        InputError: not one map, no seed, or samples that are not finite.
    """
    if len(features) != 1 or not seeds:
        raise InputError(
            "Samples need one feature map and at least one seed, "
            f"got {len(features)} maps and {len(seeds)} seeds."
        )
    for batch in sample_maps(inverter, ((features[0], seed) for seed in seeds), batch_size):
        if not all(batch.finite):
            raise InputError(not_finite("The features", inverter))
        # The map itself, whose memory layout decides the last bits of cosines.
        yield replace(batch, maps=features.as_subclass(Tensor).expand_as(batch.maps))


def sample_all(
    inverter: Inverter, features: Features, seeds: Sequence[int], batch_size: int
) -> SampleBatch:
    """Returns the samples of one map, one per seed, all at once; see `sample_map`."""
    batches = list(sample_map(inverter, features, seeds, batch_size))
    logits = [batch.logits for batch in batches if batch.logits is not None]
    return SampleBatch(
        features.as_subclass(Tensor).expand(len(seeds), -1, -1, -1),
        torch.cat([batch.images for batch in batches]),
        torch.cat([batch.features for batch in batches]),
        torch.cat(logits) if logits else None,
        [finite for batch in batches for finite in batch.finite],
    )


@torch.no_grad()
def sample_each(inverter: Inverter, features: Features, seeds: Sequence[int]) -> Images:
    """Returns one sample of each map, with the noise of its own seed and rounded to 8 bits.

    Raises:
        InputError: samples that are not finite.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    pixels, finite = decode(inverter, features, generators)
    if not bool(finite.all()):
        raise InputError(not_finite("The features", inverter))
    return to_images(pixels)


def not_finite(what: str, inverter: Inverter) -> str:
    """Returns the sentence about samples that hold no numbers, with advice that fits."""
    return f"{what} gave samples with NaN values. {advice_on_overflow(inverter)}."


def advice_on_overflow(inverter: Inverter) -> str:
    """Returns what to do about values that are not finite."""
    half = inverter.settings is not None and inverter.settings.dtype != "float32"
    return "Use --dtype float32" if half else "Look for overflow in the weights or the features"


def cell_cosine(features: Float[Tensor, "#b c h w"], seen: Features) -> Float[Tensor, "b h w"]:
    """Returns the cosine of each cell of the maps seen to the same cell of `features`."""
    return F.cosine_similarity(features.float(), seen.float(), dim=1)


def to_list(values: Float[Tensor, ...]) -> list:
    """Returns plain numbers, nested as the tensor is."""
    return values.double().cpu().tolist()


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yields lists of `size`, the last one shorter."""
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


# ---- Many pictures, image by image ---------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One image to reconstruct: where it lies, where its samples go, and the seed of each.

    Args:
        input: location of the picture; empty where it was given in memory.
        outputs: paths relative to the output folder, with forward slashes.
        read: decodes the picture; by default from its location.
    """

    input: str
    outputs: tuple[str, ...]
    seeds: tuple[int, ...]
    read: Callable[[], Image.Image] | None = field(default=None, compare=False, repr=False)

    @property
    def name(self) -> str:
        """The file name of the picture, or that of its outputs."""
        return PurePosixPath(self.input).name or self.outputs[0].rpartition("_")[0]


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """The samples of one image; every list has one value per sample.

    Args:
        original: the square that the backbone saw; None where features were given without it.
        features: what the backbone sees in the samples, `[n, c, h, w]`.
        top1_match, top5_match: None where the backbone has no head.
        scope_p_value: of the image's features; None where it was not asked for or is not known.
        certainty: what the features determine; None where it was not asked for.
    """

    job: Job
    original: Image.Image | None
    samples: list[Image.Image]
    features: Features
    cosine: list[float]
    cosine_shuffled: list[float]
    top1_match: list[bool | None]
    top5_match: list[bool | None]
    scope_p_value: float | None = None
    certainty: Certainty | None = None


@dataclass(frozen=True, eq=False)
class _Encoded:
    job: Job
    source: Source
    features: Float[Tensor, "c h w"]


@dataclass(frozen=True, eq=False)
class _Sample:
    encoded: _Encoded
    picture: Image.Image | None
    features: Float[Tensor, "c h w"]
    cosine: float
    cosine_shuffled: float
    top1_match: bool | None
    top5_match: bool | None


def make_jobs(images: ImageSet, seed: int, n_samples: int) -> list[Job]:
    """Derives each sample's seed from (seed, file name, sample number) and names its output."""
    return [
        Job(
            input=images.locations[i],
            outputs=tuple(f"{stem}_{j}.png" for j in range(n_samples)),
            seeds=tuple(derive_seed(seed, PurePosixPath(name).name, j) for j in range(n_samples)),
            read=partial(images.read, i),
        )
        for i, (name, stem) in enumerate(zip(images.ids, output_stems(images.ids), strict=True))
    ]


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


def reconstruct(
    inverter: Inverter,
    jobs: Iterable[Job],
    batch_size: int,
    on_failure: OnFailure,
    score: Score | None = None,
) -> Iterator[Reconstruction]:
    """Yields the reconstructions of the jobs in order; an image that fails is reported instead.

    The whole is a chain of generators, so any number of pictures runs in the memory of one batch.

    Args:
        batch_size: samples per batch of the inverter.
        on_failure: called with the job and a sentence where a picture cannot be read, or where
            its features or samples are not finite.
        score: of each image's features.
    """
    readable = _read(jobs, max(inverter.require_backbone().picture_size), on_failure)
    encoded = _encode(inverter.require_backbone(), readable, on_failure)
    return _join(inverter, encoded, batch_size, on_failure, score)


def reconstruct_maps(
    inverter: Inverter,
    maps: FeatureMaps,
    jobs: Sequence[Job],
    batch_size: int,
    on_failure: OnFailure,
    score: Score | None = None,
) -> Iterator[Reconstruction]:
    """As `reconstruct`, of feature maps that are at hand, one per job."""
    encoded = (
        _Encoded(job, source, one)
        for job, source, one in zip(jobs, maps.sources, maps.as_subclass(Tensor), strict=True)
    )
    return _join(inverter, encoded, batch_size, on_failure, score)


def _read(
    jobs: Iterable[Job], size: int, on_failure: OnFailure
) -> Iterator[tuple[Job, Image.Image]]:
    for job in jobs:
        try:
            picture = read_location(job.input) if job.read is None else job.read()
            yield job, center_square(picture, size)
        except InputError as error:
            on_failure(job, str(error))


@torch.no_grad()
def _encode(
    backbone: Backbone, pictures: Iterable[tuple[Job, Image.Image]], on_failure: OnFailure
) -> Iterator[_Encoded]:
    """Encodes one picture at a time, so that no bit depends on what stands beside it."""
    for job, square in pictures:
        features, logits = backbone.features_and_logits(to_tensor(square).to(backbone.device))
        if features.isfinite().all():
            scores = None if logits is None else logits[0]
            yield _Encoded(job, Source(job.name, square=square, logits=scores), features[0])
        else:
            on_failure(job, f"The features of {job.input} hold NaN or infinite values.")


def encode_pictures(backbone: Backbone, images: ImageSet) -> FeatureMaps:
    """Returns the maps that `featinv sample` would take from pictures, with their names.

    Raises:
        InputError: a picture that cannot be read, or features that are not finite.
    """
    return encode_jobs(backbone, make_jobs(images, 0, 1))


def encode_jobs(backbone: Backbone, jobs: Iterable[Job]) -> FeatureMaps:
    """As `encode_pictures`, of the pictures of jobs."""

    def fail(job: Job, error: str) -> None:
        raise InputError(error)

    found = list(_encode(backbone, _read(jobs, max(backbone.picture_size), fail), fail))
    sources = [replace(one.source, location=one.job.input) for one in found]
    return FeatureMaps.of(torch.stack([one.features for one in found]), sources)


def _join(
    inverter: Inverter,
    encoded: Iterable[_Encoded],
    batch_size: int,
    on_failure: OnFailure,
    score: Score | None,
) -> Iterator[Reconstruction]:
    samples = _sample(inverter, encoded, batch_size)
    for _, group in itertools.groupby(samples, key=lambda sample: sample.encoded):
        members = list(group)
        job = members[0].encoded.job
        if any(sample.picture is None for sample in members):
            on_failure(job, not_finite(job.input or job.name, inverter))
        else:
            yield _joined(members, score)


@torch.no_grad()
def _sample(inverter: Inverter, encoded: Iterable[_Encoded], batch_size: int) -> Iterator[_Sample]:
    todo, again = itertools.tee((one, seed) for one in encoded for seed in one.job.seeds)
    batches = sample_maps(inverter, ((one.features, seed) for one, seed in todo), batch_size)
    for batch, pairs in zip(batches, batched(again, batch_size), strict=True):
        sources = [one.source for one, _ in pairs]
        cosine = feature_cosine(batch.maps, batch.features).tolist()
        noise = [make_generator(seed, "shuffle") for _, seed in pairs]
        shuffled = shuffled_cosine(batch.maps, batch.features, noise).tolist()
        top1, top5 = (_matches(sources, batch.logits, k) for k in (1, 5))
        pictures = to_pil(batch.images)
        for i, (one, _) in enumerate(pairs):
            yield _Sample(
                one,
                pictures[i] if batch.finite[i] else None,
                batch.features[i],
                cosine[i],
                shuffled[i],
                top1[i],
                top5[i],
            )


def _matches(
    sources: Sequence[Source], logits: Float[Tensor, "b k"] | None, k: int
) -> list[bool | None]:
    """Whether the original's class is among the k of each sample; None where it is not known."""
    wanted = [source.logits for source in sources if source.logits is not None]
    if logits is None or len(wanted) < len(sources):
        return [None] * len(sources)
    return top_k_match(torch.stack(wanted), logits, min(k, logits.shape[1])).tolist()


def _joined(samples: Sequence[_Sample], score: Score | None) -> Reconstruction:
    encoded, cosine = samples[0].encoded, [s.cosine for s in samples]
    return Reconstruction(
        job=encoded.job,
        original=encoded.source.square,
        samples=[s.picture for s in samples if s.picture is not None],
        features=torch.stack([s.features for s in samples]),
        cosine=cosine,
        cosine_shuffled=[s.cosine_shuffled for s in samples],
        top1_match=[s.top1_match for s in samples],
        top5_match=[s.top5_match for s in samples],
        scope_p_value=None if score is None else score(encoded.features[None], fmean(cosine)),
    )


# ---- One picture or map as the studies take it ---------------------------------------------------


def read_maps(
    inverter: Inverter, features: object, names: Sequence[str] | None = None
) -> FeatureMaps:
    """Returns feature maps of whatever a user gives: maps, or pictures that are encoded first.

    Args:
        features: `FeatureMaps`, a tensor or array of the shape of the inverter's features
            (`[b, c, h, w]` or `[c, h, w]`), the path of a file of maps, or anything that
            `Inverter.encode` takes.
        names: what the noise of each map depends on, as the file name does of a picture; maps
            without names share their noise.

    Raises:
        InputError: neither, or not one name per map.
    """
    if not isinstance(features, FeatureMaps):
        features = _as_maps(inverter, features)
    if names is not None:
        if len(names) != len(features):
            raise InputError(
                f"There must be one name per map, got {len(names)} names and {len(features)} maps."
            )
        sources = zip(features.sources, names, strict=True)
        features = FeatureMaps.of(features, [replace(s, name=name) for s, name in sources])
    inverter.spec.check_features(features)
    return features


def _as_maps(inverter: Inverter, given: object) -> FeatureMaps:
    if is_maps_file(given):
        return load_maps(given, inverter.spec)  # pyright: ignore[reportArgumentType]
    shape = getattr(given, "shape", None)
    if shape is not None and tuple(shape[-3:]) == (inverter.spec.channels, *inverter.spec.grid):
        tensor = torch.as_tensor(given)
        maps = tensor[None] if tensor.ndim == 3 else tensor
        return FeatureMaps.of(maps.float(), [Source("")] * len(maps))
    return inverter.encode(given)  # pyright: ignore[reportArgumentType]


def seeds_of(maps: FeatureMaps, seed: int, n_samples: int) -> list[int]:
    """Returns the seeds that `featinv sample` derives for the picture of one map.

    Raises:
        InputError: more maps than one.
    """
    if len(maps) != 1:
        raise InputError(f"One picture or feature map is needed here, got {len(maps)}.")
    return [derive_seed(seed, maps.sources[0].name, j) for j in range(n_samples)]
