"""Operators on features as a study: fit one, apply it to pictures, measure it on other images."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from featinv_diffusion import __version__
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
    MAX_POWER,
    TOLERANCE,
    Operator,
    Spectrum,
    measure_spectrum,
)
from featinv_diffusion.features.pixel_operations import (
    PixelMap,
    PixelOperation,
    keep,
    make_operation,
)
from featinv_diffusion.figures import board as figures
from featinv_diffusion.figures.board import add_bars, draw_grid
from featinv_diffusion.figures.grid import Grid, GridRow
from featinv_diffusion.images import as_picture, center_square, read_image, to_pil, to_tensor
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.metrics import feature_cosine
from featinv_diffusion.metrics.colour import delta_e_2000
from featinv_diffusion.metrics.statistics import (
    Interval,
    bootstrap_difference,
    bootstrap_mean,
    bootstrap_statistic,
)
from featinv_diffusion.runs.progress import Advance, advancing, progress_bar
from featinv_diffusion.runs.record import RunFolder, read_environment
from featinv_diffusion.runs.samples import GRID, MAX_GRID_ROWS, to_captions
from featinv_diffusion.runs.sampling import Job, batched, not_finite, sample_each, sample_maps
from featinv_diffusion.runs.scope import Scope, open_scope
from featinv_diffusion.seeds import derive_seed, make_generator
from featinv_diffusion.settings import SampleSettings, to_flat
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
    drawn = draw_images(images, n_images, seed, max(backbone.input_size))
    with progress_bar(n_images, progress, "encoding", "images") as advance:
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
    """An image that was drawn.

    Args:
        id: id in its data set.
        picture: the whole picture.
        square: its centre square at the size of the backbone's input.
        digest: digest of the square's pixels, whatever the name and place of the image.
    """

    id: str
    picture: Image.Image
    square: Image.Image
    digest: str


def draw_images(
    images: ImageSet, n_images: int, seed: int, side: int, exclude: Collection[str] = ()
) -> Iterator[Drawn]:
    """Yields images in a random order, without those whose digest is excluded.

    Args:
        side: side of the squares in pixels.
        exclude: digests, such as those of the images that an operator was fitted on.

    Raises:
        InputError: fewer images than asked for, or one that cannot be read.
    """
    if n_images < 1:
        raise InputError(f"At least one image must be drawn, got {n_images}.")
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
        pixels = to_tensor([image.square for image in batch]).to(backbone.device)
        before, after = operation.source(pixels), operation.target(pixels)
        moments.update(backbone.features(before), backbone.features(after))
        digests += [image.digest for image in batch]
        advance(len(batch))
    return moments, tuple(digests)


# ---- Applying an operator to pictures ------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Applied:
    """What became of one picture; the lists have one value per power.

    Args:
        original: what the backbone saw: the square, or the source image of the operation.
        pictures: R(f Qⁿ).
        cosine: cosine between the features of each picture and the map that was inverted.
        scope_p_value: whether each map is like natural ones; None if not known.
    """

    job: Job
    original: Image.Image
    pictures: list[Image.Image]
    cosine: list[float]
    scope_p_value: list[float] | None


@dataclass(frozen=True, eq=False, repr=False)
class AppliedOperator:
    """Pictures whose features were changed by powers of an operator, and then inverted.

    Args:
        name: name or file of the operator.
        settings: settings of the inverter.
        images: one entry per picture.
        failures: dicts with `input` and `error` of the pictures that cannot be read.
        scope_basis: what the p-values of the scope rest on; None if they are not known.
    """

    operator: Operator
    name: str
    powers: Sequence[int]
    settings: SampleSettings | None
    images: list[Applied]
    failures: list[dict[str, str]]
    scope_basis: str | None

    def figure(self) -> Image.Image:
        """Draws original | R(f Qⁿ) for each power, as `grid.png`."""
        return _grid_of(self).image()

    def save(self, folder: str | Path) -> Path:
        """Writes the pictures, `grid.png` and `manifest.json`, which cannot be replayed."""
        run = RunFolder(folder)
        for done in self.images:
            for output, picture in zip(done.job.outputs, done.pictures, strict=True):
                run.picture(output, picture)
        run.figure(GRID, _grid_of(self))
        record = asdict(self.operator.record)
        del record["image_digests"]
        run.complete(
            {
                "version": __version__,
                "command": "operator apply",
                **({} if self.settings is None else to_flat(self.settings)),
                "operator": self.name,
                "record": record,
                "powers": list(self.powers),
                "given": _given(self.operator),
                "environment": read_environment(self.settings.device if self.settings else "cpu"),
                "scope_basis": self.scope_basis,
                "images": [_to_entry(done) for done in self.images],
                "failures": self.failures,
            }
        )
        return run.folder

    def summary(self) -> str:
        """Returns the mean cosine of each power in one sentence."""
        columns = zip(*(done.cosine for done in self.images), strict=True)
        means = (sum(column) / len(column) for column in columns)
        parts = (f"{n}: {mean:.2f}" for n, mean in zip(self.powers, means, strict=True))
        return f"Cosine to the changed map by power: {', '.join(parts)}."

    def __repr__(self) -> str:
        return f"AppliedOperator: {self.summary()}"


def apply_operator(
    operator: Operator,
    inverter: Inverter,
    jobs: Sequence[Job],
    powers: Sequence[int] = (0, 1),
    *,
    name: str = "",
    progress: bool = False,
) -> AppliedOperator:
    """Applies powers of an operator to the features of pictures, and inverts the results.

    Pictures go through the source of the operation first; for `colourise` they are made grey. If
    the operation is not one of this package, which is logged, pictures are taken as they are. A
    picture that cannot be read is listed among the failures.

    Args:
        jobs: what `runs.sampling.make_jobs` gives for one sample per picture; all powers share its
            noise.
        powers: powers n of Q; 0 leaves the features as they are.
        name: name or file of the operator, for the manifest.

    Raises:
        InputError: an operator of other features or weights, bad powers, samples that are not
            finite, or no picture that can be read.
    """
    jobs = _with_outputs(jobs, powers)
    operator.check(inverter.spec, weights_sha256({"": inverter.require_backbone().model}))
    edits = [operator.edit(n, spec=inverter.spec) for n in powers]
    if (source := _source_of(operator)) is None:
        logger.warning(
            "The operation %r is not one of this package; pictures are taken as they are, so they "
            "must be what the operation starts from.",
            operator.record.operation,
        )
    scope, done, failures = open_scope(inverter), [], []
    with advancing(inverter, len(jobs) * len(powers), progress):
        for job in jobs:
            try:
                original, features = _encode(inverter, job.input, source or keep)
            except InputError as error:
                failures.append({"input": job.input, "error": str(error)})
                continue
            maps = [edit(features) for edit in edits]
            done.append(_invert(inverter, job, original, maps, scope))
    if not done:
        raise InputError("\n".join(failure["error"] for failure in failures))
    return AppliedOperator(operator, name, powers, inverter.settings, done, failures, scope.basis)


def _with_outputs(jobs: Sequence[Job], powers: Sequence[int]) -> list[Job]:
    """Returns the jobs with an output for each power; all powers share the seed of the sample."""
    if not powers or not all(0 <= n <= MAX_POWER for n in powers) or len({*powers}) < len(powers):
        raise InputError(
            f"Powers must be distinct whole numbers in 0 … {MAX_POWER}, got {[*powers]}."
        )
    stems = [job.outputs[0].removesuffix("_0.png") for job in jobs]
    return [
        Job(job.input, tuple(f"{stem}_power{n}.png" for n in powers), job.seeds)
        for job, stem in zip(jobs, stems, strict=True)
    ]


def _encode(inverter: Inverter, path: str, source: PixelMap) -> tuple[Image.Image, Features]:
    """Returns what the backbone sees of a picture, and its features."""
    square = center_square(read_image(path), max(inverter.require_backbone().input_size))
    pixels = source(to_tensor(square))
    features = inverter.encode(pixels).as_subclass(Tensor)
    return (square if source is keep else to_pil(pixels)[0]), features


def _invert(
    inverter: Inverter, job: Job, original: Image.Image, maps: Sequence[Features], scope: Scope
) -> Applied:
    pictures, cosines, p_values = [], [], []
    pairs = ((features[0], job.seeds[0]) for features in maps)
    for features, batch in zip(maps, sample_maps(inverter, pairs, batch_size=1), strict=True):
        if not all(batch.finite):
            raise InputError(not_finite(job.name, inverter))
        pictures += to_pil(batch.images)
        cosines.append(batch.cosine.double().mean().item())
        p_values.append(scope.p_value(features, cosines[-1]))
    known = None if None in p_values else p_values
    return Applied(job, original, pictures, cosines, known)


def _source_of(operator: Operator) -> PixelMap | None:
    """Returns the source of the operator's operation; None if the operation is not known."""
    try:
        return operation_of(operator).source
    except InputError:
        return None


def _given(operator: Operator) -> str:
    """Returns in words what the backbone saw of a picture."""
    source = _source_of(operator)
    if source is None:
        return "the picture, for the operation is not known"
    return "the picture" if source is keep else f"what {operator.record.operation} starts from"


def _to_entry(done: Applied) -> dict[str, Any]:
    return {
        "input": done.job.input,
        "outputs": list(done.job.outputs),
        "seed": list(done.job.seeds),
        "cosine": done.cosine,
        "scope_p_value": done.scope_p_value,
    }


def _grid_of(found: AppliedOperator) -> Grid:
    operator, record = found.operator, found.operator.record
    values = "".join(f", {key} {value}" for key, value in record.parameters.items())
    inverter = "" if found.settings is None else f" · inverter {Path(found.settings.inverter).name}"
    given = "" if _source_of(operator) in (keep, None) else f" First column: {_given(operator)}."
    return Grid(
        [
            GridRow(done.original, done.job.name, done.pictures, to_captions(done.cosine))
            for done in found.images[:MAX_GRID_ROWS]
        ],
        title=f"{record.operation} in the features of {operator.spec.backbone}",
        subtitle=f"{record.method} operator{values} · layer {operator.spec.layer}{inverter}\n"
        f"Under each picture: cosine of its features to the map it was made from.{given}",
        headers=[
            "unedited" if n == 0 else "Q" if n == 1 else f"Q to the {n}" for n in found.powers
        ],
    )


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
    side, fitted_on = max(backbone.input_size), operator.record.image_digests
    drawn = draw_images(images, n_images, seed, side, fitted_on)
    with progress_bar(n_images, progress, "measuring", "images") as advance:
        found = measure_held_out(
            operator,
            operation,
            backbone,
            drawn,
            inverter=inverter,
            powers=powers,
            batch_size=batch_size,
            seed=seed,
            advance=advance,
        )
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
        pixels = to_tensor([image.square for image in batch]).to(backbone.device)
        features = backbone.features(operation.source(pixels))
        true = {n: backbone.features(operation.repeated(pixels, n)) for n in powers}
        edited = {n: edit(features) for n, edit in edits.items()}
        for n in powers:
            _add(found.columns[n], "cosine", feature_cosine(true[n], edited[n]))
            _add(found.columns[n], "cosine_nothing", feature_cosine(true[n], features))
        if inverter is not None:
            _compare(found, inverter, operation, batch, features, true, edited, seed)
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
    batch: Sequence[Drawn],
    features: Features,
    true: Mapping[int, Features],
    edited: Mapping[int, Features],
    seed: int,
) -> None:
    """Adds the measurements in the samples of a batch."""
    seeds = [derive_seed(seed, image.id, 0) for image in batch]

    def invert(maps: Features) -> Images:
        return sample_each(inverter, maps, seeds)

    reconstructed = invert(features)
    originals = _squares([image.picture for image in batch], reconstructed)
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
