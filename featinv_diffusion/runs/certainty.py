"""Certainty of a pipeline's samples: its calibration, the file that keeps it, and who is judged."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from featinv_diffusion import schema
from featinv_diffusion.backbones.base import weights_sha256
from featinv_diffusion.backbones.names import read_spec
from featinv_diffusion.data.selection import Item, select_items
from featinv_diffusion.data.sets import ImageSet, open_images
from featinv_diffusion.diffusion.hub import find_certainty_file
from featinv_diffusion.errors import InputError
from featinv_diffusion.files import read_tensors, write_tensors
from featinv_diffusion.images import center_square, to_tensor
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.metrics.certainty import (
    MIN_IMAGES,
    PARTS,
    Certainty,
    CertaintyModel,
    ErrorModel,
    fit_certainty_models,
)
from featinv_diffusion.runs.progress import Advance, progress_bar
from featinv_diffusion.runs.sampling import not_finite, sample_maps
from featinv_diffusion.runs.scope import sampling_of
from featinv_diffusion.seeds import derive_seed
from featinv_diffusion.settings import DIFFUSION, Selection
from featinv_diffusion.types import Features, FeatureSpec, Images

logger = logging.getLogger(__name__)

FORMAT = "featinv-certainty/1"
COMMAND = "featinv certainty PIPELINE_FOLDER --data HELD_OUT_IMAGES"


@dataclass(frozen=True, eq=False)
class CertaintyCalibration:
    """Models of the errors of one inverter's samples, by its settings and the number of samples.

    Args:
        spec: the features that are inverted.
        weights_sha256: digest of the weights of inverter and backbone.
        models: settings on which samples depend (`runs.scope.sampling_of`), and a model of each
            number of samples.
    """

    spec: FeatureSpec
    weights_sha256: str
    models: tuple[tuple[dict[str, Any], CertaintyModel], ...]

    def of(self, sampling: Mapping[str, Any]) -> tuple[CertaintyModel, ...]:
        """Returns the models of samples that are made with these settings, by number of samples."""
        found = [model for settings, model in self.models if settings == sampling]
        return tuple(sorted(found, key=lambda model: model.n_samples))

    def with_models_of(self, other: CertaintyCalibration) -> CertaintyCalibration:
        """Returns the models of both; of settings that both have, those of `self`."""
        own = [settings for settings, _ in self.models]
        kept = tuple(entry for entry in other.models if entry[0] not in own)
        return replace(self, models=(*kept, *self.models))

    def save(self, path: Path) -> None:
        """Writes a file, whole or not at all.

        Raises:
            InputError: a place where nothing can be written.
        """
        tensors: dict[str, Tensor] = {}
        for i, (_, model) in enumerate(self.models):
            tensors[f"{i}.scale"] = model.scale.float()
            for part, held in model.models.items():
                tensors |= {f"{i}.{part}.{name}": value for name, value in vars(held).items()}
        entries = [
            {"sampling": settings, "n_samples": model.n_samples, "n_images": model.n_images}
            for settings, model in self.models
        ]
        header = {
            "spec": asdict(self.spec),
            "weights_sha256": self.weights_sha256,
            "entries": entries,
        }
        # Models of one calibration share tensors, which the format does not allow.
        write_tensors(path, {k: value.clone() for k, value in tensors.items()}, header, FORMAT)

    @classmethod
    def load(cls, path: Path) -> CertaintyCalibration:
        """Reads what `save` wrote.

        Raises:
            InputError: a damaged file, or one that holds something else.
        """
        advice = f"Calibrate again with {COMMAND}."
        tensors, header = read_tensors(path, FORMAT, advice)
        held: _Header = schema.convert(header, _Header, "its header")
        try:
            models = tuple(
                (
                    entry.sampling,
                    CertaintyModel(
                        entry.n_samples,
                        entry.n_images,
                        tensors[f"{i}.scale"],
                        {part: _model_of(f"{i}.{part}.", tensors) for part in PARTS},
                    ),
                )
                for i, entry in enumerate(held.entries)
            )
        except (KeyError, TypeError) as error:
            raise InputError(
                f"{path} must hold all models of certainty, but some are missing ({error}). "
                f"{advice}"
            ) from error
        return cls(read_spec(held.spec), held.weights_sha256, models)


@dataclass(frozen=True)
class _Entry:
    sampling: dict[str, Any]
    n_samples: int
    n_images: int


@dataclass(frozen=True)
class _Header:
    spec: dict[str, Any]
    weights_sha256: str
    entries: list[_Entry]


def _model_of(prefix: str, tensors: Mapping[str, Tensor]) -> ErrorModel:
    held = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    return ErrorModel(**held)


# ---- What figures draw ---------------------------------------------------------------------------

PIXEL_PARTS = ("luminance", "chroma")
DETERMINED = (
    "Determined: the share of the variance of natural pictures that the features fix there. Bright "
    "is determined, dark is invented."
)
DRAWN = {
    "luminance": "light of pixels",
    "chroma": "colour of pixels",
    "cell_luminance": "light of cells",
    "cell_chroma": "colour of cells",
}
"""The parts that figures show, and their names there."""


def certainty_notes(certainty: Certainty) -> list[str]:
    """Returns the line of a figure's heading that explains the maps of what is determined."""
    return [
        f"{DETERMINED} Judged by {certainty.n_samples} samples, calibrated on "
        f"{certainty.n_images} held-out pictures."
    ]


# ---- Judging samples -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class CertaintyJudge:
    """Says what is determined of pictures, where samples like theirs are calibrated.

    Args:
        models: by number of samples; none where there is no calibration that fits.
        why_not: the reason then, after "since".
    """

    models: tuple[CertaintyModel, ...] = ()
    why_not: str = ""

    def model_for(self, n_samples: int) -> CertaintyModel | None:
        """Returns the model of the most samples that are at hand."""
        return next((m for m in reversed(self.models) if m.n_samples <= n_samples), None)

    def judge(self, images: Images, features: Features) -> Certainty | None:
        """Returns the certainty of a picture by the first of its samples; None if uncalibrated."""
        model = self.model_for(len(images))
        return None if model is None else model.judge(images, features)

    def note(self, n_samples: int) -> str:
        """Returns the sentence about certainty that is not calibrated; nothing where it is."""
        if not self.models:
            return f"Certainty: uncalibrated, since {self.why_not}"
        if self.model_for(n_samples) is None:
            least = self.models[0].n_samples
            return f"Certainty: uncalibrated, since it needs at least {least} samples."
        return ""

    def require(self, n_samples: int) -> None:
        """Raises `InputError` unless so many samples can be judged."""
        if note := self.note(n_samples):
            why = note.removeprefix("Certainty: uncalibrated, since ")
            raise InputError(f"Certainty must be calibrated for these samples, but is not: {why}")


def open_certainty(
    inverter: Inverter, calibration: CertaintyCalibration | None = None
) -> CertaintyJudge:
    """Finds the calibration of an inverter's samples.

    Args:
        calibration: of `fit_certainty`; None takes that in the inverter's pipeline.

    Raises:
        InputError: a file that is damaged.
    """
    settings = inverter.settings
    if inverter.is_deterministic:
        return CertaintyJudge((), "a deterministic inverter makes one sample, which has no spread.")
    if calibration is None:
        if settings is None or settings.inverter != DIFFUSION or settings.pipeline is None:
            return CertaintyJudge((), "only pipelines of the diffusion inverter hold one.")
        path = find_certainty_file(settings.pipeline)
        if path is None:
            return CertaintyJudge((), f"this pipeline holds none. Make it with: {COMMAND}.")
        calibration = CertaintyCalibration.load(path)
    if digest_of(inverter) != calibration.weights_sha256:
        return CertaintyJudge(
            (), f"it was made with other weights, or another --dtype. Make it with: {COMMAND}."
        )
    if not (models := calibration.of(sampling_of(inverter))):
        return CertaintyJudge(
            (),
            "it was made with other settings of the sampler. Sample with the pipeline's own, or "
            f"make it with: {COMMAND} --quality ….",
        )
    return CertaintyJudge(models)


def digest_of(inverter: Inverter) -> str:
    """Returns the digest of all weights that samples and their features depend on."""
    return weights_sha256({**inverter.networks, "backbone": inverter.require_backbone().model})


# ---- Calibrating ---------------------------------------------------------------------------------


def calibrate_certainty(
    inverter: Inverter,
    data: str | Path,
    *,
    split: str = "validation",
    classes: str | None = None,
    held_back_per_class: int = 0,
    n_images: int = 200,
    n_samples: int = 8,
    batch_size: int = 8,
    progress: bool = False,
) -> CertaintyCalibration:
    """Learns how far samples lie from true pictures, as `featinv certainty` does.

    Args:
        data: folder, parquet file or Hub name of pictures that neither backbone nor inverter was
            trained on.
        split, classes: which part of the data.
        held_back_per_class: only the last k pictures of each class; 0 takes all.
        n_images: largest number of pictures, drawn evenly over classes.
        n_samples: of each picture.
        batch_size: samples per batch.
        progress: show a progress bar on stderr.

    Raises:
        InputError: as `fit_certainty`.
    """
    images = open_images(str(data), split, classes)
    for note in images.notes:
        logger.warning("%s", note)
    selection = Selection(
        n_images=min(n_images, len(images)), held_back_per_class=held_back_per_class
    )
    items = select_items(images, selection)
    if not progress:
        return fit_certainty(inverter, images, items, n_samples, batch_size)
    with progress_bar(len(items), doing="sampling", noun="pictures") as advance:
        return fit_certainty(inverter, images, items, n_samples, batch_size, advance)


def fit_certainty(
    inverter: Inverter,
    images: ImageSet,
    items: Sequence[Item],
    n_samples: int = 8,
    batch_size: int = 8,
    advance: Advance = lambda n: None,
) -> CertaintyCalibration:
    """Samples held-out pictures and fits how far they err, for 2, 4, 8 … up to `n_samples`.

    Args:
        items: of pictures that neither backbone nor inverter was trained on, see `select_items`.
        n_samples: of each picture, with the noise of `featinv sample`.
        advance: called with the number of pictures that are done.

    Raises:
        InputError: too few pictures or samples, a picture that cannot be read, samples that are
            not finite, or a deterministic inverter.
    """
    if inverter.is_deterministic:
        raise InputError(
            "Certainty is calibrated on the spread of samples, but a deterministic inverter makes "
            "one. Name a diffusion pipeline."
        )
    if len(items) < MIN_IMAGES or n_samples < 2:
        raise InputError(
            f"Certainty needs at least {MIN_IMAGES} held-out pictures and 2 samples of each, got "
            f"{len(items)} and {n_samples}."
        )
    order = sorted(items, key=lambda item: derive_seed("certainty", item.id))
    known = list(_encoded(inverter, images, order))
    scale = channel_scale(torch.cat([maps for _, maps in known]))
    names = [images.noise_name(item.index) for item in order]
    pictures = _sampled(inverter, known, names, n_samples, batch_size, advance)
    counts = {n_samples, *(2**k for k in range(1, n_samples.bit_length()))}
    sampling = sampling_of(inverter)
    models = tuple((sampling, m) for m in fit_certainty_models(pictures, counts, scale))
    return CertaintyCalibration(inverter.spec, digest_of(inverter), models)


def _of_size(images: Images, size: Sequence[int]) -> Float[Tensor, "b 3 _ _"]:
    """Returns images as large as samples are, where the backbone reads them larger or smaller."""
    if images.shape[2:] == tuple(size):
        return images
    return F.interpolate(images, tuple(size), mode="bilinear", antialias=True)


def channel_scale(maps: Features) -> Tensor:
    """Returns the deviation of each channel over all cells of natural maps; never 0."""
    return maps.float().transpose(0, 1).flatten(1).std(dim=1).clamp_min(1e-6)


@torch.no_grad()
def _encoded(
    inverter: Inverter, images: ImageSet, items: Sequence[Item]
) -> Iterator[tuple[Images, Features]]:
    backbone = inverter.require_backbone()
    for item in items:
        square = to_tensor(center_square(images.read(item.index), max(backbone.picture_size)))
        maps = backbone.features(square.to(backbone.device)).cpu()
        backbone.spec.check_features(maps)
        yield square, maps


def _sampled(
    inverter: Inverter,
    known: Sequence[tuple[Images, Features]],
    names: Sequence[str],
    n_samples: int,
    batch_size: int,
    advance: Advance,
) -> Iterator[tuple[Images, Features, Images, Features]]:
    """Yields each picture and its map with its samples and what the backbone sees in them."""
    device = inverter.require_backbone().device
    jobs = (
        (maps[0].to(device), derive_seed(0, name, j))
        for (_, maps), name in zip(known, names, strict=True)
        for j in range(n_samples)
    )
    pictures, seen = torch.zeros(0), torch.zeros(0)
    waiting = iter(known)
    for batch in sample_maps(inverter, jobs, batch_size):
        if not all(batch.finite):
            raise InputError(not_finite("The features of a picture", inverter))
        pictures = torch.cat([pictures, batch.images]) if len(pictures) else batch.images
        new = batch.features.cpu()
        seen = torch.cat([seen, new]) if len(seen) else new
        while len(pictures) >= n_samples:
            image, maps = next(waiting)
            yield _of_size(image, pictures.shape[2:]), maps, pictures[:n_samples], seen[:n_samples]
            pictures, seen = pictures[n_samples:], seen[n_samples:]
            advance(1)
