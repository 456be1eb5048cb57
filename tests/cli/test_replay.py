"""`featinv replay`: the same bits again, or a sentence why not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from featinv_diffusion.images import read_image
from tests.cli.conftest import Featinv


@pytest.fixture
def sampled(featinv: Featinv, photos: Path) -> Path:
    """A folder that `featinv sample` wrote, of three pictures and one that failed."""
    (photos / "bad.png").write_text("hello")
    options = ["--n-samples", 2, "--seed", 3, "--scheduler", "euler-ancestral", "--batch-size", 4]
    assert featinv("sample", photos, *options, "-o", "out").code == 1
    return Path("out").absolute()


def load(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def test_replay_makes_the_same_files_bit_for_bit(featinv: Featinv, sampled: Path):
    done = featinv("replay", sampled / "manifest.json", "--output", "again")
    assert (done.code, done.err) == (0, "")
    assert "6 of 6 pictures are identical" in done.out
    before, after = load(sampled), load(Path("again"))
    names = [name for entry in before["images"] for name in entry["outputs"]]
    assert len(names) == 6
    for name in names:
        assert (sampled / name).read_bytes() == (Path("again") / name).read_bytes()
    before["failures"] = []
    assert before == after


def test_replay_works_from_another_folder_and_defaults_to_a_folder_beside(
    featinv: Featinv, sampled: Path, tmp_path: Path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert featinv("replay", sampled).code == 0
    assert (sampled / "replay" / "more" / "c_1.png").is_file()


def test_replay_into_its_own_folder_compares_with_what_was_there(featinv: Featinv, sampled: Path):
    read_image(sampled / "a_0.png").rotate(180).save(sampled / "a_0.png")
    done = featinv("replay", sampled, "-o", sampled)
    assert done.code == 0
    assert "5 of 6 pictures are identical" in done.out


def test_replay_uses_the_recorded_number_of_threads(featinv: Featinv, sampled: Path, monkeypatch):
    content = load(sampled)
    assert content["environment"]["n_threads"] == torch.get_num_threads()
    content["environment"]["n_threads"] = 3
    (sampled / "manifest.json").write_text(json.dumps(content))
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    assert featinv("replay", sampled).code == 0
    assert asked == [3]


def test_a_picture_that_is_gone_is_listed(featinv: Featinv, sampled: Path, photos: Path):
    (photos / "a.png").unlink()
    done = featinv("replay", sampled)
    assert done.code == 1
    assert "a.png" in done.err
    assert "4 of 4 pictures are identical" in done.out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.pop("steps"), "lacks steps"),
        (lambda m: m.update(steps="many"), "steps must be a whole number"),
        (lambda m: m.update(scheduler="nonsense"), "'nonsense'"),
        (lambda m: m["images"][0].pop("seed"), "as many outputs as seeds"),
        (lambda m: m["images"][0]["seed"].pop(), "as many outputs as seeds"),
        (lambda m: m["images"][0].update(outputs=["../x.png", "y.png"]), "outside of its folder"),
        (lambda m: m.update(device="cuda:99"), "cuda:99"),
        (lambda m: m.update(pipeline="tiny/swin"), "tiny/swin"),
    ],
)
def test_a_manifest_that_makes_no_sense(featinv: Featinv, sampled: Path, change, words):
    content = load(sampled)
    change(content)
    (sampled / "manifest.json").write_text(json.dumps(content))
    done = featinv("replay", sampled)
    assert done.code == 2
    assert done.err.startswith("Error: ")
    assert words in done.err


@pytest.mark.parametrize("text", ["", "hello", "[]", "{}", None])
def test_no_manifest(featinv: Featinv, tmp_path: Path, text):
    path = tmp_path / "manifest.json"
    if text is not None:
        path.write_text(text)
    done = featinv("replay", path)
    assert done.code == 2
    assert "manifest" in done.err
    assert "Traceback" not in done.err
