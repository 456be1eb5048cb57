"""Shards depend on the job list alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from featinv_diffusion.errors import InputError
from featinv_diffusion.runs.sampling import make_jobs
from featinv_diffusion.runs.shards import RECORDS, begin_run, make_shards, merge_shards
from featinv_diffusion.settings import SampleSettings


def make_some(n: int = 5, size: int = 2):
    jobs = make_jobs([(f"{i}.png", Path(f"/photos/{i}.png")) for i in range(n)], 0, 2)
    return jobs, make_shards(jobs, size)


def test_shards_are_slices_in_folders_of_their_own():
    jobs, shards = make_some()
    assert [len(shard.jobs) for shard in shards] == [2, 2, 1]
    moved = [job for shard in shards for job in shard.jobs]
    assert [job.seeds for job in moved] == [job.seeds for job in jobs]
    assert moved[2].outputs == ("shards/00001/2_0.png", "shards/00001/2_1.png")


def test_no_images_are_no_shards_and_a_size_of_zero_is_refused():
    assert make_shards([], 4) == []
    with pytest.raises(InputError, match="at least 1 image"):
        make_some(size=0)


def test_merging_keeps_the_order_of_the_jobs(tmp_path):
    _, shards = make_some()
    for number in (2, 0, 1):  # as processes finish
        lines = [json.dumps({"input": str(job.input)}) for job in shards[number].jobs]
        lines[0] = json.dumps({"input": str(shards[number].jobs[0].input), "error": "broken"})
        path = tmp_path / shards[number].folder / RECORDS
        path.parent.mkdir(parents=True)
        path.write_text("\n".join(lines) + "\n")
    merged = merge_shards(SampleSettings(device="cpu"), shards, tmp_path)
    assert [Path(e["input"]).name for e in merged.images] == ["1.png", "3.png"]
    assert [Path(e["input"]).name for e in merged.failures] == ["0.png", "2.png", "4.png"]


def test_a_run_may_go_on_another_gpu_but_not_on_another_kind_of_device(tmp_path):
    _, shards = make_some()
    settings = SampleSettings(device="cuda:0")
    begin_run(settings, shards, tmp_path, write=True)
    begin_run(replace(settings, device="cuda:3"), shards, tmp_path, write=False)
    with pytest.raises(InputError, match="device: cuda → cpu"):
        begin_run(replace(settings, device="cpu"), shards, tmp_path, write=False)
    with pytest.raises(InputError, match="images_sha256"):
        begin_run(settings, make_some(size=3)[1], tmp_path, write=False)


def test_only_the_one_that_may_write_begins_a_run(tmp_path):
    _, shards = make_some()
    begin_run(SampleSettings(), shards, tmp_path, write=False)
    assert not list(tmp_path.iterdir())
