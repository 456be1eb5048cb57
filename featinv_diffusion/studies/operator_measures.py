"""What an operator does to images that it was not fitted on, in features and as inverted."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Complex, Float
from PIL import Image
from torch import Tensor

from featinv_diffusion.backbones.base import Backbone, weights_sha256
from featinv_diffusion.data.sets import ImageSet
from featinv_diffusion.errors import InputError
from featinv_diffusion.features.operator_methods import DEFAULT_RIDGE, PairMoments, solve
from featinv_diffusion.features.operators import Operator, check_finite
from featinv_diffusion.features.pixel_operations import PixelOperation
from featinv_diffusion.images import center_square, to_tensor
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.metrics import feature_cosine
from featinv_diffusion.metrics.colour import delta_e_2000
from featinv_diffusion.metrics.statistics import (
    Interval,
    bootstrap_difference,
    bootstrap_mean,
    bootstrap_statistic,
)
from featinv_diffusion.runs.sampling import batched
from featinv_diffusion.seeds import derive_seed, make_generator
from featinv_diffusion.types import Features, Images

# ---- Fits operators on images ----

Advance = Callable[[float], None]
"""Called with the number of images that are done."""


@dataclass(frozen=True)
class Drawn:
    """An image that was drawn.

    Args:
        id: within its data set.
        picture: as it was decoded.
        square: its centre square at the size that the backbone takes.
        digest: of the pixels of the square, whatever the image is called and wherever it lies.
    """

    id: str
    picture: Image.Image
    square: Image.Image
    digest: str


def draw_images(
    images: ImageSet, n_images: int, seed: int, side: int, exclude: Collection[str] = ()
) -> Iterator[Drawn]:
    """Yields images in an order that the seed draws, without those whose digest is excluded.

    Args:
        side: of the squares, in pixels.
        exclude: digests, such as those of the images that an operator was fitted on.

    Raises:
        InputError: fewer images than asked for, or one that cannot be read.
    """
    if n_images < 1:
        raise InputError(f"At least one image must be drawn, but {n_images} were asked for.")
    order = torch.randperm(len(images), generator=make_generator(seed, "operator")).tolist()
    left_out, n_drawn = set(exclude), 0
    for index in order:
        if n_drawn == n_images:
            return
        picture = images.read(index)
        square = center_square(picture, side)
        digest = hashlib.sha256(square.tobytes()).hexdigest()[:16]
        if digest not in left_out:
            n_drawn += 1
            yield Drawn(images.ids[index], picture, square, digest)
    if n_drawn < n_images:
        besides = " that the operator was not fitted on" if left_out else ""
        raise InputError(
            f"{n_images} images{besides} were asked for, but there are {n_drawn} "
            f"among {len(images)}. Give more images or ask for fewer."
        )


def check_batch_size(batch_size: int) -> None:
    """Raises `InputError` unless a batch holds an image."""
    if batch_size < 1:
        raise InputError(f"A batch must hold at least one image, but a size of {batch_size} came.")


@torch.no_grad()
def measure_moments(
    backbone: Backbone,
    drawn: Iterable[Drawn],
    operation: PixelOperation,
    batch_size: int = 32,
    advance: Advance = lambda n: None,
) -> tuple[PairMoments, tuple[str, ...]]:
    """Returns the moments of features before and after the operation, and the images' digests.

    Images are encoded both times; no inverter is involved.

    Raises:
        InputError: batches of no image, or features that are not finite.
    """
    check_batch_size(batch_size)
    moments, digests = PairMoments(backbone.spec.channels), []
    for batch in batched(drawn, batch_size):
        pixels = to_tensor([image.square for image in batch]).to(backbone.device)
        before, after = operation.source(pixels), operation.target(pixels)
        moments.update(backbone.features(before), backbone.features(after))
        digests += [image.digest for image in batch]
        advance(len(batch))
    return moments, tuple(digests)


def fit_operator(
    backbone: Backbone,
    drawn: Iterable[Drawn],
    operation: PixelOperation,
    method: str = "orthogonal",
    *,
    ridge: float = DEFAULT_RIDGE,
    batch_size: int = 32,
    advance: Advance = lambda n: None,
) -> Operator:
    """Fits the operator on a backbone's features that does what the operation does to pixels.

    For several methods take `measure_moments` once and `features.operators.solve` for each.

    Raises:
        InputError: as `measure_moments` and `solve`.
    """
    moments, digests = measure_moments(backbone, drawn, operation, batch_size, advance)
    return solve(
        moments,
        backbone.spec,
        operation.name,
        method,
        ridge=ridge,
        parameters=operation.parameters,
        backbone_sha256=weights_sha256({"": backbone.model}),
        image_digests=digests,
    )


OPERATOR, FLOOR, CEILING = "operator", "floor", "ceiling"
ROLES = (FLOOR, OPERATOR, CEILING)
"""R(true features), R(f Qⁿ) and R(f), each against the transformed image."""

PIXEL_METRICS: dict[str, Callable[[Images, Images], Tensor]] = {
    "delta_e": delta_e_2000,
    "mse": lambda images, others: (images - others).square().mean(dim=(1, 2, 3)),
}

Columns = dict[str, list[float]]


@dataclass(frozen=True, eq=False)
class Pictures:
    """The first images of a measurement, for figures.

    Args:
        given: the source image of the operation.
        reconstructed: R(f).
        wanted: the transformed image, by power.
        edited: R(f Qⁿ), by power.
        true: R(features of the transformed image), by power.
    """

    given: list[Tensor] = field(default_factory=list)
    reconstructed: list[Tensor] = field(default_factory=list)
    wanted: dict[int, list[Tensor]] = field(default_factory=dict)
    edited: dict[int, list[Tensor]] = field(default_factory=dict)
    true: dict[int, list[Tensor]] = field(default_factory=dict)

    def take(self, held: list[Tensor], images: Images, n: int) -> None:
        """Adds images until there are n."""
        held += images[: max(0, n - len(held))].cpu().unbind()


@dataclass(frozen=True, eq=False)
class HeldOut:
    """One value per image of each figure, by power.

    Args:
        columns: `cosine` of f Qⁿ to the features of the image after n operations, `cosine_nothing`
            of f to the same; with an inverter `delta_e_ROLE` and `mse_ROLE` of `ROLES`.
        pictures: none without an inverter.
    """

    ids: list[str]
    columns: dict[int, Columns]
    pictures: Pictures

    @property
    def is_inverted(self) -> bool:
        """Whether an inverter was there."""
        return bool(self.pictures.given)


@torch.no_grad()
def measure_held_out(
    operator: Operator,
    operation: PixelOperation,
    backbone: Backbone,
    drawn: Iterable[Drawn],
    *,
    inverter: Inverter | None = None,
    powers: Sequence[int] = (1,),
    batch_size: int = 8,
    seed: int = 0,
    n_pictures: int = 8,
    advance: Advance = lambda n: None,
) -> HeldOut:
    """Measures an operator on images.

    Args:
        drawn: images that the operator was not fitted on, see `draw_images`.
        inverter: of the same features; None measures features alone. Every inversion of an image
            has the same noise.
        powers: how often the operation is done to pixels and the operator to features.

    Raises:
        InputError: bad powers, batches of no image, or features that are of another spec or not
            finite.
    """
    check_powers(powers)
    check_batch_size(batch_size)
    edits = {n: operator.edit(n, spec=backbone.spec) for n in powers}
    found = HeldOut([], {power: {} for power in powers}, Pictures())
    for batch in batched(drawn, batch_size):
        pixels = to_tensor([image.square for image in batch]).to(backbone.device)
        features = backbone.features(operation.source(pixels))
        true = {n: backbone.features(operation.repeated(pixels, n)) for n in powers}
        edited = {n: edit(features) for n, edit in edits.items()}
        for n in powers:
            _add(found.columns[n], "cosine", feature_cosine(true[n], edited[n]))
            _add(found.columns[n], "cosine_nothing", feature_cosine(true[n], features))
        if inverter is not None:
            view = _Inversions(inverter, [derive_seed(seed, image.id, 0) for image in batch])
            _compare(found, view, operation, batch, features, true, edited, n_pictures)
        found.ids.extend(image.id for image in batch)
        advance(len(batch))
    return found


def check_powers(powers: Sequence[int]) -> None:
    """Raises `InputError` unless there are powers, all different and from 1."""
    if not powers or min(powers) < 1 or len(set(powers)) < len(powers):
        raise InputError(f"Powers must be distinct whole numbers from 1, but {[*powers]} came.")


@dataclass(frozen=True, eq=False)
class _Inversions:
    inverter: Inverter
    seeds: list[int]

    def __call__(self, features: Features) -> Images:
        generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        images = self.inverter.invert(features, generator=generators).float()
        if not bool(images.isfinite().all()):
            raise InputError("The inverter's images hold NaN or infinite values; use float32.")
        return images.clamp(0, 1)


def _compare(
    found: HeldOut,
    invert: _Inversions,
    operation: PixelOperation,
    batch: Sequence[Drawn],
    features: Features,
    true: dict[int, Features],
    edited: dict[int, Features],
    n_pictures: int,
) -> None:
    """Adds what is seen in the inversions of a batch."""
    reconstructed = invert(features)
    originals = _fit([image.picture for image in batch], reconstructed)
    pictures = found.pictures
    pictures.take(pictures.given, operation.source(originals), n_pictures)
    pictures.take(pictures.reconstructed, reconstructed, n_pictures)
    for n in true:
        wanted = operation.repeated(originals, n)
        seen = {FLOOR: invert(true[n]), OPERATOR: invert(edited[n]), CEILING: reconstructed}
        for metric, distance in PIXEL_METRICS.items():
            for role, images in seen.items():
                _add(found.columns[n], f"{metric}_{role}", distance(images, wanted))
        pictures.take(pictures.wanted.setdefault(n, []), wanted, n_pictures)
        pictures.take(pictures.edited.setdefault(n, []), seen[OPERATOR], n_pictures)
        pictures.take(pictures.true.setdefault(n, []), seen[FLOOR], n_pictures)


def _fit(pictures: Sequence[Image.Image], images: Images) -> Images:
    """Returns the centre squares at the size of the images."""
    height, width = images.shape[-2:]
    squares = [center_square(picture, max(height, width)) for picture in pictures]
    return to_tensor([square.resize((width, height)) for square in squares]).to(images.device)


def _add(columns: Columns, name: str, values: Float[Tensor, " b"]) -> None:
    columns.setdefault(name, []).extend(values.double().cpu().tolist())


def summarise_power(columns: Columns) -> dict[str, Interval | None]:
    """Returns the mean of each column with its interval, and what follows from several.

    `cosine_gain` is paired. Of each pixel metric, `room` is ceiling − floor, paired, and `position`
    is (operator − floor) / (ceiling − floor): 0 is as good as the inverter can show, 1 is doing
    nothing. It is None unless the whole interval of the room lies above 0: where it holds 0, the
    inverter does not show the operation, and where it lies below, pictures of the true features are
    further from the transformed image than doing nothing.
    """
    summary: dict[str, Interval | None] = {n: bootstrap_mean(v) for n, v in columns.items()}
    summary["cosine_gain"] = bootstrap_difference(columns["cosine"], columns["cosine_nothing"])
    for metric in PIXEL_METRICS:
        if f"{metric}_{FLOOR}" in columns:
            roles = {role: columns[f"{metric}_{role}"] for role in ROLES}
            room = bootstrap_difference(roles[CEILING], roles[FLOOR])
            summary[f"{metric}_room"] = room
            summary[f"{metric}_position"] = _position(roles) if room.low > 0 else None
    return summary


def _position(roles: Columns) -> Interval:
    return bootstrap_statistic(
        roles, lambda means: (means[OPERATOR] - means[FLOOR]) / (means[CEILING] - means[FLOOR])
    )


# ---- Eigenvalues of an operator and of its powers, and how near twice of it is to nothing --------

TOLERANCE = 0.1
"""How far from +1 or −1 an eigenvalue may lie, in the complex plane, to count as near it."""


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The eigenvalues of Qⁿ, and distances of matrices that tell rotations and involutions.

    Distances are ‖A − B‖_F / √c, the root mean square of what a random unit vector is moved by:
    √2 between unrelated rotations, 2 between A and −A.

    Args:
        power: n.
        eigenvalues: of Qⁿ.
        from_identity: distance of Qⁿ from I.
        twice_from_identity: distance of Q²ⁿ from I.
        from_orthogonal: distance of Qⁿ(Qⁿ)ᵀ from I.
        from_symmetric: distance of Qⁿ from its transpose.
    """

    power: int
    eigenvalues: Complex[Tensor, " c"]
    from_identity: float
    twice_from_identity: float
    from_orthogonal: float
    from_symmetric: float

    def count_near(self, value: float, tolerance: float = TOLERANCE) -> int:
        """Returns how many eigenvalues lie within the tolerance of a number."""
        return int(((self.eigenvalues - value).abs() <= tolerance).sum())

    def figures(self) -> dict[str, Any]:
        """Returns counts, moduli and angles as plain numbers."""
        moduli, angles = self.eigenvalues.abs(), self.eigenvalues.angle().abs().rad2deg()
        return {
            "power": self.power,
            "tolerance": TOLERANCE,
            "n_eigenvalues": len(self.eigenvalues),
            "n_near_plus_one": self.count_near(1),
            "n_near_minus_one": self.count_near(-1),
            "n_negative_real": int((self.eigenvalues.real < 0).sum()),
            "modulus": _summary(moduli),
            "n_modulus_above_one": int((moduli > 1 + 1e-6).sum()),
            "absolute_angle_degrees": _summary(angles),
            "from_identity": self.from_identity,
            "twice_from_identity": self.twice_from_identity,
            "from_orthogonal": self.from_orthogonal,
            "from_symmetric": self.from_symmetric,
        }


def measure_spectrum(operator: Operator, power: int = 1) -> Spectrum:
    """Returns the spectrum of Qⁿ, in float64 and without the scaling to unit norm.

    Raises:
        InputError: a power that is no whole number in 0 … `MAX_POWER`, or one where Qⁿ or Q²ⁿ
            overflows.
    """
    matrix = operator.power(power)
    twice = matrix @ matrix
    for product in (twice, matrix @ matrix.T):
        check_finite(product, 2 * power)
    return Spectrum(
        power=power,
        eigenvalues=torch.linalg.eigvals(matrix),
        from_identity=_from_identity(matrix),
        twice_from_identity=_from_identity(twice),
        from_orthogonal=_from_identity(matrix @ matrix.T),
        from_symmetric=_size(matrix - matrix.T),
    )


def _size(matrix: Float[Tensor, "c c"]) -> float:
    return (matrix.norm() / len(matrix) ** 0.5).item()


def _from_identity(matrix: Float[Tensor, "c c"]) -> float:
    return _size(matrix - torch.eye(len(matrix), dtype=matrix.dtype))


def _summary(values: Float[Tensor, " c"]) -> dict[str, float]:
    return {
        "min": values.min().item(),
        "median": values.median().item(),
        "mean": values.mean().item(),
        "max": values.max().item(),
    }
