"""How much of an image each stage of a model keeps: MSE of its reconstruction from there.

Source: "Inverting DETR" (modular inversion), section 4.1 and figure 3.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from featinv_diffusion.backbones.traced import to_meta
from featinv_diffusion.data.boxes import (
    BoxedImages,
    coco_annotations,
    crop_boxes,
    open_boxed_images,
)
from featinv_diffusion.data.crops import Crop, DataConfig, split_held_back
from featinv_diffusion.data.sets import open_images
from featinv_diffusion.errors import InputError, choices_hint
from featinv_diffusion.figures.board import write_bars, write_grid, write_tradeoff
from featinv_diffusion.images import center_square, to_tensor
from featinv_diffusion.inverters.detr import DetrPath
from featinv_diffusion.inverters.modular import TUNING, ModularInverter, load_modular
from featinv_diffusion.inverters.path import ForwardPath
from featinv_diffusion.inverters.vit import AnalyticPatchInverse, VitPath
from featinv_diffusion.metrics.detection import average_precision, best_query_scores
from featinv_diffusion.metrics.statistics import bootstrap_mean
from featinv_diffusion.types import Images

# ---- What a model keeps of colour ----

HUES = {"red": 0.0, "green": 1 / 3, "blue": 2 / 3}
"""Filters that set the hue, in turns."""
TURNS = {"+120": 1 / 3, "+240": 2 / 3}
"""Filters that turn the hue."""
NONE, GREY = "none", "grey"
COMPARED = (NONE, *HUES, *TURNS)
"""The versions of an image whose pairwise differences are measured: 15 pairs."""
FILTERS = (*COMPARED, GREY)


def recolour(
    images: Images, inside: Bool[Tensor, "b height width"], name: str
) -> Float[Tensor, "b 3 height width"]:
    """Changes the hue inside the masks; `grey` removes colour everywhere.

    Saturation and value stay, so grey pixels stay grey. The result is rounded to 8 bits, as is
    that of `none`, which thus differs from another filter by the filter alone.

    Raises:
        InputError: unknown filter.
    """
    if name not in FILTERS:
        raise InputError(f"No colour filter is named {name!r}; {choices_hint(name, list(FILTERS))}")
    if name == GREY:
        weights = images.new_tensor([0.299, 0.587, 0.114])[:, None, None]
        changed = (images * weights).sum(1, keepdim=True).expand_as(images)
    elif name == NONE:
        changed = images
    else:
        changed = torch.where(inside[:, None], _with_hue(images, name), images)
    return (changed * 255).round() / 255


def pairwise_mse(versions: Mapping[str, Images]) -> Float[Tensor, " b"]:
    """Returns per image the MSE between two versions, averaged over all pairs."""
    pairs = list(combinations(versions.values(), 2))
    errors = [(a - b).square().mean(dim=(1, 2, 3)) for a, b in pairs]
    return torch.stack(errors).mean(0)


def _with_hue(images: Tensor, name: str) -> Tensor:
    hsv = rgb_to_hsv(images.movedim(1, -1).double().numpy())
    hue = HUES[name] if name in HUES else (hsv[..., 0] + TURNS[name]) % 1
    hsv[..., 0] = hue
    return torch.from_numpy(np.asarray(hsv_to_rgb(hsv))).movedim(-1, 1).to(images.dtype)


# ---- States within the stages, through inverses that were trained on the last of them ------------


def matching_states(inverter: ModularInverter, stage: str) -> list[str]:
    """Returns the stages and states whose shape the inverse of a stage reads, in order.

    Of several names of one state, such as the last state of a stage and the stage itself, only the
    stage that was asked for, or else a main stage, is returned.
    """
    specs = inverter.path.specs
    wanted = specs[stage]
    found = [
        name
        for name, spec in specs.items()
        if (spec.kind, spec.channels, spec.grid) == (wanted.kind, wanted.channels, wanted.grid)
    ]
    return _drop_aliases(inverter.path, stage, found)


def _drop_aliases(path: ForwardPath, stage: str, names: Sequence[str]) -> list[str]:
    """Leaves out the names under which a forward pass (on the meta device) hands on one tensor."""
    ghost = to_meta(path)
    pixels = torch.zeros(1, 3, *path.input_size, device="meta")
    with torch.no_grad():
        states = ghost.embeddings(pixels, names)
    chosen: dict[int, str] = {}
    for name in sorted(names, key=lambda name: (name != stage, name not in path.main_stages)):
        chosen.setdefault(id(states[name]), name)
    return [name for name in names if name in chosen.values()]


@torch.no_grad()
def invert_states(
    inverter: ModularInverter,
    images: Images,
    stage: str,
    states: Sequence[str],
    batch_size: int = 32,
) -> dict[str, Images]:
    """Returns reconstructions of every state through the chain of one stage, on the CPU."""
    chain = inverter.chain(stage)
    parts: dict[str, list[Tensor]] = {state: [] for state in states}
    for batch in images.split(batch_size):
        found = inverter.path.embeddings(batch.to(inverter.path.device), states)
        for state in states:
            parts[state].append(chain.invert(found[state]).cpu())
    return {state: torch.cat(part) for state, part in parts.items()}


AVERAGE = "average image"


@torch.no_grad()
def reconstruct_stages(
    inverter: ModularInverter, images: Images, stages: Sequence[str], batch_size: int = 32
) -> dict[str, Images]:
    """Returns the reconstructions from each stage, on the CPU."""
    chains = {stage: inverter.chain(stage) for stage in stages}
    parts: dict[str, list[Tensor]] = {stage: [] for stage in stages}
    for batch in images.split(batch_size):
        found = inverter.path.embeddings(batch.to(inverter.path.device), stages)
        for stage, chain in chains.items():
            parts[stage].append(chain.invert(found[stage]).cpu())
    return {stage: torch.cat(part) for stage, part in parts.items()}


@torch.no_grad()
def invert_patch_embedding(path: VitPath, images: Images) -> dict[str, float]:
    """Undoes the patch embedding in closed form, in float64.

    Returns:
        `condition_number` of the embedding and `max_error` of the pixels.

    Raises:
        InputError: the model norms its patches before the first block.
    """
    exact = VitPath(deepcopy(path.model).double(), name=path.name, preprocessing=path.preprocessing)
    module = AnalyticPatchInverse.from_path(exact)
    tokens = exact.embeddings(images, ["patches"])["patches"]
    error = float((module(tokens) - images).abs().max())
    return {"condition_number": module.condition_number, "max_error": error}


def stage_mse(reconstructions: dict[str, Images], images: Images) -> dict[str, Float[Tensor, " b"]]:
    """Returns the MSE of each image in [0, 1] by stage, and that of the average image.

    The average is that of these images, so no constant picture scores better.
    """
    guess = images.mean(0, keepdim=True).expand_as(images)
    candidates = {**reconstructions, AVERAGE: guess}
    return {
        name: (other - images).square().mean(dim=(1, 2, 3)) for name, other in candidates.items()
    }


# ---- The pictures of an analysis of stages ----

N_DEFAULT = 250
"""Images of an analysis, where the data have as many and no number is asked for."""


@dataclass(frozen=True, eq=False)
class PictureSet:
    """Images of one size.

    Args:
        images: 8-bit values in [0, 1].
        objects: per image `class_labels` and `boxes` (centre x, centre y, width, height, as
            shares); None where the data have no boxes.
        inside: where objects are: their masks, or else their boxes, or else everywhere.
    """

    ids: list[str]
    images: Images
    objects: list[dict[str, Tensor]] | None
    inside: Bool[Tensor, "b height width"]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class PictureChoice:
    """Which pictures to take.

    Args:
        data: folder of COCO, or of Tiny-ImageNet-200 for its training images with boxes; else a
            folder of pictures, parquet file or Hub name, without objects.
        split: such as `val2017`; `train` for Tiny-ImageNet's boxes.
        n_images: spread evenly over the data; None takes at most `N_DEFAULT`.
        classes: text file with a class folder per line.
        held_back_per_class: of boxes: only the last k images of each class, as training holds
            back.
    """

    data: str
    split: str = "validation"
    n_images: int | None = None
    classes: str | None = None
    held_back_per_class: int = 0


def load_pictures(choice: PictureChoice, size: tuple[int, int]) -> PictureSet:
    """Decodes the pictures at (h, w) = `size`; those with boxes are squashed, others cut square.

    Raises:
        InputError: no pictures there, or fewer than asked for.
    """
    root = Path(choice.data).expanduser()
    if coco_annotations(root, choice.split).is_file() or _has_boxes(root / choice.split):
        return _load_with_objects(choice, size)
    images = open_images(choice.data, choice.split, choice.classes)
    rows = _spread(range(len(images)), choice.n_images)
    side = max(size)
    pictures = [center_square(images.read(i), side).resize((size[1], size[0])) for i in rows]
    inside = torch.ones(len(rows), *size, dtype=torch.bool)
    return PictureSet([images.ids[i] for i in rows], to_tensor(pictures), None, inside)


def _load_with_objects(choice: PictureChoice, size: tuple[int, int]) -> PictureSet:
    images = open_boxed_images(
        DataConfig(root=choice.data, split=choice.split, classes=choice.classes)
    )
    held = choice.held_back_per_class
    members = split_held_back(images.labels or [], held)[1] if held else range(len(images))
    rows = _spread(members, choice.n_images)
    pictures: list[Image.Image] = []
    objects: list[dict[str, Tensor]] = []
    inside: list[Tensor] = []
    for i in rows:
        picture = images.read(i)
        whole = Crop((0, 0, picture.height, picture.width), hflip=False, vflip=False)
        seen = crop_boxes(images.boxes(i), whole)
        boxes = torch.tensor([box for box, _ in seen]).reshape(-1, 4)
        labels = torch.tensor([label for _, label in seen], dtype=torch.long)
        pictures.append(picture.resize((size[1], size[0]), Image.Resampling.BILINEAR))
        objects.append({"class_labels": labels, "boxes": boxes})
        inside.append(_inside(images, i, boxes, size))
    ids = [images.ids[i] for i in rows]
    return PictureSet(ids, to_tensor(pictures), objects, torch.stack(inside))


def _inside(images: BoxedImages, index: int, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """The union of the objects: one pixel belongs to it once, however many there are."""
    if images.masks is not None:
        mask = torch.from_numpy(images.masks(index).any(0)).float()[None, None]
        return F.interpolate(mask, size, mode="nearest")[0, 0] > 0.5
    found = np.zeros(size, bool)
    for x, y, width, height in boxes.tolist():
        rows = slice(round((y - height / 2) * size[0]), round((y + height / 2) * size[0]))
        columns = slice(round((x - width / 2) * size[1]), round((x + width / 2) * size[1]))
        found[rows, columns] = True
    return torch.from_numpy(found)


def _has_boxes(folder: Path) -> bool:
    return folder.is_dir() and next(folder.glob("*/*_boxes.txt"), None) is not None


def _spread(members: range | list[int], n: int | None) -> list[int]:
    if n is None:
        n = min(N_DEFAULT, len(members))
    if n > len(members) or n < 1:
        raise InputError(f"There are {len(members)} images to choose from, but {n} came.")
    places = torch.linspace(0, len(members) - 1, n).round().long().tolist()
    return [members[place] for place in places]


# ---- Reconstruction against detection of detectors that were tuned for both, by λ ----------------

ISOLATED = "isolated"
"""The inverter whose modules were trained on their own, on the detector as it came."""


@dataclass(frozen=True, eq=False)
class Tradeoff:
    """One detector and its inverter.

    Args:
        weight: λ, the share of reconstruction; None for `ISOLATED`.
        mse: per image, in [0, 1].
        scores: of `best_query_scores` and `average_precision`.
    """

    weight: float | None
    mse: Float[Tensor, " b"]
    scores: dict[str, float]
    reconstructions: Float[Tensor, "b 3 h w"]

    @property
    def name(self) -> str:
        return ISOLATED if self.weight is None else f"λ = {self.weight:g}"


def measure_tradeoff(
    inverter: ModularInverter,
    pictures: PictureSet,
    weight: float | None,
    stage: str = "decoder",
    batch_size: int = 32,
) -> Tradeoff:
    """Measures one detector on pictures with boxes.

    Raises:
        InputError: no DETR, no boxes, or pycocotools is not installed.
    """
    found = reconstruct_stages(inverter, pictures.images, [stage], batch_size)[stage]
    mse = (found - pictures.images).square().mean(dim=(1, 2, 3))
    scores = detection_scores(inverter, pictures, pictures.images, batch_size)
    return Tradeoff(weight, mse, scores, found)


@torch.no_grad()
def detection_scores(
    inverter: ModularInverter,
    pictures: PictureSet,
    images: Float[Tensor, "b 3 h w"],
    batch_size: int = 32,
) -> dict[str, float]:
    """Returns how well the objects of the pictures are found in images of them."""
    path = inverter.path
    if not isinstance(path, DetrPath) or pictures.objects is None:
        raise InputError("Detection needs a DETR and pictures with boxes, see --data and --split.")
    parts = [
        path.embeddings(batch.to(path.device), ["prediction"])["prediction"].cpu()
        for batch in images.split(batch_size)
    ]
    predicted = path.split(torch.cat(parts))
    size = (images.shape[-2], images.shape[-1])
    precision = average_precision(*predicted, pictures.objects, size)
    return best_query_scores(*predicted, pictures.objects) | precision


def read_weight(folder: str) -> float | None:
    """Returns λ of an inverter in a folder; None where it was not tuned end to end."""
    path = Path(folder).expanduser().parent / TUNING
    return json.loads(path.read_text())["reconstruction_weight"] if path.is_file() else None


# ---- `stages` ----

MSE = "MSE of pixels in [0, 1], 95 % interval"
PAIRWISE = "MSE between two versions, 95 % interval"

Study = Callable[[Sequence[str], PictureSet, Path], dict[str, Any]]


def study_stages(names: Sequence[str], pictures: PictureSet, folder: Path) -> dict[str, Any]:
    """MSE of the reconstruction from every stage that has an inverse, beside the average image."""
    inverter = _only(names)
    stages = [s for s in inverter.path.specs if s in inverter.inverses.chainable()]
    found = reconstruct_stages(inverter, pictures.images, stages)
    intervals = {name: bootstrap_mean(v) for name, v in stage_mse(found, pictures.images).items()}
    baseline = (AVERAGE, intervals[AVERAGE])
    bars = {stage: intervals[stage] for stage in stages}
    title = f"Reconstruction from the stages of {inverter.path.name}"
    write_bars(bars, folder / "stage_mse.png", title, MSE, baseline)
    notes = [_note(pictures)]
    columns = {"original": pictures.images, **found}
    write_grid(columns, folder / "stages.png", title, notes)
    metrics: dict[str, Any] = {"stage_mse": _to_dicts(intervals)}
    if isinstance(inverter.path, VitPath) and inverter.path.embeds_linearly:
        few = pictures.images[:8]
        metrics["patch_embedding"] = invert_patch_embedding(inverter.path, few)
    return metrics


def study_layers(names: Sequence[str], pictures: PictureSet, folder: Path) -> dict[str, Any]:
    """States within the stages through every inverse whose shape they have."""
    inverter = _only(names)
    metrics: dict[str, Any] = {}
    for stage in inverter.inverses.chainable():
        states = matching_states(inverter, stage)
        if len(states) < 2:
            continue
        found = invert_states(inverter, pictures.images, stage, states)
        errors = stage_mse(found, pictures.images)
        metrics[stage] = _to_dicts({name: bootstrap_mean(v) for name, v in errors.items()})
        title = f"States of {inverter.path.name} through the inverse of {stage!r}"
        columns = {"original": pictures.images, **found}
        write_grid(columns, folder / f"layers-{stage}.png", title, [_note(pictures)], n_rows=4)
    return {"layer_mse": metrics}


def study_colour(names: Sequence[str], pictures: PictureSet, folder: Path) -> dict[str, Any]:
    """Differences between recoloured versions, in the input and from each stage."""
    inverter = _only(names)
    stages = [s for s in inverter.path.main_stages if s in inverter.inverses.chainable()]
    versions = {name: recolour(pictures.images, pictures.inside, name) for name in FILTERS}
    found = {name: reconstruct_stages(inverter, v, stages) for name, v in versions.items()}
    table: dict[str, dict[str, Tensor]] = {"input": versions}
    table |= {stage: {name: found[name][stage] for name in FILTERS} for stage in stages}
    intervals = {
        stage: bootstrap_mean(pairwise_mse({name: row[name] for name in COMPARED}))
        for stage, row in table.items()
    }
    title = f"Recoloured objects through {inverter.path.name}"
    write_bars(intervals, folder / "pairwise_mse.png", title, PAIRWISE)
    for i in range(min(4, len(pictures))):
        rows = {name: _column(table, name, i) for name in FILTERS}
        note = "Rows: input, " + ", ".join(stages) + "."
        write_grid(rows, folder / f"colour-{i}.png", title, [note])
    metrics: dict[str, Any] = {"pairwise_mse": _to_dicts(intervals)}
    if isinstance(inverter.path, DetrPath) and pictures.objects is not None:
        metrics["detection"] = {
            name: detection_scores(inverter, pictures, v) for name, v in versions.items()
        }
    return metrics


def study_tradeoff(names: Sequence[str], pictures: PictureSet, folder: Path) -> dict[str, Any]:
    """MSE and average precision of detectors that were tuned with several λ."""
    points = [measure_tradeoff(load_modular(n), pictures, read_weight(n)) for n in names]
    points.sort(key=lambda point: -1.0 if point.weight is None else point.weight)
    mse = [bootstrap_mean(point.mse) for point in points]
    labels = [point.name for point in points]
    write_tradeoff(labels, mse, [p.scores["ap"] for p in points], folder / "tradeoff.png")
    columns = {"original": pictures.images}
    columns |= {point.name: point.reconstructions for point in points}
    title = "Reconstructions from the decoder of detectors tuned for both"
    write_grid(columns, folder / "reconstructions.png", title, [_note(pictures)])
    rows = [
        {"weight": point.weight, "mse": asdict(value), **point.scores}
        for point, value in zip(points, mse, strict=True)
    ]
    return {"tradeoff": rows}


STUDIES: dict[str, Study] = {
    "stages": study_stages,
    "layers": study_layers,
    "colour": study_colour,
    "tradeoff": study_tradeoff,
}
"""By the name on the command line; each takes inverters, pictures and a folder for figures."""


def _only(names: Sequence[str]) -> ModularInverter:
    if len(names) != 1:
        raise InputError(f"This analysis takes one --inverter, but {len(names)} came.")
    return load_modular(names[0])


def _to_dicts(intervals: dict[str, Any]) -> dict[str, Any]:
    return {name: asdict(interval) for name, interval in intervals.items()}


def _column(table: dict[str, dict[str, Tensor]], name: str, i: int) -> Tensor:
    return torch.stack([row[name][i] for row in table.values()])


def _note(pictures: PictureSet) -> str:
    height, width = pictures.images.shape[-2:]
    return f"Of {len(pictures)} images at {height}×{width} pixels."
