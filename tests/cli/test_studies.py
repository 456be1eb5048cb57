"""`featinv interpolate`, `compose` and `variability`: what they write, say and refuse; replay."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet

import featinv_diffusion as fi
from featinv_diffusion.images import read_image
from featinv_diffusion.inverters import reconstructor
from featinv_diffusion.seeds import derive_seed
from featinv_diffusion.settings import SampleSettings
from tests.cli.conftest import Featinv, Outcome
from tests.inverters import encoders


def load(folder: str | Path, name: str = "manifest") -> dict:
    return json.loads((Path(folder) / f"{name}.json").read_text())


def names(folder: str | Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file()}


def same(a: str, b: str) -> bool:
    return Path(a).read_bytes() == Path(b).read_bytes()


@pytest.fixture
def siglip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A deterministic inverter `siglip`, as it is bundled."""
    monkeypatch.setattr(reconstructor, "ASSETS", tmp_path / "assets")
    return encoders.save_member(tmp_path / "assets/tiny/siglip")


@pytest.fixture
def sampled(featinv: Featinv, photos: Path) -> str:
    """Where `featinv sample` wrote two samples of a.png; a batch holds both."""
    assert featinv("sample", photos / "a.png", "--n-samples", 2, "--seed", 3, "-o", "s").code == 0
    return "s"


def run(featinv: Featinv, command: str, *arguments: object) -> Outcome:
    return featinv(command, *arguments, "--n-samples", 2, "--seed", 3, "-o", "out")


# ---- what they write -----------------------------------------------------------------------------


def test_interpolate(featinv: Featinv, photos: Path, sampled: str):
    done = run(featinv, "interpolate", photos / "a.png", photos / "b.jpg", "--weights", "0,.25,1")
    assert (done.code, done.err) == (0, "")
    manifest = load("out")
    assert manifest["weights"] == [0, 0.25, 1]
    assert len(manifest["cosines"]) == 3
    assert manifest["scope_p_value"] is None
    assert "scope_p_value is null" in done.out
    assert manifest["seeds"] == [derive_seed(3, "a.png", j) for j in range(2)]
    pictures = {f"weight_{w}_{j}.png" for w in ("0", "0.25", "1") for j in range(2)}
    assert set(manifest["outputs"]) == pictures
    assert names("out") == pictures | {
        "figure.png",
        "interpolate.json",
        "interpolate.parquet",
        "manifest.json",
    }
    for j in range(2):
        assert same(f"out/weight_1_{j}.png", f"{sampled}/a_{j}.png")
        assert not same(f"out/weight_0_{j}.png", f"{sampled}/a_{j}.png")
    rows = parquet.read_table("out/interpolate.parquet").to_pylist()
    assert rows == load("out", "interpolate")["samples"]
    (entry,) = load(sampled)["images"]
    ones = [row for row in rows if row["weight"] == 1]
    assert [row["cosine"] for row in ones] == pytest.approx(entry["cosine"], abs=1e-6)
    assert [row["cosine_to_a"] for row in ones] == [row["cosine"] for row in ones]
    assert manifest["cosines"][2] == pytest.approx(np.mean(entry["cosine"]), abs=1e-6)


def test_weight_zero_inverts_the_other_picture(featinv: Featinv, photos: Path):
    """With A's noise: the same picture under A's name gives it."""
    assert (
        run(featinv, "interpolate", photos / "a.png", photos / "b.jpg", "--weights", "0").code == 0
    )
    folder = photos.parent / "renamed"
    folder.mkdir()
    read_image(photos / "b.jpg").save(folder / "a.png")
    assert featinv("sample", folder / "a.png", "--n-samples", 2, "--seed", 3, "-o", "s").code == 0
    assert all(same(f"out/weight_0_{j}.png", f"s/a_{j}.png") for j in range(2))


def test_compose(featinv: Featinv, photos: Path, sampled: str):
    arguments = [photos / "a.png", photos / "b.jpg", "--box", "0,0,.5,.3"]
    done = run(featinv, "compose", *arguments, "--figure", "f.svg")
    assert (done.code, done.err) == (0, "")
    assert "12 of 64 cells" in done.out  # 4 rows, and 0.3 · 8 columns rounded out
    manifest = load("out")
    assert manifest["box"] == [0, 0, 0.5, 0.3]
    assert len(manifest["cosines"]) == 1
    assert manifest["scope_p_value"] is None
    for j in range(2):
        assert same(f"out/unedited_{j}.png", f"{sampled}/a_{j}.png")
    change = [
        np.abs(
            np.asarray(read_image(f"out/composed_{j}.png"), dtype=float)
            - np.asarray(read_image(f"out/unedited_{j}.png"), dtype=float)
        ).mean(axis=2)
        / 255
        for j in range(2)
    ]
    inside = np.mean([c[:32, :24].mean() for c in change])
    outside = np.mean([np.r_[c[:32, 24:].ravel(), c[32:].ravel()].mean() for c in change])
    assert manifest["change_inside"] == pytest.approx(inside, abs=1e-6)
    assert manifest["change_outside"] == pytest.approx(outside, abs=1e-6)
    numbers = load("out", "compose")
    assert np.array(numbers["cells"]).sum() == 12
    assert parquet.read_table("out/compose.parquet").to_pylist() == numbers["samples"]
    assert ">A (original)</text>" in Path("out/f.svg").read_text()


def test_an_empty_box_gives_the_samples_of_a(featinv: Featinv, photos: Path, sampled: str):
    arguments = [photos / "a.png", photos / "b.jpg", "--box", ".3,0,.3,1"]
    assert run(featinv, "compose", *arguments).code == 0
    assert all(same(f"out/composed_{j}.png", f"{sampled}/a_{j}.png") for j in range(2))
    manifest = load("out")
    assert manifest["change_inside"] is None
    assert manifest["change_outside"] == 0


def test_a_mask_is_the_region_where_it_is_light(featinv: Featinv, photos: Path):
    a, b = photos / "a.png", photos / "b.jpg"
    light = np.zeros((70, 90), dtype=np.uint8)
    light[:35, 10:45] = 255  # the upper left quarter of the centre square
    Image.fromarray(light).save("mask.png")
    assert run(featinv, "compose", a, b, "--mask", "mask.png").code == 0
    composed = Path("out/composed_0.png").read_bytes()
    assert load("out")["mask"] == str(Path("mask.png").absolute())
    assert run(featinv, "compose", a, b, "--box", "0,0,.5,.5").code == 0
    assert Path("out/composed_0.png").read_bytes() == composed


def test_variability(featinv: Featinv, photos: Path, sampled: str):
    done = run(featinv, "variability", photos / "a.png", "--figure", "f.pdf")
    assert (done.code, done.err) == (0, "")
    assert "scope_p_value is null" in done.out
    manifest = load("out")
    assert manifest["scope_p_value"] is None
    assert manifest["outputs"] == ["mean.png"]
    pixels = np.stack([np.asarray(read_image(f"{sampled}/a_{j}.png")) for j in range(2)]) / 255
    std = np.sqrt(pixels.var(axis=0, ddof=1).mean(axis=2))
    assert manifest["pixel_std_mean"] == pytest.approx(std.mean(), abs=1e-6)
    np.testing.assert_allclose(
        np.asarray(read_image("out/mean.png")) / 255, pixels.mean(axis=0), atol=0.51 / 255
    )
    table = parquet.read_table("out/variability.parquet").to_pydict()
    np.testing.assert_allclose(np.reshape(table["std"], (64, 64)), std, atol=1e-6)
    quantiles = manifest["cosine_quantiles"]
    assert list(quantiles) == ["0.05", "0.25", "0.5", "0.75", "0.95"]
    assert sorted(quantiles.values()) == list(quantiles.values())
    numbers = load("out", "variability")
    assert np.shape(numbers["cosine_quantiles_per_cell"]["0.5"]) == (8, 8)
    (entry,) = load(sampled)["images"]
    assert numbers["cosines"] == pytest.approx(entry["cosine"], abs=1e-6)


# ---- in Python -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verb", "arguments", "options"),
    [
        (fi.interpolate, {"weights": [0, 0.3]}, ["--weights", "0,.3"]),
        (fi.compose, {"box": (0, 0, 0.5, 1)}, ["--box", "0,0,.5,1"]),
        (fi.variability, {}, []),
    ],
)
def test_a_script_gives_what_the_command_gives(
    featinv: Featinv, photos: Path, verb, arguments, options
):
    pictures = [photos / "a.png", photos / "b.jpg"][: 1 if verb is fi.variability else 2]
    assert run(featinv, verb.__name__, *pictures, *options).code == 0
    inverter = fi.load_inverter("tiny/convnext", device="cpu")
    found = verb(inverter, *pictures, **arguments, n_samples=2, seed=3)
    found.save("script")
    assert names("script") == names("out")
    for name in names("out") - {f"{verb.__name__}.parquet"}:
        assert same(f"out/{name}", f"script/{name}"), name
    assert found.rows() == parquet.read_table(f"out/{verb.__name__}.parquet").to_pylist()
    in_memory = verb(inverter, *map(inverter.encode, pictures), **arguments, n_samples=2, seed=3)
    assert in_memory.numbers() == found.numbers()


@pytest.mark.parametrize("command", ["interpolate", "compose", "variability"])
def test_with_a_deterministic_inverter(featinv: Featinv, photos: Path, siglip, command):
    pictures = [photos / "a.png", photos / "b.jpg"][: 1 if command == "variability" else 2]
    region = ["--box", "0,0,.5,1"] if command == "compose" else []
    done = featinv(command, *pictures, *region, "--inverter", "siglip", "-o", "out")
    assert (done.code, done.err) == (0, "")
    assert "only pipelines of the diffusion inverter hold" in done.out
    manifest = load("out")
    assert (manifest["inverter"], manifest["n_samples"]) == ("siglip", 1)
    assert len(manifest["seeds"]) == 1
    done = featinv("replay", "out", "-o", "again")
    n = len(manifest["outputs"])
    assert f"{n} of {n} pictures are identical" in done.out, done.err


# ---- replay --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("interpolate", ["a.png", "b.jpg", "--weights", ".1,-1"]),
        ("compose", ["a.png", "b.jpg", "--box", "0,0,.5,.5"]),
        ("variability", ["a.png"]),
    ],
)
def test_replay_makes_everything_again(featinv: Featinv, photos: Path, command, arguments):
    paths = [photos / a if a.endswith(("png", "jpg")) else a for a in arguments]
    assert run(featinv, command, *paths, "--figure", "f.svg", "--steps", 3).code == 0
    done = featinv("replay", "out", "-o", "again")
    assert (done.code, done.err) == (0, "")
    n = len(load("out")["outputs"])
    assert f"{n} of {n} pictures are identical" in done.out
    assert names("again") == names("out")
    for name in names("out") - {f"{command}.parquet"}:
        assert same(f"out/{name}", f"again/{name}"), name


def test_replay_uses_the_recorded_seeds_also_under_another_name(featinv: Featinv, photos: Path):
    assert run(featinv, "variability", photos / "a.png").code == 0
    moved = photos / "moved.png"
    (photos / "a.png").rename(moved)
    content = load("out") | {"image": str(moved)}
    Path("out/manifest.json").write_text(json.dumps(content))
    assert "1 of 1 pictures are identical" in featinv("replay", "out").out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.pop("weights"), "featinv interpolate; it lacks weights"),
        (lambda m: m.update(weights="many"), "weights must be a list"),
        (lambda m: m.update(weights=[1.0, 1.0]), "each given once"),
        (lambda m: m.update(command="dance"), "'dance'"),
        (lambda m: m.update(command=["dance"]), "dance"),
        (lambda m: m.update(outputs=["../x.png"]), "inside of the output folder"),
        (lambda m: m.update(figure="../x.png"), "file name"),
        (lambda m: m.update(b=None), "names no file as 'b', for it was given in memory"),
        (lambda m: m.update(seeds=[]), "seed"),
        (lambda m: m.pop("environment"), "environment"),
        (lambda m: m.update(steps="many"), "steps must be a whole number"),
    ],
)
def test_a_manifest_that_makes_no_sense(featinv: Featinv, photos: Path, change, words):
    content = {
        "command": "interpolate",
        **asdict(SampleSettings()),
        "a": str(photos / "a.png"),
        "b": str(photos / "b.jpg"),
        "weights": [1.0],
        "seeds": [1],
        "figure": "figure.png",
        "outputs": [],
        "environment": {},
    }
    change(content)
    Path("manifest.json").write_text(json.dumps(content))
    done = featinv("replay", "manifest.json", "-o", "again")
    assert done.code == 2
    assert done.err.startswith("Error: ")
    assert words in done.err
    assert "Traceback" not in done.err


# ---- bad input -----------------------------------------------------------------------------------


def refused(done: Outcome, words: str) -> None:
    assert done.code == 2
    assert done.err.startswith("Error: ")
    assert words in done.err
    assert "Traceback" not in done.err
    assert not Path("out/manifest.json").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--weights", "0,half"], "'0,half'"),
        (["--weights", ""], "--weights must be numbers"),
        (["--weights", "0,nan"], "finite"),
        (["--weights", "1,1.0"], "each given once"),
        (["--figure", "f.jpg"], "'f.jpg'"),
        (["--figure", "a/f.png"], "'a/f.png'"),
        (["--batch-size", "0"], "batch_size must be at least 1"),
    ],
)
def test_interpolate_refuses(featinv: Featinv, photos: Path, options, words):
    done = run(featinv, "interpolate", photos / "a.png", photos / "b.jpg", *options)
    refused(done, words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "Exactly one of a box and a mask must be given, got none"),
        (["--box", "0,0,1,1", "--mask", "m.png"], "got both"),
        (["--box", "0,0,1"], "four fractions"),
        (["--box", "0,0,1,64"], "each in 0 … 1"),
        (["--box", "1,0,0,1"], "y0 ≤ y1"),
        (["--box", "left"], "'left'"),
        (["--mask", "none.png"], "there is nothing at"),
        (["--mask", "thin.png"], "proportions"),
    ],
)
def test_compose_refuses(featinv: Featinv, photos: Path, options, words):
    Image.new("L", (10, 90)).save("thin.png")
    done = run(featinv, "compose", photos / "a.png", photos / "b.jpg", *options)
    refused(done, words)


@pytest.mark.parametrize("command", ["interpolate", "compose"])
def test_a_second_picture_that_is_none(featinv: Featinv, photos: Path, command):
    box = ["--box", "0,0,1,1"] if command == "compose" else []
    (photos / "bad.png").write_text("hello")
    refused(run(featinv, command, photos / "a.png", photos / "bad.png", *box), "not a picture")
    refused(run(featinv, command, photos / "a.png", photos / "none.png", *box), "nothing at")


def test_variability_refuses(featinv: Featinv, photos: Path):
    refused(featinv("variability", photos / "a.png", "--n-samples", 1, "-o", "out"), "at least 2")
    refused(run(featinv, "variability", photos), "there is a folder at")
    refused(run(featinv, "variability", photos / "none.png"), "there is nothing at")


def test_a_run_that_fails_leaves_an_earlier_folder_whole(featinv: Featinv, photos: Path):
    assert run(featinv, "variability", photos / "a.png").code == 0
    before = load("out")
    assert run(featinv, "variability", photos / "a.png", "--guidance", "both").code == 2
    assert load("out") == before
