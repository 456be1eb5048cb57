"""Concepts of a folder of pictures of one class: what `featinv concepts` finds."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from pyarrow import parquet
from torch import Tensor

from featinv_diffusion import __version__
from featinv_diffusion.backbones import Backbone, load_backbone, same_backbone
from featinv_diffusion.backbones.base import weights_sha256
from featinv_diffusion.concepts import (
    MCD,
    ConceptDictionary,
    DirectionConcepts,
    KMeansConcepts,
    NMFConcepts,
    PCAConcepts,
    PooledHead,
    read_head,
)
from featinv_diffusion.concepts.base import completeness, orthonormal_rows, read_directions
from featinv_diffusion.data.classes import find_class
from featinv_diffusion.diffusion.folders import without_progress_bars
from featinv_diffusion.errors import InputError, choices_hint
from featinv_diffusion.features.edits import high_cells
from featinv_diffusion.figures import board as figures
from featinv_diffusion.figures.board import Board, write_figure
from featinv_diffusion.files import replacing, write_text
from featinv_diffusion.images import center_square, read_image, to_tensor
from featinv_diffusion.inverters.open import find_device
from featinv_diffusion.runs.record import from_values, path_of, read_content, read_environment
from featinv_diffusion.runs.sampling import batched, to_list
from featinv_diffusion.types import Features, FeatureSpec

# ---- The class that concepts are relevant to: by name, by index, or by majority prediction -------


@dataclass(frozen=True, eq=False)
class TargetClass:
    """A class of the backbone.

    Args:
        name: as the backbone calls it; the index where it knows no names.
        n_predicted: pictures that are classified so.
        head: None where relevance is not defined for this backbone and layer.
        note: why not.
    """

    index: int
    name: str
    n_predicted: int
    head: PooledHead | None
    note: str | None = None

    @property
    def direction(self) -> Float[Tensor, " c"] | None:
        """The direction of the class in feature space, float32 on the CPU."""
        return None if self.head is None else self.head.direction(self.index).float().cpu()


def find_target(
    backbone: Backbone, given: str | None, logits: Float[Tensor, "n k"] | None
) -> TargetClass | None:
    """Returns the class that is meant, or without a classification head None.

    Args:
        given: name or index; None is the majority of the predictions, the first of equals.

    Raises:
        InputError: no such class, a name that several have, or a class that is asked for where
            there are none.
    """
    if logits is None:
        if given is not None:
            raise InputError(f"{backbone.name} must classify to have classes, but has no head.")
        return None
    predicted = logits.argmax(dim=1)
    index = (
        int(predicted.bincount().argmax())
        if given is None
        else find_class(given, backbone.labels, logits.shape[1], backbone.name)
    )
    head, note = None, None
    try:
        head = read_head(backbone)
    except InputError as error:
        note = f"Relevance to the class is not defined here, and concepts are not sorted: {error}"
    name = str(index) if backbone.labels is None else backbone.labels[index]
    return TargetClass(index, name, int((predicted == index).sum()), head, note)


METHODS = ("mcd", "pca", "nmf", "kmeans", "directions")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ConceptFit:
    """Arguments of a fit; they are keys of its manifest.

    Args:
        folder: of the pictures.
        images: their paths below it.
        backbone: a name of `load_backbone`.
        layer: of the features.
        target: name or index of the class that relevance is to; None is the one that most
            pictures are classified as.
        method: one of `METHODS`.
        n_concepts: None lets MCD choose, and keeps all directions of a file.
        directions: path of a matrix, see `read_directions`, for the method of that name.
        encoding: of such directions, see `DirectionConcepts`.
        max_cells: cells that MCD looks at, whose time grows with the square; None takes all.
        seed: of whatever the method draws.
        batch_size: pictures per batch of the backbone.
        output: name of the file of concepts; the others are named after it.
        figure: name of the figure.
    """

    command: ClassVar[str] = "concepts"

    folder: str
    images: list[str]
    backbone: str
    layer: str
    target: str | None
    method: str
    n_concepts: int | None
    directions: str | None
    encoding: str
    max_cells: int | None
    seed: int
    batch_size: int
    device: str
    output: str
    figure: str

    def __post_init__(self) -> None:
        figures.check_name(self.figure)
        if Path(self.output).name != self.output or Path(self.output).suffix != ".safetensors":
            raise InputError(
                f"Concepts must go to a file that ends in .safetensors, but {self.output!r} came."
            )
        if self.method not in METHODS:
            hint = choices_hint(self.method, list(METHODS))
            raise InputError(f"No method is named {self.method!r}; {hint}")
        if (self.method == "directions") != (self.directions is not None):
            raise InputError(
                "The method directions and a file of directions go together, but the method "
                f"{self.method} came with {self.directions or 'none'}."
            )
        if self.n_concepts is None and self.method not in ("mcd", "directions"):
            raise InputError(
                f"{self.method} must be told the number of concepts; only mcd chooses it."
            )
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed must lie in 0 … 2**32 - 1, but {self.seed} came.")
        for name in ("n_concepts", "max_cells", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, but {value} came.")


@dataclass(frozen=True, eq=False)
class Fitted:
    """What a fit found.

    Args:
        concepts: most relevant first where relevance is defined, else as the method has them.
        target: None where the backbone does not classify.
        images: those that could be read, of `ConceptFit.images`.
        activations: of each picture, as published: divided by its longest feature vector.
        local_relevance: what each concept adds to the logit; None where that is not defined.
        energy: share of the squared length of all cells that each concept's part has.
        predicted: class of each picture.
        notes: what a user may not expect, a sentence each.
    """

    spec: FeatureSpec
    concepts: ConceptDictionary
    target: TargetClass | None
    images: list[str]
    activations: Float[Tensor, "n k h w"]
    local_relevance: Float[Tensor, "n k"] | None
    energy: Float[Tensor, " k"]
    predicted: Int[Tensor, " n"] | None
    notes: tuple[str, ...] = ()


def fit_concepts(fit: ConceptFit, *, progress: bool = False) -> Fitted:
    """Reads the pictures, finds their concepts and measures them; writes nothing.

    Raises:
        InputError: no picture that can be read, an unknown backbone, layer or class, or what the
            method refuses.
    """
    device = find_device(fit.device)
    with without_progress_bars():
        backbone = load_backbone(fit.backbone, fit.layer).to(device)
    concepts = _make(fit, backbone.spec)
    images, features, logits = _encode(fit, backbone)
    target = find_target(backbone, fit.target, logits)
    _fit(concepts, features, target, progress)
    _arrange(concepts, fit, target)
    concepts.origin = {
        "class_index": None if target is None else target.index,
        "class_name": None if target is None else target.name,
        "weights_sha256": weights_sha256({"backbone": backbone.model}),
    }
    activations, energy, relevance = _measure(concepts, features, target, fit.batch_size)
    return Fitted(
        spec=backbone.spec,
        concepts=concepts,
        target=target,
        images=images,
        activations=activations,
        local_relevance=relevance,
        energy=energy,
        predicted=None if logits is None else logits.argmax(dim=1),
        notes=() if target is None or target.note is None else (target.note,),
    )


@torch.no_grad()
def _encode(fit: ConceptFit, backbone: Backbone) -> tuple[list[str], Features, Tensor | None]:
    """Returns the pictures that can be read, their features, and their class scores."""
    size = max(backbone.input_size)
    images, features, scores = [], [], []
    for names in batched(fit.images, fit.batch_size):
        squares = []
        for name in names:
            try:
                squares.append(center_square(read_image(Path(fit.folder) / name), size))
                images.append(name)
            except InputError as error:
                logger.warning("A picture is left out: %s", error)
        if squares:
            found, logits = backbone.features_and_logits(to_tensor(squares).to(backbone.device))
            features.append(found.float().cpu())
            scores.append(None if logits is None else logits.float().cpu())
    if not images:
        raise InputError(f"{fit.folder} must hold a picture that can be read, but holds none.")
    has_scores = scores[0] is not None
    return images, torch.cat(features), torch.cat(scores) if has_scores else None


def _make(fit: ConceptFit, spec: FeatureSpec) -> ConceptDictionary:
    n, seed = fit.n_concepts, fit.seed
    if fit.method == "mcd":
        return MCD(n, max_cells=fit.max_cells, seed=seed, spec=spec)
    if fit.directions is not None:
        directions, offset = read_directions(fit.directions)
        encoding: Any = fit.encoding
        return DirectionConcepts(directions, offset=offset, encoding=encoding, spec=spec)
    kinds = {"pca": PCAConcepts, "nmf": NMFConcepts, "kmeans": KMeansConcepts}
    return kinds[fit.method](n, seed=seed, spec=spec)


def _fit(
    concepts: ConceptDictionary, features: Features, target: TargetClass | None, progress: bool
) -> None:
    if isinstance(concepts, MCD):
        direction = None if target is None else target.direction
        concepts.fit(features, direction=direction, progress=progress)
    else:
        concepts.fit(features, progress=progress)


def _arrange(concepts: ConceptDictionary, fit: ConceptFit, target: TargetClass | None) -> None:
    """Sorts concepts by relevance, as MCD has done already, and keeps as many as are asked for."""
    if target is not None and target.direction is not None and not isinstance(concepts, MCD):
        concepts.sort_by_relevance(target.direction)
    if fit.n_concepts is not None and concepts.n_concepts > fit.n_concepts:
        concepts.reorder(range(fit.n_concepts))


def _measure(
    concepts: ConceptDictionary, features: Features, target: TargetClass | None, batch_size: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns activation maps, shares of energy, and relevance of each picture to the class."""
    activations, relevance = [], []
    energy = torch.zeros(concepts.n_concepts, dtype=torch.float64)
    total = 0.0
    for batch in features.split(batch_size):
        norms = concepts.activations(batch, "none")
        energy += norms.double().square().sum(dim=(0, 2, 3))
        total += batch.double().square().sum().item()
        activations.append(concepts.activations(batch))
        if target is not None and target.head is not None:
            local = concepts.local_relevance(batch, target.head, target.index)
            relevance.append(local[:, :-1].mean(dim=(2, 3)))
    return (
        torch.cat(activations),
        (energy / total).float(),
        torch.cat(relevance) if relevance else None,
    )


def to_rows(fitted: Fitted) -> list[dict[str, Any]]:
    """Returns one row per picture and concept."""
    predicted: Sequence[int | None] = (
        [None] * len(fitted.images) if fitted.predicted is None else fitted.predicted.tolist()
    )
    greatest, mean = fitted.activations.amax(dim=(2, 3)), fitted.activations.mean(dim=(2, 3))
    return [
        {
            "image": name,
            "predicted": predicted[i],
            "concept": k,
            "activation_max": greatest[i, k].item(),
            "activation_mean": mean[i, k].item(),
            "relevance": None
            if fitted.local_relevance is None
            else fitted.local_relevance[i, k].item(),
        }
        for i, name in enumerate(fitted.images)
        for k in range(fitted.concepts.n_concepts)
    ]


# ---- The figure of `featinv concepts` ----

MAX_CONCEPTS, N_PICTURES, SIDE = 6, 6, 256


def draw_concepts(fit: ConceptFit, fitted: Fitted) -> Figure:
    """Draws for each concept the pictures with the greatest activation, above their maps."""
    n_concepts = min(fitted.concepts.n_concepts, MAX_CONCEPTS)
    n_pictures = min(len(fitted.images), N_PICTURES)
    board = Board(
        2 * n_concepts,
        n_pictures,
        _title(fitted),
        _notes(fit, fitted, n_concepts),
        headers="first",
        right=0.7,
    )
    figure = board.make()
    greatest = fitted.activations.amax(dim=(2, 3))
    high = max(greatest[:, :n_concepts].max().item(), 1e-6)
    for k in range(n_concepts):
        order = greatest[:, k].argsort(descending=True, stable=True)[:n_pictures]
        for column, i in enumerate(order.tolist()):
            activation = fitted.activations[i, k]
            above, below = (board.tile_axes(figure, 2 * k + row, column) for row in range(2))
            path = Path(fit.folder) / fitted.images[i]
            figures.show_picture(above, center_square(read_image(path), SIDE))
            figures.outline(above, high_cells(activation))
            figures.caption(above, figures.short_name(fitted.images[i]), color=figures.GREY)
            image = figures.show_map(below, activation, 0, high)
            figures.caption(below, f"max {figures.number(activation.max().item())}")
            if column == 0:
                figures.side_label(above, f"concept {k}")
                figures.side_label(below, "activation")
            if column == n_pictures - 1:
                figures.add_colour_bar(board, figure, 2 * k + 1, image, "‖part‖ / max ‖f‖")
    return figure


def _title(fitted: Fitted) -> str:
    what = "these pictures" if fitted.target is None else fitted.target.name
    return f"Concepts of {what} in {fitted.spec.backbone}, layer {fitted.spec.layer}"


def _notes(fit: ConceptFit, fitted: Fitted, n_shown: int) -> list[str]:
    sizes = ", ".join(map(str, fitted.concepts.sizes[:n_shown]))
    shown = "" if n_shown == fitted.concepts.n_concepts else f", first {n_shown} shown"
    head = (
        f"{fit.method}, {len(fitted.images)} pictures, {fitted.concepts.n_concepts} concepts"
        f"{shown}, of {sizes} dimensions"
    )
    direction = None if fitted.target is None else fitted.target.direction
    if direction is not None:
        relevance = fitted.concepts.global_relevance(direction)[:n_shown]
        head += f" · global relevance {', '.join(map(figures.number, relevance.tolist()))}"
    return [
        head,
        "Of each concept the pictures that activate it most, and their activation maps; outlined: "
        "at least half of the picture's own maximum.",
    ]


# ---- The figures of fitted concepts: as numbers, and as a table for the terminal -----------------

HEADER = ("concept", "dimensions", "relevance", "completeness", "energy")


def describe(fitted: Fitted) -> dict[str, Any]:
    """Returns all figures; those of relevance are None where it is not defined.

    `relevance` is ‖w_l‖ of the split of the class's unit direction over the concepts,
    `completeness` ‖P w‖ / ‖w‖ of one concept by itself or of all, `energy` the share of the cells'
    squared length that a part has (parts that are not orthogonal need not add up).
    """
    concepts, target = fitted.concepts, fitted.target
    direction = None if target is None else target.direction
    relevance = None if direction is None else to_list(concepts.global_relevance(direction))
    return {
        "backbone": fitted.spec.backbone,
        "layer": fitted.spec.layer,
        "kind": concepts.kind,
        "class_index": None if target is None else target.index,
        "class_name": None if target is None else target.name,
        "n_predicted": None if target is None else target.n_predicted,
        "n_images": len(fitted.images),
        "head": None if target is None or target.head is None else target.head.form,
        "completeness": None if direction is None else concepts.completeness(direction),
        "relevance_of_rest": None if relevance is None else relevance[-1],
        "energy": concepts.report.get("energy"),
        "concepts": [
            {
                "concept": k,
                "dimensions": concepts.sizes[k],
                "relevance": None if relevance is None else relevance[k],
                "completeness": None
                if direction is None
                else _completeness(concepts.basis(k), direction),
                "energy": fitted.energy[k].item(),
            }
            for k in range(concepts.n_concepts)
        ],
        "fit": concepts.report,
        "notes": list(fitted.notes),
    }


def to_table(fitted: Fitted) -> str:
    """Returns what is printed: the class, one line per concept, and the energy of each basis."""
    found = describe(fitted)
    rows = [_cells(row, row["concept"]) for row in found["concepts"]]
    total = {"dimensions": sum(fitted.concepts.sizes), "completeness": found["completeness"]}
    rows += [_cells(total, "all"), _cells({"relevance": found["relevance_of_rest"]}, "rest")]
    widths = [max(len(row[i]) for row in [HEADER, *rows]) for i in range(len(HEADER))]
    lines = [_line(row, widths) for row in [HEADER, *rows]]
    return "\n".join([_heading(found), *lines, *_energies(found), *fitted.notes])


def _heading(found: dict[str, Any]) -> str:
    pictures = f"{found['n_images']} pictures"
    if found["class_name"] is None:
        return f"{pictures}; the backbone does not classify."
    return (
        f"Class {found['class_index']}, {found['class_name']}: "
        f"{found['n_predicted']} of {pictures} are classified so."
    )


def _energies(found: dict[str, Any]) -> list[str]:
    """Says what share of the cells' energy each kind of basis holds, and by how many directions."""
    energy, fit = found["energy"], found["fit"]
    if not isinstance(energy, dict):
        return []
    sizes = {name: sum(listed) for name, listed in fit.get("dimensions", {}).items()}
    parts = [
        f"{name} {share:.3f}" + (f" in {sizes[name]} dimensions" if name in sizes else "")
        for name, share in energy.items()
    ]
    if equal := fit.get("energy_at_equal_dimensions"):
        both = ", ".join(f"{name} {share:.3f}" for name, share in equal.items())
        parts.append(f"with as many dimensions, which decides: {both}")
    return [
        f"Energy of the cells in the span of all concepts: {'; '.join(parts)}. "
        f"The {fit['basis']} basis is used."
    ]


def _completeness(basis: Tensor, direction: Tensor) -> float:
    unit = basis / basis.norm(dim=1, keepdim=True)
    return completeness(orthonormal_rows(unit), direction)


def _cells(row: dict[str, Any], name: object) -> list[str]:
    shares = [row.get(key) for key in HEADER[2:]]
    texts = ["" if share is None else f"{share:.3f}" for share in shares]
    return [str(name), str(row.get("dimensions", "")), *texts]


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


# ---- The files of `featinv concepts` ----

MANIFEST_SUFFIX = ".manifest.json"


def write_fit(fit: ConceptFit, fitted: Fitted, folder: Path) -> list[str]:
    """Writes concepts, figure, numbers and manifest, the manifest last; returns their names."""
    stem = Path(fit.output).stem
    manifest = folder / f"{stem}{MANIFEST_SUFFIX}"
    manifest.unlink(missing_ok=True)
    fitted.concepts.save(folder / fit.output)
    write_figure(draw_concepts(fit, fitted), folder / fit.figure)
    numbers = describe(fitted)
    write_text(folder / f"{stem}.json", _to_json(numbers))
    with replacing(folder / f"{stem}.parquet") as partial:
        parquet.write_table(pa.Table.from_pylist(to_rows(fitted)), partial)
    device = str(find_device(fit.device))
    content = {
        "version": __version__,
        "command": fit.command,
        **asdict(replace(fit, device=device)),
        **{key: numbers[key] for key in ("class_index", "class_name", "completeness", "energy")},
        "environment": read_environment(device),
    }
    write_text(manifest, _to_json(content))
    return [fit.output, fit.figure, f"{stem}.json", f"{stem}.parquet", manifest.name]


def read_fit(path: Path) -> tuple[ConceptFit, dict[str, Any]] | None:
    """Reads a manifest that `write_fit` wrote; None where it is one of another command.

    Raises:
        InputError: no such file, no JSON, keys missing or of a wrong kind.
    """
    path = path_of(path)
    content = read_content(path)
    if not isinstance(content, dict) or content.get("command") != ConceptFit.command:
        return None
    names = [field.name for field in fields(ConceptFit)]
    if missing := [name for name in (*names, "environment") if name not in content]:
        raise InputError(
            f"{path} is no manifest of featinv concepts; it lacks {', '.join(missing)}."
        )
    if not isinstance(content["environment"], dict):
        raise InputError(f"{path} must tell its environment, but holds something else.")
    return from_values(ConceptFit, {name: content[name] for name in names}, path), content


def load_concepts(path: str | Path, backbone: Backbone) -> ConceptDictionary:
    """Reads concepts that were fitted on this backbone and layer.

    Raises:
        InputError: no concepts, or those of another layer or other weights.
    """
    concepts = ConceptDictionary.load(path)
    mine, spec = concepts.spec, backbone.spec
    if mine is None:
        raise InputError(
            f"The concepts in {path} must tell which features they are of, but do not. "
            f"Give the dictionary spec={spec!r} before it is saved."
        )
    digest = concepts.origin.get("weights_sha256")
    layers = [(s.layer, s.kind, s.channels) for s in (mine, spec)]
    if layers[0] != layers[1] or (
        digest is None and not same_backbone(mine.backbone, spec.backbone)
    ):
        raise InputError(
            f"The concepts in {path} are those of a {mine}, but the pipeline inverts a {spec}. "
            "Use the pipeline of that backbone and layer, or fit concepts of this one with "
            f"featinv concepts FOLDER --backbone {spec.backbone} --layer {spec.layer}."
        )
    if digest not in (None, weights_sha256({"backbone": backbone.model})):
        raise InputError(
            f"The concepts in {path} were fitted on a {mine} with other weights than those of the "
            f"pipeline's {spec}. Fit them again."
        )
    return concepts


def _to_json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, allow_nan=False) + "\n"
