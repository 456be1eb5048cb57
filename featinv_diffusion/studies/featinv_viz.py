"""The study of `featinv viz`: one concept of one picture, attenuated."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from featinv_diffusion.backbones import Backbone
from featinv_diffusion.concepts import ConceptDictionary
from featinv_diffusion.errors import InputError
from featinv_diffusion.features import scale_part
from featinv_diffusion.features.edits import CellMask, high_cells, to_pixels
from featinv_diffusion.figures import board as figures
from featinv_diffusion.figures.board import Board
from featinv_diffusion.images import to_pil, to_tensor
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.runs.sampling import backbone_of, encode_picture, sample_all, to_list
from featinv_diffusion.runs.scope import Scope, caption
from featinv_diffusion.seeds import make_generator
from featinv_diffusion.settings import SampleSettings
from featinv_diffusion.studies.concepts import load_concepts
from featinv_diffusion.studies.study import Outcome, Study, settings_line
from featinv_diffusion.types import Features, Images

# ---- FeatInv-Viz: where a picture changes when a concept of its features is attenuated -----------


@dataclass(frozen=True, eq=False)
class Dose:
    """The samples of one strength of the concept.

    Args:
        factor: of the concept's part; 1 is the map as it is.
        features: the edited map.
        images: one per seed.
        cosine: of each sample's features to the edited map.
        probability: that the backbone gives the class in each sample; None without a head.
    """

    factor: float
    features: Float[Tensor, "1 c h w"]
    images: Float[Tensor, "seeds 3 height width"]
    cosine: Float[Tensor, " seeds"]
    probability: Float[Tensor, " seeds"] | None


@dataclass(frozen=True, eq=False)
class ConceptEffect:
    """What one concept does to the samples of a map, beside what noise and other edits do.

    Distances are ‖x − x'‖ over the three channels, in units where a channel is 0 … 1.

    Args:
        doses: by rising factor; one of them is 1 and one is `factor`.
        factor: of the edit that the map shows.
        distance: between the samples before and after it, of the same seed.
        seed_noise: between samples before it, of each seed and the next one.
        random: as `distance`, after edits of the same size along random directions.
        random_doses: the samples of these edits.
    """

    doses: list[Dose]
    factor: float
    distance: Float[Tensor, "seeds height width"]
    seed_noise: Float[Tensor, "seeds height width"]
    random: Float[Tensor, "directions seeds height width"]
    random_doses: list[Dose]

    def dose(self, factor: float) -> Dose:
        """Returns the samples of one of the factors."""
        return next(dose for dose in self.doses if dose.factor == factor)

    @property
    def before(self) -> Dose:
        """The samples of the map as it is."""
        return self.dose(1.0)

    @property
    def after(self) -> Dose:
        """The samples of the edited map."""
        return self.dose(self.factor)

    @property
    def map(self) -> Float[Tensor, "height width"]:
        """The output of algorithm 1, not normalised: the median over seeds."""
        return median(self.distance)

    @property
    def null_map(self) -> Float[Tensor, "height width"]:
        """The same of unpaired seeds and no edit."""
        return median(self.seed_noise)

    @property
    def random_map(self) -> Float[Tensor, "height width"]:
        """The same of random directions, mean over them."""
        return torch.stack([median(distance) for distance in self.random]).mean(dim=0)


def measure_concept(
    inverter: Inverter,
    features: Features,
    part: Features,
    factor: float,
    seeds: Sequence[int],
    *,
    film: Sequence[float] = (),
    n_directions: int = 3,
    class_index: int | None = None,
    batch_size: int = 8,
) -> ConceptEffect:
    """Samples a map with a part of it scaled, and what the nulls need, all with the same seeds.

    Args:
        features: `[1, c, h, w]`.
        part: the concept's part of it, such as `dictionary.part(features, 0)`.
        factor: see `features.scale_part`; the paper takes 0.25.
        film: further factors to sample.
        n_directions: random directions; they derive from the first seed.
        class_index: whose probability is read off; None leaves it out.

    Raises:
        InputError: fewer than two seeds, no direction, a factor that is not finite.
    """
    if len(seeds) < 2 or n_directions < 1:
        raise InputError(
            "The nulls need at least 2 samples and 1 random direction, "
            f"but {len(seeds)} and {n_directions} came."
        )

    def sample(part: Features, factor: float) -> Dose:
        edited = scale_part(features, part, factor)
        done = sample_all(inverter, edited, seeds, batch_size)
        cosine = done.cosine.mean(dim=(1, 2)).cpu()
        probability = _probability(inverter, done.images, class_index, batch_size)
        return Dose(factor, edited, done.images, cosine, probability)

    doses = [sample(part, dose) for dose in sorted({1.0, factor, *film})]
    generators = [make_generator(seeds[0], "direction", k) for k in range(n_directions)]
    random_doses = [sample(turn_part(part, generator), factor) for generator in generators]
    by_factor = {dose.factor: dose.images for dose in doses}
    before, after = by_factor[1.0], by_factor[factor]
    return ConceptEffect(
        doses=doses,
        factor=factor,
        distance=rgb_distance(after, before),
        seed_noise=rgb_distance(before, before.roll(-1, dims=0)),
        random=torch.stack([rgb_distance(dose.images, before) for dose in random_doses]),
        random_doses=random_doses,
    )


def turn_part(part: Features, generator: torch.Generator) -> Features:
    """Turns the directions of a part to random ones, and leaves all else as it is.

    Each cell keeps its norm, and any two cells the angle between them, so that a concept of one
    dimension becomes one random direction with the concept's own coefficients.

    Args:
        part: `[1, c, h, w]`.
        generator: on the CPU.
    """
    cells = part[0].flatten(1).T.cpu().double()
    codes, lengths, _ = torch.linalg.svd(cells, full_matrices=False)
    noise = torch.randn(cells.shape[1], len(lengths), generator=generator, dtype=torch.float64)
    frame = torch.linalg.qr(noise).Q
    return ((codes * lengths) @ frame.T).T.reshape(part.shape).to(part)


def rgb_distance(
    images: Float[Tensor, "b 3 height width"], others: Float[Tensor, "b 3 height width"]
) -> Float[Tensor, "b height width"]:
    """Returns the Euclidean distance over RGB of each pixel, 0 … √3."""
    return (images - others).norm(dim=1)


def median(values: Float[Tensor, "n height width"]) -> Float[Tensor, "height width"]:
    """Returns the median over the first axis; of an even number the mean of the middle two."""
    ordered = values.sort(dim=0).values
    return (ordered[(len(values) - 1) // 2] + ordered[len(values) // 2]) / 2


@torch.no_grad()
def _probability(
    inverter: Inverter, images: Images, class_index: int | None, batch_size: int
) -> Float[Tensor, " seeds"] | None:
    if class_index is None:
        return None
    backbone = backbone_of(inverter)
    scores = [backbone.classify(part.to(backbone.device)) for part in images.split(batch_size)]
    return torch.cat(scores).float().softmax(dim=1)[:, class_index].cpu()


# ---- FeatInv-Viz in numbers: the maps against their nulls, and where the change lies -------------

THRESHOLD = 0.33
"""Of the normalised map, as published: pixels below count as unaffected."""


def summarise(found: ConceptEffect, cells: CellMask) -> dict[str, Any]:
    """Returns the figures of a manifest; shares and ratios of nothing are None.

    `effect`, `null` and `null_random` are the means over pixels of the three maps; `dominance`
    compares the mean distances of single samples, see there.

    Args:
        cells: where the concept is active.
    """
    effect, null, null_random = (
        values.double().mean().item() for values in (found.map, found.null_map, found.random_map)
    )
    means = found.distance.mean(dim=(1, 2))
    size = (found.map.shape[0], found.map.shape[1])
    return {
        "factors": [dose.factor for dose in found.doses],
        "class_probabilities": _mean_probabilities(found.doses),
        "class_probabilities_random": _mean_probabilities(found.random_doses),
        "cosines": [dose.cosine.double().mean().item() for dose in found.doses],
        "effect": effect,
        "null": null,
        "null_random": null_random,
        "effect_over_null": effect / null if null > 0 else None,
        "effect_over_null_random": effect / null_random if null_random > 0 else None,
        "dominance": dominance(means, found.seed_noise.mean(dim=(1, 2))),
        "dominance_random": dominance(means, found.random.mean(dim=(2, 3))),
        "affected": (normalise(found.map) >= THRESHOLD).double().mean().item(),
        "area_inside": to_pixels(cells, size).double().mean().item(),
        "energy_inside": energy_inside(found.distance, cells),
        "energy_inside_null": energy_inside(found.seed_noise, cells),
        "energy_inside_null_random": energy_inside(found.random, cells),
    }


def _mean_probabilities(doses: Sequence[Dose]) -> list[float] | None:
    means = [
        dose.probability.double().mean().item() for dose in doses if dose.probability is not None
    ]
    return means or None


def normalise(values: Float[Tensor, "height width"]) -> Float[Tensor, "height width"]:
    """Divides a map by its maximum; one of zeros stays zero."""
    high = values.max()
    return values / high if high > 0 else torch.zeros_like(values)


def dominance(values: Float[Tensor, ...], null: Float[Tensor, ...]) -> float:
    """Returns how much oftener values lie above those of a null than below, −1 … 1.

    Cliff's delta (1993): P(value > null) − P(value < null) over all pairs.
    """
    return (values.flatten()[:, None] - null.flatten()).sign().double().mean().item()


def energy_inside(distance: Float[Tensor, "... height width"], cells: CellMask) -> float | None:
    """Returns the share of the summed squared distance that lies under cells; None of nothing.

    Args:
        distance: with one leading axis at least, over which energies add up.
    """
    energy = distance.double().square().flatten(0, -3).sum(dim=0)
    total = energy.sum().item()
    inside: Bool[Tensor, "height width"] = to_pixels(cells, (energy.shape[0], energy.shape[1]))
    return energy[inside].sum().item() / total if total > 0 else None


# ---- The figure of `featinv viz` ----

_CURVE = 1.0  # inches
_FADED = 0.8  # towards white
_CLIPPED = 0.99  # of a map's pixels lie on the scale, so that single ones do not darken the rest


@dataclass(frozen=True, eq=False)
class Shown:
    """What is drawn beside the samples.

    Args:
        activation: of the concept in the picture.
        held: the figures of the manifest.
        p_values: of each dose; None where the scope is unknown.
    """

    image: str
    square: Image.Image
    concept: int
    activation: Float[Tensor, "h w"]
    held: dict[str, Any]
    p_values: list[float] | None


def draw_effect(
    shown: Shown, found: ConceptEffect, settings: SampleSettings, notes: Sequence[str]
) -> Figure:
    """Draws pictures above maps at one scale above the film of doses, and its probabilities."""
    has_classes = found.before.probability is not None
    board = Board(
        3,
        max(6, len(found.doses)),
        f"Concept {shown.concept} at factor {found.factor:g}: where the picture changes",
        [
            f"{settings_line(settings)} · {len(found.before.cosine)} samples, of which the first "
            "is shown",
            "Outlined: cells with at least half of the concept's greatest activation. Maps: RGB "
            "distance of samples, median over seeds, at one scale; the brightest 1 % are clipped.",
            *notes,
        ],
        tile=1.25,
        gap=0.1,
        right=0.1,
        extra=_CURVE + 0.65 if has_classes else 0.0,
    )
    figure = board.make()
    _draw_pictures(board, figure, shown, found)
    _draw_maps(board, figure, shown, found)
    _draw_means(board, figure, found)
    _draw_film(board, figure, shown, found)
    if has_classes:
        _draw_curve(board, figure, shown, found)
    return figure


def fade(
    picture: Float[Tensor, "3 height width"], distance: Float[Tensor, "height width"]
) -> Float[Tensor, "3 height width"]:
    """Pales the pixels whose normalised distance is below the threshold."""
    kept = (normalise(distance) >= THRESHOLD).to(picture)
    return picture * kept + (1 - kept) * (picture * (1 - _FADED) + _FADED)


def _draw_pictures(board: Board, figure: Figure, shown: Shown, found: ConceptEffect) -> None:
    tiles = [board.tile_axes(figure, 0, column) for column in range(5)]
    before, after = found.before, found.after
    titles = ("original", "concept activation", "reconstruction", f"at factor {found.factor:g}")
    for axes, title in zip(tiles, (*titles, "affected"), strict=True):
        figures.label(axes, title)
    figures.show_picture(tiles[0], shown.square)
    figures.outline(tiles[0], high_cells(shown.activation))
    figures.caption(tiles[0], figures.short_name(shown.image), color=figures.GREY)
    high = shown.activation.max().item()
    figures.show_map(tiles[1], shown.activation, 0, max(high, 1e-6))
    figures.caption(tiles[1], f"0 … {high:.2f}")
    figures.show_picture(tiles[2], before.images[0])
    figures.caption(tiles[2], f"cos {figures.number(before.cosine[0].item())}")
    figures.show_picture(tiles[3], after.images[0])
    place = found.doses.index(after)
    caption(tiles[3], f"cos {figures.number(after.cosine[0].item())}", _at(shown, place))
    figures.show_picture(tiles[4], fade(before.images[0], found.map))
    figures.caption(tiles[4], f"≥ {THRESHOLD} of max: {shown.held['affected']:.0%}")


def _draw_maps(board: Board, figure: Figure, shown: Shown, found: ConceptEffect) -> None:
    maps = (found.map, found.null_map, found.random_map)
    titles = ("concept", "null: other noise", "null: random")
    shares = ("energy_inside", "energy_inside_null", "energy_inside_null_random")
    high = max(1e-3, *(float(np.quantile(values.numpy(), _CLIPPED)) for values in maps))
    image: Any = None
    for column, (values, title, share) in enumerate(zip(maps, titles, shares, strict=True)):
        axes = board.tile_axes(figure, 1, column)
        image = figures.show_map(axes, values, 0, high)
        figures.outline(axes, high_cells(shown.activation))
        figures.label(axes, title)
        inside = shown.held[share]
        figures.caption(
            axes,
            f"{values.mean().item():.3f}" + ("" if inside is None else f" · {inside:.0%} inside"),
        )
    figures.add_colour_bar(board, figure, 1, image, "RGB distance", column=3)


def _draw_means(board: Board, figure: Figure, found: ConceptEffect) -> None:
    """Draws the mean distance of every pair of samples, in the columns beside the maps."""
    left = board.left_of(4) + 0.1
    top = board.bottom_of(1) - board.caption - board.tile
    axes = board.axes(figure, left, top, board.left_of(6) - board.gap - left, board.tile)
    groups = (
        ("concept", found.distance, figures.INK, "o"),
        ("noise", found.seed_noise, figures.BLUE, "^"),
        ("random", found.random.flatten(0, 1), figures.ORANGE, "s"),
    )
    for place, (_, distances, colour, marker) in enumerate(groups):
        means = distances.mean(dim=(1, 2)).numpy()
        spots = place + np.linspace(-0.2, 0.2, len(means))
        axes.plot(spots, means, marker, color=colour, ms=3, alpha=0.7, mew=0)
        axes.hlines(means.mean(), place - 0.3, place + 0.3, color=colour, lw=1)
    axes.set(xticks=range(3), xticklabels=[name for name, *_ in groups], xlim=(-0.5, 2.5))
    axes.set_ylim(bottom=0)
    axes.set_ylabel("mean distance")


def _draw_film(board: Board, figure: Figure, shown: Shown, found: ConceptEffect) -> None:
    for column, dose in enumerate(found.doses):
        axes = board.tile_axes(figure, 2, column)
        figures.show_picture(axes, dose.images[0])
        figures.label(axes, f"factor {dose.factor:g}")
        words = (
            f"cos {figures.number(dose.cosine[0].item())}"
            if dose.probability is None
            else f"p = {figures.number(dose.probability[0].item())}"
        )
        caption(axes, words, _at(shown, column))


def _draw_curve(board: Board, figure: Figure, shown: Shown, found: ConceptEffect) -> None:
    """Draws the class probability of every sample as a dot below its dose, and the means."""
    n = len(found.doses)
    width = n * (board.tile + board.gap) - board.gap
    axes: Axes = board.axes(figure, board.left_of(0), board.bottom_of(2) + 0.25, width, _CURVE)
    places = (np.arange(n) + 0.5) / n
    values = np.stack(
        [dose.probability.numpy() for dose in found.doses if dose.probability is not None]
    )
    axes.plot(places, values, "o", color=figures.INK, ms=2, alpha=0.4, mew=0)
    axes.plot(places, values.mean(axis=1), "o-", color=figures.INK, lw=1, ms=4)
    name = shown.held["class_name"] or f"class {shown.held['class_index']}"
    axes.set(xlim=(0, 1), ylim=(-0.03, 1.03), yticks=[0, 0.5, 1], xticks=places)
    axes.set(xticklabels=[f"{dose.factor:g}" for dose in found.doses])
    axes.set_xlabel("factor of the concept")
    axes.set_title(f"p of {name}", size=figures.TEXT, loc="left")


def _at(shown: Shown, place: int) -> float | None:
    return None if shown.p_values is None else shown.p_values[place]


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
