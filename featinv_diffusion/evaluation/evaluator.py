"""A shard of images → reconstructions, nulls and ceilings → one row of figures per image."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from PIL import Image
from torch import Tensor

from featinv_diffusion.backbones.base import Backbone
from featinv_diffusion.data.crops import to_images
from featinv_diffusion.data.selection import Item
from featinv_diffusion.data.sets import ImageSet
from featinv_diffusion.errors import InputError
from featinv_diffusion.features import permute_cells
from featinv_diffusion.images import center_square, to_tensor
from featinv_diffusion.inverters.base import Inverter, LatentInverter
from featinv_diffusion.metrics import feature_cosine, top_k_match
from featinv_diffusion.metrics.extractors import ImageFeatures
from featinv_diffusion.metrics.features import psnr, ssim
from featinv_diffusion.runs.sampling import batched
from featinv_diffusion.seeds import make_generator
from featinv_diffusion.types import Features, Images

# ---- Who looks at the pictures ----

Pixels = UInt8[Tensor, "b 3 height width"]
Columns = dict[str, Tensor]
"""One value per image under each name."""

OWN = ""
"""The name of the inverter's own backbone among those that look."""

PREDICTED = "predicted_class"
"""The column with the top-1 class that the own backbone sees in the reconstruction."""


@dataclass(frozen=True, eq=False)
class View:
    """What a backbone sees; `logits` is None where it has no head."""

    features: Features
    logits: Tensor | None

    @property
    def is_finite(self) -> Bool[Tensor, " b"]:
        """Whether features and class scores of each picture are finite."""
        finite = finite_rows(self.features)
        return finite if self.logits is None else finite & finite_rows(self.logits)


Views = dict[str, View]


@dataclass(frozen=True, eq=False)
class Observers:
    """All that look at the pictures.

    Args:
        backbones: by name; `OWN` is the inverter's.
        lpips: distance of each pair of images; None where it is left out.
    """

    backbones: Mapping[str, Backbone]
    lpips: Callable[[Images, Images], Tensor] | None = None

    @property
    def own(self) -> Backbone:
        return self.backbones[OWN]

    @torch.no_grad()
    def view_originals(self, pictures: Sequence[Image.Image]) -> Views:
        """Shows each backbone the centre squares at the size that it takes."""
        return {
            name: View(*backbone.features_and_logits(self._squares(backbone, pictures)))
            for name, backbone in self.backbones.items()
        }

    @torch.no_grad()
    def view_pixels(self, pixels: Pixels) -> Views:
        """Shows the pictures to each backbone."""
        return {
            name: View(*backbone.features_and_logits(to_images(pixels.to(backbone.device))))
            for name, backbone in self.backbones.items()
        }

    @torch.no_grad()
    def compare_views(self, originals: Views, seen: Views) -> Columns:
        """Compares what the backbones saw; NaN where one of the two views holds such values."""
        columns: Columns = {}
        for name in self.backbones:
            prefix = f"evaluated_by_{name}_" if name != OWN else ""
            for metric, values in _agreement(originals[name], seen[name]).items():
                columns[prefix + metric] = values
        return columns

    @torch.no_grad()
    def compare_pixels(self, originals: Pixels, pixels: Pixels) -> Columns:
        """Compares pictures of one size."""
        device = self.own.device
        a, b = to_images(originals.to(device)), to_images(pixels.to(device))
        columns = {"psnr": psnr(b, a), "ssim": ssim(b, a)}
        if self.lpips is not None:
            columns["lpips"] = self.lpips(b, a)
        return {name: values.cpu() for name, values in columns.items()}

    def _squares(self, backbone: Backbone, pictures: Sequence[Image.Image]) -> Images:
        side = max(backbone.input_size)
        return to_tensor([center_square(p, side) for p in pictures]).to(backbone.device)


def to_pixels(images: Images) -> Pixels:
    """Rounds to 8 bits, as a PNG does; values beyond [0, 1] are clamped, NaN become 0.

    So look at `finite_rows` first: a sample of NaN is no black picture.
    """
    return (images.float().nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def finite_rows(values: Tensor) -> Bool[Tensor, " b"]:
    """Whether each row of a batch holds neither NaN nor infinite values; on the CPU."""
    return values.flatten(1).isfinite().all(dim=1).cpu()


def join_views(parts: Sequence[Views]) -> Views:
    """Joins the views of batches."""
    return {name: _join([part[name] for part in parts]) for name in parts[0]}


def take_views(views: Views, rows: Sequence[int]) -> Views:
    """Returns the views of some images."""
    index = list(rows)
    return {
        name: View(v.features[index], None if v.logits is None else v.logits[index])
        for name, v in views.items()
    }


def _agreement(original: View, seen: View) -> Columns:
    columns = {"cosine": feature_cosine(original.features, seen.features)}
    if original.logits is not None and seen.logits is not None:
        n_classes = seen.logits.shape[1]
        for k in (1, 5):
            match = top_k_match(original.logits, seen.logits, min(k, n_classes))
            columns[f"top{k}_match"] = match.float()
    finite = original.is_finite & seen.is_finite
    return {
        name: values.float().cpu().masked_fill(~finite, torch.nan)
        for name, values in columns.items()
    }


def _join(views: Sequence[View]) -> View:
    logits = [view.logits for view in views if view.logits is not None]
    return View(torch.cat([v.features for v in views]), torch.cat(logits) if logits else None)


# ---- What is kept of a shard: figures, vectors, and what could not be measured -------------------


@dataclass
class ShardResult:
    """What is kept of a shard.

    Args:
        items: those that were measured; rows of everything below.
        digests: SHA-256 of the pixels of each original, at the resolution of the samples.
        columns: float64, NaN where a figure was not taken.
        failures: `id` and `error` of each image that could not be measured.
        partial_failures: `id`, `figure` and `error` of what could not be measured of others, e.g.
            because the sample of a null held NaN.
        reconstructed, original: feature vectors `[n, d]` by extractor, for distances.
    """

    items: list[Item]
    digests: list[str] = field(default_factory=list)
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    failures: list[dict[str, str]] = field(default_factory=list)
    partial_failures: list[dict[str, str]] = field(default_factory=list)
    pixels: Pixels | None = None
    reconstructed: dict[str, np.ndarray] = field(default_factory=dict)
    original: dict[str, np.ndarray] = field(default_factory=dict)

    def put(self, prefix: str, rows: Sequence[int], columns: Columns) -> None:
        """Sets figures of some rows under prefixed names; those that are NaN are reported."""
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
            "holds NaN or infinite values; use --dtype float32."
        )
        self.partial_failures.append({"id": name, "figure": figure, "error": error})


T = TypeVar("T")
OTHER_IMAGE, PERMUTED_CELLS, PRIOR_ONLY = NULLS = ("other_image", "permuted_cells", "prior_only")
VAE_ROUND_TRIP, RESIZED_ORIGINAL = CEILINGS = ("vae_round_trip", "resized_original")


@dataclass(frozen=True, eq=False)
class _Batch:
    items: list[Item]
    views: Views
    originals: Pixels
    samples: Pixels


@dataclass(frozen=True, eq=False)
class Evaluator:
    """Measures images with models that are loaded once.

    Args:
        extractors: by name; their vectors of originals and reconstructions are kept for distances
            of distributions.
        seed: of the permutation of cells.
        class_of_label: a label to the class of the own backbone; None where they are not known to
            correspond.
    """

    inverter: Inverter
    observers: Observers
    images: ImageSet
    batch_size: int
    seed: int = 0
    extractors: Mapping[str, ImageFeatures] = field(default_factory=dict)
    class_of_label: Sequence[int] | None = None

    def run(self, items: Sequence[Item]) -> ShardResult:
        """Measures the images; one that fails is reported in the result instead."""
        failures: list[dict[str, str]] = []
        batches = list(self._reconstruct(items, failures))
        result = ShardResult([i for b in batches for i in b.items], failures=failures)
        if not batches:
            return result
        views = join_views([b.views for b in batches])
        originals = torch.cat([b.originals for b in batches])
        result.digests = [sha256(square.numpy().tobytes()).hexdigest() for square in originals]
        result.pixels = samples = torch.cat([b.samples for b in batches])
        seen = self._view(samples)
        everyone = range(len(result.items))
        result.put("", everyone, self._compare(views, originals, seen, samples))
        result.columns.update(self._label_columns(result, views[OWN], seen[OWN]))
        self._put_other_image(result, views, originals, seen, samples)
        self._put_ceilings(result, views, originals)
        self._put_sampled_nulls(result, views, originals)
        for name, extractor in self.extractors.items():
            result.reconstructed[name] = self._extract(extractor, samples)
            result.original[name] = self._extract(extractor, originals)
            for side in (result.reconstructed, result.original):
                for row in np.flatnonzero(~np.isfinite(side[name]).all(axis=1)).tolist():
                    result.miss(row, name, ["vector for the distance"])
        return result

    @property
    def image_size(self) -> int:
        """The side in pixels of the samples, where the inverter knows it, else of its input."""
        if isinstance(self.inverter, LatentInverter):
            return self.inverter.image_size[0]
        return self.observers.own.input_size[0]

    # ---- reconstructions -----------------------------------------------------------------------

    def _reconstruct(
        self, items: Sequence[Item], failures: list[dict[str, str]]
    ) -> Iterator[_Batch]:
        readable = self._read(items, failures)
        for batch in batched(readable, self.batch_size):
            members, pictures = [item for item, _ in batch], [picture for _, picture in batch]
            views = self.observers.view_originals(pictures)
            finite = views[OWN].is_finite
            features = views[OWN].features.nan_to_num(posinf=0, neginf=0)
            samples = self.inverter.invert(features, generator=noise_of(members))
            sampled = finite_rows(samples)
            for i, item in enumerate(members):
                if not finite[i]:
                    _fail(failures, item, "its features or class scores are not finite")
                elif not sampled[i]:
                    _fail(failures, item, "its sample holds NaN values; use --dtype float32")
            kept = [i for i, fine in enumerate((finite & sampled).tolist()) if fine]
            if kept:
                size = samples.shape[-1]
                squares = to_tensor([center_square(pictures[i], size) for i in kept])
                yield _Batch(
                    [members[i] for i in kept],
                    take_views(views, kept),
                    to_pixels(squares),
                    to_pixels(samples[kept]),
                )

    def _read(
        self, items: Sequence[Item], failures: list[dict[str, str]]
    ) -> Iterator[tuple[Item, Image.Image]]:
        for item in items:
            try:
                yield item, self.images.read(item.index)
            except InputError as error:
                failures.append({"id": item.id, "error": str(error)})

    # ---- comparisons ---------------------------------------------------------------------------

    def _view(self, pixels: Pixels) -> Views:
        rows = batched(range(len(pixels)), self.batch_size)
        return join_views([self.observers.view_pixels(pixels[part]) for part in rows])

    def _compare(self, views: Views, originals: Pixels, seen: Views, pixels: Pixels) -> Columns:
        """Compares row by row, a batch at a time; `views` are those of the originals."""
        parts = [
            self.observers.compare_views(take_views(views, rows), take_views(seen, rows))
            | self.observers.compare_pixels(originals[rows], pixels[rows])
            for rows in batched(range(len(pixels)), self.batch_size)
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _put_other_image(
        self, result: ShardResult, views: Views, originals: Pixels, seen: Views, samples: Pixels
    ) -> None:
        """The reconstruction of another image of the shard, beside the original."""
        partners = find_partners([item.label for item in result.items])
        if partners:
            columns = self._compare(views, originals, take_views(seen, partners), samples[partners])
            result.put(f"{OTHER_IMAGE}_", range(len(partners)), columns)

    def _put_ceilings(self, result: ShardResult, views: Views, originals: Pixels) -> None:
        everyone = range(len(result.items))
        columns = self.observers.compare_views(views, self._view(originals))
        result.put(f"{RESIZED_ORIGINAL}_", everyone, columns)
        if isinstance(inverter := self.inverter, LatentInverter):
            trips = (
                inverter.round_trip(to_images(originals[rows]))
                for rows in batched(everyone, self.batch_size)
            )
            self._put_made(result, VAE_ROUND_TRIP, everyone, views, originals, trips)

    def _put_sampled_nulls(self, result: ShardResult, views: Views, originals: Pixels) -> None:
        """The nulls that cost a sample each, with the noise of the reconstruction."""
        rows = [i for i, item in enumerate(result.items) if item.has_null]
        if not rows:
            return
        features = views[OWN].features
        batches = [
            (part, [result.items[i] for i in part]) for part in batched(rows, self.batch_size)
        ]
        permuted = (
            self.inverter.invert(
                permute_cells(features[part], self._permutation_of(items)),
                generator=noise_of(items),
            )
            for part, items in batches
        )
        self._put_made(result, PERMUTED_CELLS, rows, views, originals, permuted)
        if isinstance(inverter := self.inverter, LatentInverter):
            prior = (
                inverter.sample_prior(len(items), generator=noise_of(items)) for _, items in batches
            )
            self._put_made(result, PRIOR_ONLY, rows, views, originals, prior)

    def _put_made(
        self,
        result: ShardResult,
        kind: str,
        rows: Sequence[int],
        views: Views,
        originals: Pixels,
        made: Iterable[Images],
    ) -> None:
        """Compares pictures that were made for some rows; those of NaN have no figures."""
        parts = [(to_pixels(images), finite_rows(images)) for images in made]
        pixels, finite = (torch.cat(part) for part in zip(*parts, strict=True))
        index = list(rows)
        columns = self._compare(
            take_views(views, index), originals[index], self._view(pixels), pixels
        )
        broken = ~finite
        columns = {name: values.masked_fill(broken, torch.nan) for name, values in columns.items()}
        result.put(f"{kind}_", rows, columns)

    def _permutation_of(self, items: Sequence[Item]) -> list[torch.Generator]:
        return [make_generator(self.seed, item.id, PERMUTED_CELLS) for item in items]

    def _label_columns(self, result: ShardResult, own: View, seen: View) -> dict[str, np.ndarray]:
        """The classes of original and reconstruction, and whether they are the label's."""
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
        device = self.observers.own.device
        with torch.no_grad():
            parts = [
                extractor(to_images(pixels[rows].to(device))).float().cpu()
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


def _fail(failures: list[dict[str, str]], item: Item, reason: str) -> None:
    failures.append({"id": item.id, "error": f"{item.id} cannot be measured: {reason}."})
