"""Pictures through an operator and an inverter, for `featinv operator apply`."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from featinv_diffusion import __version__
from featinv_diffusion.analysis.operator_study import operation_of
from featinv_diffusion.analysis.sampling import Encoded, backbone_of, encode_picture, sample_all
from featinv_diffusion.analysis.scope import Scope
from featinv_diffusion.errors import InputError
from featinv_diffusion.evaluation.fingerprints import weights_sha256
from featinv_diffusion.features.operators import MAX_POWER, Operator
from featinv_diffusion.files import write_text
from featinv_diffusion.images import center_square, read_image, to_pil, to_tensor, write_png
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.manifest import MANIFEST, read_environment
from featinv_diffusion.pixel_operations import PixelMap, keep
from featinv_diffusion.reconstruction import Job, OnFailure
from featinv_diffusion.sampling import SampleSettings
from featinv_diffusion.viz import GridRow, make_grid

GRID = "grid.png"
MAX_GRID_ROWS = 100

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Applied:
    """What became of one picture; every list has one value per power.

    Args:
        original: what the backbone saw: the square, or what the operation's source makes of it.
        pictures: R(f Qⁿ).
        cosine: of the features of each picture to the map that was inverted.
        scope_p_value: of each map, whether it is like natural ones; None where not known.
    """

    job: Job
    original: Image.Image
    pictures: list[Image.Image]
    cosine: list[float]
    scope_p_value: list[float] | None


def make_apply_jobs(jobs: Sequence[Job], powers: Sequence[int]) -> list[Job]:
    """Names an output for each power of jobs of one sample; all powers share its seed.

    Raises:
        InputError: no powers, one that comes twice, or one outside of 0 … `MAX_POWER`.
    """
    if not powers or not all(0 <= n <= MAX_POWER for n in powers) or len({*powers}) < len(powers):
        raise InputError(
            f"Powers must be distinct whole numbers in 0 … {MAX_POWER}, but {[*powers]} came."
        )
    return [
        Job(
            job.input,
            tuple(f"{job.outputs[0].removesuffix('_0.png')}_power{n}.png" for n in powers),
            job.seeds,
        )
        for job in jobs
    ]


def source_of(operator: Operator) -> PixelMap | None:
    """Returns what makes of a picture what the operation starts from; None where not known."""
    try:
        return operation_of(operator).source
    except InputError:
        return None


def apply_operator(
    operator: Operator,
    inverter: Inverter,
    jobs: Sequence[Job],
    powers: Sequence[int],
    on_failure: OnFailure,
    scope: Scope,
) -> Iterator[Applied]:
    """Yields the pictures of each job; one that cannot be read is reported instead.

    Pictures go through the operation's source first, e.g. they are made grey to be colourised;
    where the operation is not known, which is logged, they must be what it starts from.

    Raises:
        InputError: an operator of other features or weights than the inverter's.
    """
    operator.check(inverter.spec, weights_sha256({"": backbone_of(inverter).model}))
    edits = [operator.edit(n, spec=inverter.spec) for n in powers]
    if (source := source_of(operator)) is None:
        logger.warning(
            "The operation %r is none of this package's; pictures must be what it starts from, for "
            "they are given as they are.",
            operator.record.operation,
        )
    for job in jobs:
        try:
            encoded = _encode(inverter, job.input, source or keep)
        except InputError as error:
            on_failure(job, str(error))
            continue
        pictures, cosines, p_values = [], [], []
        for edit in edits:
            features = edit(encoded.features)
            sample = sample_all(inverter, features, job.seeds, batch_size=1)
            pictures += to_pil(sample.images)
            cosines.append(sample.cosine.double().mean().item())
            p_values.append(scope.p_value(features, cosines[-1]))
        known = None if None in p_values else [p for p in p_values if p is not None]
        yield Applied(job, encoded.square, pictures, cosines, known)


@torch.no_grad()
def _encode(inverter: Inverter, path: Path, source: PixelMap) -> Encoded:
    if source is keep:
        return encode_picture(inverter, path)
    backbone, picture = backbone_of(inverter), read_image(path)
    pixels = source(to_tensor(center_square(picture, max(backbone.input_size))))
    features = backbone.features(pixels.to(backbone.device))
    inverter.spec.check_features(features)
    return Encoded(picture.size, to_pil(pixels)[0], features)


def write_applied(
    applied: Sequence[Applied],
    failures: Sequence[dict[str, str]],
    operator: Operator,
    name: str,
    powers: Sequence[int],
    settings: SampleSettings,
    scope: Scope,
    folder: Path,
) -> None:
    """Writes the pictures, a grid of the first ones, and last a manifest, which has no replay.

    Args:
        name: of the operator, as it was opened.
        settings: of the inverter, resolved.
    """
    (folder / MANIFEST).unlink(missing_ok=True)
    for done in applied:
        for output, picture in zip(done.job.outputs, done.pictures, strict=True):
            write_png(picture, folder / output)
    write_png(_draw(applied[:MAX_GRID_ROWS], operator, powers, settings), folder / GRID)
    record = asdict(operator.record)
    del record["image_digests"]
    content = {
        "version": __version__,
        "command": "operator apply",
        **asdict(settings),
        "operator": name,
        "record": record,
        "powers": list(powers),
        "given": _given(operator),
        "environment": read_environment(settings.device),
        "scope_basis": scope.basis,
        "images": [_to_entry(done) for done in applied],
        "failures": list(failures),
    }
    write_text(folder / MANIFEST, json.dumps(content, indent=2, allow_nan=False) + "\n")


def _given(operator: Operator) -> str:
    """Says what of a picture the backbone saw."""
    source = source_of(operator)
    if source is None:
        return "the picture, for the operation is not known"
    return "the picture" if source is keep else f"what {operator.record.operation} starts from"


def _to_entry(done: Applied) -> dict[str, Any]:
    return {
        "input": str(done.job.input.absolute()),
        "outputs": list(done.job.outputs),
        "seed": list(done.job.seeds),
        "cosine": done.cosine,
        "scope_p_value": done.scope_p_value,
    }


def _draw(
    applied: Sequence[Applied],
    operator: Operator,
    powers: Sequence[int],
    settings: SampleSettings,
) -> Image.Image:
    rows = [
        GridRow(
            done.original,
            done.job.input.name,
            done.pictures,
            [f"cosine {round(value, 2) + 0.0:.2f}" for value in done.cosine],
        )
        for done in applied
    ]
    record = operator.record
    values = "".join(f", {key} {value}" for key, value in record.parameters.items())
    inverter = Path(settings.inverter).name
    given = "" if source_of(operator) in (keep, None) else f" First column: {_given(operator)}."
    return make_grid(
        rows,
        title=f"{record.operation} in the features of {operator.spec.backbone}",
        subtitle=f"{record.method} operator{values} · layer {operator.spec.layer} · inverter "
        f"{inverter}\nUnder each picture: cosine of its features to the map it was made from."
        f"{given}",
        headers=["unedited" if n == 0 else "Q" if n == 1 else f"Q to the {n}" for n in powers],
    )
