"""Units depend on the list of items, and are done only if nothing that decides them changed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from featinv_diffusion.errors import InputError
from featinv_diffusion.inverters import DiffusionInverter
from featinv_diffusion.processes import Alone
from featinv_diffusion.runs.units import (
    DONE,
    Unit,
    begin_run,
    describe_inverter,
    discard_run,
    make_units,
    merge_units,
    open_units,
    run_units,
    share,
)
from tests import tiny

SETTINGS = {"seed": 0, "weights": "abc"}


@dataclass(frozen=True)
class Number:
    value: int


class Second(Alone):
    """The second of two processes, which waits for nobody."""

    process_index, num_processes, is_main_process = 1, 2, False


def make(output: Path, n: int = 5, size: int = 2, settings=SETTINGS, least: int = 1):
    numbers = [Number(i) for i in range(n)]
    return make_units(numbers, size, output, settings, least=least)


def write(unit: Unit[Number]) -> dict:
    unit.folder.mkdir(parents=True, exist_ok=True)
    (unit.folder / "sum.txt").write_text(str(sum(item.value for item in unit.items)))
    return {"values": [item.value for item in unit.items], "failures": []}


# ---- units ---------------------------------------------------------------------------------------


def test_units_are_slices_in_folders_of_their_own(tmp_path: Path):
    units = make(tmp_path)
    assert [[item.value for item in unit.items] for unit in units] == [[0, 1], [2, 3], [4]]
    assert [unit.folder.relative_to(tmp_path).as_posix() for unit in units] == [
        "shards/00000",
        "shards/00001",
        "shards/00002",
    ]
    assert len({unit.id for unit in units}) == 3


def test_no_items_are_no_units_and_a_size_of_zero_is_refused(tmp_path: Path):
    assert make(tmp_path, n=0) == []
    with pytest.raises(InputError, match="at least 1 image, got 0"):
        make(tmp_path, size=0)


def test_a_last_unit_that_is_too_small_joins_the_one_before(tmp_path: Path):
    def sizes(n: int) -> list[int]:
        return [len(unit.items) for unit in make(tmp_path, n, size=3, least=2)]

    assert (sizes(7), sizes(8), sizes(1)) == ([3, 4], [3, 3, 2], [1])


@pytest.mark.parametrize("change", ["settings", "items"])
def test_a_unit_of_another_id_is_not_done(tmp_path: Path, change: str):
    run_units(make(tmp_path), write, Alone())
    assert all(unit.is_done for unit in make(tmp_path))
    settings = {**SETTINGS, "weights": "def"} if change == "settings" else SETTINGS
    others = make(tmp_path, n=6 if change == "items" else 5, settings=settings)
    assert [unit.is_done for unit in others] == [change == "items"] * 2 + [False]


# ---- running them --------------------------------------------------------------------------------


def test_open_units_are_done_and_merged_in_order(tmp_path: Path):
    units = make(tmp_path)
    run_units(reversed_ := units[::-1], write, Alone())
    assert reversed_[0].items[0].value == 4
    assert merge_units(units, "values") == [0, 1, 2, 3, 4]
    assert open_units(units, Alone()) == []
    (units[1].folder / DONE).unlink()
    assert open_units(units, Alone()) == [units[1]]


def test_each_process_does_every_nth_unit(tmp_path: Path):
    units = make(tmp_path)
    assert share(units, Second()) == [units[1]]
    run_units(units, write, Second())
    assert [unit.is_done for unit in units] == [False, True, False]
    with pytest.raises(InputError, match="00000 must hold the results of another process"):
        merge_units(units, "values")


@pytest.mark.parametrize("key", ["failures", "partial_failures"])
def test_what_failed_is_tried_again(tmp_path: Path, key: str):
    (unit,) = make(tmp_path, n=1)
    run_units([unit], lambda unit: {**write(unit), key: [{"error": "broken"}]}, Alone())
    assert not unit.is_done
    assert merge_units([unit], key) == [{"error": "broken"}]
    run_units([unit], write, Alone())
    assert unit.is_done
    assert merge_units([unit], key) == []


def test_work_that_is_interrupted_leaves_the_unit_open_and_its_remains_are_removed(tmp_path: Path):
    (unit,) = make(tmp_path, n=1)
    run_units([unit], write, Alone())

    def interrupted(unit: Unit[Number]) -> dict:
        (unit.folder / ".0.png.99.part").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_units([unit], interrupted, Alone())
    assert not unit.is_done  # though it was done before
    run_units([unit], write, Alone())
    assert unit.is_done
    assert sorted(path.name for path in unit.folder.iterdir()) == ["sum.txt", DONE]


def test_a_run_that_gave_nothing_leaves_nothing_of_its_own(tmp_path: Path):
    output = tmp_path / "out"
    for other in (False, True):
        begin_run(SETTINGS, output, Alone())
        run_units(make(output), write, Alone())
        if other:
            (output / "mine.txt").touch()
        discard_run(output)
        assert output.exists() == other
    assert [path.name for path in output.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / DONE).write_text("[]"), "group of named values"),
        (lambda folder: (folder / DONE).write_text(""), "JSON"),
        (lambda folder: (folder / DONE).write_text('{"id": "x", "fi'), "JSON"),
        (lambda folder: (folder / DONE).write_text('{"id": 5, "failures": [1]}'), DONE),
        (lambda folder: (folder / "sum.txt").unlink(), "sum.txt is missing"),
        (lambda folder: (folder / "sum.txt").write_bytes(b""), "sum.txt is missing"),
    ],
)
def test_a_damaged_unit_is_done_again_and_named(tmp_path: Path, caplog, damage, words: str):
    units = make(tmp_path)
    run_units(units, write, Alone())
    damage(units[1].folder)
    found = open_units(units, Alone())
    assert found == [units[1]]
    assert words in caplog.text
    assert "00001 is done again" in caplog.text
    run_units(found, write, Alone())
    assert open_units(units, Alone()) == []


@pytest.mark.parametrize("text", ["", "[]", '{"seed"'])
def test_a_damaged_run_file_is_written_again_and_its_units_are_kept(tmp_path: Path, caplog, text):
    begin_run(SETTINGS, tmp_path, Alone())
    run_units(make(tmp_path), write, Alone())
    (tmp_path / "run.json").write_text(text)
    begin_run(SETTINGS, tmp_path, Alone())
    assert "finished units are kept" in caplog.text
    assert json.loads((tmp_path / "run.json").read_text()) == SETTINGS
    assert open_units(make(tmp_path), Alone()) == []


# ---- what guards a run ---------------------------------------------------------------------------


def test_a_run_goes_on_only_with_the_same_settings_and_says_which_are_not(tmp_path: Path):
    settings = {"seed": 0, "names": ("a", "b")}
    begin_run(settings, tmp_path, Alone())
    begin_run(settings, tmp_path, Alone())
    with pytest.raises(InputError, match=r"\(seed: 0 → 1\)"):
        begin_run({**settings, "seed": 1}, tmp_path, Alone())
    with pytest.raises(InputError, match=r"weights: None → abc"):
        begin_run({**settings, "weights": "abc"}, tmp_path, Second())


def test_only_the_main_process_begins_a_run(tmp_path: Path):
    begin_run(SETTINGS, tmp_path, Second())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "controlnet", "backbone"])
def test_each_part_of_a_pipeline_counts(part: str):
    def digest(pipeline) -> str:
        inverter = DiffusionInverter(pipeline)
        return describe_inverter(inverter, inverter.require_backbone())["pipeline_sha256"]

    pipeline = tiny.make_pipeline()
    before = digest(pipeline)
    with torch.no_grad():
        next(getattr(pipeline, part).parameters()).add_(1e-3)
    assert digest(pipeline) != before


def test_the_schedule_is_json_also_where_it_holds_infinity():
    pipeline = tiny.make_pipeline()
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    inverter = DiffusionInverter(pipeline)
    described = describe_inverter(inverter, inverter.require_backbone())
    json.dumps(described, allow_nan=False)
    assert described["scheduler_config"]["beta_end"] == 0.012
    assert described["prompt"] == pipeline.config["default_prompt"]
