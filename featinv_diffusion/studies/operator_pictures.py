"""An operator on features applied to pictures, and seen through an inverter."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from featinv_diffusion import __version__
from featinv_diffusion.backbones.base import weights_sha256
from featinv_diffusion.errors import InputError
from featinv_diffusion.features.operators import MAX_POWER, Operator
from featinv_diffusion.features.pixel_operations import PixelMap, keep
from featinv_diffusion.figures.grid import Grid, GridRow
from featinv_diffusion.images import center_square, read_image, to_pil, to_tensor
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.runs.parts import WHOLE, Division, Part, describe_sampling
from featinv_diffusion.runs.progress import advancing
from featinv_diffusion.runs.record import RunFolder, read_environment
from featinv_diffusion.runs.samples import GRID, MAX_GRID_ROWS, to_captions
from featinv_diffusion.runs.sampling import Job, not_finite, sample_maps
from featinv_diffusion.runs.scope import Scope, open_scope
from featinv_diffusion.runs.units import FAILURES
from featinv_diffusion.settings import SampleSettings, to_flat
from featinv_diffusion.studies.operators import describe_edits, operation_of
from featinv_diffusion.types import Features

logger = logging.getLogger(__name__)


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
    division: Division = WHOLE,
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
        division: of the pictures among processes.

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

    def measure(job: Job) -> Part:
        try:
            original, features = _encode(inverter, job.input, source or keep)
        except InputError as error:
            return Part({}, {FAILURES: [{"input": job.input, "error": str(error)}]})
        return _invert(inverter, original, job, [edit(features) for edit in edits], scope)

    def describe() -> dict[str, Any]:
        return {**describe_sampling(inverter), **describe_edits(operator, powers)}

    with advancing(inverter, division.share(len(jobs)) * len(powers), progress):
        for job, part in zip(jobs, division.each(jobs, measure, describe), strict=True):
            if part.tensors:
                done.append(_to_applied(job, part))
            failures += part.content.get(FAILURES, [])
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
    square = center_square(read_image(path), max(inverter.require_backbone().picture_size))
    pixels = source(to_tensor(square))
    features = inverter.encode(pixels).as_subclass(Tensor)
    return (square if source is keep else to_pil(pixels)[0]), features


def _invert(
    inverter: Inverter, original: Image.Image, job: Job, maps: Sequence[Features], scope: Scope
) -> Part:
    pictures, cosines, p_values = [], [], []
    pairs = ((features[0], job.seeds[0]) for features in maps)
    for features, batch in zip(maps, sample_maps(inverter, pairs, batch_size=1), strict=True):
        if not all(batch.finite):
            raise InputError(not_finite(job.name, inverter))
        pictures += to_pil(batch.images)
        cosines.append(batch.cosine.double().mean().item())
        p_values.append(scope.p_value(features, cosines[-1]))
    shown = {"original": to_tensor([original]), "pictures": to_tensor(pictures)}
    tensors = {name: (images * 255).round().byte() for name, images in shown.items()}
    known = None if None in p_values else p_values
    return Part(tensors, {"cosine": cosines, "scope_p_value": known})


def _to_applied(job: Job, part: Part) -> Applied:
    original, *pictures = (
        picture for name in ("original", "pictures") for picture in to_pil(part.tensors[name] / 255)
    )
    return Applied(job, original, pictures, part.content["cosine"], part.content["scope_p_value"])


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
