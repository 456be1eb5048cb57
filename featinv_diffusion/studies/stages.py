"""What the stages of a DETR or a ViT keep of an image, seen through their inverse modules.

Source: "Inverting DETR" (modular inversion), section 4.1 and figure 3. The studies are
`measure_stages`, `measure_layers`, `measure_colour` and `measure_tradeoff`.
"""

from __future__ import annotations

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
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from featinv_diffusion import schema
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
from featinv_diffusion.figures.board import BLUE, TEXT, draw_bars, draw_grid, plain_figure
from featinv_diffusion.images import center_square, to_tensor
from featinv_diffusion.inverters.chain import Chain
from featinv_diffusion.inverters.detr import DetrPath
from featinv_diffusion.inverters.modular import TUNING, ModularInverter, load_modular
from featinv_diffusion.inverters.open import find_kind, name_inverter
from featinv_diffusion.inverters.path import ForwardPath
from featinv_diffusion.inverters.vit import AnalyticPatchInverse, VitPath
from featinv_diffusion.metrics.detection import average_precision, best_query_scores
from featinv_diffusion.metrics.statistics import Interval, bootstrap_mean
from featinv_diffusion.settings import DIFFUSION, SampleSettings
from featinv_diffusion.studies.settings import ImageChoice, PictureChoice
from featinv_diffusion.studies.study import N_DEFAULT, Analysis, to_dicts, to_rows
from featinv_diffusion.types import Images

# ---- Colour --------------------------------------------------------------------------------------

HUES = {"red": 0.0, "green": 1 / 3, "blue": 2 / 3}
"""Filters that set the hue; the unit is a full turn."""
TURNS = {"+120": 1 / 3, "+240": 2 / 3}
"""Filters that turn the hue; the unit is a full turn."""
NONE, GREY = "none", "grey"
COMPARED = (NONE, *HUES, *TURNS)
"""The versions of an image whose pairwise differences are measured: 15 pairs."""
FILTERS = (*COMPARED, GREY)


def recolour(
    images: Images, inside: Bool[Tensor, "b height width"], name: str
) -> Float[Tensor, "b 3 height width"]:
    """Changes the hue inside the masks; `grey` removes colour everywhere.

    Saturation and value stay, so grey pixels stay grey. All results are rounded to 8 bits, that of
    `none` too.

    Raises:
        InputError: an unknown filter.
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
    """Returns the MSE between two versions of each image, averaged over all pairs."""
    pairs = list(combinations(versions.values(), 2))
    errors = [(a - b).square().mean(dim=(1, 2, 3)) for a, b in pairs]
    return torch.stack(errors).mean(0)


def _with_hue(images: Tensor, name: str) -> Tensor:
    hsv = rgb_to_hsv(images.movedim(1, -1).double().numpy())
    hue = HUES[name] if name in HUES else (hsv[..., 0] + TURNS[name]) % 1
    hsv[..., 0] = hue
    return torch.from_numpy(np.asarray(hsv_to_rgb(hsv))).movedim(-1, 1).to(images.dtype)


# ---- Stages, and the states within them ----------------------------------------------------------

AVERAGE = "average image"


def open_modular(name: str) -> ModularInverter:
    """Loads the modular inverter of any name or folder that `load_inverter` takes.

    Raises:
        InputError: no such inverter, or one that has no stages.
    """
    settings = name_inverter(SampleSettings(inverter=name))
    if settings.inverter == DIFFUSION or find_kind(settings.inverter).takes_pipeline:
        raise InputError(
            f"This analysis needs a modular inverter, which has stages, such as vit, got {name!r}."
        )
    return load_modular(settings.inverter)


def matching_states(inverter: ModularInverter, stage: str) -> list[str]:
    """Returns the stages and states of the shape that the inverse of a stage reads, in order.

    Several names may stand for one state, such as the last state of a stage and the stage itself.
    Then only the stage that was asked for, or else a main stage, is returned.
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
    """Keeps one name of each tensor in a forward pass, which runs on the meta device."""
    ghost = to_meta(path)
    pixels = torch.zeros(1, 3, *path.input_size, device="meta")
    with torch.no_grad():
        states = ghost.embeddings(pixels, names)
    chosen: dict[int, str] = {}
    for name in sorted(names, key=lambda name: (name != stage, name not in path.main_stages)):
        chosen.setdefault(id(states[name]), name)
    return [name for name in names if name in chosen.values()]


def invert_states(
    inverter: ModularInverter,
    images: Images,
    stage: str,
    states: Sequence[str],
    batch_size: int = 32,
) -> dict[str, Images]:
    """Returns the reconstructions of every state through the chain of one stage, on the CPU."""
    return _invert(inverter, images, dict.fromkeys(states, inverter.chain(stage)), batch_size)


def reconstruct_stages(
    inverter: ModularInverter, images: Images, stages: Sequence[str], batch_size: int = 32
) -> dict[str, Images]:
    """Returns the reconstructions from each stage, on the CPU."""
    return _invert(inverter, images, {s: inverter.chain(s) for s in stages}, batch_size)


@torch.no_grad()
def _invert(
    inverter: ModularInverter, images: Images, chains: Mapping[str, Chain], batch_size: int
) -> dict[str, Images]:
    parts: dict[str, list[Tensor]] = {state: [] for state in chains}
    for batch in images.split(batch_size):
        found = inverter.path.embeddings(batch.to(inverter.path.device), [*chains])
        for state, chain in chains.items():
            parts[state].append(chain.invert(found[state]).cpu())
    return {state: torch.cat(part) for state, part in parts.items()}


@torch.no_grad()
def invert_patch_embedding(path: VitPath, images: Images) -> dict[str, float]:
    """Inverts the patch embedding in closed form, in float64.

    Returns:
        `condition_number` of the embedding and `max_error` of the pixels.

    Raises:
        InputError: a model that normalises its patches before the first block.
    """
    exact = VitPath(deepcopy(path.model).double(), name=path.name, preprocessing=path.preprocessing)
    module = AnalyticPatchInverse.from_path(exact)
    tokens = exact.embeddings(images, ["patches"])["patches"]
    error = float((module(tokens) - images).abs().max())
    return {"condition_number": module.condition_number, "max_error": error}


def stage_mse(reconstructions: dict[str, Images], images: Images) -> dict[str, Float[Tensor, " b"]]:
    """Returns the MSE of each image in [0, 1] by stage, and that of the average image.

    The average is taken over these images, so that no constant picture has a lower MSE.
    """
    guess = images.mean(0, keepdim=True).expand_as(images)
    candidates = {**reconstructions, AVERAGE: guess}
    return {
        name: (other - images).square().mean(dim=(1, 2, 3)) for name, other in candidates.items()
    }


# ---- Pictures ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class PictureSet:
    """Images of one size.

    Args:
        images: 8-bit values in [0, 1].
        objects: `class_labels` and `boxes` (centre x, centre y, width, height, as shares) of each
            image; None if the data have no boxes.
        inside: where the objects are: their masks, or their boxes, or the whole image.
        masks: of each object of each image, in the order of its boxes; None if there are no boxes.
        class_names: of the labels; None where they are not known.
    """

    ids: list[str]
    images: Images
    objects: list[dict[str, Tensor]] | None
    inside: Bool[Tensor, "b height width"]
    masks: list[Bool[Tensor, "n height width"]] | None = None
    class_names: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.ids)


def load_pictures(settings: PictureChoice, size: tuple[int, int]) -> PictureSet:
    """Reads the pictures at (h, w) = `size`.

    Pictures of COCO or Tiny-ImageNet-200 with boxes are resized without cropping, others are cut
    square first.

    Raises:
        InputError: no pictures there, or fewer than asked for.
    """
    choice = settings.images
    root = Path(choice.data or "").expanduser()
    if coco_annotations(root, choice.split).is_file() or _has_boxes(root / choice.split):
        return _load_with_objects(settings, choice, size)
    images = open_images(choice.data, choice.split, choice.classes)
    rows = _spread(range(len(images)), settings.n_images)
    side = max(size)
    pictures = [center_square(images.read(i), side).resize((size[1], size[0])) for i in rows]
    inside = torch.ones(len(rows), *size, dtype=torch.bool)
    return PictureSet([images.ids[i] for i in rows], to_tensor(pictures), None, inside)


def _load_with_objects(
    settings: PictureChoice, choice: ImageChoice, size: tuple[int, int]
) -> PictureSet:
    images = open_boxed_images(
        DataConfig(root=choice.data, split=choice.split, classes=choice.classes)
    )
    held = settings.held_back_per_class
    members = split_held_back(images.labels or [], held)[1] if held else range(len(images))
    rows = _spread(members, settings.n_images)
    pictures: list[Image.Image] = []
    objects: list[dict[str, Tensor]] = []
    masks: list[Tensor] = []
    for i in rows:
        picture = images.read(i)
        whole = Crop((0, 0, picture.height, picture.width), hflip=False, vflip=False)
        seen = crop_boxes(images.boxes(i), whole)
        boxes = torch.tensor([box for box, _ in seen]).reshape(-1, 4)
        labels = torch.tensor([label for _, label in seen], dtype=torch.long)
        pictures.append(picture.resize((size[1], size[0]), Image.Resampling.BILINEAR))
        objects.append({"class_labels": labels, "boxes": boxes})
        masks.append(_masks_of(images, i, boxes, size))
    ids = [images.ids[i] for i in rows]
    inside = torch.stack([mask.any(0) for mask in masks])
    return PictureSet(ids, to_tensor(pictures), objects, inside, masks, images.class_names)


def _masks_of(images: BoxedImages, index: int, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Returns the pixels of each object."""
    if images.masks is not None:
        masks = torch.from_numpy(images.masks(index)).float()[None]
        return F.interpolate(masks, size, mode="nearest")[0] > 0.5
    found = torch.zeros(len(boxes), *size, dtype=torch.bool)
    for mask, (x, y, width, height) in zip(found, boxes.tolist(), strict=True):
        rows = slice(round((y - height / 2) * size[0]), round((y + height / 2) * size[0]))
        columns = slice(round((x - width / 2) * size[1]), round((x + width / 2) * size[1]))
        mask[rows, columns] = True
    return found


def _has_boxes(folder: Path) -> bool:
    return folder.is_dir() and next(folder.glob("*/*_boxes.txt"), None) is not None


def _spread(members: range | list[int], n: int | None) -> list[int]:
    if n is None:
        n = min(N_DEFAULT, len(members))
    if n > len(members) or n < 1:
        raise InputError(f"There are {len(members)} images to choose from, got {n}.")
    places = torch.linspace(0, len(members) - 1, n).round().long().tolist()
    return [members[place] for place in places]


# ---- Detectors that were tuned for reconstruction too, by λ --------------------------------------

ISOLATED = "isolated"
"""An inverter whose modules were trained on their own, on a detector that was not tuned."""


@dataclass(frozen=True, eq=False)
class Tradeoff:
    """One detector and its inverter.

    Args:
        weight: λ, the share of reconstruction; None for `ISOLATED`.
        mse: MSE of each image in [0, 1].
        scores: what `best_query_scores` and `average_precision` give.
    """

    weight: float | None
    mse: Float[Tensor, " b"]
    scores: dict[str, float]
    reconstructions: Float[Tensor, "b 3 h w"]

    @property
    def name(self) -> str:
        """The name in figures."""
        return ISOLATED if self.weight is None else f"λ = {self.weight:g}"


def measure_detector(
    inverter: ModularInverter, pictures: PictureSet, weight: float | None
) -> Tradeoff:
    """Measures one detector, and its reconstruction from the decoder, on pictures with boxes.

    Raises:
        InputError: no DETR, no boxes, or pycocotools is not installed.
    """
    found = reconstruct_stages(inverter, pictures.images, ["decoder"])["decoder"]
    mse = (found - pictures.images).square().mean(dim=(1, 2, 3))
    return Tradeoff(weight, mse, detection_scores(inverter, pictures, pictures.images), found)


@torch.no_grad()
def detection_scores(
    inverter: ModularInverter,
    pictures: PictureSet,
    images: Float[Tensor, "b 3 h w"],
    batch_size: int = 32,
) -> dict[str, float]:
    """Returns how well the objects of the pictures are detected in versions of them."""
    path = inverter.path
    if not isinstance(path, DetrPath) or pictures.objects is None:
        raise InputError("Detection needs a DETR and pictures with boxes; see --data and --split.")
    parts = [
        path.embeddings(batch.to(path.device), ["prediction"])["prediction"].cpu()
        for batch in images.split(batch_size)
    ]
    predicted = path.split(torch.cat(parts))
    size = (images.shape[-2], images.shape[-1])
    precision = average_precision(*predicted, pictures.objects, size)
    return best_query_scores(*predicted, pictures.objects) | precision


def read_weight(folder: str) -> float | None:
    """Returns λ of an inverter in a folder; None if it was not tuned end to end."""
    path = Path(folder).expanduser().parent / TUNING
    if not path.is_file():
        return None
    return schema.read_json(path, _Tuning).reconstruction_weight


@dataclass(frozen=True)
class _Tuning:
    reconstruction_weight: float


# ---- The studies ---------------------------------------------------------------------------------

MSE = "MSE of pixels in [0, 1], 95 % interval"
PAIRWISE = "MSE between two versions, 95 % interval"


def measure_stages(names: Sequence[str], pictures: PictureSet) -> Analysis:
    """Measures the MSE of the reconstruction from each stage, beside the average image.

    Args:
        names: the name or folder of one modular inverter.
    """
    inverter = _only(names)
    stages = [s for s in inverter.path.specs if s in inverter.inverses.chainable()]
    found = reconstruct_stages(inverter, pictures.images, stages)
    intervals = _means(stage_mse(found, pictures.images))
    title = f"Reconstruction from the stages of {inverter.path.name}"
    bars = {stage: intervals[stage] for stage in stages}
    metrics: dict[str, Any] = {"stage_mse": to_dicts(intervals)}
    if isinstance(inverter.path, VitPath) and inverter.path.embeds_linearly:
        few = pictures.images[:8]
        metrics["patch_embedding"] = invert_patch_embedding(inverter.path, few)
    figures = {
        "stage_mse.png": draw_bars(bars, title, MSE, (AVERAGE, intervals[AVERAGE])),
        "stages.png": draw_grid({"original": pictures.images, **found}, title, [_note(pictures)]),
    }
    return _result(pictures, metrics, figures, "MSE by stage", to_rows(intervals))


def measure_layers(names: Sequence[str], pictures: PictureSet) -> Analysis:
    """Measures the MSE of the states within the stages, through every inverse that fits them.

    Args:
        names: the name or folder of one modular inverter.
    """
    inverter = _only(names)
    metrics: dict[str, Any] = {}
    figures: dict[str, Figure] = {}
    rows: list[dict[str, Any]] = []
    for stage in inverter.inverses.chainable():
        states = matching_states(inverter, stage)
        if len(states) < 2:
            continue
        found = invert_states(inverter, pictures.images, stage, states)
        intervals = _means(stage_mse(found, pictures.images))
        metrics[stage] = to_dicts(intervals)
        rows += to_rows(intervals, inverse=stage)
        title = f"States of {inverter.path.name} through the inverse of {stage!r}"
        columns = {"original": pictures.images, **found}
        figures[f"layers-{stage}.png"] = draw_grid(columns, title, [_note(pictures)], n_rows=4)
    return _result(pictures, {"layer_mse": metrics}, figures, "MSE by state", rows)


def measure_colour(names: Sequence[str], pictures: PictureSet) -> Analysis:
    """Measures the differences between recoloured versions, in the input and from each stage.

    Args:
        names: the name or folder of one modular inverter.
    """
    inverter = _only(names)
    stages = [s for s in inverter.path.main_stages if s in inverter.inverses.chainable()]
    versions = {name: recolour(pictures.images, pictures.inside, name) for name in FILTERS}
    found = {name: reconstruct_stages(inverter, v, stages) for name, v in versions.items()}
    table: dict[str, dict[str, Tensor]] = {"input": versions}
    table |= {stage: {name: found[name][stage] for name in FILTERS} for stage in stages}
    intervals = _means(
        {
            stage: pairwise_mse({name: row[name] for name in COMPARED})
            for stage, row in table.items()
        }
    )
    what = "images" if pictures.objects is None else "objects"
    title = f"Recoloured {what} through {inverter.path.name}"
    figures = {"pairwise_mse.png": draw_bars(intervals, title, PAIRWISE)}
    note = "Rows: input, " + ", ".join(stages) + "."
    for i in range(min(4, len(pictures))):
        columns = {n: torch.stack([row[n][i] for row in table.values()]) for n in FILTERS}
        figures[f"colour-{i}.png"] = draw_grid(columns, title, [note])
    metrics: dict[str, Any] = {"pairwise_mse": to_dicts(intervals)}
    if isinstance(inverter.path, DetrPath) and pictures.objects is not None:
        metrics["detection"] = {
            name: detection_scores(inverter, pictures, v) for name, v in versions.items()
        }
    return _result(pictures, metrics, figures, "Differences by stage", to_rows(intervals))


def measure_tradeoff(names: Sequence[str], pictures: PictureSet) -> Analysis:
    """Measures MSE and average precision of detectors that were tuned with several λ.

    Args:
        names: the names or folders of modular inverters of DETR.
    """
    points = [measure_detector(open_modular(n), pictures, read_weight(n)) for n in names]
    points.sort(key=lambda point: -1.0 if point.weight is None else point.weight)
    mse = [bootstrap_mean(point.mse) for point in points]
    columns = {"original": pictures.images}
    columns |= {point.name: point.reconstructions for point in points}
    title = "Reconstructions from the decoder of detectors tuned for both"
    figures = {
        "tradeoff.png": _draw_tradeoff(points, mse),
        "reconstructions.png": draw_grid(columns, title, [_note(pictures)]),
    }
    rows = [
        {"weight": point.weight, "mse": asdict(value), **point.scores}
        for point, value in zip(points, mse, strict=True)
    ]
    intervals = {point.name: value for point, value in zip(points, mse, strict=True)}
    return _result(pictures, {"tradeoff": rows}, figures, "MSE by λ", to_rows(intervals))


def _draw_tradeoff(points: Sequence[Tradeoff], mse: Sequence[Interval]) -> Figure:
    """Draws average precision against MSE, a point for each λ."""
    figure, axes = plain_figure(4.2, 3.2)
    precisions = [point.scores["ap"] for point in points]
    errors = [[v.value - v.low for v in mse], [v.high - v.value for v in mse]]
    axes.errorbar([v.value for v in mse], precisions, xerr=errors, fmt="o", color=BLUE, capsize=3)
    for i, (point, value, precision) in enumerate(zip(points, mse, precisions, strict=True)):
        axes.annotate(
            point.name,
            (value.value, precision),
            xytext=(4, -11 if i % 2 else 4),  # keeps the names of close neighbours apart
            textcoords="offset points",
            fontsize=TEXT,
        )
    axes.margins(0.12)  # leaves room for the names
    axes.set_xlabel("MSE of the reconstruction, 95 % interval", fontsize=TEXT)
    axes.set_ylabel("average precision", fontsize=TEXT)
    return figure


STUDIES: dict[str, Callable[[Sequence[str], PictureSet], Analysis]] = {
    "stages": measure_stages,
    "layers": measure_layers,
    "colour": measure_colour,
    "tradeoff": measure_tradeoff,
}
"""The studies by their names on the command line."""


def _only(names: Sequence[str]) -> ModularInverter:
    if len(names) != 1:
        raise InputError(f"This analysis takes one --inverter, got {len(names)}.")
    return open_modular(names[0])


def _means(values: Mapping[str, Tensor]) -> dict[str, Interval]:
    return {name: bootstrap_mean(v) for name, v in values.items()}


def _result(
    pictures: PictureSet,
    metrics: dict[str, Any],
    figures: dict[str, Figure],
    what: str,
    rows: list[dict[str, Any]],
) -> Analysis:
    parts = ", ".join(f"{row['name']} {row['value']:.4f}" for row in rows)
    return Analysis({"n_images": len(pictures), **metrics}, figures, [f"{what}: {parts}."], rows)


def _note(pictures: PictureSet) -> str:
    height, width = pictures.images.shape[-2:]
    return f"Of {len(pictures)} images at {height}×{width} pixels."
