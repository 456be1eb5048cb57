"""Concepts of a folder of pictures of one class: what `featinv concepts` finds."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from featinv_diffusion.analysis import figures
from featinv_diffusion.analysis.concept_class import TargetClass, find_class
from featinv_diffusion.backbones import Backbone, list_backbones, load_backbone
from featinv_diffusion.concepts import (
    MCD,
    ConceptDictionary,
    DirectionConcepts,
    KMeansConcepts,
    NMFConcepts,
    PCAConcepts,
)
from featinv_diffusion.concepts.storage import read_directions
from featinv_diffusion.diffusion.quiet import without_progress_bars
from featinv_diffusion.errors import InputError, choices_hint
from featinv_diffusion.evaluation.fingerprints import weights_sha256
from featinv_diffusion.images import center_square, read_image, to_tensor
from featinv_diffusion.reconstruction import batched
from featinv_diffusion.sampling import BUNDLED, find_device
from featinv_diffusion.types import Features, FeatureSpec

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
    target = find_class(backbone, fit.target, logits)
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


def backbone_name(name: str) -> str:
    """Returns the bundled model that stands for a name, as in all commands, or the name itself."""
    bundled = BUNDLED + name.removeprefix(BUNDLED)
    return bundled if bundled in list_backbones() else name


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
