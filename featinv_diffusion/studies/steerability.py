"""Whether setting a latent moves the decoded picture, and whether the picture then carries it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from featinv_diffusion.concepts import ConceptDictionary, SAEConcepts
from featinv_diffusion.concepts.sae_files import AUTO
from featinv_diffusion.data.sets import ImageSet, open_pictures
from featinv_diffusion.errors import InputError
from featinv_diffusion.features.edits import CellMask, high_cells, random_like
from featinv_diffusion.features.map_summary import CellBasis, fit_basis
from featinv_diffusion.figures import board as figures
from featinv_diffusion.figures.board import Board
from featinv_diffusion.images import center_square, to_tensor
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.metrics.statistics import Interval, share
from featinv_diffusion.runs.progress import advancing
from featinv_diffusion.runs.record import RunFolder
from featinv_diffusion.runs.sampling import batched, not_finite, sample_maps
from featinv_diffusion.runs.scope import open_scope
from featinv_diffusion.seeds import derive_seed, make_generator
from featinv_diffusion.studies.concepts import FoundConcepts, check_concepts
from featinv_diffusion.studies.study import Analysis, to_dicts
from featinv_diffusion.types import Features, Images

TABLE = "steerability.parquet"
FIGURE = "steerability.png"
CARRIED = 0.5
"""Share of the value asked that the new picture must have for its latent to count as carried."""
N_SHOWN, N_TOP = 3, 3


def steerability(
    inverter: Inverter,
    concepts: ConceptDictionary | FoundConcepts | str | Path,
    pictures: ImageSet | str | Path | Sequence[str | Path],
    *,
    n_latents: int | None = 30,
    n_pictures: int = 4,
    n_directions: int = 9,
    dose: float = 1.0,
    seed: int = 0,
    sae_format: str = AUTO,
    batch_size: int = 8,
    progress: bool = False,
) -> Steerability:
    """Sets latents in pictures' maps, and looks at what the decoded pictures make of it.

    A latent is set to its typical high value, the median over the pictures where it is active of
    the greatest code, in the cells where its own picture, which activates it most, has it high. It
    is **seen** where the decoded pictures move more, on average over the pictures, than with each
    of the random directions: the same change turned to the span of natural cells, the same
    direction in all pictures, decoded with the same noise. It is **steerable** where the encoded
    new pictures have it: in those cells at least half of what was asked, and more than with each
    random direction.

    Args:
        concepts: an SAE, or another dictionary of one direction per concept, or a file of one.
        pictures: where activations are read and latents are set: a folder, files, or an `ImageSet`.
        n_latents: latents to test, drawn at random from those that are ever active; None is all.
        n_pictures: pictures to set each in, half of them where it is active.
        n_directions: random directions; without any effect, 1 in n_directions + 1 latents is seen.
        dose: factor on the typical high value, above 0.
        seed: random seed of the draws and of the noise.
        sae_format: library that made a file of an SAE, see `concepts.sae_files.read_sae`.
        batch_size: samples per batch.
        progress: show a progress bar on stderr.

    Raises:
        InputError: concepts of other features or of several directions, too few pictures, samples
            that are not finite.
    """
    if n_pictures < 2 or n_directions < 1 or (n_latents is not None and n_latents < 1):
        raise InputError(
            "n_pictures must be at least 2, n_directions and n_latents at least 1, got "
            f"{n_pictures}, {n_directions} and {n_latents}."
        )
    if not 0 < dose < float("inf"):
        raise InputError(f"dose must be a number above 0, got {dose}.")
    dictionary = check_concepts(concepts, inverter.require_backbone(), sae_format)
    if set(dictionary.sizes) != {1}:
        raise InputError(
            "Concepts to set must have one direction each, as the latents of an SAE have, got "
            f"{sorted(set(dictionary.sizes))} directions."
        )
    images = _opened(pictures)
    survey = _survey(inverter, dictionary, images, batch_size)
    alive = survey.alive
    if not len(alive):
        raise InputError(f"No concept is active in any of the {len(images)} pictures.")
    order = torch.randperm(len(alive), generator=make_generator(seed, "latents"))
    chosen = alive[order[:n_latents]].sort().values.tolist()
    natural = open_scope(inverter).natural
    basis = fit_basis(survey.features) if natural is None else natural.density.basis
    lab = _Lab(inverter, dictionary, images, survey, basis, dose, seed, batch_size)
    with advancing(inverter, len(chosen) * n_pictures * (1 + n_directions), progress):
        trials = [lab.test(latent, n_pictures, n_directions) for latent in chosen]
    return _report(
        inverter, dictionary, images, survey, trials, n_directions, natural is not None, dose, seed
    )


def _opened(pictures: ImageSet | str | Path | Sequence[str | Path]) -> ImageSet:
    if isinstance(pictures, ImageSet):
        images = pictures
    else:
        images = open_pictures([pictures] if isinstance(pictures, str | Path) else pictures)
    if len(images) < 2:
        raise InputError(f"At least 2 pictures are needed, got {len(images)}.")
    return images


# ---- Where each latent is active -----------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Survey:
    """The pictures' maps, and the greatest code of each latent in each picture."""

    features: Float[Tensor, "n c h w"]
    greatest: Float[Tensor, "n k"]
    frequency: Float[Tensor, " k"]

    @property
    def alive(self) -> Tensor:
        return (self.greatest > 0).any(dim=0).nonzero()[:, 0]

    def value(self, latent: int) -> float:
        """Returns the typical high value of a latent that is ever active."""
        found = self.greatest[:, latent]
        return float(found[found > 0].quantile(0.5))

    def top(self, latent: int) -> list[int]:
        """Returns the pictures that activate a latent most, greatest first."""
        return self.greatest[:, latent].argsort(descending=True, stable=True)[:N_TOP].tolist()


@torch.no_grad()
def _survey(
    inverter: Inverter, concepts: ConceptDictionary, images: ImageSet, batch_size: int
) -> _Survey:
    backbone = inverter.require_backbone()
    size = max(backbone.picture_size)
    maps, greatest = [], []
    active = torch.zeros(concepts.n_concepts, dtype=torch.float64)
    for chosen in batched(range(len(images)), batch_size):
        squares = [center_square(images.read(i), size) for i in chosen]
        found = backbone.features(to_tensor(squares).to(backbone.device)).cpu()
        inverter.spec.check_features(found)
        codes = concepts.encode(found)
        maps.append(found)
        greatest.append(codes.amax(dim=(2, 3)))
        active += (codes > 0).double().mean(dim=(2, 3)).sum(dim=0)
    return _Survey(torch.cat(maps), torch.cat(greatest), (active / len(images)).float())


# ---- One latent ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Trial:
    """What setting one latent did, one entry per picture (and random direction).

    Args:
        latent: the concept's index.
        value: what it was set to.
        cells: where.
        pictures: indices of the pictures.
        active: whether it is active in each of them.
        effect: mean RGB distance of the decoded pictures before and after.
        effect_null: of each random direction.
        carried: mean code of the new picture in the cells, as a share of the value.
        carried_map: of the edited map itself, which an SAE need not encode to what it was set to:
            the ceiling.
        carried_before: of the decoded picture before the edit.
        carried_null: of each random direction.
        example: a picture decoded before, after, and along a random direction.
    """

    latent: int
    value: float
    cells: CellMask
    pictures: list[int]
    active: Bool[Tensor, " p"]
    effect: Float[Tensor, " p"]
    effect_null: Float[Tensor, "r p"]
    carried: Float[Tensor, " p"]
    carried_map: Float[Tensor, " p"]
    carried_before: Float[Tensor, " p"]
    carried_null: Float[Tensor, "r p"]
    example: Images

    @property
    def is_seen(self) -> bool:
        return bool(self.effect.mean() > self.effect_null.mean(dim=1).max())

    @property
    def is_steerable(self) -> bool:
        found = self.carried.mean()
        return bool(found >= CARRIED and found > self.carried_null.mean(dim=1).max())

    def row(self) -> dict[str, Any]:
        return {
            "n_pictures": len(self.pictures),
            "effect": self.effect.mean().item(),
            "effect_active": _mean(self.effect[self.active]),
            "effect_inactive": _mean(self.effect[~self.active]),
            "effect_null": self.effect_null.mean().item(),
            "effect_null_greatest": self.effect_null.mean(dim=1).max().item(),
            "carried": self.carried.mean().item(),
            "carried_active": _mean(self.carried[self.active]),
            "carried_inactive": _mean(self.carried[~self.active]),
            "carried_map": self.carried_map.mean().item(),
            "carried_before": self.carried_before.mean().item(),
            "carried_null_greatest": self.carried_null.mean(dim=1).max().item(),
            "seen": self.is_seen,
            "steerable": self.is_steerable,
        }


def _mean(values: Tensor) -> float | None:
    return values.mean().item() if len(values) else None


class _Lab:
    """Sets latents; the decoded picture of each unedited map is made once."""

    def __init__(
        self,
        inverter: Inverter,
        concepts: ConceptDictionary,
        images: ImageSet,
        survey: _Survey,
        basis: CellBasis,
        dose: float,
        seed: int,
        batch_size: int,
    ):
        self.inverter, self.concepts, self.survey = inverter, concepts, survey
        self.frame = basis.frame
        self.dose, self.seed, self.batch_size = dose, seed, batch_size
        self.seeds = [derive_seed(seed, Path(name).name, 0) for name in images.ids]
        self.device = inverter.require_backbone().device
        self.unedited: dict[int, tuple[Tensor, Tensor]] = {}

    def test(self, latent: int, n_pictures: int, n_directions: int) -> Trial:
        survey, concepts = self.survey, self.concepts
        top, value = survey.top(latent)[0], self.dose * survey.value(latent)
        cells = high_cells(concepts.encode(survey.features[[top]])[0, latent])
        pictures = self._draw(latent, n_pictures)
        features = survey.features[pictures]
        edited = concepts.set_code(features, latent, value, cells)
        maps = [edited]
        for k in range(n_directions):
            generator = make_generator(self.seed, "direction", latent, k)
            maps.append(features + random_like(edited - features, self.frame, generator))
        seeds = [self.seeds[i] for i in pictures]
        after, codes = self._decode(torch.cat(maps), seeds * len(maps), latent, cells)
        before = self._before(pictures)
        kept = concepts.encode(torch.stack([seen for _, seen in before]))[:, latent, cells]
        shown = torch.stack([image for image, _ in before])
        distance = (after - shown.repeat(len(maps), 1, 1, 1)).norm(dim=1).mean(dim=(1, 2))
        effect = distance.reshape(len(maps), -1)
        carried = (codes / value).reshape(len(maps), -1)
        p = len(pictures)
        return Trial(
            latent=latent,
            value=value,
            cells=cells,
            pictures=pictures,
            active=survey.greatest[pictures, latent] > 0,
            effect=effect[0],
            effect_null=effect[1:],
            carried=carried[0],
            carried_map=concepts.encode(edited)[:, latent, cells].mean(dim=1) / value,
            carried_before=kept.mean(dim=1) / value,
            carried_null=carried[1:],
            example=torch.stack([shown[-1], after[p - 1], after[2 * p - 1]]),
        )

    def _draw(self, latent: int, n_pictures: int) -> list[int]:
        """Returns pictures where the latent is active, then others, as many as there are."""
        active = self.survey.greatest[:, latent] > 0
        drawn: list[int] = []
        for name, mask, number in (
            ("active", active, n_pictures - n_pictures // 2),
            ("inactive", ~active, n_pictures // 2),
        ):
            found = mask.nonzero()[:, 0]
            order = torch.randperm(len(found), generator=make_generator(self.seed, name, latent))
            drawn += found[order[:number]].tolist()
        return drawn

    def _before(self, pictures: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Returns the decoded unedited map of each picture, and what the backbone sees in it."""
        missing = [i for i in pictures if i not in self.unedited]
        pairs = ((self.survey.features[i].to(self.device), self.seeds[i]) for i in missing)
        found = []
        for batch in sample_maps(self.inverter, pairs, self.batch_size):
            found += zip(batch.images.cpu(), batch.features.cpu(), strict=True)
        self.unedited.update(zip(missing, found, strict=True))
        return [self.unedited[i] for i in pictures]

    def _decode(
        self, maps: Features, seeds: Sequence[int], latent: int, cells: CellMask
    ) -> tuple[Images, Float[Tensor, " b"]]:
        """Returns decoded pictures, and the mean code of the latent in the cells of each."""
        images, codes = [], []
        pairs = zip(maps.to(self.device), seeds, strict=True)
        for batch in sample_maps(self.inverter, pairs, self.batch_size):
            if not all(batch.finite):
                raise InputError(not_finite(f"Latent {latent}", self.inverter))
            images.append(batch.images.cpu())
            codes.append(self.concepts.encode(batch.features.cpu())[:, latent, cells].mean(dim=1))
        return torch.cat(images), torch.cat(codes)


# ---- What was found ------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class Steerability(Analysis):
    """The table of all latents, and the shares of those tested that are seen and steerable."""

    def _write(self, run: RunFolder, made_by: Mapping[str, Any]) -> None:
        run.table(TABLE, self.rows())
        run.numbers("steerability.json", {"latents": self.rows()})


def _report(
    inverter: Inverter,
    concepts: ConceptDictionary,
    images: ImageSet,
    survey: _Survey,
    trials: Sequence[Trial],
    n_directions: int,
    has_scope: bool,
    dose: float,
    seed: int,
) -> Steerability:
    shares = {
        "seen": _share([trial.is_seen for trial in trials]),
        "steerable": _share([trial.is_steerable for trial in trials]),
        "both": _share([trial.is_seen and trial.is_steerable for trial in trials]),
    }
    n_alive = len(survey.alive)
    chance = 1 / (n_directions + 1)
    metrics = {
        "command": "steerability",
        "spec": str(inverter.spec),
        "n_concepts": concepts.n_concepts,
        "n_alive": n_alive,
        "n_tested": len(trials),
        "n_images": len(images),
        "n_directions": n_directions,
        "chance": chance,
        "null": "span of the natural maps of the scope" if has_scope else "span of these pictures",
        "dose": dose,
        "seed": seed,
        "shares": to_dicts(shares),
    }
    lines = [
        f"{n_alive} of {concepts.n_concepts} latents are active in {len(images)} pictures; "
        f"{len(trials)} of them were set, to {dose:g} times their typical high value.",
        f"Seen: {_words(shares['seen'])} move the picture more than each of {n_directions} random "
        f"directions of the same length ({chance:.0%} would by chance).",
        f"Steerable: {_words(shares['steerable'])} come back with at least {CARRIED:.0%} of what "
        "was asked, and more than with each random direction.",
        f"Both: {_words(shares['both'])}.",
    ]
    table = _rows(concepts, images, survey, trials)
    figure = _draw(inverter, concepts, images, survey, trials, lines)
    return Steerability(metrics, {FIGURE: figure}, lines, table)


def _share(found: Sequence[bool]) -> Interval:
    return share(sum(found), len(found))


def _words(found: Interval) -> str:
    return f"{found.value:.0%} [{found.low:.0%}, {found.high:.0%}]"


def _rows(
    concepts: ConceptDictionary, images: ImageSet, survey: _Survey, trials: Sequence[Trial]
) -> list[dict[str, Any]]:
    tested = {trial.latent: trial.row() for trial in trials}
    blank = dict.fromkeys(trials[0].row())
    numbers = concepts.latents if isinstance(concepts, SAEConcepts) else range(concepts.n_concepts)
    return [
        {
            "concept": k,
            "latent": number,
            "share_of_cells": survey.frequency[k].item(),
            "n_active_pictures": int((survey.greatest[:, k] > 0).sum()),
            "greatest": survey.greatest[:, k].max().item(),
            "top_pictures": [images.ids[i] for i in survey.top(k)],
            "value": survey.value(k) if bool((survey.greatest[:, k] > 0).any()) else None,
            "tested": k in tested,
            **tested.get(k, blank),
        }
        for k, number in enumerate(numbers)
    ]


def _draw(
    inverter: Inverter,
    concepts: ConceptDictionary,
    images: ImageSet,
    survey: _Survey,
    trials: Sequence[Trial],
    lines: Sequence[str],
) -> Figure:
    """Draws the best and the worst latents beside their pictures, and histograms of all."""
    order = sorted(trials, key=lambda trial: trial.carried.mean().item(), reverse=True)
    n_best = min(N_SHOWN, (len(order) + 1) // 2)
    shown = [*order[:n_best], *order[n_best:][-N_SHOWN:]]
    board = Board(
        len(shown),
        N_TOP + 3,
        f"Steerability of latents: {inverter.spec}",
        [*lines, "Best and worst latents: the pictures that activate each most, cells where it is "
         "high outlined; then a picture decoded as it is, with the latent set in the cells of the "
         "first, and with the same change along a random direction."],
        headers="first",
        after_first=0.0,
        extra=2.0,
    )  # fmt: skip
    figure = board.make()
    for row, trial in enumerate(shown):
        _draw_latent(board, figure, row, concepts, images, survey, trial)
    _draw_histograms(board, figure, trials)
    return figure


def _draw_latent(
    board: Board,
    figure: Figure,
    row: int,
    concepts: ConceptDictionary,
    images: ImageSet,
    survey: _Survey,
    trial: Trial,
) -> None:
    for column, i in enumerate(survey.top(trial.latent)):
        axes = board.tile_axes(figure, row, column)
        figures.show_picture(axes, _square(images.read(i)))
        codes = concepts.encode(survey.features[[i]])[0, trial.latent]
        figures.outline(axes, high_cells(codes))
        figures.caption(axes, f"code {figures.number(codes.max().item())}", color=figures.GREY)
        if column == 0:
            figures.side_label(axes, f"latent {trial.latent}")
    titles = ("decoded", f"set to {trial.value:.2g}", "random direction")
    ratio = trial.effect.mean() / trial.effect_null.mean().clamp(min=1e-12)
    carried, null = trial.carried.mean().item(), trial.carried_null.mean().item()
    words = ("", f"{ratio.item():.1f}× moved, carried {carried:.0%}", f"carried {null:.0%}")
    for k, (image, title, caption) in enumerate(zip(trial.example, titles, words, strict=True)):
        axes = board.tile_axes(figure, row, N_TOP + k)
        figures.show_picture(axes, image)
        if k:
            figures.outline(axes, trial.cells)
        if row == 0:
            figures.label(axes, title.split(" to ")[0])
        figures.caption(axes, caption)


def _square(picture: Image.Image) -> Image.Image:
    return center_square(picture, 256)


def _draw_histograms(board: Board, figure: Figure, trials: Sequence[Trial]) -> None:
    ratio = [(t.effect.mean() / t.effect_null.mean().clamp(min=1e-12)).item() for t in trials]
    carried = [t.carried.mean().item() for t in trials]
    top = board.bottom_of(board.n_rows - 1) + 0.5
    width = (board.width - 2 * board.margin - 1.2) / 2
    for place, (values, line, name) in enumerate(
        [(ratio, 1.0, "effect ÷ mean of random"), (carried, CARRIED, "activation after ÷ asked")]
    ):
        left = board.margin + 0.4 + place * (width + 0.7)
        axes = board.axes(figure, left, top, width, 1.1)
        axes.hist(values, bins=20, color=figures.BLUE)
        axes.axvline(line, color=figures.GREY, lw=1, ls="--")
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=figures.TEXT)
        axes.set_xlabel(name, fontsize=figures.TEXT)
        axes.set_ylabel("latents", fontsize=figures.TEXT)
