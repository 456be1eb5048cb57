"""Edits as values: what they change, the lines of Python that do the same, and links."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from featinv_diffusion.app.edits import Edit, Materials, apply_all, concepts_of
from featinv_diffusion.app.state import State, read_link, read_state
from featinv_diffusion.concepts import ConceptDictionary
from featinv_diffusion.concepts.factorisations import PCAConcepts
from featinv_diffusion.errors import InputError
from featinv_diffusion.features import paste, scale_part
from featinv_diffusion.schema import convert

GRID = [3, 4]


def to_edits(*edits: dict[str, Any]) -> list[Edit]:
    return convert(list(edits), list[Edit], "a test")


@pytest.fixture
def materials() -> Materials:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(1, 5, 3, 4, generator=generator) for _ in range(2))
    concepts: ConceptDictionary = PCAConcepts(2).fit(first)
    return Materials(first, second, lambda name: {"some": concepts}[name])


CELLS = {"cells": [1, 6], "grid": GRID}
ALL = (
    {"kind": "scale", "concepts": "some", "factors": [[0, 0.25], [1, 3]]},
    {"kind": "mirror", "cells": [0, 3], "grid": GRID},
    {"kind": "paint", **CELLS},
    {"kind": "erase", "cells": [11], "grid": GRID},
    {"kind": "steer", "cells": [8], "grid": GRID, "factor": -1.5},
    {"kind": "steer", "cells": [9], "grid": GRID, "factor": 2, "concepts": "some", "concept": 1},
)


def test_cells_change_as_they_should_and_no_others(materials: Materials) -> None:
    first, second = materials.first, materials.second
    assert second is not None
    edited = apply_all(to_edits(*ALL[1:]), materials)[0].flatten(1).T
    before, other = (x[0].flatten(1).T for x in (first, second))
    expected = before.clone()
    expected[[0, 3]] = before[[3, 0]]
    expected[[1, 6]] = other[[1, 6]]
    expected[11] = 0
    expected[8] += -1.5 * (other.mean(0) - before.mean(0))
    basis = materials.load_concepts("some").basis(1)[0]
    expected[9] += 2 * basis / basis.norm() * before.norm(dim=1).mean()
    untouched = [2, 4, 5, 7, 10]
    assert torch.equal(edited[untouched], before[untouched])
    torch.testing.assert_close(edited, expected)


def test_factors_scale_the_parts_of_the_unedited_map_and_1_changes_no_bit(
    materials: Materials,
) -> None:
    first, dictionary = materials.first, materials.load_concepts("some")
    scaled = apply_all(to_edits(ALL[0]), materials)
    expected = first - 0.75 * dictionary.part(first, 0) + 2 * dictionary.part(first, 1)
    torch.testing.assert_close(scaled, expected)
    one = {"kind": "scale", "concepts": "some", "factors": [[0, 1], [1, 1.0]]}
    assert torch.equal(apply_all(to_edits(one), materials), first)


def test_the_lines_of_python_do_the_very_same(materials: Materials) -> None:
    edits = to_edits(*ALL)
    known: dict[str, Any] = {
        "torch": torch,
        "paste": paste,
        "scale_part": scale_part,
        "first": materials.first,
        "features": materials.first,
        "second": materials.second,
        "concepts": materials.load_concepts("some"),
    }
    for edit in edits:
        exec("\n".join(edit.to_lines(materials.first)), known)
    assert torch.equal(known["features"], apply_all(edits, materials))
    assert concepts_of(edits) == ["some"]


def test_cells_are_found_on_a_map_of_another_grid(materials: Materials) -> None:
    (edit,) = to_edits({"kind": "erase", "cells": [3], "grid": [2, 2]})
    assert not isinstance(edit, Tensor)
    edited = apply_all([edit], materials)[0].norm(dim=0)
    # The lower right quarter of 3×4 cells, the middle row of which both halves touch.
    half = [False, False, True, True]
    assert (edited == 0).tolist() == [[False] * 4, half, half]


def test_a_link_holds_the_whole_state() -> None:
    content = {
        "picture": "flower",
        "second": "china",
        "members": ["tiny/convnext", "vit@blocks.2"],
        "quality": "draft",
        "n_samples": 2,
        "seed": 7,
        "edits": list(ALL),
    }
    state = convert(content, State, "a test")
    assert read_link(state.to_link()) == state
    assert read_link(state.to_link()).edits == to_edits(*ALL)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"picture": "../../etc/passwd"}, "picture"),
        ({"members": []}, "members"),
        ({"members": ["a"] * 5}, "members"),
        ({"n_samples": 9}, "n_samples"),
        ({"seed": -1}, "seed"),
        ({"quality": "published"}, "published"),
        ({"more": 1}, "more"),
        ({"edits": [{"kind": "paint", "cells": [1], "grid": [2, 2]}]}, "second picture"),
        ({"edits": [{"kind": "erase", "cells": [4], "grid": [2, 2]}]}, "numbered from 0 to 3"),
        ({"edits": [{"kind": "erase", "cells": [4], "grid": [1000, 2]}]}, "128"),
        ({"edits": [{"kind": "run", "cells": [4], "grid": [2, 2]}]}, "run"),
        ({"edits": [{**ALL[4], "factor": float("nan")}]}, "100"),
        ({"edits": [{**ALL[0], "factors": [[0.5, 1]]}]}, "whole number"),
    ],
)
def test_a_state_of_a_stranger_is_refused_in_one_sentence(
    changed: dict[str, Any], words: str
) -> None:
    content = {"picture": "flower", "members": ["tiny/convnext"], **changed}
    with pytest.raises(InputError, match=words) as caught:
        read_state(json.dumps(content))
    assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize("link", ["?", "AAAA", "x" * 300_000])
def test_a_damaged_link_is_refused(link: str) -> None:
    with pytest.raises(InputError):
        read_link(link)
