"""A unit of images → reconstructions, nulls and ceilings → one row of figures per image."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from PIL import Image
from torch import Tensor

from featinv_diffusion.backbones.base import Backbone
from featinv_diffusion.data.crops import to_images
from featinv_diffusion.data.selection import Item
from featinv_diffusion.data.sets import ImageSet
from featinv_diffusion.errors import InputError
from featinv_diffusion.evaluation.baselines import OPTIMISE, Baseline
from featinv_diffusion.evaluation.views import (
    OWN,
    Columns,
    Natural,
    View,
    Views,
    compare_views,
    join_views,
    moments_of,
    take_views,
)
from featinv_diffusion.features import permute_cells
from featinv_diffusion.images import center_square, to_tensor
from featinv_diffusion.inverters.base import Inverter, LatentInverter
from featinv_diffusion.metrics.extractors import ImageFeatures
from featinv_diffusion.metrics.features import psnr, ssim
from featinv_diffusion.runs.sampling import (
    Pixels,
    advice_on_overflow,
    batched,
    decode,
    finite_rows,
    to_pixels,
)
from featinv_diffusion.seeds import make_generator
from featinv_diffusion.types import Images

OTHER_IMAGE, PERMUTED_CELLS, PRIOR_ONLY = NULLS = ("other_image", "permuted_cells", "prior_only")
VAE_ROUND_TRIP, RESIZED_ORIGINAL = CEILINGS = ("vae_round_trip", "resized_original")

MAP = "map"
"""The name of the vectors of whole maps, beside those of the extractors."""
N_NATURAL = 128
"""Images, the first of the selection, whose mean cell is taken from all maps."""
PREDICTED = "predicted_class"
"""The column with the top-1 class that the own backbone sees in the reconstruction."""

Failure = dict[str, str]


@dataclass
class Measured:
    """What is kept of a unit of images.

    Args:
        items: those that were measured; rows of everything below.
        digests: SHA-256 of the pixels of each original, at the resolution of the samples, or of
            its map, where maps are evaluated.
        columns: float64, NaN where a figure was not taken.
        failures: `id` and `error` of each image that could not be measured.
        partial_failures: `id`, `figure` and `error` of what could not be measured of others, e.g.
            because the sample of a null held NaN.
        pixels: the reconstructions.
        reconstructed, original: feature vectors `[n, d]` by extractor, for distances; under `MAP`
            those of whole maps.
        round_trip: vectors of whole maps of the autoencoder's round trip.
        advice: what to do about values that are not finite.
    """

    items: list[Item]
    digests: list[str] = field(default_factory=list)
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    partial_failures: list[Failure] = field(default_factory=list)
    pixels: Pixels | None = None
    reconstructed: dict[str, np.ndarray] = field(default_factory=dict)
    original: dict[str, np.ndarray] = field(default_factory=dict)
    round_trip: dict[str, np.ndarray] = field(default_factory=dict)
    advice: str = ""

    def put(self, prefix: str, rows: Sequence[int], columns: Columns) -> None:
        """Sets figures of some rows under prefixed names, and reports those that are NaN."""
        for name, values in columns.items():
            column = np.full(len(self.items), np.nan)
            column[list(rows)] = values.double().numpy()
            self.columns[prefix + name] = column
        for place, row in enumerate(rows):
            if missing := [n for n, values in columns.items() if not values[place].isfinite()]:
                self.miss(row, prefix.rstrip("_") or "reconstruction", missing)

    def miss(self, row: int, figure: str, names: Sequence[str]) -> None:
        """Reports what could not be measured of an image."""
        name = self.items[row].id
        error = (
            f"{name} has no {', '.join(names)} of {figure}: a picture or what a network sees in it "
            "holds NaN or infinite values. {self.advice}."
        )
        self.partial_failures.append({"id": name, "figure": figure, "error": error})


@dataclass(frozen=True, eq=False)
class _Batch:
    """Of given maps `originals` is None."""

    items: list[Item]
    views: Views
    originals: Pixels | None
    samples: Pixels


@dataclass(frozen=True, eq=False)
class Evaluator:
    """Measures images with models that are loaded once.

    Args:
        backbones: all that look at the pictures, by name; `OWN` is the inverter's.
        seed: of the permutation of cells.
        lpips: distance of each pair of images; None leaves it out.
        extractors: by name; their vectors of originals and reconstructions are kept for distances
            of distributions.
        class_of_label: from a label to the class of the own backbone; None where they are not
            known to correspond.
        natural: of each backbone, see `measure_natural`; without it centred figures are not taken.
        baselines: by name, made of every image.
        optimiser: the training-free inverter, which makes the images named by `optimised`.
    """

    inverter: Inverter
    backbones: Mapping[str, Backbone]
    images: ImageSet
    batch_size: int
    seed: int = 0
    lpips: Callable[[Images, Images], Tensor] | None = None
    extractors: Mapping[str, ImageFeatures] = field(default_factory=dict)
    class_of_label: Sequence[int] | None = None
    natural: Mapping[str, Natural] = field(default_factory=dict)
    baselines: Mapping[str, Baseline] = field(default_factory=dict)
    optimiser: Baseline | None = None
    optimised: frozenset[str] = frozenset()

    @property
    def own(self) -> Backbone:
        """The inverter's backbone."""
        return self.backbones[OWN]

    @property
    def image_size(self) -> int:
        """The side in pixels of the samples where the inverter knows it, else of its input."""
        if isinstance(self.inverter, LatentInverter):
            return self.inverter.image_size[0]
        return self.own.input_size[0]

    @torch.no_grad()
    def measure_natural(self, items: Sequence[Item]) -> dict[str, Natural]:
        """Returns what the maps of the first images have in common, as each backbone sees them.

        The first of a selection are spread evenly over classes. Empty where none can be read.
        """
        moments: dict[str, list[Tensor]] = {}
        for _, views, _ in self._encode(items[:N_NATURAL], []):
            for name, view in views.items():
                moments.setdefault(name, []).append(moments_of(view.features))
        joined = {name: torch.cat(parts) for name, parts in moments.items()}
        return {name: Natural.of(rows) for name, rows in joined.items() if len(rows)}

    @torch.no_grad()
    def vectors_of(self, items: Sequence[Item]) -> Iterator[tuple[Item, Tensor]]:
        """Yields images that can be read with the vector of the map of each."""
        for members, views, _ in self._encode(items, []):
            vectors = self.natural[OWN].vectors(views[OWN].features)
            yield from zip(members, vectors, strict=True)

    @torch.no_grad()
    def run(self, items: Sequence[Item]) -> Measured:
        """Measures the images; one that fails is reported in the result instead."""
        failures: list[Failure] = []
        batches = list(self._reconstruct(items, failures))
        result = Measured(
            [i for b in batches for i in b.items],
            failures=failures,
            advice=advice_on_overflow(self.inverter),
        )
        if not batches:
            return result
        views = join_views([b.views for b in batches])
        pixels = [b.originals for b in batches if b.originals is not None]
        originals = torch.cat(pixels) if pixels else None
        given = views[OWN].features.float().cpu() if originals is None else originals
        result.digests = [sha256(one.numpy().tobytes()).hexdigest() for one in given]
        result.pixels = samples = torch.cat([b.samples for b in batches])
        seen = self._view(samples)
        everyone = range(len(result.items))
        result.put("", everyone, self._compare(views, originals, seen, samples))
        result.columns.update(self._label_columns(result, views[OWN], seen[OWN]))
        if partners := find_partners([item.label for item in result.items]):
            others = self._compare(views, originals, take_views(seen, partners), samples[partners])
            result.put(f"{OTHER_IMAGE}_", everyone, others)
        if originals is not None:
            self._put_ceilings(result, views, originals)
        self._put_sampled_nulls(result, views, originals)
        self._put_baselines(result, views, originals)
        if OWN in self.natural:
            for side, view in ((result.original, views), (result.reconstructed, seen)):
                side[MAP] = self._vectors(view)
        if originals is None:
            return result
        for name, extractor in self.extractors.items():
            result.reconstructed[name] = self._extract(extractor, samples)
            result.original[name] = self._extract(extractor, originals)
            for side in (result.reconstructed, result.original):
                for row in np.flatnonzero(~np.isfinite(side[name]).all(axis=1)).tolist():
                    result.miss(row, name, ["vector for the distance"])
        return result

    # ---- reconstructions -----------------------------------------------------------------------

    def _reconstruct(self, items: Sequence[Item], failures: list[Failure]) -> Iterator[_Batch]:
        for members, views, pictures in self._encode(items, failures):
            finite = views[OWN].is_finite
            features = views[OWN].features.nan_to_num(posinf=0, neginf=0)
            advice = advice_on_overflow(self.inverter)
            samples, sampled = decode(self.inverter, features, noise_of(members))
            for i, item in enumerate(members):
                if not finite[i]:
                    _fail(failures, item, "its features or class scores are not finite")
                elif not sampled[i]:
                    _fail(failures, item, f"its sample holds NaN values. {advice}")
            kept = [i for i, fine in enumerate((finite & sampled).tolist()) if fine]
            if kept:
                originals = None
                if pictures is not None:
                    squares = [center_square(pictures[i], samples.shape[-1]) for i in kept]
                    originals = to_pixels(to_tensor(squares))
                yield _Batch(
                    [members[i] for i in kept],
                    take_views(views, kept),
                    originals,
                    samples[kept],
                )

    def _encode(
        self, items: Sequence[Item], failures: list[Failure]
    ) -> Iterator[tuple[list[Item], Views, list[Image.Image] | None]]:
        """Yields items a batch at a time, with what is seen in them and their pictures."""
        if (maps := self.images.maps) is not None:
            for members in batched(items, self.batch_size):
                given: Any = maps[[item.index for item in members]]
                scores = [source.logits for source in given.sources if source.logits is not None]
                logits = torch.stack(scores) if len(scores) == len(given) else None
                view = View(given.as_subclass(Tensor), logits)
                yield members, {OWN: view.to(self.own.device)}, None
            return
        for batch in batched(self._read(items, failures), self.batch_size):
            pictures = [picture for _, picture in batch]
            yield [item for item, _ in batch], self._view_pictures(pictures), pictures

    def _read(
        self, items: Sequence[Item], failures: list[Failure]
    ) -> Iterator[tuple[Item, Image.Image]]:
        for item in items:
            try:
                yield item, self.images.read(item.index)
            except InputError as error:
                failures.append({"id": item.id, "error": str(error)})

    def _view_pictures(self, pictures: Sequence[Image.Image]) -> Views:
        """Shows each backbone the centre squares at the size that it takes."""
        views: Views = {}
        for name, backbone in self.backbones.items():
            squares = [center_square(picture, max(backbone.picture_size)) for picture in pictures]
            images = to_tensor(squares).to(backbone.device)
            views[name] = View(*backbone.features_and_logits(images))
        return views

    def _view(self, pixels: Pixels) -> Views:
        """Shows the pictures to each backbone, a batch at a time."""
        parts: list[Views] = []
        for rows in batched(range(len(pixels)), self.batch_size):
            parts.append({})
            for name, backbone in self.backbones.items():
                images = to_images(pixels[rows].to(backbone.device))
                parts[-1][name] = View(*backbone.features_and_logits(images))
        return join_views(parts)

    # ---- comparisons ---------------------------------------------------------------------------

    def _compare(
        self, views: Views, originals: Pixels | None, seen: Views, pixels: Pixels
    ) -> Columns:
        """Compares row by row, a batch at a time; `views` are those of the originals."""
        parts = [
            compare_views(take_views(views, rows), take_views(seen, rows), self.natural)
            | ({} if originals is None else self._compare_pixels(originals[rows], pixels[rows]))
            for rows in batched(range(len(pixels)), self.batch_size)
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _compare_pixels(self, originals: Pixels, pixels: Pixels) -> Columns:
        device = self.own.device
        a, b = to_images(originals.to(device)), to_images(pixels.to(device))
        columns = {"psnr": psnr(b, a), "ssim": ssim(b, a)}
        if self.lpips is not None:
            columns["lpips"] = self.lpips(b, a)
        return {name: values.cpu() for name, values in columns.items()}

    def _put_ceilings(self, result: Measured, views: Views, originals: Pixels) -> None:
        everyone = range(len(result.items))
        columns = compare_views(views, self._view(originals), self.natural)
        result.put(f"{RESIZED_ORIGINAL}_", everyone, columns)
        if isinstance(inverter := self.inverter, LatentInverter):
            trips = (
                inverter.round_trip(to_images(originals[rows]))
                for rows in batched(everyone, self.batch_size)
            )
            made = ((to_pixels(images), finite_rows(images)) for images in trips)
            self._put_made(result, VAE_ROUND_TRIP, everyone, views, originals, made)

    def _put_sampled_nulls(self, result: Measured, views: Views, originals: Pixels | None) -> None:
        """Measures the nulls that cost a sample each.

        They share the noise, the originals and all that was seen in these with the
        reconstruction. The way of a sample through its steps is its own after the first one.
        """
        rows = [i for i, item in enumerate(result.items) if item.has_null]
        if not rows:
            return
        features = views[OWN].features
        batches = [
            (part, [result.items[i] for i in part]) for part in batched(rows, self.batch_size)
        ]
        permuted = (
            decode(
                self.inverter,
                permute_cells(features[part], self._permutation_of(items)),
                noise_of(items),
            )
            for part, items in batches
        )
        self._put_made(result, PERMUTED_CELLS, rows, views, originals, permuted)
        if isinstance(inverter := self.inverter, LatentInverter):
            priors = (
                inverter.sample_prior(len(items), generator=noise_of(items)) for _, items in batches
            )
            made = ((to_pixels(images), finite_rows(images)) for images in priors)
            self._put_made(result, PRIOR_ONLY, rows, views, originals, made)

    def _put_baselines(self, result: Measured, views: Views, originals: Pixels | None) -> None:
        """Measures what other methods make of the same features."""
        everyone = list(range(len(result.items)))
        todo = [(name, baseline, everyone) for name, baseline in self.baselines.items()]
        chosen = [i for i in everyone if result.items[i].id in self.optimised]
        if self.optimiser is not None and chosen:
            todo.append((OPTIMISE, self.optimiser, chosen))
        features = views[OWN].features
        for name, baseline, rows in todo:
            made = (
                baseline(
                    features[part],
                    noise_of(result.items[i] for i in part),
                    [result.digests[i] for i in part],
                )
                for part in batched(rows, self.batch_size)
            )
            self._put_made(result, name, rows, views, originals, made)

    def _vectors(self, views: Views) -> np.ndarray:
        """Returns the vectors of the maps that the own backbone saw."""
        return self.natural[OWN].vectors(views[OWN].features).numpy()

    def _put_made(
        self,
        result: Measured,
        kind: str,
        rows: Sequence[int],
        views: Views,
        originals: Pixels | None,
        made: Iterable[tuple[Pixels, Bool[Tensor, " b"]]],
    ) -> None:
        """Compares pictures that were made for some rows; those of NaN have no figures."""
        pixels, finite = (torch.cat(part) for part in zip(*made, strict=True))
        index, seen = list(rows), self._view(pixels)
        columns = self._compare(
            take_views(views, index),
            None if originals is None else originals[index],
            seen,
            pixels,
        )
        if kind == VAE_ROUND_TRIP and OWN in self.natural:
            result.round_trip[MAP] = self._vectors(seen)
        broken = ~finite
        columns = {name: values.masked_fill(broken, torch.nan) for name, values in columns.items()}
        result.put(f"{kind}_", rows, columns)

    def _permutation_of(self, items: Sequence[Item]) -> list[torch.Generator]:
        return [make_generator(self.seed, item.id, PERMUTED_CELLS) for item in items]

    def _label_columns(self, result: Measured, own: View, seen: View) -> dict[str, np.ndarray]:
        """Returns the classes of original and reconstruction, and whether they are the label's."""
        if own.logits is None or seen.logits is None:
            return {}
        original = own.logits.argmax(dim=1).double().cpu()
        again = seen.logits.argmax(dim=1).double().cpu()
        again = again.masked_fill(~seen.is_finite, torch.nan)
        columns = {f"original_{PREDICTED}": original, PREDICTED: again}
        if self.class_of_label is not None and result.items[0].label is not None:
            labels = [self.class_of_label[item.label or 0] for item in result.items]
            wanted = torch.tensor(labels, dtype=torch.float64)
            for side, predicted in (("original", original), ("reconstruction", again)):
                correct = (predicted == wanted).double()
                columns[f"label_correct_{side}"] = correct.masked_fill(predicted.isnan(), torch.nan)
        return {name: values.numpy() for name, values in columns.items()}

    def _extract(self, extractor: ImageFeatures, pixels: Pixels) -> np.ndarray:
        parts = [
            extractor(to_images(pixels[rows].to(self.own.device))).float().cpu()
            for rows in batched(range(len(pixels)), self.batch_size)
        ]
        return torch.cat(parts).numpy()


def find_partners(labels: Sequence[int | None]) -> list[int]:
    """Returns another image for each, by the rotation that pairs the fewest of one class.

    Empty where there is one image alone.
    """
    n = len(labels)
    best: tuple[int, int] | None = None
    for shift in range(1, n):
        pairs = ((labels[i], labels[(i + shift) % n]) for i in range(n))
        n_same = sum(a is not None and a == b for a, b in pairs)
        if best is None or n_same < best[0]:
            best = n_same, shift
        if n_same == 0:
            break
    return [] if best is None else [(i + best[1]) % n for i in range(n)]


def noise_of(items: Iterable[Item]) -> list[torch.Generator]:
    """Returns the generator of each image's noise, from its beginning."""
    return [torch.Generator().manual_seed(item.seed) for item in items]


def _fail(failures: list[Failure], item: Item, reason: str) -> None:
    failures.append({"id": item.id, "error": f"{item.id} cannot be measured: {reason}."})
