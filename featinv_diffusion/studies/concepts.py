"""The concepts of pictures of one class in a backbone's features."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from featinv_diffusion import __version__
from featinv_diffusion.backbones import Backbone, same_backbone
from featinv_diffusion.backbones.base import weights_sha256
from featinv_diffusion.concepts import (
    MCD,
    ConceptDictionary,
    DirectionConcepts,
    KMeansConcepts,
    NMFConcepts,
    PCAConcepts,
    PooledHead,
    SAEConcepts,
    load_concepts,
    read_head,
)
from featinv_diffusion.concepts.base import (
    ACTIVE_FROM,
    completeness,
    orthonormal_rows,
    read_directions,
)
from featinv_diffusion.concepts.sae_files import AUTO, find_concepts_file
from featinv_diffusion.data.classes import find_class
from featinv_diffusion.data.places import fingerprint, list_pictures
from featinv_diffusion.data.selection import digest
from featinv_diffusion.errors import InputError
from featinv_diffusion.features.edits import HIGH, CellMask, high_cells
from featinv_diffusion.figures import board as figures
from featinv_diffusion.figures.board import Board, check_name
from featinv_diffusion.images import center_square, read_batch, read_image, to_pil, to_tensor
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.runs.parts import WHOLE, Division, Part
from featinv_diffusion.runs.record import RunFolder, read_environment, to_png
from featinv_diffusion.runs.sampling import batched, to_list
from featinv_diffusion.settings import ConceptSettings, to_flat
from featinv_diffusion.types import Features, FeatureSpec, Source

SUFFIX, MANIFEST_SUFFIX = ".safetensors", ".manifest.json"
MAX_CONCEPTS, N_PICTURES, SIDE = 6, 6, 256
MIN_OF_CLASS = 10
"""Pictures of a class below which its concepts are said to be those of few pictures."""
_GREATEST = 0.99  # quantile, so that a single cell decides nothing
HEADER = ("concept", "dimensions", "relevance", "completeness", "energy")

logger = logging.getLogger(__name__)


def find_concepts(
    backbone: Backbone | Inverter,
    pictures: Any,
    *,
    folder: str | Path | None = None,
    target: str | int | None = None,
    method: str | None = None,
    n_concepts: int | str | None = None,
    directions: str | Path | None = None,
    basis: str = "auto",
    order: str = "energy",
    encoding: str = "least_squares",
    sae: SAEConcepts | str | Path | None = None,
    sae_format: str = AUTO,
    max_cells: int | None = 20_000,
    seed: int = 42,
    batch_size: int = 32,
    progress: bool = False,
    division: Division = WHOLE,
) -> FoundConcepts:
    """Finds the concepts of a class in a backbone's features, those that hold most of it first.

    Args:
        backbone: the backbone, or an inverter that has one.
        pictures: of one class: a folder, or a list of whatever `Backbone.features` takes. Files
            that cannot be read are left out with a warning.
        folder: what the paths in a list are relative to.
        target: name or index of the class that relevance is measured to; None is the one that
            most pictures are classified as.
        method: one of `settings.METHODS`; None is `mcd`, or `directions` where they are given.
        n_concepts: None is 3, all directions of a file, or 6 latents of an SAE; `auto` lets mcd
            choose.
        directions: file with a matrix of directions, see `concepts.base.read_directions`.
        basis: of each cluster of mcd, see `MCD`: `centred` is the published one.
        order: `energy` puts the concept first whose part has the largest share of the pictures'
            squared length, `relevance` the most relevant to the class, as published.
        encoding: how features split over such directions, see `DirectionConcepts`.
        sae: a sparse autoencoder of these features, or its file, whose latents to take: those that
            add most to the class, or without a class those of the greatest parts.
        sae_format: library that made the file, see `concepts.sae_files.read_sae`.
        max_cells: cells that mcd draws where there are more, whose time grows with the square;
            None takes all.
        seed: random seed of whatever the method draws.
        batch_size: pictures per batch of the backbone.
        progress: show a progress bar on stderr.
        division: of the encoding of pictures among processes.

    Raises:
        InputError: no picture that can be read, an unknown method or class, or what the method
            refuses.
    """
    if isinstance(backbone, Inverter):
        backbone = backbone.require_backbone()
    settings = ConceptSettings(
        backbone=backbone.spec.backbone,
        layer=backbone.spec.layer,
        target=None if target is None else str(target),
        method=method,
        n_concepts=None if n_concepts is None else str(n_concepts),
        directions=None if directions is None else str(Path(directions).absolute()),
        basis=basis,
        order=order,
        encoding=encoding,
        sae=None if sae is None else _name_of(sae),
        sae_format=sae_format,
        max_cells=max_cells or 0,
        seed=seed,
        batch_size=batch_size,
        device=str(backbone.device),
    )
    concepts = (
        _make(settings, backbone.spec) if sae is None else _open_sae(sae, backbone, sae_format)
    )
    folder, items = _listed(pictures, folder)
    names, sources, features, logits = _encode(backbone, folder, items, batch_size, division)
    chosen = find_target(backbone, settings.target, logits)
    _fit(concepts, features, chosen, progress)
    if isinstance(concepts, SAEConcepts):
        strengths = _strengths(concepts, features, chosen, batch_size)
        concepts.keep_strongest(strengths, settings.number or concepts.n_concepts)
    else:
        _arrange(concepts, settings.number, chosen)
    concepts.origin = {
        "class_index": None if chosen is None else chosen.index,
        "class_name": None if chosen is None else chosen.name,
        "weights_sha256": weights_sha256({"backbone": backbone.model}),
    }
    activations, energy, relevance = _measure(concepts, features, chosen, batch_size)
    weight = features.double().square().sum(dim=(1, 2, 3))
    weight = weight / weight.sum().clamp_min(1e-300)
    places = torch.arange(concepts.n_concepts)
    if settings.order == "energy":
        places = (energy * weight[:, None]).sum(dim=0).argsort(descending=True, stable=True)
        concepts.reorder(places.tolist())
    activations, energy = activations[:, places], energy[:, places]
    concepts.origin[ACTIVE_FROM] = [_active_from(activations[:, k]) for k in range(len(places))]
    return FoundConcepts(
        settings=settings,
        folder=folder,
        given=[_name(item, i) for i, item in enumerate(items)],
        spec=backbone.spec,
        concepts=concepts,
        target=chosen,
        images=names,
        sources=sources,
        activations=activations,
        local_relevance=None if relevance is None else relevance[:, places],
        energy=energy,
        total_energy=weight @ energy,
        predicted=None if logits is None else logits.argmax(dim=1),
    )


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


# ---- The steps of a fit --------------------------------------------------------------------------


def _listed(pictures: Any, folder: str | Path | None) -> tuple[Path | None, list[Any]]:
    """Returns what paths are relative to, None where pictures lie in memory, and the pictures."""
    if isinstance(pictures, str | Path) and not Path(pictures).is_file():
        folder = Path(pictures).absolute()
        return folder, list_pictures(folder).names
    if isinstance(pictures, str | Path | Image.Image):
        pictures = [pictures]
    if isinstance(pictures, np.ndarray | Tensor) and pictures.ndim == 3:
        pictures = pictures[None]
    items = list(pictures)
    in_memory = not all(isinstance(item, str | Path) for item in items)
    return None if in_memory else Path(folder or "").absolute(), items


def _name(item: Any, place: int) -> str:
    return Path(item).as_posix() if isinstance(item, str | Path) else str(place)


def _encode(
    backbone: Backbone,
    folder: Path | None,
    items: Sequence[Any],
    batch_size: int,
    division: Division,
) -> tuple[list[str], list[Source], Features, Tensor | None]:
    """Returns the pictures that can be read: names, sources, features and class scores."""

    def measure(places: list[int]) -> Part:
        return _encode_batch(backbone, folder, {place: items[place] for place in places})

    def describe() -> dict[str, Any]:
        assert folder is not None  # workers are given files
        names = [_name(item, place) for place, item in enumerate(items)]
        return {
            "backbone": backbone.name,
            "layer": backbone.spec.layer,
            "device": backbone.device.type,
            "backbone_sha256": weights_sha256({"backbone": backbone.model}),
            "batch_size": batch_size,
            "images_sha256": digest(names),
            "data_fingerprint": fingerprint(str(folder / name) for name in names),
        }

    names: list[str] = []
    sources: list[Source] = []
    features, scores = [], []
    for part in division.each(list(batched(range(len(items)), batch_size)), measure, describe):
        for reason in part.content["left_out"]:
            logger.warning("A picture is left out: %s", reason)
        if not part.tensors:
            continue
        names += [_name(items[place], place) for place in part.content["places"]]
        squares = to_pil(part.tensors["squares"] / 255)
        for (name, location, size), square in zip(part.content["sources"], squares, strict=True):
            sources.append(Source(name, location, square, None if size is None else tuple(size)))
        features.append(part.tensors["features"])
        scores.append(part.tensors.get("logits"))
    if not names:
        where = "The list" if folder is None else str(folder)
        raise InputError(f"{where} must hold a picture that can be read, but holds none.")
    has_scores = scores[0] is not None
    return names, sources, torch.cat(features), torch.cat(scores) if has_scores else None


@torch.no_grad()
def _encode_batch(backbone: Backbone, folder: Path | None, items: Mapping[int, Any]) -> Part:
    """Encodes the pictures, by their place in the list, that can be read."""
    size = max(backbone.picture_size)
    places, sources, images, squares, left_out = [], [], [], [], []
    for place, item in items.items():
        is_path = isinstance(item, str | Path)
        try:
            image, (source,) = read_batch([(folder or Path()) / item if is_path else item], size)
        except InputError as error:
            left_out.append(str(error))
            continue
        places.append(place)
        images.append(image)
        sources.append((source.name, source.location, source.size))
        squares.append(source.square or to_pil(image)[0])
    content = {"places": places, "sources": sources, "left_out": left_out}
    if not images:
        return Part({}, content)
    found, logits = backbone.features_and_logits(torch.cat(images).to(backbone.device))
    pixels = (to_tensor(squares) * 255).round().byte()
    tensors = {"squares": pixels, "features": found.float().cpu()}
    tensors |= {} if logits is None else {"logits": logits.float().cpu()}
    return Part(tensors, content)


def _make(settings: ConceptSettings, spec: FeatureSpec) -> ConceptDictionary:
    n, seed = settings.number, settings.seed
    if settings.directions is not None:
        directions, offset = read_directions(settings.directions)
        encoding: Any = settings.encoding
        return DirectionConcepts(directions, offset=offset, encoding=encoding, spec=spec)
    if settings.resolved_method == "mcd":
        basis: Any = settings.basis
        return MCD(n, basis=basis, max_cells=settings.max_cells or None, seed=seed, spec=spec)
    kinds = {"pca": PCAConcepts, "nmf": NMFConcepts, "kmeans": KMeansConcepts}
    return kinds[settings.resolved_method](n, seed=seed, spec=spec)


def _name_of(sae: SAEConcepts | str | Path) -> str:
    if isinstance(sae, SAEConcepts):
        return "an SAE in memory"
    return str(find_concepts_file(sae).absolute())


def _open_sae(sae: SAEConcepts | str | Path, backbone: Backbone, sae_format: str) -> SAEConcepts:
    """Returns an SAE of these features, of which latents can be chosen."""
    concepts = check_concepts(sae, backbone, sae_format)
    if not isinstance(concepts, SAEConcepts):
        raise InputError(
            f"{sae} must hold a sparse autoencoder, but it holds concepts of {concepts.kind}."
        )
    return concepts.copy()


def _strengths(
    concepts: SAEConcepts, features: Features, target: TargetClass | None, batch_size: int
) -> Float[Tensor, " n_concepts"]:
    """Returns what each latent adds to the class over all cells, or its energy without one."""
    total = torch.zeros(concepts.n_concepts, dtype=torch.float64)
    for batch in features.split(batch_size):
        if target is not None and target.head is not None:
            found = concepts.local_relevance(batch, target.head, target.index)[:, :-1]
        else:
            found = concepts.activations(batch, "none").square()
        total += found.double().sum(dim=(0, 2, 3))
    return total


def _fit(
    concepts: ConceptDictionary, features: Features, target: TargetClass | None, progress: bool
) -> None:
    if isinstance(concepts, MCD):
        direction = None if target is None else target.direction
        concepts.fit(features, direction=direction, progress=progress)
    else:
        concepts.fit(features, progress=progress)


def _arrange(concepts: ConceptDictionary, number: int | None, target: TargetClass | None) -> None:
    """Sorts concepts by relevance, as MCD has done already, and keeps as many as are asked for."""
    if target is not None and target.direction is not None and not isinstance(concepts, MCD):
        concepts.sort_by_relevance(target.direction)
    if number is not None and concepts.n_concepts > number:
        concepts.reorder(range(number))


def _measure(
    concepts: ConceptDictionary, features: Features, target: TargetClass | None, batch_size: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns activation maps, shares of each picture's energy, and its relevance to the class."""
    activations, relevance, energy = [], [], []
    for batch in features.split(batch_size):
        norms = concepts.activations(batch, "none")
        total = batch.double().square().sum(dim=(1, 2, 3)).clamp_min(1e-300)
        energy.append(norms.double().square().sum(dim=(2, 3)) / total[:, None])
        activations.append(concepts.activations(batch))
        if target is not None and target.head is not None:
            local = concepts.local_relevance(batch, target.head, target.index)
            relevance.append(local[:, :-1].mean(dim=(2, 3)))
    return (
        torch.cat(activations),
        torch.cat(energy),
        torch.cat(relevance) if relevance else None,
    )


def _active_from(activation: Float[Tensor, "n h w"]) -> float:
    """Returns `HIGH` of the activation that one of a hundred cells of all pictures exceeds."""
    return HIGH * float(np.quantile(activation.numpy(), _GREATEST))


def active_cells(
    concepts: ConceptDictionary, concept: int, activation: Float[Tensor, "h w"]
) -> tuple[CellMask, str]:
    """Marks where a concept is active in a map, and says by which rule.

    Args:
        activation: scaled by image.
    """
    known = concepts.origin.get(ACTIVE_FROM)
    if known is None:
        return high_cells(activation), "at least half of the greatest activation in this picture"
    words = f"activation of at least {known[concept]:.2f}, one threshold for all pictures"
    return high_cells(activation, known[concept]), words


# ---- What was found ------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class FoundConcepts:
    """Concepts of pictures, and what they are worth. Shows itself in a notebook.

    Args:
        settings: how they were found.
        folder: what the names of the pictures are relative to; None where they lie in memory.
        given: names of all pictures that were given.
        spec: the features.
        concepts: most relevant first where relevance is defined, else as the method has them.
        target: None where the backbone does not classify.
        images: names of the pictures that could be read.
        sources: these pictures.
        activations: of each picture, as published: divided by its longest feature vector.
        local_relevance: what each concept adds to the logit; None where that is not defined.
        energy: share of each picture's squared length that each concept's part has.
        total_energy: the same of all pictures together.
        predicted: class of each picture.
    """

    settings: ConceptSettings
    folder: Path | None
    given: list[str]
    spec: FeatureSpec
    concepts: ConceptDictionary
    target: TargetClass | None
    images: list[str]
    sources: list[Source]
    activations: Float[Tensor, "n k h w"]
    local_relevance: Float[Tensor, "n k"] | None
    energy: Float[Tensor, "n k"]
    total_energy: Float[Tensor, " k"]
    predicted: Int[Tensor, " n"] | None

    @property
    def notes(self) -> list[str]:
        """What a user may not expect, a sentence each."""
        notes = [] if self.target is None or self.target.note is None else [self.target.note]
        n, of_class = len(self.images), None if self.target is None else self.target.n_predicted
        if n < MIN_OF_CLASS or (of_class is not None and of_class < MIN_OF_CLASS):
            found = f"{n} are given" if of_class is None else f"{of_class} of {n} are classified so"
            notes.append(
                f"Warning: concepts of a class need at least {MIN_OF_CLASS} pictures of it, but "
                f"{found}; these concepts are those of few pictures, or of other classes."
            )
        direction = self._direction
        if direction is not None and self.concepts.global_relevance(direction).max() > 1:
            notes.append(
                "Relevance is the length of a concept's share of the class direction; it exceeds 1 "
                "where bases are oblique, so that shares cancel."
            )
        return notes

    @property
    def basis(self) -> str | None:
        """The basis of MCD and how it was published, in words; None of other methods."""
        return basis_words(self.concepts)

    @property
    def _direction(self) -> Tensor | None:
        known = self.target is not None and self.concepts.is_linear
        return self.target.direction if self.target is not None and known else None

    def numbers(self) -> dict[str, Any]:
        """Returns all figures; those of relevance are None where it is not defined, as they are
        for an SAE whose decoder is not linear.

        `relevance` is ‖w_l‖ of the split of the class's unit direction over the concepts,
        `completeness` ‖P w‖ / ‖w‖ of one concept by itself or of all, `energy` the share of the
        cells' squared length that a part has (parts that are not orthogonal need not add up).
        """
        concepts, target, direction = self.concepts, self.target, self._direction
        relevance = None if direction is None else to_list(concepts.global_relevance(direction))
        return {
            "backbone": self.spec.backbone,
            "layer": self.spec.layer,
            "kind": concepts.kind,
            "class_index": None if target is None else target.index,
            "class_name": None if target is None else target.name,
            "n_predicted": None if target is None else target.n_predicted,
            "n_images": len(self.images),
            "head": None if target is None or target.head is None else target.head.form,
            "completeness": None if direction is None else concepts.completeness(direction),
            "relevance_of_rest": None if relevance is None else relevance[-1],
            "basis": concepts.report.get("basis"),
            "energy": concepts.report.get("energy"),
            "concepts": [
                {
                    "concept": k,
                    **(
                        {"latent": concepts.latents[k]} if isinstance(concepts, SAEConcepts) else {}
                    ),
                    "dimensions": concepts.sizes[k],
                    "relevance": None if relevance is None else relevance[k],
                    "completeness": None
                    if direction is None
                    else _completeness(concepts.basis(k), direction),
                    "energy": self.total_energy[k].item(),
                }
                for k in range(concepts.n_concepts)
            ],
            "fit": concepts.report,
            "notes": self.notes,
        }

    def rows(self) -> list[dict[str, Any]]:
        """Returns one dict per picture and concept."""
        predicted = None if self.predicted is None else self.predicted.tolist()
        greatest, mean = self.activations.amax(dim=(2, 3)), self.activations.mean(dim=(2, 3))
        relevance = self.local_relevance
        return [
            {
                "image": name,
                "predicted": None if predicted is None else predicted[i],
                "concept": k,
                "activation_max": greatest[i, k].item(),
                "activation_mean": mean[i, k].item(),
                "energy": self.energy[i, k].item(),
                "relevance": None if relevance is None else relevance[i, k].item(),
            }
            for i, name in enumerate(self.images)
            for k in range(self.concepts.n_concepts)
        ]

    def summary(self) -> str:
        """Returns the class, a table with one line per concept, and the energy of each basis."""
        found = self.numbers()
        rows = [_cells(row, row["concept"]) for row in found["concepts"]]
        total = {"dimensions": sum(self.concepts.sizes), "completeness": found["completeness"]}
        rows += [_cells(total, "all"), _cells({"relevance": found["relevance_of_rest"]}, "rest")]
        widths = [max(len(row[i]) for row in [HEADER, *rows]) for i in range(len(HEADER))]
        lines = [_line(row, widths) for row in [HEADER, *rows]]
        return "\n".join([_heading(found), *lines, *_energies(found), *self.notes])

    def figure(self) -> Figure:
        """Draws for each concept the pictures with the greatest activation, above their maps."""
        n_concepts = min(self.concepts.n_concepts, MAX_CONCEPTS)
        n_pictures = min(len(self.images), N_PICTURES)
        what = "these pictures" if self.target is None else self.target.name
        board = Board(
            2 * n_concepts,
            n_pictures,
            f"Concepts of {what} in {self.spec.backbone}, layer {self.spec.layer}",
            [
                self._heading(n_concepts),
                "Of each concept the pictures that activate it most, and their activation maps; "
                "outlined: active, from half of the activation that 1 % of all cells exceed, one "
                "threshold for all pictures.",
            ],
            headers="first",
            right=0.7,
        )
        figure = board.make()
        greatest = self.activations.amax(dim=(2, 3))
        high = max(greatest[:, :n_concepts].max().item(), 1e-6)
        for k in range(n_concepts):
            order = greatest[:, k].argsort(descending=True, stable=True)[:n_pictures]
            for column, i in enumerate(order.tolist()):
                activation = self.activations[i, k]
                above, below = (board.tile_axes(figure, 2 * k + row, column) for row in range(2))
                figures.show_picture(above, _large(self.sources[i]))
                figures.outline(above, active_cells(self.concepts, k, activation)[0])
                figures.caption(above, figures.short_name(self.images[i]), color=figures.GREY)
                image = figures.show_map(below, activation, 0, high)
                figures.caption(below, f"max {figures.number(activation.max().item())}")
                if column == 0:
                    figures.side_label(above, f"concept {k}")
                    figures.side_label(below, "activation")
                if column == n_pictures - 1:
                    figures.add_colour_bar(board, figure, 2 * k + 1, image, "‖part‖ / max ‖f‖")
        return figure

    def _heading(self, n_shown: int) -> str:
        sizes = ", ".join(map(str, self.concepts.sizes[:n_shown]))
        shown = "" if n_shown == self.concepts.n_concepts else f", first {n_shown} shown"
        head = (
            f"{self.settings.resolved_method}, {len(self.images)} pictures, "
            f"{self.concepts.n_concepts} concepts{shown}, of {sizes} dimensions"
            + (f", {self.basis}" if self.basis else "")
        )
        if self._direction is None:
            return head
        relevance = self.concepts.global_relevance(self._direction)[:n_shown]
        return f"{head} · global relevance {', '.join(map(figures.number, relevance.tolist()))}"

    def save(self, path: str | Path, figure: str | None = None) -> Path:
        """Writes the concepts, and beside them their figure, numbers, table and manifest.

        Args:
            path: a file that ends in .safetensors, or a folder for `concepts.safetensors`.
            figure: file name of the figure, a .png, .pdf or .svg; by default that of the concepts
                with .png.

        Returns:
            The file of the concepts.

        Raises:
            InputError: a figure of another format, or the disk refuses.
        """
        path = Path(path)
        path = path if path.suffix == SUFFIX else path / f"concepts{SUFFIX}"
        figure = figure or f"{path.stem}.png"
        check_name(figure)
        numbers, device = self.numbers(), self.settings.device
        run = RunFolder(path.parent, f"{path.stem}{MANIFEST_SUFFIX}")
        run.figure(figure, self.figure())
        run.numbers(f"{path.stem}.json", numbers)
        run.table(f"{path.stem}.parquet", self.rows())
        self.concepts.save(path)
        run.complete(
            {
                "version": __version__,
                "command": "concepts",
                "folder": None if self.folder is None else str(self.folder),
                "images": self.given,
                **to_flat(self.settings),
                "method": self.settings.resolved_method,
                "n_concepts": self.settings.number,
                "max_cells": self.settings.max_cells or None,
                "output": path.name,
                "figure": figure,
                **{k: numbers[k] for k in ("class_index", "class_name", "completeness", "energy")},
                "environment": read_environment(device),
            }
        )
        return path

    def _repr_png_(self) -> bytes:
        return to_png(self.figure())

    def __repr__(self) -> str:
        return f"{type(self).__name__}: {self.summary()}"


def basis_words(concepts: ConceptDictionary) -> str | None:
    """Names the basis of MCD beside the published one; None of other methods."""
    basis = concepts.report.get("basis") if isinstance(concepts, MCD) else None
    if basis is None:
        return None
    return (
        "centred basis, as published"
        if basis == "centred"
        else (f"{basis} basis (published: centred)")
    )


def _large(source: Source) -> Image.Image:
    """Returns the picture as figures show it; files are larger than what the backbone saw."""
    if source.location is not None:
        return center_square(read_image(source.location), SIDE)
    assert source.square is not None
    return source.square


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
        f"The {fit['basis']} basis is used; the published one is centred."
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


# ---- Concepts and the features that they are of --------------------------------------------------


def check_concepts(
    concepts: ConceptDictionary | FoundConcepts | str | Path,
    backbone: Backbone,
    sae_format: str = AUTO,
) -> ConceptDictionary:
    """Returns concepts that were found on this backbone and layer, read from a file where named.

    The file of an SAE of another library does not say what it was trained on, so it is taken for
    one of this backbone and layer if it has their width.

    Args:
        sae_format: library that made the file, see `concepts.sae_files.read_sae`.

    Raises:
        InputError: no concepts, or those of another layer or other weights.
    """
    what = "The concepts"
    if isinstance(concepts, str | Path):
        what = f"The concepts in {concepts}"
        concepts = load_concepts(concepts, backbone.spec, sae_format)
    if isinstance(concepts, FoundConcepts):
        concepts = concepts.concepts
    mine, spec = concepts.spec, backbone.spec
    if mine is None:
        raise InputError(
            f"{what} must tell which features they are of, but do not. "
            f"Build the dictionary with spec={spec!r}."
        )
    digest = concepts.origin.get("weights_sha256")
    layers = [(s.layer, s.kind, s.channels) for s in (mine, spec)]
    same = digest is not None or same_backbone(mine.backbone, spec.backbone)
    if layers[0] != layers[1] or not same:
        raise InputError(
            f"{what} are those of a {mine}, but the inverter reads a {spec}. "
            "Use the inverter of that backbone and layer, or find concepts of this one with "
            f"featinv concepts FOLDER --backbone {spec.backbone} --layer {spec.layer}."
        )
    if digest not in (None, weights_sha256({"backbone": backbone.model})):
        raise InputError(
            f"{what} were found on a {mine} with other weights than those of the inverter's "
            f"{spec}. Find them again."
        )
    return concepts
