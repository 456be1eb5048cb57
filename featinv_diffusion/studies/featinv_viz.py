"""FeatInv-Viz: where a picture changes when a concept of its features is attenuated."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from featinv_diffusion.backbones import Backbone
from featinv_diffusion.concepts import ConceptDictionary
from featinv_diffusion.concepts.sae_files import AUTO, find_concepts_file
from featinv_diffusion.errors import InputError
from featinv_diffusion.features import scale_part
from featinv_diffusion.features.edits import CellMask, high_cells, to_pixels
from featinv_diffusion.figures import board as figures
from featinv_diffusion.figures.board import Board
from featinv_diffusion.images import to_pil
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.runs.progress import advancing
from featinv_diffusion.runs.record import Result
from featinv_diffusion.runs.sampling import read_maps, sample_all, to_list
from featinv_diffusion.runs.scope import Scope, caption, open_scope, scope_notes
from featinv_diffusion.seeds import make_generator
from featinv_diffusion.studies.concepts import FoundConcepts, check_concepts
from featinv_diffusion.studies.study import (
    choose_seeds,
    draw_original,
    pixel_rows,
    settings_line,
    settings_of,
)
from featinv_diffusion.types import Features, Images, Source

THRESHOLD = 0.33
"""Of the normalised map, as published: pixels below count as unaffected."""
MAX_DIRECTIONS = 1000
_CURVE = 1.0  # inches
_FADED = 0.8  # towards white
_CLIPPED = 0.99  # of a map's pixels lie on the scale, so that single ones do not darken the rest


def show_concept(
    inverter: Inverter,
    picture: Any,
    concepts: ConceptDictionary | FoundConcepts | str | Path,
    *,
    concept: int = 0,
    factor: float = 0.25,
    film: Sequence[float] = (0, 0.5, 1, 1.5, 2),
    sae_format: str = AUTO,
    n_directions: int = 3,
    n_samples: int = 8,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    batch_size: int = 8,
    progress: bool = False,
) -> ConceptViz:
    """Samples a picture's map with a concept at several strengths, all with the same noise.

    The map of the result is the distance between samples before and after, beside two nulls at the
    same scale: samples of other noise, and edits of the same size along random directions. A
    deterministic inverter makes one sample of each map, and has no null of other noise.

    Args:
        picture: a picture or a feature map `[1, c, h, w]`; the noise depends on its file name.
        concepts: of this backbone and layer: what `find_concepts` returns, a dictionary, an SAE,
            or a file of one of these.
        concept: index of the concept, from 0; of an SAE the latent.
        factor: factor on the concept's part in the edit that the map shows (FeatInv, algorithm 1):
            0 removes it, 1 leaves it, 2 doubles it.
        film: further factors to sample.
        sae_format: library that made a file of an SAE, see `concepts.sae_files.read_sae`.
        n_directions: random directions; they derive from the first seed.
        n_samples: samples of each map, at least 2; deterministic inverters make one.
        seed: random seed.
        seeds: the seed of each sample itself, as a manifest keeps them.
        batch_size: samples per batch.
        progress: show a progress bar on stderr.

    Raises:
        InputError: concepts of other features, no such concept, factors that are not finite or
            alike, too few samples or directions, a picture that cannot be read, samples that are
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
    part = dictionary.part(features, concept)
    class_index = _find_class(backbone, dictionary, source)
    scope = open_scope(inverter)

    def sample(part: Features, factor: float) -> Dose:
        edited = scale_part(features, part, factor)
        done = sample_all(inverter, edited, seeds, batch_size)
        cosine = done.cosine.mean(dim=(1, 2)).cpu()
        probability = _probability(backbone, done.images, class_index, batch_size)
        return Dose(factor, edited, done.images, cosine, probability)

    with advancing(inverter, (len(factors) + n_directions) * len(seeds), progress):
        doses = [sample(part, each) for each in factors]
        generators = [make_generator(seeds[0], "direction", k) for k in range(n_directions)]
        random_doses = [sample(turn_part(part, generator), factor) for generator in generators]
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
        random_doses=random_doses,
        activation=dictionary.activations(features)[0, concept].float().cpu(),
        part_energy=_share(part, features),
        class_index=class_index,
        class_name=None if class_index is None or labels is None else labels[class_index],
        scope_p_values=p_values,
        scope_p_values_random=_scope_of(random_doses, scope),
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


@torch.no_grad()
def _probability(
    backbone: Backbone, images: Images, class_index: int | None, batch_size: int
) -> Float[Tensor, " seeds"] | None:
    if class_index is None:
        return None
    scores = [backbone.classify(part.to(backbone.device)) for part in images.split(batch_size)]
    return torch.cat(scores).float().softmax(dim=1)[:, class_index].cpu()


def _scope_of(doses: Sequence[Dose], scope: Scope) -> list[float] | None:
    """Returns how natural each edited map is."""
    maps = torch.cat([dose.features for dose in doses])
    return scope.p_values(maps, [dose.cosine.mean().item() for dose in doses])


def _share(part: Tensor, features: Tensor) -> float:
    """Share of the summed squared length of the cells that a part has."""
    total = features.double().square().sum().item()
    return part.double().square().sum().item() / total if total > 0 else 0.0


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


def normalise(values: Float[Tensor, "height width"]) -> Float[Tensor, "height width"]:
    """Divides a map by its maximum; one of zeros stays zero."""
    high = values.max()
    return values / high if high > 0 else torch.zeros_like(values)


def dominance(values: Float[Tensor, ...], null: Float[Tensor, ...]) -> float:
    """Returns how much more often values lie above those of a null than below, −1 … 1.

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
    inside = to_pixels(cells, (energy.shape[0], energy.shape[1]))
    return energy[inside].sum().item() / total if total > 0 else None


def fade(
    picture: Float[Tensor, "3 height width"], distance: Float[Tensor, "height width"]
) -> Float[Tensor, "3 height width"]:
    """Pales the pixels whose normalised distance is below the threshold."""
    kept = (normalise(distance) >= THRESHOLD).to(picture)
    return picture * kept + (1 - kept) * (picture * (1 - _FADED) + _FADED)


@dataclass(frozen=True, eq=False)
class Dose:
    """The samples of one strength of a part.

    Args:
        factor: on the part; 1 is the map as it is.
        features: the edited map.
        images: one per seed, in [0, 1], rounded to 8 bits.
        cosine: of each sample's features to the edited map.
        probability: that the backbone gives the class in each sample; None without a head.
    """

    factor: float
    features: Float[Tensor, "1 c h w"]
    images: Float[Tensor, "seeds 3 height width"]
    cosine: Float[Tensor, " seeds"]
    probability: Float[Tensor, " seeds"] | None

    @property
    def mean_probability(self) -> float:
        """Mean over the samples; NaN without a head."""
        return math.nan if self.probability is None else self.probability.double().mean().item()


@dataclass(frozen=True, eq=False, repr=False)
class ConceptViz(Result):
    """What one concept does to the samples of a map, beside what noise and other edits do.

    Distances are ‖x − x'‖ over the three channels, in units where a channel is 0 … 1.

    Args:
        picture: that the map comes from.
        doses: the samples of the concept at each factor, by rising factor; 1 is among them.
        random_doses: the samples of edits of the same size along random directions.
        activation: of the concept in the map.
        part_energy: share of the map's squared length that the concept's part has.
        class_index: class whose probability is shown; None without a head.
        scope_p_values: of each of the doses; None where the scope is not known.
        scope_p_values_random: of each of the random doses.
    """

    command: ClassVar[str] = "viz"

    picture: Source
    doses: list[Dose]
    random_doses: list[Dose]
    activation: Float[Tensor, "h w"]
    part_energy: float
    class_index: int | None
    class_name: str | None
    scope_p_values: list[float] | None
    scope_p_values_random: list[float] | None

    # ---- The maps

    @property
    def factor(self) -> float:
        """The factor of the edit that the map shows."""
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
    def seed_noise(self) -> Float[Tensor, "seeds height width"] | None:
        """The distance between the samples before it, of each seed and the next one."""
        images = self.before.images
        return None if len(images) < 2 else rgb_distance(images, images.roll(-1, dims=0))

    @property
    def random(self) -> Float[Tensor, "directions seeds height width"]:
        """As `distance`, after edits of the same size along random directions."""
        before = self.before.images
        return torch.stack([rgb_distance(dose.images, before) for dose in self.random_doses])

    @property
    def map(self) -> Float[Tensor, "height width"]:
        """The output of algorithm 1, not normalised: the median over seeds."""
        return median(self.distance)

    @property
    def null_map(self) -> Float[Tensor, "height width"] | None:
        """The same of unpaired seeds and no edit; None of a deterministic inverter."""
        return None if self.seed_noise is None else median(self.seed_noise)

    @property
    def random_map(self) -> Float[Tensor, "height width"]:
        """The same of random directions, mean over them."""
        return torch.stack([median(distance) for distance in self.random]).mean(dim=0)

    # ---- The numbers

    def main_figures(self) -> dict[str, Any]:
        """Returns the maps against their nulls, and where the change lies.

        `effect`, `null` and `null_random` are the means over pixels of the three maps; `dominance`
        compares the mean distances of single samples, see there. Shares and ratios of nothing, and
        what rests on a null that there is not, are None.
        """
        cells, distance, noise, random = (
            high_cells(self.activation),
            self.distance,
            self.seed_noise,
            self.random,
        )
        effect, null, null_random = map(_mean, (self.map, self.null_map, self.random_map))
        assert effect is not None
        means = distance.mean(dim=(1, 2))
        size = (distance.shape[1], distance.shape[2])
        return {
            "class_index": self.class_index,
            "class_name": self.class_name,
            "part_energy": self.part_energy,
            "factors": [dose.factor for dose in self.doses],
            "class_probabilities": self._probabilities(self.doses),
            "class_probabilities_random": self._probabilities(self.random_doses),
            "cosines": [dose.cosine.double().mean().item() for dose in self.doses],
            "effect": effect,
            "null": null,
            "null_random": null_random,
            "effect_over_null": effect / null if null else None,
            "effect_over_null_random": effect / null_random if null_random else None,
            "dominance": None if noise is None else dominance(means, noise.mean(dim=(1, 2))),
            "dominance_random": dominance(means, random.mean(dim=(2, 3))),
            "affected": _mean((normalise(self.map) >= THRESHOLD).double()),
            "area_inside": _mean(to_pixels(cells, size).double()),
            "energy_inside": energy_inside(distance, cells),
            "energy_inside_null": None if noise is None else energy_inside(noise, cells),
            "energy_inside_null_random": energy_inside(random, cells),
        }

    def _probabilities(self, doses: Sequence[Dose]) -> list[float] | None:
        return None if self.class_index is None else [dose.mean_probability for dose in doses]

    def numbers(self) -> dict[str, Any]:
        """Returns these, the p-values, the activation map and the values of each sample."""
        return {
            **self.main_figures(),
            "scope_p_values": self.scope_p_values,
            "scope_p_values_random": self.scope_p_values_random,
            "activation": to_list(self.activation),
            "samples": self._samples(),
        }

    def _samples(self) -> list[dict[str, Any]]:
        """One dict per sample of each edit, in the order of `pictures`."""
        before = self.before.images
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
                "distance": (dose.images[j] - before[j]).norm(dim=0).mean().item(),
            }
            for kind, direction, stem, dose in self._edits()
            for j, seed in enumerate(self.arguments["seeds"])
        ]

    def _edits(self) -> Iterator[tuple[str, int | None, str, Dose]]:
        """Yields kind, number of the direction, name, and samples of each edit."""
        for dose in self.doses:
            yield "concept", None, f"factor_{figures.exact_number(dose.factor)}", dose
        for k, dose in enumerate(self.random_doses):
            yield "random", k, f"random_{k}", dose

    def rows(self) -> list[dict[str, Any]]:
        """Returns one dict per pixel: the maps, and the first of them normalised."""
        return pixel_rows(
            distance=self.map,
            null=self.null_map,
            null_random=self.random_map,
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
        """Returns how much changes, where, and what becomes of the class; a sentence each."""
        found = self.main_figures()
        noise = (
            "; a deterministic inverter has no null of other noise"
            if found["null"] is None
            else f", other noise and no edit: {found['null']:.3f}"
        )
        parts = [
            f"Concept {self.arguments['concept']} at factor {self.factor:g} moves a pixel by "
            f"{found['effect']:.3f} on average (random directions of its size: "
            f"{found['null_random']:.3f}{noise})."
        ]
        if found["energy_inside"] is not None:
            parts.append(
                f"{found['energy_inside']:.0%} of the change lies where the concept is active, "
                f"{found['area_inside']:.0%} of the picture "
                f"(random directions: {found['energy_inside_null_random']:.0%})."
            )
        if self.class_index is not None:
            before, after = self.before.mean_probability, self.after.mean_probability
            parts.append(f"Probability of {self._class}: {before:.2f} before, {after:.2f} after.")
        return "\n".join(parts)

    @property
    def _class(self) -> str:
        return self.class_name or f"class {self.class_index}"

    # ---- The figure

    def figure(self) -> Figure:
        """Draws pictures above maps at one scale above the film of doses, and its probabilities."""
        n_samples = len(self.before.cosine)
        made = f"{n_samples} samples, of which the first is shown"
        has_noise = self.seed_noise is not None
        board = Board(
            3,
            max(6, len(self.doses)),
            f"Concept {self.arguments['concept']} at factor {self.factor:g}: where the picture "
            "changes",
            [
                f"{settings_line(self.settings)} · {made if has_noise else '1 sample'}",
                "Outlined: cells with at least half of the concept's greatest activation. Maps: "
                f"RGB distance of samples, {'median over seeds, ' if has_noise else ''}at one "
                "scale; the brightest 1 % are clipped.",
                *scope_notes(self.scope_basis),
            ],
            tile=1.25,
            gap=0.1,
            right=0.1,
            extra=0.0 if self.class_index is None else _CURVE + 0.65,
        )
        figure = board.make()
        found = self.main_figures()
        self._draw_pictures(board, figure, found)
        self._draw_maps(board, figure, found)
        self._draw_means(board, figure)
        self._draw_film(board, figure)
        if self.class_index is not None:
            self._draw_curve(board, figure)
        return figure

    def _draw_pictures(self, board: Board, figure: Figure, found: dict[str, Any]) -> None:
        tiles = [board.tile_axes(figure, 0, column) for column in range(5)]
        titles = ("concept activation", "reconstruction", f"at factor {self.factor:g}", "affected")
        for axes, title in zip(tiles[1:], titles, strict=True):
            figures.label(axes, title)
        draw_original(tiles[0], self.picture)
        figures.outline(tiles[0], high_cells(self.activation))
        high = self.activation.max().item()
        figures.show_map(tiles[1], self.activation, 0, max(high, 1e-6))
        figures.caption(tiles[1], f"0 … {high:.2f}")
        before, after = self.before, self.after
        figures.show_picture(tiles[2], before.images[0])
        figures.caption(tiles[2], f"cos {figures.number(before.cosine[0].item())}")
        figures.show_picture(tiles[3], after.images[0])
        words = f"cos {figures.number(after.cosine[0].item())}"
        caption(tiles[3], words, self._p_value(self.doses.index(after)))
        figures.show_picture(tiles[4], fade(before.images[0], self.map))
        figures.caption(tiles[4], f"≥ {THRESHOLD} of max: {found['affected']:.0%}")

    def _draw_maps(self, board: Board, figure: Figure, found: dict[str, Any]) -> None:
        drawn = [
            (name, values, found[share])
            for name, values, share in (
                ("concept", self.map, "energy_inside"),
                ("null: other noise", self.null_map, "energy_inside_null"),
                ("null: random", self.random_map, "energy_inside_null_random"),
            )
            if values is not None
        ]
        tops = (float(np.quantile(values.numpy(), _CLIPPED)) for _, values, _ in drawn)
        high = max(1e-3, *tops)
        image: Any = None
        for column, (title, values, inside) in enumerate(drawn):
            axes = board.tile_axes(figure, 1, column)
            image = figures.show_map(axes, values, 0, high)
            figures.outline(axes, high_cells(self.activation))
            figures.label(axes, title)
            share = "" if inside is None else f" · {inside:.0%} inside"
            figures.caption(axes, f"{values.mean().item():.3f}{share}")
        figures.add_colour_bar(board, figure, 1, image, "RGB distance", column=len(drawn))

    def _draw_means(self, board: Board, figure: Figure) -> None:
        """Draws the mean distance of every pair of samples, in the columns beside the maps."""
        left = board.left_of(4) + 0.1
        top = board.bottom_of(1) - board.caption - board.tile
        axes = board.axes(figure, left, top, board.left_of(6) - board.gap - left, board.tile)
        groups = [
            (name, distances.mean(dim=(1, 2)).numpy(), colour, marker)
            for name, distances, colour, marker in (
                ("concept", self.distance, figures.INK, "o"),
                ("noise", self.seed_noise, figures.BLUE, "^"),
                ("random", self.random.flatten(0, 1), figures.ORANGE, "s"),
            )
            if distances is not None
        ]
        for place, (_, means, colour, marker) in enumerate(groups):
            spots = place + np.linspace(-0.2, 0.2, len(means))
            axes.plot(spots, means, marker, color=colour, ms=3, alpha=0.7, mew=0)
            axes.hlines(means.mean(), place - 0.3, place + 0.3, color=colour, lw=1)
        names = [name for name, *_ in groups]
        axes.set(xticks=range(len(groups)), xticklabels=names, xlim=(-0.5, len(groups) - 0.5))
        axes.set_ylim(bottom=0)
        axes.set_ylabel("mean distance")

    def _draw_film(self, board: Board, figure: Figure) -> None:
        for column, dose in enumerate(self.doses):
            axes = board.tile_axes(figure, 2, column)
            figures.show_picture(axes, dose.images[0])
            figures.label(axes, f"factor {dose.factor:g}")
            words = (
                f"cos {figures.number(dose.cosine[0].item())}"
                if dose.probability is None
                else f"p = {figures.number(dose.probability[0].item())}"
            )
            caption(axes, words, self._p_value(column))

    def _draw_curve(self, board: Board, figure: Figure) -> None:
        """Draws the class probability of every sample as a dot below its dose, and the means."""
        n = len(self.doses)
        width = n * (board.tile + board.gap) - board.gap
        axes: Axes = board.axes(figure, board.left_of(0), board.bottom_of(2) + 0.25, width, _CURVE)
        places = (np.arange(n) + 0.5) / n
        values = np.stack([d.probability.numpy() for d in self.doses if d.probability is not None])
        axes.plot(places, values, "o", color=figures.INK, ms=2, alpha=0.4, mew=0)
        axes.plot(places, values.mean(axis=1), "o-", color=figures.INK, lw=1, ms=4)
        axes.set(xlim=(0, 1), ylim=(-0.03, 1.03), yticks=[0, 0.5, 1], xticks=places)
        axes.set(xticklabels=[f"{dose.factor:g}" for dose in self.doses])
        axes.set_xlabel("factor of the concept")
        axes.set_title(f"p of {self._class}", size=figures.TEXT, loc="left")

    def _p_value(self, place: int) -> float | None:
        return None if self.scope_p_values is None else self.scope_p_values[place]


def _mean(values: Tensor | None) -> float | None:
    return None if values is None else values.double().mean().item()
