"""Settings: side by side outside the code, held inside; checked by what their fields say."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from featinv_diffusion import settings as module
from featinv_diffusion.config import load_flat
from featinv_diffusion.diffusion import objective
from featinv_diffusion.diffusion.featinv_pipeline import GUIDANCE
from featinv_diffusion.errors import InputError
from featinv_diffusion.settings import (
    SCHEDULERS,
    SampleSettings,
    changed,
    flat_fields,
    from_flat,
    nested,
    option,
    to_flat,
)


@dataclass(frozen=True)
class Outer:
    sampling: SampleSettings = nested(SampleSettings)
    names: tuple[str, ...] = option((), "Names.")
    size: int = option(3, "A size.", least=2, most=9)

    def __post_init__(self) -> None:
        module.check(self)


def test_fields_stand_side_by_side_and_back() -> None:
    given = Outer(SampleSettings(steps=5), names=("a",), size=4)
    flat = to_flat(given)
    assert (flat["steps"], flat["size"], flat["names"]) == (5, 4, ("a",))
    assert "sampling" not in flat
    assert from_flat(Outer, flat) == given
    assert changed(given, steps=6, size=5) == Outer(SampleSettings(steps=6), ("a",), 5)
    assert list(flat_fields(Outer)) == list(flat)


def test_two_fields_of_one_name_are_a_mistake_of_the_class() -> None:
    @dataclass(frozen=True)
    class Twice:
        sampling: SampleSettings = nested(SampleSettings)
        steps: int = option(1, "Again.")

    # the hints of a class in a function are found by its own names
    Twice.__annotations__ = {"sampling": SampleSettings, "steps": int}
    with pytest.raises(TypeError, match="two fields named steps"):
        flat_fields(Twice)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"stepz": 1}, "did you mean 'steps'"),
        ({"size": 1}, "size must be at least 2, got 1"),
        ({"size": 10}, "size must be at most 9, got 10"),
        ({"scheduler": "unpic"}, "did you mean 'unipc'"),
        ({"strength": float("inf")}, "strength must be a finite number, got inf"),
        ({"n_samples": 0}, "n_samples must be at least 1, got 0"),
    ],
)
def test_what_a_class_refuses(values: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        from_flat(Outer, values)


def test_yaml_and_options(tmp_path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("steps: 7\nsize: 5\nnames: [x, y]\n")
    assert load_flat(Outer, path, {"size": 6}) == Outer(
        SampleSettings(steps=7), names=("x", "y"), size=6
    )
    path.write_text("steps: many\n")
    with pytest.raises(InputError, match="steps"):
        load_flat(Outer, path, {})
    path.write_text("stepz: 7\n")
    with pytest.raises(InputError, match="did you mean 'steps'"):
        load_flat(Outer, path, {})


def test_names_are_those_that_the_pipeline_knows() -> None:
    assert set(SCHEDULERS) == set(objective.SCHEDULERS)
    assert module.GUIDANCE == GUIDANCE
