"""FeatInv-Viz: what samples show when a concept of their features is attenuated, and where."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from featinv_diffusion.backbones import Backbone
from featinv_diffusion.concepts import ConceptDictionary
from featinv_diffusion.concepts.sae_files import AUTO, find_concepts_file
from featinv_diffusion.errors import InputError
from featinv_diffusion.features import scale_part
from featinv_diffusion.features.edits import CellMask, random_part, shorten, to_pixels
from featinv_diffusion.figures import board as figures
from featinv_diffusion.images import to_pil
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.runs.progress import advancing
from featinv_diffusion.runs.record import Result
from featinv_diffusion.runs.sampling import SampleBatch, read_maps, sample_all, to_list
from featinv_diffusion.runs.scope import Scope, open_scope
from featinv_diffusion.seeds import make_generator
from featinv_diffusion.studies.concepts import (
    FoundConcepts,
    active_cells,
    basis_words,
    check_concepts,
)
from featinv_diffusion.studies.study import choose_seeds, pixel_rows, settings_of
from featinv_diffusion.studies.viz_measures import (
    MEASURES,
    THRESHOLD,
    EditEffect,
    class_share,
    mean_of_nulls,
    measure_edit,
    median,
    normalise,
    p_value,
    rgb_distance,
)
from featinv_diffusion.types import Features, Source

MAX_DIRECTIONS = 1000
N_DIRECTIONS = 19
"""Null subspaces: one edit in twenty that means nothing is above all of them."""


def show_concept(
    inverter: Inverter,
    picture: Any,
    concepts: ConceptDictionary | FoundConcepts | str | Path,
    *,
    concept: int | None = None,
    factor: float = 0.25,
    film: Sequence[float] = (0, 0.5, 1, 1.5, 2),
    sae_format: str = AUTO,
    n_directions: int = N_DIRECTIONS,
    n_samples: int = 4,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    batch_size: int = 8,
    progress: bool = False,
) -> ConceptViz:
    """Samples a picture's map with a concept at several strengths, all with the same noise.

    Beside the concept stand nulls at the same factor: equally long parts of the same map in random
    subspaces of the span of natural maps, of as many dimensions as the concept or more where that
    is too short (`features.edits.random_part`). Whatever is measured of the concept is measured of
    each null, with the same noise. What another noise changes is no null of paired samples, which
    do not differ at all without an edit; it is the scale that maps are drawn to. A deterministic
    inverter makes one sample of each map, and has no other noise.

    Args:
        picture: a picture or a feature map `[1, c, h, w]`; the noise depends on its file name.
        concepts: of this backbone and layer: what `find_concepts` returns, a dictionary, an SAE,
            or a file of one of these.
        concept: index of the concept, from 0; of an SAE the latent. None is the one whose part has
            the most energy in this picture.
        factor: factor on the concept's part in the edit that is measured (FeatInv, algorithm 1):
            0 removes it, 1 leaves it, 2 doubles it.
        film: further factors to sample.
        sae_format: library that made a file of an SAE, see `concepts.sae_files.read_sae`.
        n_directions: random subspaces; they derive from the first seed.
        n_samples: samples of each map, at least 2; deterministic inverters make one.
        seed: random seed.
        seeds: the seed of each sample itself, as a manifest keeps them.
        batch_size: samples per batch.
        progress: show a progress bar on stderr.

    Raises:
        InputError: concepts of other features, no such concept, factors that are not finite or
            alike, too few samples or subspaces, a picture that cannot be read, samples that are
            not finite.
    """
    factors = check_factors(factor, film)
    if not 1 <= n_directions <= MAX_DIRECTIONS:
        raise InputError(f"n_directions must be from 1 to {MAX_DIRECTIONS}, got {n_directions}.")
    backbone = inverter.require_backbone()
    path = concepts if isinstance(concepts, str | Path) else None
    dictionary = check_concepts(concepts, backbone, sae_format)
    maps = read_maps(inverter, picture)
    seeds = choose_seeds(inverter, maps, seed, n_samples, seeds, least=2)
    source, features = maps.sources[0], maps.as_subclass(Tensor)
    norms = dictionary.activations(features, "none")[0]
    energy = norms.double().square().sum(dim=(1, 2)).cpu()
    concept = int(energy.argmax()) if concept is None else concept
    part = dictionary.part(features, concept)
    activation = dictionary.activations(features)[0, concept].float().cpu()
    cells, rule = active_cells(dictionary, concept, activation)
    class_index = _find_class(backbone, dictionary, source)
    scope = open_scope(inverter)
    frame, span = _frame(scope, features)

    def sample(part: Features, factor: float, dimensions: int) -> Dose:
        edited = scale_part(features, part, factor)
        return Dose(factor, edited, sample_all(inverter, edited, seeds, batch_size), dimensions)

    with advancing(inverter, (len(factors) + n_directions) * len(seeds), progress):
        doses = [sample(part, each, dictionary.sizes[concept]) for each in factors]
        nulls = []
        for k in range(n_directions):
            generator = make_generator(seeds[0], "direction", k)
            random, rank = random_part(features, part, frame, generator, dictionary.sizes[concept])
            nulls.append(sample(random, factor, rank))

    def effect(dose: Dose) -> EditEffect:
        before = next(each for each in doses if each.factor == 1)
        change = dose.features - features
        return measure_edit(
            before.samples, dose.samples, change, dictionary, concept, cells, class_index
        )

    p_values = _scope_of(doses, scope)
    labels = backbone.labels
    return ConceptViz(
        settings=settings_of(inverter, len(seeds), seed, batch_size),
        arguments={
            "seeds": seeds,
            "image": source.location,
            "concepts": None if path is None else str(find_concepts_file(path).absolute()),
            "sae_format": sae_format,
            "concept": concept,
            "factor": float(factor),
            "film": [float(each) for each in film],
            "n_directions": n_directions,
        },
        scope_p_value=None if p_values is None else p_values[factors.index(factor)],
        scope_basis=scope.basis,
        picture=source,
        doses=doses,
        nulls=nulls,
        own_effect=effect(next(dose for dose in doses if dose.factor == factor)),
        null_effects=[effect(dose) for dose in nulls],
        span=span,
        span_dimensions=frame.shape[1],
        activation=activation,
        cells=cells,
        active_rule=rule,
        concept_basis=basis_words(dictionary),
        part_energy=_share(part, features),
        class_index=class_index,
        class_name=None if class_index is None or labels is None else labels[class_index],
        scope_p_values=p_values,
        scope_p_values_null=_scope_of(nulls, scope),
    )


def check_factors(factor: float, film: Sequence[float]) -> list[float]:
    """Returns the factors to sample in rising order; 1 and `factor` are always among them.

    Raises:
        InputError: a factor that is not finite, or two that differ by rounding errors alone.
    """
    if not all(map(math.isfinite, (factor, *film))):
        listed = ",".join(f"{each:g}" for each in film)
        raise InputError(
            f"Factors must be finite numbers, got {factor:g}, and {listed or 'none'} for the film."
        )
    factors = sorted({1.0, float(factor), *map(float, film)})
    if len(set(map(figures.exact_number, factors))) < len(factors):
        raise InputError(
            "Factors must differ by more than rounding errors, got "
            f"{', '.join(map(repr, factors))}."
        )
    return factors


def _find_class(backbone: Backbone, concepts: ConceptDictionary, source: Source) -> int | None:
    """Returns the class that the concepts are of, else the picture's own; None without a head."""
    if not backbone.has_head:
        return None
    known = concepts.origin.get("class_index")
    if known is None and source.logits is not None:
        return int(source.logits.argmax())
    return known


def _scope_of(doses: Sequence[Dose], scope: Scope) -> list[float] | None:
    """Returns how natural each edited map is."""
    maps = torch.cat([dose.features for dose in doses])
    return scope.p_values(maps, [dose.cosine.mean().item() for dose in doses])


def _share(part: Tensor, features: Tensor) -> float:
    """Share of the summed squared length of the cells that a part has."""
    total = features.double().square().sum().item()
    return part.double().square().sum().item() / total if total > 0 else 0.0


def _frame(scope: Scope, features: Features) -> tuple[Float[Tensor, "c k"], str]:
    """Returns directions with the second moment of natural cells, and what they are of.

    A removal goes towards the origin, so that the mean of the cells is one of the directions.
    """
    if scope.natural is None:
        return shorten(features.flatten(2)[0].float()), "the cells of this picture"
    basis = scope.natural.density.basis
    frame = torch.cat([basis.axes * basis.std, basis.mean[:, None]], dim=1)
    return shorten(frame), "natural maps"


@dataclass(frozen=True, eq=False)
class Dose:
    """The samples of one strength of a part.

    Args:
        factor: on the part; 1 is the map as it is.
        features: the edited map.
        samples: one per seed.
        dimensions: of the subspace that the part lies in.
    """

    factor: float
    features: Float[Tensor, "1 c h w"]
    samples: SampleBatch
    dimensions: int

    @property
    def images(self) -> Float[Tensor, "seeds 3 height width"]:
        """In [0, 1], rounded to 8 bits."""
        return self.samples.images

    @cached_property
    def cosine(self) -> Float[Tensor, " seeds"]:
        """Of each sample's features to the edited map."""
        return self.samples.cosine.mean(dim=(1, 2)).cpu()

    def probability(self, class_index: int | None) -> list[float] | None:
        """Returns the probability of a class in each sample; None without a head."""
        if class_index is None or self.samples.logits is None:
            return None
        return class_share(self.samples.logits, class_index).tolist()

    def mean_probability(self, class_index: int | None) -> float:
        """Returns its mean over the samples; NaN without a head."""
        found = self.probability(class_index)
        return math.nan if found is None else sum(found) / len(found)


@dataclass(frozen=True, eq=False, repr=False)
class ConceptViz(Result):
    """What one concept does to the samples of a map, beside what equally long removals do.

    Distances are ‖x − x'‖ over the three channels, in units where a channel is 0 … 1.

    Args:
        picture: that the map comes from.
        doses: the samples of the concept at each factor, by rising factor; 1 is among them.
        nulls: the samples of each random subspace, at the factor that is measured.
        own_effect: of the concept at this factor.
        null_effects: of each null.
        span: what random subspaces are drawn from.
        span_dimensions: of it.
        activation: of the concept in the map, divided by the longest feature vector.
        cells: where it is active.
        active_rule: from which activation on, in words.
        concept_basis: the basis of MCD in words, beside the published one; None of other methods.
        part_energy: share of the map's squared length that the concept's part has.
        class_index: class whose probability is shown; None without a head.
        scope_p_values: of each of the doses; None where the scope is not known.
        scope_p_values_null: of each of the nulls.
    """

    command: ClassVar[str] = "viz"

    picture: Source
    doses: list[Dose]
    nulls: list[Dose]
    own_effect: EditEffect
    null_effects: list[EditEffect]
    span: str
    span_dimensions: int
    activation: Float[Tensor, "h w"]
    cells: CellMask
    active_rule: str
    concept_basis: str | None
    part_energy: float
    class_index: int | None
    class_name: str | None
    scope_p_values: list[float] | None
    scope_p_values_null: list[float] | None

    # ---- The maps

    @property
    def factor(self) -> float:
        """The factor of the edit that is measured."""
        return self.arguments["factor"]

    @property
    def before(self) -> Dose:
        """The samples of the map as it is."""
        return self._dose(1.0)

    @property
    def after(self) -> Dose:
        """The samples of the edited map."""
        return self._dose(self.factor)

    def _dose(self, factor: float) -> Dose:
        return next(dose for dose in self.doses if dose.factor == factor)

    @property
    def distance(self) -> Float[Tensor, "seeds height width"]:
        """The distance between the samples before and after the edit, of the same seed."""
        return rgb_distance(self.after.images, self.before.images)

    @property
    def map(self) -> Float[Tensor, "height width"]:
        """The output of algorithm 1, not normalised: the median over seeds."""
        return median(self.distance)

    @property
    def signed_map(self) -> Float[Tensor, "height width"]:
        """Mean over seeds and channels of after minus before; what seeds do not share cancels."""
        return (self.after.images - self.before.images).mean(dim=(0, 1))

    @property
    def null_maps(self) -> Float[Tensor, "n height width"]:
        """The output of algorithm 1 of each null."""
        before = self.before.images
        return torch.stack([median(rgb_distance(dose.images, before)) for dose in self.nulls])

    @property
    def other_noise(self) -> float | None:
        """Mean over pixels of the median distance between samples of each seed and the next one,
        without any edit: the scale of the maps. None of a deterministic inverter."""
        images = self.before.images
        if len(images) < 2:
            return None
        return median(rgb_distance(images, images.roll(-1, dims=0))).double().mean().item()

    @property
    def has_null(self) -> bool:
        """Whether subspaces are drawn: a part as long as the whole span leaves nothing to draw."""
        return any(dose.dimensions < self.span_dimensions for dose in self.nulls)

    @property
    def is_above_null(self) -> bool:
        """Whether a pixel moves more on average than with each of the nulls."""
        greatest = max(null.effect for null in self.null_effects)
        return self.has_null and self.own_effect.effect > greatest

    @property
    def affected(self) -> Bool[Tensor, "height width"]:
        """Pixels that move more than with each of the nulls; none where the whole does not."""
        marked = self.map > self.null_maps.amax(dim=0)
        return marked if self.is_above_null else torch.zeros_like(marked)

    # ---- The numbers

    def p_value(self, measure: str) -> float | None:
        """Returns how often a random subspace shows at least as much; see `viz_measures`."""
        if not self.has_null:
            return None
        return p_value(measure, self.own_effect, self.null_effects, self.factor)

    def null_mean(self, measure: str) -> float | None:
        """Returns the mean of a measure over the nulls."""
        return mean_of_nulls(measure, self.null_effects)

    def main_figures(self) -> dict[str, Any]:
        """Returns each measure with its interval over seeds, beside its null.

        `viz_measures.EditEffect` says what they are. `null_natural` has the mean of each over the
        random subspaces, `p_values` the share of these that show at least as much, the concept
        counted among them. What is not defined is None.
        """
        size = (self.map.shape[0], self.map.shape[1])
        noise, effect = self.other_noise, self.own_effect.effect
        intervals = {name: self.own_effect.interval(name) for name in MEASURES if name != "effect"}
        return {
            "class_index": self.class_index,
            "class_name": self.class_name,
            "concept_basis": self.concept_basis,
            "part_energy": self.part_energy,
            "factors": [dose.factor for dose in self.doses],
            "class_probabilities": self._probabilities(self.doses),
            "cosines": [dose.cosine.double().mean().item() for dose in self.doses],
            "effect": effect,
            "other_noise": noise,
            "effect_over_other_noise": effect / noise if noise else None,
            **{k: None if value is None else asdict(value) for k, value in intervals.items()},
            "null_natural": {
                "n": len(self.nulls),
                "span": self.span,
                "dimensions": [dose.dimensions for dose in self.nulls],
                **{name: self.null_mean(name) for name in MEASURES},
                "class_probabilities": self._probabilities(self.nulls),
            },
            "p_values": {name: self.p_value(name) for name in MEASURES},
            "is_above_null": self.is_above_null,
            "affected": self.affected.double().mean().item(),
            "affected_as_published": (normalise(self.map) >= THRESHOLD).double().mean().item(),
            "area_inside": to_pixels(self.cells, size).double().mean().item(),
        }

    def _probabilities(self, doses: Sequence[Dose]) -> list[float] | None:
        if self.class_index is None:
            return None
        return [dose.mean_probability(self.class_index) for dose in doses]

    def numbers(self) -> dict[str, Any]:
        """Returns these, each null, the scope, the activation map and each sample."""
        return {
            **self.main_figures(),
            "nulls": [
                {"dimensions": dose.dimensions, **{name: null.mean(name) for name in MEASURES}}
                for dose, null in zip(self.nulls, self.null_effects, strict=True)
            ],
            "scope_p_values": self.scope_p_values,
            "scope_p_values_null": self.scope_p_values_null,
            "activation": to_list(self.activation),
            "active_rule": self.active_rule,
            "samples": self._samples(),
        }

    def _samples(self) -> list[dict[str, Any]]:
        """One dict per sample of each edit, in the order of `pictures`."""
        before = self.before.images
        rows = []
        for kind, number, stem, dose in self._edits():
            probability = dose.probability(self.class_index)
            for j, seed in enumerate(self.arguments["seeds"]):
                rows.append(
                    {
                        "edit": kind,
                        "null": number,
                        "factor": dose.factor,
                        "sample": j,
                        "seed": seed,
                        "output": f"{stem}_{j}.png",
                        "cosine": dose.cosine[j].item(),
                        "class_probability": None if probability is None else probability[j],
                        "distance": (dose.images[j] - before[j]).norm(dim=0).mean().item(),
                    }
                )
        return rows

    def _edits(self) -> Iterator[tuple[str, int | None, str, Dose]]:
        """Yields kind, number of the null, name, and samples of each edit."""
        for dose in self.doses:
            yield "concept", None, f"factor_{figures.exact_number(dose.factor)}", dose
        for k, dose in enumerate(self.nulls):
            yield "null", k, f"null_{k}", dose

    def rows(self) -> list[dict[str, Any]]:
        """Returns one dict per pixel: the maps, and the first of them normalised."""
        return pixel_rows(
            distance=self.map,
            signed=self.signed_map,
            null_natural=self.null_maps.mean(dim=0),
            null_greatest=self.null_maps.amax(dim=0),
            normalised=normalise(self.map),
        )

    def pictures(self) -> dict[str, Image.Image]:
        """Returns the samples by file name."""
        return {
            f"{stem}_{j}.png": picture
            for _, _, stem, dose in self._edits()
            for j, picture in enumerate(to_pil(dose.images))
        }

    def summary(self) -> str:
        """Returns what the samples show of the concept, of the class and where; with nulls."""
        from featinv_diffusion.studies.viz_words import summarise

        return summarise(self)

    @property
    def class_words(self) -> str:
        """The name of the class, or its index."""
        return self.class_name or f"class {self.class_index}"

    def figure(self) -> Figure:
        """Draws pictures above maps, above the measures with their nulls, above the doses."""
        from featinv_diffusion.studies.viz_figure import draw

        return draw(self)
