"""A shard of images → reconstructions, nulls and ceilings → one row of figures per image."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TypeVar

import numpy as np
import torch
from PIL import Image

from featinv_diffusion.data import to_images
from featinv_diffusion.errors import InputError
from featinv_diffusion.evaluation.dataset import ImageSet
from featinv_diffusion.evaluation.observers import (
    OWN,
    PREDICTED,
    Columns,
    Observers,
    Pixels,
    View,
    Views,
    finite_rows,
    join_views,
    take_views,
    to_pixels,
)
from featinv_diffusion.evaluation.result import ShardResult
from featinv_diffusion.evaluation.selection import Item
from featinv_diffusion.features import permute_cells
from featinv_diffusion.images import center_square, to_tensor
from featinv_diffusion.inverters.base import Inverter, LatentInverter
from featinv_diffusion.metrics.extractors import ImageFeatures
from featinv_diffusion.reconstruction import batched
from featinv_diffusion.seeds import make_generator
from featinv_diffusion.types import Images

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
