"""`featinv classemb` from pictures to a folder, with a tiny ViT of random weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from pyarrow import parquet

from featinv_diffusion.class_embedding import study
from tests.class_embedding.vits import make_vit
from tests.cli.conftest import Featinv


@pytest.fixture(autouse=True)
def _tiny_vit(monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    monkeypatch.setattr(
        study, "load_backbone", lambda name: names.append(name) or make_vit().backbone
    )


def read(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def test_pictures_without_classes(featinv: Featinv, photos: Path, tmp_path: Path):
    done = featinv("classemb", photos, "--backbone", "vit", "--output", tmp_path / "out")
    assert done.code == 0, done.err
    found = read(tmp_path / "out")
    assert found["label_source"] == "predicted"
    assert found["accuracy"] is None
    assert found["n_images"] == 3
    assert len(found["identifiability_by_block"]) == 2
    assert 0 <= found["identifiability_rate"] <= 1
    assert len(found["figures"]) == 3
    for name in (*found["figures"], "identifiability.png"):
        assert Image.open(tmp_path / "out" / name).width > 300
    table = parquet.read_table(tmp_path / "out/per_image.parquet")
    assert table.column("id").to_pylist() == ["a.png", "b.jpg", "more/c.png"]
    assert "predicted class" in done.out


def test_class_folders_masks_and_a_target(featinv: Featinv, tmp_path: Path):
    for i in range(7):
        for root, colour in (("images", (9 * i, 99, 0)), ("masks", "black")):
            path = tmp_path / root / str(i) / "x.png"
            path.parent.mkdir(parents=True)
            picture = Image.new("RGB", (32, 32), colour)
            picture.paste("white", (0, 0, 16, 32))
            picture.save(path)
    arguments = ("--masks", tmp_path / "masks", "--n-figures", 1, "--interpolation", "bilinear")
    done = featinv("classemb", tmp_path / "images", *arguments, "--ablations", "-o", "out")
    assert done.code == 0, done.err
    found = read(Path("out"))
    assert found["label_source"] == "number"
    assert found["interpolation"] == "bilinear"
    assert found["context"]["n_images"] == 7
    assert 0 <= found["accuracy"] <= 1
    assert len(found["figures"]) == 1
    done = featinv("classemb", tmp_path / "images/0/x.png", "--target", 4, "-o", "one")
    assert done.code == 0, done.err
    assert read(Path("one"))["label_source"] == "target"


def test_probes_take_the_last_images_of_each_class(featinv: Featinv, tmp_path: Path):
    for i in range(7):
        for j in range(3):
            path = tmp_path / "images" / str(i) / f"{j}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (9 * i, 40 * j, 0)).save(path)
    options = ("--probes-per-class", 2, "--perturbation", "--n-points", 2, "--n-figures", 0)
    done = featinv("classemb", tmp_path / "images", *options, "-o", "out")
    assert done.code == 0, done.err
    found = read(Path("out"))
    assert (found["n_images"], found["probes"]["n_fitted"]) == (7, 14)
    assert found["arguments"]["probes_per_class"] == 2
    orders = {name.split("/", 1)[0] for name in found["perturbation"]} - {"n_kept"}
    assert orders == {"gradient", "gradient_of_probability", "chefer", "probe", "random"}
    assert {"probe/negative", "probe/negative/predicted", "probe/positive/wrong"} < set(
        found["perturbation"]
    )
    rows = parquet.read_table("out/per_image.parquet").to_pylist()
    assert sorted(row["label"] for row in rows) == list(range(7))
    assert Image.open("out/perturbation.png").width > 500


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target", "7"), "0 to 6"),
        (("--interpolation", "bilinaer"), "did you mean 'bilinear'"),
        (("--masks", "nowhere"), "folder of masks must exist"),
        (("--masks", "."), "none has one of its own"),
        (("--stage", "last"), "name one with --inverter"),
        (("--probes-per-class", "1"), "the predicted class"),
        (("--batch-size", "0"), "batch_size must be at least 1"),
    ],
)
def test_mistakes_are_sentences(featinv: Featinv, photos: Path, arguments, message):
    done = featinv("classemb", photos, *arguments)
    assert done.code == 2
    assert message in done.err
    assert "Traceback" not in done.err
    assert not Path("outputs").exists()


def test_a_script_writes_what_the_command_writes(featinv: Featinv, photos: Path):
    done = featinv("classemb", photos, "--ablations", "--seed", 3, "-o", "command")
    assert done.code == 0, done.err
    backbone = make_vit().backbone
    reading = study.read_tokens(backbone, photos, ablations=True, seed=3)
    assert reading.summary() in done.out
    reading.save("script")
    names = {path.name for path in Path("command").iterdir()}
    assert names == {path.name for path in Path("script").iterdir()}
    for name in names - {"metrics.json"}:
        assert Path("command", name).read_bytes() == Path("script", name).read_bytes(), name
    command, script = read(Path("command")), read(Path("script"))
    named = {key: command["arguments"].pop(key) for key in ("backbone", "device")}
    assert named == {"backbone": "tiny/vit", "device": "auto"}
    assert command["arguments"] == {k: script["arguments"][k] for k in command["arguments"]}
    assert command | {"arguments": {}} == script | {"arguments": {}}
