"""Which worker a process is: by its option, or by the job array that it is a task of."""

from __future__ import annotations

import pytest

from featinv_diffusion.errors import InputError
from featinv_diffusion.processes import Alone, Joiner, Worker, find_worker, joins


def array(number: int, least: int, count: int, **more: str) -> dict[str, str]:
    values = {"ID": number, "MIN": least, "COUNT": count}
    return {f"SLURM_ARRAY_TASK_{k}": str(v) for k, v in values.items()} | more


@pytest.mark.parametrize(
    ("text", "environment", "worker"),
    [
        (None, {}, None),
        ("0/1", {}, Worker(0, 1)),
        ("3/4", array(1, 0, 2), Worker(3, 4)),  # the option wins
        ("whole", array(1, 0, 2), None),
        (None, array(1, 0, 2), Worker(1, 2)),
        (None, array(7, 5, 4, SLURM_ARRAY_TASK_MAX="8"), Worker(2, 4)),
        (None, array(3, 3, 1, SLURM_ARRAY_TASK_MAX="3"), Worker(0, 1)),
        (None, {"SLURM_ARRAY_TASK_ID": "3"}, None),
    ],
)
def test_which_worker_it_is(text, environment, worker):
    assert find_worker(text, environment) == worker


@pytest.mark.parametrize("text", ["", "1", "2/2", "-1/2", "0/0", "a/b", "1/2/3", "1 / 2", "٠/2"])
def test_other_options_are_refused(text: str):
    with pytest.raises(InputError, match=r"--worker must be i/N with i from 0 to N-1"):
        find_worker(text, {})


@pytest.mark.parametrize(
    "environment",
    [
        array(4, 0, 3),  # 0,2,4
        array(2, 0, 3, SLURM_ARRAY_TASK_MAX="4"),
        array(1, 2, 3),
        {**array(0, 0, 2), "SLURM_ARRAY_TASK_ID": "x"},
    ],
)
def test_an_array_with_gaps_is_refused(environment):
    with pytest.raises(InputError, match=r"numbers without gaps, such as --array=0-3, got SLURM_"):
        find_worker(None, environment)


def test_a_worker_is_one_process():
    with pytest.raises(InputError, match=r"Worker 0/2 must be one process, but 8 were launched"):
        find_worker("0/2", {"WORLD_SIZE": "8"})
    assert find_worker("whole", {"WORLD_SIZE": "8"}) is None
    assert find_worker("0/2", {"WORLD_SIZE": "1"}) == Worker(0, 2)


def test_workers_leave_the_joining_to_another():
    assert [joins(process) for process in (Alone(), Worker(0, 1), Joiner(4))] == [True, False, True]
