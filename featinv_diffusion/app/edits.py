"""Edits of a feature map as plain values, which a link, a widget and lines of Python all say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, TypeAlias

import torch
from msgspec import Meta, Struct
from torch import Tensor
from torch.nn import functional as F

from featinv_diffusion.concepts import ConceptDictionary
from featinv_diffusion.errors import InputError
from featinv_diffusion.features import paste, scale_part
from featinv_diffusion.features.edits import CellMask
from featinv_diffusion.types import Features

MAX_SIDE = 128
MAX_FACTOR = 100.0

Factor = Annotated[float, Meta(ge=-MAX_FACTOR, le=MAX_FACTOR)]
Number = Annotated[int, Meta(ge=0, lt=1_000_000)]
Name = Annotated[str, Meta(min_length=1, max_length=1000)]
Side = Annotated[int, Meta(ge=1, le=MAX_SIDE)]
Grid = Annotated[list[Side], Meta(min_length=2, max_length=2)]
Cells = Annotated[list[Number], Meta(min_length=1, max_length=MAX_SIDE**2)]


@dataclass(frozen=True)
class Materials:
    """What edits take from beside the map that they edit.

    Args:
        first: the map before all edits, `[1, c, h, w]`.
        second: the map of the second picture.
        load_concepts: returns the dictionary of a name.
    """

    first: Features
    second: Features | None
    load_concepts: Callable[[str], ConceptDictionary]

    def require_second(self) -> Features:
        """Returns the map of the second picture.

        Raises:
            InputError: there is none.
        """
        if self.second is None:
            raise InputError("This edit takes cells of a second picture, but none is chosen.")
        return self.second


class _OfCells(Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind"):
    """An edit of some cells.

    Args:
        cells: numbers of the cells, row by row from the upper left one.
        grid: (h, w) of the map that they are numbered on; maps of another grid are edited in the
            cells that lie under these.
    """

    cells: Cells
    grid: Grid

    def __post_init__(self) -> None:
        if max(self.cells) >= self.grid[0] * self.grid[1]:
            raise InputError(
                f"Cells of a grid of {self.grid[0]}×{self.grid[1]} are numbered from 0 to "
                f"{self.grid[0] * self.grid[1] - 1}, got {max(self.cells)}."
            )

    def mask_on(self, features: Features) -> CellMask:
        """Marks the cells on the grid of a map."""
        mask = torch.zeros(self.grid[0], self.grid[1], dtype=torch.bool)
        mask.view(-1)[self.cells] = True
        wanted = (features.shape[2], features.shape[3])
        if wanted == mask.shape:
            return mask
        return F.adaptive_max_pool2d(mask[None, None].float(), wanted)[0, 0] > 0.5

    def apply(self, features: Features, materials: Materials) -> Features:
        """Returns the edited map; the input stays as it is."""
        return paste(features, self._inside(features, materials), self.mask_on(features))

    def to_lines(self, features: Features) -> list[str]:
        """Returns lines of Python that do the same to the variable `features`."""
        h, w = features.shape[2:]
        chosen = self.mask_on(features).view(-1).nonzero()[:, 0].tolist()
        return [
            f"cells = torch.zeros({h}, {w}, dtype=torch.bool)",
            *_wrapped("cells.view(-1)[[", chosen, "]] = True"),
            *self._lines_inside(),
        ]

    def _inside(self, features: Features, materials: Materials) -> Features:
        """Returns the map that the cells are taken from."""
        raise NotImplementedError

    def _lines_inside(self) -> list[str]:
        raise NotImplementedError


class Paint(_OfCells, frozen=True, tag="paint"):
    """Takes the cells of the second picture's map."""

    def _inside(self, features: Features, materials: Materials) -> Features:
        return materials.require_second()

    def _lines_inside(self) -> list[str]:
        return ["features = paste(features, second, cells)"]


class Erase(_OfCells, frozen=True, tag="erase"):
    """Sets the cells to zero."""

    def _inside(self, features: Features, materials: Materials) -> Features:
        return torch.zeros_like(features)

    def _lines_inside(self) -> list[str]:
        return ["features = paste(features, torch.zeros_like(features), cells)"]


class Mirror(_OfCells, frozen=True, tag="mirror"):
    """Takes each cell from the same place of the map that is mirrored left to right."""

    def _inside(self, features: Features, materials: Materials) -> Features:
        return features.flip(3)

    def _lines_inside(self) -> list[str]:
        return ["features = paste(features, features.flip(3), cells)"]


class Steer(_OfCells, frozen=True, tag="steer"):
    """Adds a factor times a direction to the cells.

    Args:
        factor: how far.
        concepts: a dictionary of concepts; the direction is one of a concept there, as long as the
            map's cells are on average. None steers from the mean cell of the first picture's map
            to that of the second.
        concept: the number of the concept.
    """

    factor: Factor
    concepts: Name | None = None
    concept: Number = 0

    def _inside(self, features: Features, materials: Materials) -> Features:
        first = materials.first
        if self.concepts is None:
            direction = materials.require_second().mean(dim=(2, 3)) - first.mean(dim=(2, 3))
        else:
            basis = materials.load_concepts(self.concepts).basis(self.concept)
            if len(basis) != 1:
                raise InputError(
                    "A concept must have one direction to steer along, but concept "
                    f"{self.concept} has {len(basis)}. Change its factor instead."
                )
            direction = (basis[0] / basis[0].norm() * first.norm(dim=1).mean().cpu())[None]
        return features + self.factor * direction.to(features)[:, :, None, None]

    def _lines_inside(self) -> list[str]:
        if self.concepts is None:
            lines = ["direction = second.mean(dim=(2, 3)) - first.mean(dim=(2, 3))"]
        else:
            lines = [
                f"basis = concepts.basis({self.concept})[0]",
                "direction = (basis / basis.norm() * first.norm(dim=1).mean().cpu())[None]",
            ]
        moved = f"features + {self.factor!r} * direction.to(features)[:, :, None, None]"
        return [*lines, f"features = paste(features, {moved}, cells)"]


class Scale(Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="scale"):
    """Multiplies the parts of concepts: f − Σ_l (1 − factor_l) part_l (FeatInv, algorithm 1).

    Parts are those of the map before all edits, so that sliders do not depend on their order.

    Args:
        concepts: a dictionary of concepts.
        factors: (number of the concept, factor); 1 changes nothing.
    """

    concepts: Name
    factors: Annotated[list[tuple[Number, Factor]], Meta(max_length=256)]

    def apply(self, features: Features, materials: Materials) -> Features:
        """Returns the edited map; the input stays as it is."""
        dictionary = materials.load_concepts(self.concepts)
        for concept, factor in self.factors:
            part = dictionary.part(materials.first, concept)
            features = scale_part(features, part, factor)
        return features

    def to_lines(self, features: Features) -> list[str]:
        """Returns lines of Python that do the same to the variable `features`."""
        return [
            f"features = scale_part(features, concepts.part(first, {concept}), {factor!r})"
            for concept, factor in self.factors
        ]


Edit: TypeAlias = Paint | Erase | Mirror | Steer | Scale


def concepts_of(edits: Sequence[Edit]) -> list[str]:
    """Returns the dictionaries that edits name."""
    names = [edit.concepts for edit in edits if isinstance(edit, Scale | Steer)]
    return list(dict.fromkeys(name for name in names if name is not None))


def needs_second(edits: Sequence[Edit]) -> bool:
    """Whether any of the edits takes something from the second picture."""
    return any(
        isinstance(edit, Paint) or (isinstance(edit, Steer) and edit.concepts is None)
        for edit in edits
    )


def apply_all(edits: Sequence[Edit], materials: Materials) -> Tensor:
    """Returns the first map after all edits, one after the other; without any the very map."""
    features: Tensor = materials.first
    for edit in edits:
        features = edit.apply(features, materials)
    return features


def _wrapped(start: str, numbers: Sequence[int], end: str, width: int = 96) -> list[str]:
    """Returns a list of numbers as lines of Python."""
    whole = start + ", ".join(map(str, numbers)) + end
    if len(whole) <= width:
        return [whole]
    lines, line = [start], "   "
    for number in numbers:
        if len(line) + len(f" {number},") > width:
            lines.append(line)
            line = "   "
        line += f" {number},"
    return [*lines, line, end]
