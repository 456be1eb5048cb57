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


def test_replay_works_from_another_folder_and_writes_below_the_working_folder(
    featinv: Featinv, sampled: Path, tmp_path: Path, monkeypatch
):
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.chdir(other)
    before = sorted(sampled.rglob("*"))
    for _ in range(2):  # what the first one made, the second one may replace
        assert featinv("replay", sampled).code == 0
    assert (other / "outputs" / "replay" / "more" / "c_1.png").is_file()
    assert sorted(sampled.rglob("*")) == before
    monkeypatch.chdir(sampled)
    assert "Name a folder with --output" in featinv("replay", ".").err


def names_of(content: dict, names: list[str]) -> None:
    content["images"] = [{**content["images"][0], "outputs": names[:2]}]


@pytest.mark.parametrize(
    "name",
    [
        ".bashrc", ".ssh/id.png", ".x.png", "..png", "a/.b.png", "../x.png", "/tmp/x.png", "", ".",
        "a//x.png", "a.exe", "manifest.json", "a\\x.png", "C:x.png", "a\n.png", "a\x1b[31m.png",
    ],
)  # fmt: skip
def test_an_output_is_a_picture_inside_of_the_folder(featinv: Featinv, sampled: Path, name: str):
    content = load(sampled)
    names_of(content, [name, "y.png"])
    (sampled / "manifest.json").write_text(json.dumps(content))
    done = featinv("replay", sampled, "-o", "again")
    assert (done.code, "An output must" in done.err) == (2, True)
    assert not Path("again").exists()


def test_outputs_have_names_of_their_own(featinv: Featinv, sampled: Path):
    content = load(sampled)
    for names in (["x.png", "X.png"], ["grid.png", "y.png"]):
        names_of(content, names)
        (sampled / "manifest.json").write_text(json.dumps(content))
        done = featinv("replay", sampled, "-o", "again")
        assert (done.code, "named twice" in done.err) == (2, True)


def test_a_replay_follows_no_link_and_replaces_nothing_of_others(featinv: Featinv, sampled: Path):
    home = Path("home")
    home.mkdir()
    (home / "a_0.png").write_text("precious")
    done = featinv("replay", sampled, "-o", home)
    assert (done.code, "no run of this folder made it" in done.err) == (2, True)
    (sampled / "replay").symlink_to(home.absolute())  # nobody named it: it is not followed
    assert featinv("replay", sampled).code == 0
    Path("fresh").mkdir()
    (Path("fresh") / "more").symlink_to(home.absolute())
    done = featinv("replay", sampled, "-o", "fresh")
    assert (done.code, "a link leads to" in done.err) == (2, True)
    assert [path.name for path in home.iterdir()] == ["a_0.png"]
    assert (home / "a_0.png").read_text() == "precious"


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
        (lambda m: m["images"][0].pop("seed"), "seed"),
        (lambda m: m["images"][0]["seed"].pop(), "as many outputs as seeds"),
        (
            lambda m: m["images"][0].update(outputs=["../x.png", "y.png"]),
            "inside of the output folder",
        ),
        (lambda m: m["environment"].update(n_threads=10**6), "environment.n_threads must be"),
        (lambda m: m.update(environment=None), "environment must be"),
        (lambda m: m.update(batch_size=10**12), "batch_size must be at most"),
        (lambda m: m.update(steps=10**9), "steps must be at most"),
        (lambda m: m.update(images=[]), "images must be"),
        (lambda m: m.update(failures=None), "failures must be"),
        (lambda m: m["images"][0].update(seed=[2**70, 1]), "images[0].seed[0]"),
        (lambda m: m.update(pipeline="${oc.env:HOME}"), "${oc.env:HOME}"),
        (lambda m: m.update(device="meta"), "meta"),
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
