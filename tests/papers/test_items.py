"""The list of the papers' items: none missing, none invented, and the page is that of the list."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from featinv_diffusion.errors import InputError
from featinv_diffusion.papers.items import (
    DIFFERS,
    NOT_MEASURED,
    REPRODUCED,
    STATES,
    TEXTS,
    find_item,
    list_items,
    read_measured,
)
from featinv_diffusion.papers.page import to_markdown
from featinv_diffusion.papers.run import STUDIES, find_study

ROOT = Path(__file__).parents[2]
ITEMS = list_items()
NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e-?\d+)?")


def test_all_figures_and_tables_of_the_texts_are_listed() -> None:
    """Their numbers in the texts; the 72 of the count are all kinds together."""
    names = {item.name for item in ITEMS}
    assert len(ITEMS) == len(names) == 72
    figures = {"featinv": range(1, 7), "detr": range(1, 15), "siglip": range(1, 11)}
    for text, numbers in figures.items():
        assert {f"{text}-figure-{n}" for n in numbers} <= names
    assert {"featinv-table-1", "featinv-table-2", "siglip-table-1", "siglip-table-2"} <= names
    assert {item.text for item in ITEMS} == set(TEXTS)


@pytest.mark.parametrize("item", ITEMS, ids=lambda item: item.name)
def test_a_row_says_everything(item) -> None:
    assert item.state in STATES
    assert item.title
    assert item.published
    assert item.verdict
    if item.state == REPRODUCED:
        assert item.ours != NOT_MEASURED
        assert item.source
    if item.study is None and item.state != REPRODUCED:
        assert item.how
    if item.study is not None:
        assert item.study in STUDIES
        assert item.command == f"featinv paper {item.name}"


@pytest.mark.parametrize(
    "item", [i for i in ITEMS if i.source.startswith("docs/")], ids=lambda item: item.name
)
def test_figures_of_a_page_stand_on_that_page(item) -> None:
    """All numbers that a row takes from a page are there, so none is invented or outdated."""
    known = set(NUMBER.findall((ROOT / item.source).read_text("utf-8").replace("−", "-")))
    known |= {str(int(n)) for n in known if n.isdigit()}
    ours = item.ours.replace("−", "-")
    assert set(NUMBER.findall(ours)) <= known | {"0", "1"}


def test_what_was_measured_decides_the_state() -> None:
    found = read_measured()
    names = {item.name: item for item in ITEMS}
    assert found.keys() <= names.keys()
    for name, one in found.items():
        item = names[name]
        if one.ours == item.ours:
            assert item.state == (REPRODUCED if one.holds else DIFFERS)
            assert str(one.n_images) in item.source


def test_the_page_is_that_of_the_list() -> None:
    """`python benchmarks/papers.py --page` writes it."""
    assert (ROOT / "docs/papers.md").read_text("utf-8") == to_markdown(ITEMS)


def test_an_unknown_item_is_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'detr-figure-3'"):
        find_item("detr-figure3")


def test_what_cannot_be_run_says_what_to_do() -> None:
    with pytest.raises(InputError, match="featinv train inverter"):
        find_study(find_item("siglip-table-3"))
