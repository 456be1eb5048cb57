"""Operators on features as a study: fit one, and measure it on other images."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from featinv_diffusion.backbones.base import Backbone, weights_sha256
from featinv_diffusion.data.selection import digest
from featinv_diffusion.data.sets import ImageSet, open_images
from featinv_diffusion.errors import InputError
from featinv_diffusion.features.operator_methods import (
    DEFAULT_RIDGE,
    LINEAR,
    PairMoments,
    check_method,
    solve,
)
from featinv_diffusion.features.operators import (
    TOLERANCE,
    Operator,
    Spectrum,
    measure_spectrum,
)
from featinv_diffusion.features.pixel_operations import (
    PixelOperation,
    make_operation,
)
from featinv_diffusion.figures import board as figures
from featinv_diffusion.figures.board import add_bars, draw_grid
from featinv_diffusion.images import as_picture, center_square, to_tensor
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.metrics import feature_cosine
from featinv_diffusion.metrics.colour import delta_e_2000
from featinv_diffusion.metrics.statistics import (
    Interval,
    bootstrap_difference,
    bootstrap_mean,
    bootstrap_statistic,
)
from featinv_diffusion.runs.parts import WHOLE, Division, Part, describe_sampling
from featinv_diffusion.runs.progress import Advance, progress_bar
from featinv_diffusion.runs.sampling import batched, sample_each
from featinv_diffusion.seeds import derive_seed, make_generator
from featinv_diffusion.studies.study import Analysis, to_dicts, to_rows
from featinv_diffusion.types import Features, Images

logger = logging.getLogger(__name__)


def fit_operator(
    backbone: Backbone | Inverter,
    data: object,
    operation: str | PixelOperation,
    *,
    method: str = "orthogonal",
    alpha: float | None = None,
    channel: str | None = None,
    ridge: float = DEFAULT_RIDGE,
    n_images: int = 1024,
    seed: int = 0,
    batch_size: int = 32,
    split: str = "train",
    classes: str | None = None,
    progress: bool = False,
    division: Division = WHOLE,
) -> Operator:
    """Fits the matrix that does to features what an operation does to pixels.

    Images are encoded before and after the operation; nothing is inverted. `featinv operator fit`
    gives the same operator for the same settings.

    Args:
        backbone: the model whose features to use, or an inverter that has it.
        data: a folder, a parquet file or a Hub name; an `ImageSet`; or a list of pictures (paths
            or PIL images), of which at most `n_images` are drawn.
        operation: `swap`, `suppress`, `grey`, `colourise`, or any `PixelOperation`.
        method: `orthogonal`, `self-adjoint`, `self-adjoint-direct` or `linear`.
        alpha, channel: for `suppress`: the factor (0.9) and the channel (`blue`).
        ridge: for `linear`: pull towards the identity, as a share of the mean eigenvalue of XᵀX.
        n_images: images to draw at random.
        seed: random seed of the draw.
        batch_size: images per batch; it decides the last bits.
        split, classes: see `open_images`; they have no effect on a list.
        progress: show a progress bar on stderr.
        division: of the images among processes.

    Raises:
        InputError: an unknown operation or method, bad parameters, too few images, images that
            cannot be read, or features that are not finite.
    """
    operation = to_operation(operation, alpha, channel)
    check_method(method, ridge)
    backbone = _backbone_of(backbone)
    images = to_image_set(data, split, classes)
    if isinstance(data, list | tuple):
        n_images = min(n_images, len(images))
    _check_batch_size(batch_size)
    drawn = draw_images(images, n_images, seed, max(backbone.picture_size))
    with progress_bar(division.share(n_images), progress, "encoding", "images") as advance:

        def measure(chunk: list[Drawn]) -> Part:
            found, digests = measure_moments(backbone, chunk, operation, batch_size, advance)
            sums = {"xx": found.xx, "xy": found.xy, "yy": found.yy}
            return Part(sums, {"n": found.n, "digests": list(digests)})

        def describe() -> dict[str, Any]:
            source = {"operation": operation.name, **operation.parameters}
            return {**source, "batch_size": batch_size, **_describe(backbone, images, drawn)}

        chunks = list(batched(drawn, batch_size * FIT_BATCHES))
        parts = division.each(chunks, measure, describe)
        moments, digests = _join_moments(backbone.spec.channels, parts)
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


FIT_BATCHES = 8
"""Batches of a fit whose sums are added up by themselves, and then to the others."""


def _join_moments(channels: int, parts: Iterable[Part]) -> tuple[PairMoments, tuple[str, ...]]:
    total, digests = PairMoments(channels), []
    for part in parts:
        found = PairMoments(channels)
        found.xx, found.xy, found.yy = (part.tensors[name] for name in ("xx", "xy", "yy"))
        found.n = part.content["n"]
        total.add(found)
        digests += part.content["digests"]
    return total, tuple(digests)


def _describe(backbone: Backbone, images: ImageSet, drawn: Sequence[Drawn]) -> dict[str, Any]:
    """Returns what decides the features of images."""
    return {
        "backbone": backbone.name,
        "layer": backbone.spec.layer,
        "device": backbone.device.type,
        "backbone_sha256": weights_sha256({"": backbone.model}),
        "images_sha256": digest(map(repr, drawn)),
        "data_fingerprint": images.fingerprint,
    }


def describe_edits(operator: Operator, powers: Sequence[int]) -> dict[str, Any]:
    """Returns what decides the maps that powers of an operator make."""
    matrix = operator.matrix.detach().cpu().contiguous().numpy()
    return {
        "operation": operator.record.operation,
        **operator.record.parameters,
        "operator_sha256": hashlib.sha256(matrix.tobytes()).hexdigest(),
        "powers": list(powers),
    }


def to_operation(
    operation: str | PixelOperation, alpha: float | None = None, channel: str | None = None
) -> PixelOperation:
    """Returns the operation of this name, with the parameters that are given.

    Raises:
        InputError: an unknown operation, or parameters that it does not take.
    """
    given = {"alpha": alpha, "channel": channel}
    known = {name: value for name, value in given.items() if value is not None}
    if not isinstance(operation, PixelOperation):
        return make_operation(operation, **known)
    if known:
        raise InputError(f"A PixelOperation has its own parameters, got {', '.join(known)}.")
    return operation


def operation_of(operator: Operator) -> PixelOperation:
    """Returns the operation on pixels that an operator was fitted for.

    Raises:
        InputError: the operation is not one of this package.
    """
    return make_operation(operator.record.operation, **operator.record.parameters)


def _backbone_of(model: Backbone | Inverter) -> Backbone:
    return model.require_backbone() if isinstance(model, Inverter) else model


# ---- Images --------------------------------------------------------------------------------------


def to_image_set(data: object, split: str, classes: str | None = None) -> ImageSet:
    """Returns the images that `open_images` finds, or a list of pictures as an `ImageSet`."""
    if isinstance(data, ImageSet):
        return data
    if not isinstance(data, list | tuple):
        return open_images(None if data is None else str(data), split, classes)
    ids = [Path(p).name if isinstance(p, str | Path) else f"{i}" for i, p in enumerate(data)]
    return ImageSet(ids, None, None, lambda i: as_picture(data[i]))


@dataclass(frozen=True)
class Drawn:
    """An image that was drawn; it is read when it is used.

    Args:
        index: into the images.
        id: id in its data set.
        side: side in pixels of its centre square, the backbone's input.
    """

    images: ImageSet = field(repr=False)
    index: int
    id: str
    side: int

    def read(self) -> tuple[Image.Image, Image.Image, str]:
        """Returns the whole picture, its centre square, and the digest of the square's pixels.

        The digest is the same whatever the name and place of the image.

        Raises:
            InputError: it cannot be read.
        """
        picture = self.images.read(self.index)
        square = center_square(picture, self.side)
        return picture, square, hashlib.sha256(square.tobytes()).hexdigest()[:16]


def draw_images(
    images: ImageSet, n_images: int, seed: int, side: int, exclude: Collection[str] = ()
) -> list[Drawn]:
    """Draws images in a random order, without those whose digest is excluded.

    Args:
        side: side of the squares in pixels.
        exclude: digests, such as those of the images that an operator was fitted on. All images
            before the last one that is drawn are read, to find them.

    Raises:
        InputError: fewer images than asked for, or one that cannot be read.
    """
    if n_images < 1:
        raise InputError(f"At least one image must be drawn, got {n_images}.")
    order = torch.randperm(len(images), generator=make_generator(seed, "operator")).tolist()
    left_out = set(exclude)
    every = (Drawn(images, index, images.ids[index], side) for index in order)
    kept = (image for image in every if not left_out or image.read()[2] not in left_out)
    drawn = list(islice(kept, n_images))
    if len(drawn) < n_images:
        besides = " that the operator was not fitted on" if left_out else ""
        raise InputError(
            f"{n_images} images{besides} were asked for, but there are {len(drawn)} "
            f"among {len(images)}. Give more images or ask for fewer."
        )
    return drawn


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}.")


@torch.no_grad()
def measure_moments(
    backbone: Backbone,
    drawn: Iterable[Drawn],
    operation: PixelOperation,
    batch_size: int = 32,
    advance: Advance = lambda n: None,
) -> tuple[PairMoments, tuple[str, ...]]:
    """Returns the moments of features before and after the operation, and the images' digests.

    `features.operator_methods.solve` takes them, once for each method.

    Raises:
        InputError: a batch size below 1, or features that are not finite.
    """
    _check_batch_size(batch_size)
    moments, digests = PairMoments(backbone.spec.channels), []
    for batch in batched(drawn, batch_size):
        _, squares, found = zip(*(image.read() for image in batch), strict=True)
        pixels = to_tensor(squares).to(backbone.device)
        before, after = operation.source(pixels), operation.target(pixels)
        moments.update(backbone.features(before), backbone.features(after))
        digests += found
        advance(len(batch))
    return moments, tuple(digests)


# ---- Measuring an operator on other images -------------------------------------------------------

POWERS = {"suppress": (1, 4, 8, 12), "swap": (1, 2)}
"""Powers that are measured by default; for other operations only 1."""

OPERATOR, FLOOR, CEILING = "operator", "floor", "ceiling"
ROLES = (FLOOR, OPERATOR, CEILING)
"""R(true features), R(f Qⁿ) and R(f); each is compared with the transformed image."""

PIXEL_METRICS: dict[str, Callable[[Images, Images], Tensor]] = {
    "delta_e": delta_e_2000,
    "mse": lambda images, others: (images - others).square().mean(dim=(1, 2, 3)),
}

Columns = dict[str, list[float]]
N_PICTURES = 8


def default_powers(operation: PixelOperation) -> tuple[int, ...]:
    """Returns the powers that are measured by default."""
    return POWERS.get(operation.name, (1,))


def measure_operator(
    operator: Operator,
    model: Inverter | Backbone,
    data: object,
    *,
    operation: PixelOperation | None = None,
    powers: Sequence[int] | None = None,
    n_images: int = 256,
    seed: int = 0,
    batch_size: int = 8,
    split: str = "validation",
    classes: str | None = None,
    progress: bool = False,
    division: Division = WHOLE,
) -> Analysis:
    """Measures an operator's eigenvalues, and what it does to images that it was not fitted on.

    Args:
        model: an inverter of the operator's features, which the fit never used; or a backbone, and
            then pixels are not measured.
        data: images, as in `fit_operator`; those of the fit are left out.
        operation: the operation on pixels, if it is not one of this package.
        powers: how often the operation and the operator are applied; the figures of measures and
            pictures show the first one. None takes `POWERS`.
        n_images: images to draw at random.
        seed: random seed of the draw and the noise.
        batch_size: images per batch.
        split, classes: see `open_images`.
        progress: show a progress bar on stderr.
        division: of the images among processes.

    Raises:
        InputError: an operator of other features or weights, bad powers, too few other images, or
            features or samples that are not finite.
    """
    backbone = _backbone_of(model)
    inverter = model if isinstance(model, Inverter) else None
    operator.check(backbone.spec, weights_sha256({"": backbone.model}))
    operation = operation or operation_of(operator)
    powers = default_powers(operation) if powers is None else powers
    check_powers(powers)
    spectra = [measure_spectrum(operator, n) for n in powers]  # refuses powers before the work
    images = to_image_set(data, split, classes)
    side, fitted_on = max(backbone.picture_size), operator.record.image_digests
    drawn = draw_images(images, n_images, seed, side, fitted_on)
    _check_batch_size(batch_size)
    with progress_bar(division.share(n_images), progress, "measuring", "images") as advance:

        def measure(chunk: list[Drawn]) -> Part:
            return measure_held_out(
                operator,
                operation,
                backbone,
                chunk,
                inverter=inverter,
                powers=powers,
                batch_size=batch_size,
                seed=seed,
                advance=advance,
            ).to_part()

        def describe() -> dict[str, Any]:
            how = {} if inverter is None else describe_sampling(inverter)
            own = {**_describe(backbone, images, drawn), **describe_edits(operator, powers)}
            return {**how, **own, "seed": seed, "batch_size": batch_size}

        chunks = list(batched(drawn, batch_size))
        found = HeldOut.join(division.each(chunks, measure, describe), powers)
    summaries = {n: summarise_power(found.columns[n]) for n in powers}
    title = f"{operation} on {operator.spec.backbone}, {operator.record.method} operator"
    record = asdict(operator.record)
    record["n_images"] = len(record.pop("image_digests"))
    metrics = {
        "operator": {**record, "spec": asdict(operator.spec)},
        "spectrum": [spectrum.figures() for spectrum in spectra],
        "n_images": len(found.ids),
        "ids_sha256": digest(found.ids),
        "seed": seed,
        "held_out": {str(n): to_dicts(summaries[n]) for n in powers},
    }
    drawings = {
        "eigenvalues.png": draw_spectra(spectra, title),
        "measures.png": draw_measures(summaries[powers[0]], powers[0], title),
        **_draw_pictures(found, title),
    }
    rows = [row for n in powers for row in to_rows(summaries[n], power=n)]
    return Analysis(metrics, drawings, to_lines(metrics), rows)


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Measurements of each image, by power.

    Args:
        columns: `cosine` between f Qⁿ and the features of the image after n operations, and
            `cosine_nothing` between f and these; with an inverter also `delta_e_ROLE` and
            `mse_ROLE` for each of `ROLES`.
        pictures: the first images by the names of `names_of`, beside `given` and `R(f)`; empty
            without an inverter.
    """

    ids: list[str]
    columns: dict[int, Columns]
    pictures: dict[str, list[Tensor]]

    def to_part(self) -> Part:
        """Returns it as workers keep it."""
        tensors = {
            f"{n}/{name}": torch.tensor(values, dtype=torch.float64)
            for n, columns in self.columns.items()
            for name, values in columns.items()
        }
        shown = {f"shown/{name}": torch.stack(images) for name, images in self.pictures.items()}
        return Part({**tensors, **shown}, {"ids": self.ids})

    @classmethod
    def join(cls, parts: Iterable[Part], powers: Sequence[int]) -> HeldOut:
        """Joins the measurements of several chunks of images."""
        found = cls([], {power: {} for power in powers}, {})
        for part in parts:
            found.ids.extend(part.content["ids"])
            for name, values in part.tensors.items():
                where, _, column = name.partition("/")
                if where == "shown":
                    found.keep(column, values)
                else:
                    found.columns[int(where)].setdefault(column, []).extend(values.tolist())
        return found

    def keep(self, name: str, images: Images) -> None:
        """Keeps the first images for figures."""
        held = self.pictures.setdefault(name, [])
        held += images[: max(0, N_PICTURES - len(held))].cpu().unbind()


def names_of(power: int) -> tuple[str, str, str]:
    """Returns the names of the transformed images, of R(f Qⁿ) and of R(true features)."""
    return _transformed(power), f"R(f {to_symbol(power)})", _to_title("R(true f)", power)


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
    advance: Advance = lambda n: None,
) -> HeldOut:
    """Measures an operator on images that it was not fitted on.

    Args:
        inverter: of the same features; None measures features alone. All samples of an image have
            the same noise.
        powers: how often the operation and the operator are applied.

    Raises:
        InputError: bad powers, a batch size below 1, features of another spec, or features or
            samples that are not finite.
    """
    check_powers(powers)
    _check_batch_size(batch_size)
    edits = {n: operator.edit(n, spec=backbone.spec) for n in powers}
    found = HeldOut([], {power: {} for power in powers}, {})
    for batch in batched(drawn, batch_size):
        pictures, squares, _ = zip(*(image.read() for image in batch), strict=True)
        pixels = to_tensor(squares).to(backbone.device)
        features = backbone.features(operation.source(pixels))
        true = {n: backbone.features(operation.repeated(pixels, n)) for n in powers}
        edited = {n: edit(features) for n, edit in edits.items()}
        for n in powers:
            _add(found.columns[n], "cosine", feature_cosine(true[n], edited[n]))
            _add(found.columns[n], "cosine_nothing", feature_cosine(true[n], features))
        if inverter is not None:
            seeds = [derive_seed(seed, image.id, 0) for image in batch]
            _compare(found, inverter, operation, pictures, seeds, features, true, edited)
        found.ids.extend(image.id for image in batch)
        advance(len(batch))
    return found


def check_powers(powers: Sequence[int]) -> None:
    """Raises `InputError` unless there are distinct powers of at least 1."""
    if not powers or min(powers) < 1 or len(set(powers)) < len(powers):
        raise InputError(f"Powers must be distinct whole numbers from 1, got {[*powers]}.")


def _compare(
    found: HeldOut,
    inverter: Inverter,
    operation: PixelOperation,
    pictures: Sequence[Image.Image],
    seeds: Sequence[int],
    features: Features,
    true: Mapping[int, Features],
    edited: Mapping[int, Features],
) -> None:
    """Adds the measurements in the samples of a batch."""

    def invert(maps: Features) -> Images:
        return sample_each(inverter, maps, seeds)

    reconstructed = invert(features)
    originals = _squares(pictures, reconstructed)
    found.keep("given", operation.source(originals))
    found.keep("R(f)", reconstructed)
    for n in true:
        wanted = operation.repeated(originals, n)
        seen = {FLOOR: invert(true[n]), OPERATOR: invert(edited[n]), CEILING: reconstructed}
        for metric, distance in PIXEL_METRICS.items():
            for role, images in seen.items():
                _add(found.columns[n], f"{metric}_{role}", distance(images, wanted))
        for name, images in zip(names_of(n), (wanted, seen[OPERATOR], seen[FLOOR]), strict=True):
            found.keep(name, images)


def _squares(pictures: Sequence[Image.Image], images: Images) -> Images:
    """Returns the centre squares of pictures at the size of the images."""
    height, width = images.shape[-2:]
    squares = [center_square(picture, max(height, width)) for picture in pictures]
    return to_tensor([square.resize((width, height)) for square in squares])


def _add(columns: Columns, name: str, values: Float[Tensor, " b"]) -> None:
    columns.setdefault(name, []).extend(values.double().cpu().tolist())


def summarise_power(columns: Columns) -> dict[str, Interval | None]:
    """Returns the mean of each column with its interval, and what follows from several columns.

    `cosine_gain` is paired. For each pixel metric, `room` is ceiling − floor, paired, and
    `position` is (operator − floor) / (ceiling − floor): 0 is as good as the inverter can show and
    1 is doing nothing. The position is None unless the whole interval of the room lies above 0. If
    the interval contains 0, the inverter does not show the operation; if it lies below 0, pictures
    of the true features are further from the transformed image than doing nothing.
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


def to_lines(metrics: Mapping[str, Any]) -> list[str]:
    """Returns the lines of the terminal: the eigenvalues, and the measurements of each power."""
    lines = []
    for spectrum in metrics["spectrum"]:
        moduli = spectrum["modulus"]
        lines.append(
            f"Power {spectrum['power']}: {spectrum['n_near_plus_one']} eigenvalues near +1 and "
            f"{spectrum['n_near_minus_one']} near −1 (within {spectrum['tolerance']:g}), "
            f"{spectrum['n_negative_real']} with a negative real part, of "
            f"{spectrum['n_eigenvalues']}; moduli {moduli['min']:.3f} … {moduli['max']:.3f}, "
            f"twice is {spectrum['twice_from_identity']:.3f} from the identity."
        )
    for power, held in metrics["held_out"].items():
        parts = [f"cosine {_cell(held['cosine'])}, doing nothing {_cell(held['cosine_nothing'])}"]
        for metric, name in (("delta_e", "ΔE2000"), ("mse", "MSE")):
            if f"{metric}_floor" in held:
                parts.append(_between(held, metric, name))
        lines.append(f"Held out, power {power}: {'; '.join(parts)}.")
    if metrics["operator"]["method"] == LINEAR:
        lines.append("Eigenvalues are those of Q alone; features are scaled to unit norm after it.")
    return lines


def _between(held: Mapping[str, Any], metric: str, name: str) -> str:
    values = [held[f"{metric}_{role}"]["value"] for role in (FLOOR, OPERATOR, CEILING)]
    floor, found, ceiling = (f"{value:.4g}" for value in values)
    stands = f"{found} between" if values == sorted(values) else f"{found}, beside"
    position = held[f"{metric}_position"]
    where = _why_none(held[f"{metric}_room"]) if position is None else f"position {_cell(position)}"
    return f"{name} {stands} {floor} (floor) and {ceiling} (doing nothing), {where}"


def _why_none(room: Mapping[str, float]) -> str:
    if room["high"] < 0:
        return "no position: the floor is above doing nothing"
    return "no position: floor and doing nothing do not differ"


def _cell(interval: Mapping[str, float]) -> str:
    return f"{interval['value']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


# ---- Figures -------------------------------------------------------------------------------------

PIXEL_LABELS = {"delta_e": "ΔE2000", "mse": "MSE of pixels"}
SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def to_symbol(power: int) -> str:
    """Returns `Q` for 1, `Q¹²` for 12."""
    return "Q" if power == 1 else f"Q{str(power).translate(SUPERSCRIPTS)}"


def _to_title(title: str, power: int) -> str:
    return title if power == 1 else f"{title}, {to_symbol(power)}"


def _transformed(power: int) -> str:
    return "transformed" if power == 1 else f"{power}× transformed"


def draw_spectra(spectra: Sequence[Spectrum], title: str) -> Figure:
    """Draws the eigenvalues of each power in the complex plane, with the unit circle."""
    with mpl.rc_context({"font.size": figures.TEXT}):
        figure = Figure(figsize=(2.7 * len(spectra) + 0.4, 3.3), layout="constrained")
        figure.suptitle(title, fontsize=figures.TITLE, fontweight="bold")
        for axes, spectrum in zip(
            figure.subplots(1, len(spectra), squeeze=False)[0], spectra, strict=True
        ):
            _draw_spectrum(axes, spectrum)
    return figure


def _draw_spectrum(axes: Axes, spectrum: Spectrum) -> None:
    around = torch.linspace(0, 2 * torch.pi, 200)
    axes.plot(around.cos(), around.sin(), color=figures.GREY, linewidth=0.7, zorder=1)
    axes.axhline(0, color=figures.GREY, linewidth=0.4, zorder=0)
    axes.axvline(0, color=figures.GREY, linewidth=0.4, zorder=0)
    values = spectrum.eigenvalues
    axes.scatter(values.real, values.imag, s=9, alpha=0.6, color=figures.BLUE, linewidths=0)
    reach = max(1.15, 1.08 * values.abs().max().item())
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    moduli = values.abs()
    counts = f"{spectrum.count_near(1)} near +1, {spectrum.count_near(-1)} near −1"
    axes.set_title(
        f"{to_symbol(spectrum.power)}: {counts}\n"
        f"(within {TOLERANCE:g}) of {len(values)}; moduli {moduli.min():.2f} … {moduli.max():.2f}",
        fontsize=figures.TEXT,
    )
    axes.set_xlabel("real part", fontsize=figures.TEXT)
    axes.set_ylabel("imaginary part", fontsize=figures.TEXT)
    axes.tick_params(labelsize=figures.TEXT)


def draw_measures(summary: Mapping[str, Interval | None], power: int, title: str) -> Figure:
    """Draws the distance to the true features, and the pixel errors beside floor and ceiling."""
    symbol = to_symbol(power)
    names = {FLOOR: "R(true f)\nfloor", OPERATOR: f"R(f {symbol})\n", CEILING: "R(f)\ndo nothing"}
    drawn = [metric for metric in PIXEL_LABELS if f"{metric}_{FLOOR}" in summary]
    figure = Figure(figsize=(2.3 * (1 + len(drawn)) + 0.6, 3.0), layout="constrained")
    figure.suptitle(
        f"{_to_title(title, power)}, held out", fontsize=figures.TITLE, fontweight="bold"
    )
    panels = figure.subplots(1, 1 + len(drawn), squeeze=False)[0]
    cosines = {f"f {symbol}\n": summary["cosine"], "f\ndo nothing": summary["cosine_nothing"]}
    distances = {
        name: Interval(1 - v.value, 1 - v.high, 1 - v.low, v.n) for name, v in cosines.items() if v
    }
    _draw_bars(panels[0], distances, "1 − cosine to the true features")
    for axes, metric in zip(panels[1:], drawn, strict=True):
        bars = {words: summary[f"{metric}_{role}"] for role, words in names.items()}
        _draw_bars(axes, bars, f"{PIXEL_LABELS[metric]} to the {_transformed(power)}")
    return figure


def _draw_bars(axes: Axes, bars: Mapping[str, Interval | None], ylabel: str) -> None:
    values = {name: value for name, value in bars.items() if value is not None}
    colours = [figures.GREEN if "Q" in name else figures.BLUE for name in values]
    add_bars(axes, list(values), list(values.values()), colours)
    axes.set_ylabel(f"{ylabel}\n95 % interval", fontsize=figures.TEXT)


def _draw_pictures(found: HeldOut, title: str) -> dict[str, Figure]:
    """Draws the pictures of the first power, and of all powers if there are several."""
    if not found.pictures:
        return {}
    notes = [f"Of {len(found.ids)} images that the operator was not fitted on; R is the inverter."]
    columns = {name: torch.stack(images) for name, images in found.pictures.items()}
    wanted, edited, true = names_of(first := next(iter(found.columns)))
    of_first = {name: columns[name] for name in ("given", wanted, "R(f)", edited)}
    of_first["R(true f)"] = columns[true]
    drawn = {"pictures.png": draw_grid(of_first, _to_title(title, first), notes)}
    if len(found.columns) > 1:
        shown = {n: images for n, images in columns.items() if not n.startswith("R(true f)")}
        drawn["powers.png"] = draw_grid(shown, title, notes)
    return drawn
