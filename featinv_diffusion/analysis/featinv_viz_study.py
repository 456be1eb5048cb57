"""The study of `featinv viz`: one concept of one picture, attenuated."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image

from featinv_diffusion.analysis import figures
from featinv_diffusion.analysis.concept_files import load_concepts
from featinv_diffusion.analysis.featinv_viz import ConceptEffect, Dose, measure_concept
from featinv_diffusion.analysis.featinv_viz_figure import Shown, draw_effect
from featinv_diffusion.analysis.featinv_viz_numbers import high_cells, normalise, summarise
from featinv_diffusion.analysis.sampling import backbone_of, encode_picture, to_list
from featinv_diffusion.analysis.scope import Scope
from featinv_diffusion.analysis.study import Outcome, Study
from featinv_diffusion.backbones import Backbone
from featinv_diffusion.concepts import ConceptDictionary
from featinv_diffusion.errors import InputError
from featinv_diffusion.images import to_pil, to_tensor
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.sampling import SampleSettings


@dataclass(frozen=True)
class ConceptViz(Study):
    """Samples of a picture's map with a concept at several factors, and of random edits.

    Args:
        image: path of the picture, whose name the seeds derive from.
        concepts: path of a file that `featinv concepts` wrote for this backbone and layer.
        concept: which of them.
        factor: of its part, in the edit that the map shows.
        film: further factors; 1 and `factor` belong to them anyway.
        n_directions: random directions of the null.
    """

    command: ClassVar[str] = "viz"

    image: str
    concepts: str
    concept: int
    factor: float
    film: list[float]
    n_directions: int

    def __post_init__(self) -> None:
        figures.check_name(self.figure)
        if not all(map(math.isfinite, (self.factor, *self.film))):
            raise InputError(
                f"Factors must be finite numbers, but {self.factor:g} came, and for the film "
                f"{','.join(f'{factor:g}' for factor in self.film)}."
            )
        factors = {1.0, self.factor, *self.film}
        if len(set(map(figures.exact_number, factors))) < len(factors):
            raise InputError(
                "Factors must differ by more than rounding errors, but "
                f"{','.join(map(repr, sorted(factors)))} came."
            )
        if len(self.seeds) < 2 or self.n_directions < 1:
            raise InputError(
                "n_samples must be at least 2 here and n_directions at least 1, "
                f"but {len(self.seeds)} and {self.n_directions} came."
            )

    @property
    def n_samples(self) -> int:
        return (len({1.0, self.factor, *self.film}) + self.n_directions) * len(self.seeds)

    def run(self, inverter: Inverter, settings: SampleSettings, scope: Scope) -> Outcome:
        concepts = load_concepts(self.concepts, backbone_of(inverter))
        picture = encode_picture(inverter, self.image)
        part = concepts.part(picture.features, self.concept)
        class_index = self._class(inverter, concepts, picture.square)
        found = measure_concept(
            inverter,
            picture.features,
            part,
            self.factor,
            self.seeds,
            film=self.film,
            n_directions=self.n_directions,
            class_index=class_index,
            batch_size=settings.batch_size,
        )
        activation = concepts.activations(picture.features)[0, self.concept].float().cpu()
        held = {
            **_names(backbone_of(inverter), class_index),
            "part_energy": _share(part, picture.features),
            **summarise(found, high_cells(activation)),
        }
        p_values = _scope_of(found.doses, scope)
        shown = Shown(self.image, picture.square, self.concept, activation, held, p_values)
        return self._outcome(found, shown, settings, scope)

    def _outcome(
        self, found: ConceptEffect, shown: Shown, settings: SampleSettings, scope: Scope
    ) -> Outcome:
        p_values = shown.p_values
        return Outcome(
            figures=shown.held,
            numbers={
                **shown.held,
                "scope_p_values": p_values,
                "scope_p_values_random": _scope_of(found.random_doses, scope),
                "activation": to_list(shown.activation),
                "samples": self._samples(found),
            },
            rows=_pixels(found),
            pictures=_pictures(found),
            drawing=draw_effect(shown, found, settings, scope.notes),
            summary=_summary(self.concept, self.factor, shown.held),
            scope_p_value=None if p_values is None else p_values[found.doses.index(found.after)],
        )

    def _class(
        self, inverter: Inverter, concepts: ConceptDictionary, square: Image.Image
    ) -> int | None:
        """Returns the class that the concepts are of, else the picture's own."""
        backbone = backbone_of(inverter)
        known = concepts.origin.get("class_index")
        if known is not None or not backbone.has_head:
            return known if backbone.has_head else None
        with torch.no_grad():
            return int(backbone.classify(to_tensor(square).to(backbone.device)).argmax())

    def _samples(self, found: ConceptEffect) -> list[dict[str, Any]]:
        """One row per sample of each edit, in the order of `_pictures`."""
        return [
            {
                "edit": kind,
                "direction": direction,
                "factor": dose.factor,
                "sample": j,
                "seed": seed,
                "output": f"{stem}_{j}.png",
                "cosine": dose.cosine[j].item(),
                "class_probability": None
                if dose.probability is None
                else dose.probability[j].item(),
                "distance": (dose.images[j] - found.before.images[j]).norm(dim=0).mean().item(),
            }
            for kind, direction, stem, dose in _edits(found)
            for j, seed in enumerate(self.seeds)
        ]


def _scope_of(doses: Sequence[Dose], scope: Scope) -> list[float] | None:
    """Returns how natural each edited map is."""
    maps = torch.cat([dose.features for dose in doses])
    return scope.p_values(maps, [dose.cosine.mean().item() for dose in doses])


def with_backbone_of(settings: SampleSettings, concepts: Path) -> SampleSettings:
    """Returns settings that name the backbone and layer of a file of concepts, where free.

    Raises:
        InputError: no such file, or not one of concepts.
    """
    spec = ConceptDictionary.load(concepts).spec
    if spec is None or settings.pipeline is not None or settings.backbone is not None:
        return settings
    return replace(settings, backbone=spec.backbone, layer=settings.layer or spec.layer)


def _edits(found: ConceptEffect) -> Iterator[tuple[str, int | None, str, Dose]]:
    """Yields kind, number of the direction, name, and samples of each edit."""
    for dose in found.doses:
        yield "concept", None, f"factor_{figures.exact_number(dose.factor)}", dose
    for k, dose in enumerate(found.random_doses):
        yield "random", k, f"random_{k}", dose


def _pictures(found: ConceptEffect) -> dict[str, Image.Image]:
    return {
        f"{stem}_{j}.png": picture
        for _, _, stem, dose in _edits(found)
        for j, picture in enumerate(to_pil(dose.images))
    }


def _names(backbone: Backbone, class_index: int | None) -> dict[str, Any]:
    labels = backbone.labels
    name = None if class_index is None or labels is None else labels[class_index]
    return {"class_index": class_index, "class_name": name}


def _share(part: torch.Tensor, features: torch.Tensor) -> float:
    """Share of the summed squared length of the cells that a part has."""
    total = features.double().square().sum().item()
    return part.double().square().sum().item() / total if total > 0 else 0.0


def _pixels(found: ConceptEffect) -> list[dict[str, Any]]:
    """One row per pixel: the maps, and the first of them normalised."""
    maps = (found.map, found.null_map, found.random_map, normalise(found.map))
    places = [(y, x) for y in range(maps[0].shape[0]) for x in range(maps[0].shape[1])]
    columns = zip(places, *(to_list(values.flatten()) for values in maps), strict=True)
    return [
        {"y": y, "x": x, "distance": d, "null": null, "null_random": random, "normalised": n}
        for (y, x), d, null, random, n in columns
    ]


def _summary(concept: int, factor: float, held: dict[str, Any]) -> str:
    parts = [
        f"Concept {concept} at factor {factor:g} moves a pixel by {held['effect']:.3f} on average "
        f"(random directions of its size: {held['null_random']:.3f}, other noise and no edit: "
        f"{held['null']:.3f})."
    ]
    if held["energy_inside"] is not None:
        parts.append(
            f"{held['energy_inside']:.0%} of the change lies where the concept is active, "
            f"{held['area_inside']:.0%} of the picture "
            f"(random directions: {held['energy_inside_null_random']:.0%})."
        )
    if held["class_probabilities"] is not None:
        at = dict(zip(held["factors"], held["class_probabilities"], strict=True))
        name = held["class_name"] or f"class {held['class_index']}"
        parts.append(f"Probability of {name}: {at[1.0]:.2f} before, {at[factor]:.2f} after.")
    return "\n".join(parts)
