"""The items of the five texts, one row each, with their state here; nothing heavy is imported."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, Literal

from featinv_diffusion import schema
from featinv_diffusion.errors import InputError

FOLDER = Path(__file__).parent
MEASURED = FOLDER / "measured.json"
"""What `benchmarks/papers.py` measured, by item."""
TEXTS = {
    "featinv": "FeatInv: spatially resolved mapping from feature space to input space",
    "detr": "Inverting Visual Representations with Detection Transformers",
    "vit": "Understanding Transformer-based Vision Models through Inversion (a summary)",
    "siglip": "Image Reconstruction as a Tool for Feature Analysis",
    "tokens": "The class embedding of vision transformers, Vilas et al. 2023 (its abstract)",
}
"""The texts by the prefix of their items. Of two only a summary or the abstract was at hand."""
REPRODUCED, DIFFERS, NEEDS_WEIGHTS = STATES = (
    "reproduced here",
    "not reproduced here",
    "needs real weights",
)
NOT_MEASURED = "–"


@dataclass(frozen=True)
class _Row:
    """An item as the files of rows keep it.

    Args:
        name: the text's prefix, then what the item is there.
        published: the published number, or what is claimed.
        study: function that `featinv paper NAME` runs; None where nothing is to be run.
        ours: our figures where no study gives them, all of them on `page`.
        page: the page with them.
        state: one of `STATES`; None where it follows from the measurement.
        how: how ours differs, why it does not hold, or what is missing.
        weights: the command for those who have the real weights.
    """

    name: str
    kind: Literal["figure", "table", "claim"]
    title: str
    published: str
    study: str | None = None
    ours: str | None = None
    page: str | None = None
    state: str | None = None
    how: str = ""
    weights: str | None = None


@dataclass(frozen=True)
class Measurement:
    """What a study measured for an item.

    Args:
        ours: the figures, in words.
        holds: whether what is published holds in them.
        n_images: images behind them.
        command: the command that gave them.
        when: date and kind of machine.
    """

    ours: str
    holds: bool
    n_images: int
    command: str
    when: str


@dataclass(frozen=True)
class Item:
    """A figure, table or claim of one of the texts.

    Args:
        text: key of `TEXTS`.
        state: one of `STATES`.
        command: what runs it; for some a command that is no `featinv paper`.
        ours: our figures; `NOT_MEASURED` without any.
        source: where they are kept: a page, or the command's own record.
        verdict: whether what is published holds here, in words.
    """

    name: str
    text: str
    kind: str
    title: str
    state: str
    command: str
    ours: str
    published: str
    verdict: str
    source: str
    study: str | None
    how: str
    weights: str | None

    def to_dict(self) -> dict[str, Any]:
        """Returns the item as `featinv paper list --json` prints it."""
        return asdict(self)


@cache
def list_items() -> tuple[Item, ...]:
    """Returns all items, in the order of the texts."""
    measured = read_measured()
    return tuple(
        _to_item(text, row, measured.get(row.name)) for text in TEXTS for row in _read_rows(text)
    )


def find_item(name: str) -> Item:
    """Returns the item of this name.

    Raises:
        InputError: there is none; the nearest name is said.
    """
    items = {item.name: item for item in list_items()}
    if name not in items:
        near = get_close_matches(name, items, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(
            f"No item of the papers is named {name!r}; {hint}`featinv paper list` names all."
        )
    return items[name]


def read_measured() -> dict[str, Measurement]:
    """Returns what was measured, by the name of the item."""
    if not MEASURED.is_file():
        return {}
    return schema.read_json(MEASURED, dict[str, Measurement])


def _read_rows(text: str) -> list[_Row]:
    path = FOLDER / f"{text}.yaml"
    return schema.convert(
        schema.parse_yaml(path.read_text("utf-8"), path.name), list[_Row], path.name
    )


def _to_item(text: str, row: _Row, found: Measurement | None) -> Item:
    if row.ours is not None or row.state is not None:
        found = None  # a page with more images than the study takes
    if found is not None:
        state = REPRODUCED if found.holds else DIFFERS
        verdict = "holds here" if found.holds else "does not hold here"
    elif row.state is None:
        state, verdict = DIFFERS, "not measured yet"
    else:
        state = row.state
        verdict = "holds here" if state == REPRODUCED else "not measured here"
        if row.ours is not None and state == DIFFERS:
            verdict = "does not hold here"
    own = f"featinv paper {row.name}" if row.study else None
    return Item(
        name=row.name,
        text=text,
        kind=row.kind,
        title=row.title,
        state=state,
        command=own or row.weights or NOT_MEASURED,
        ours=(found.ours if found else row.ours) or NOT_MEASURED,
        published=row.published,
        verdict=f"{verdict}: {row.how}" if row.how else verdict,
        source=_source(found) if found else row.page or "",
        study=row.study,
        how=row.how,
        weights=row.weights,
    )


def _source(found: Measurement) -> str:
    return f"`{found.command}`, {found.n_images} images, {found.when}"
