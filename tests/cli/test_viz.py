"""`featinv viz`: what it writes, says and refuses; replay."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import parquet

import featinv_diffusion as fi
from featinv_diffusion.backbones import names
from featinv_diffusion.concepts import ConceptDictionary, DirectionConcepts
from featinv_diffusion.images import read_image
from featinv_diffusion.inverters import reconstructor
from featinv_diffusion.seeds import derive_seed
from featinv_diffusion.types import FeatureSpec
from tests.cli.conftest import Featinv, Outcome
from tests.cli.test_concepts import save_sae
from tests.inverters import encoders

SEEDS = [derive_seed(3, "a.png", j) for j in range(2)]


@pytest.fixture
def concepts(featinv: Featinv, photos: Path, family: Path, monkeypatch) -> str:
    monkeypatch.setattr(names, "ASSETS", family)
    arguments = ["--method", "pca", "--n-concepts", 2, "--class", 4]
    assert featinv("concepts", photos, *arguments, "-o", "c.safetensors").code == 0
    return "c.safetensors"


def run(featinv: Featinv, photos: Path, *arguments: object, n_samples: int = 2) -> Outcome:
    common = ["--n-samples", n_samples, "--seed", 3, "--n-directions", 1, "-o", "out"]
    return featinv("viz", photos / "a.png", "--concepts", "c.safetensors", *common, *arguments)


def load(name: str = "manifest", folder: str = "out") -> dict:
    return json.loads(Path(folder, f"{name}.json").read_text())


def pixels(name: str) -> np.ndarray:
    return np.asarray(read_image(f"out/{name}.png"), dtype=float) / 255


def distance(a: str, b: str) -> np.ndarray:
    return np.sqrt(((pixels(a) - pixels(b)) ** 2).sum(axis=2))


def test_what_it_writes(featinv: Featinv, photos: Path, concepts: str):
    done = run(featinv, photos, "--concept", 1, "--film", "0,2", "--figure", "f.svg")
    assert (done.code, done.err) == (0, "")
    manifest = load()
    assert (manifest["concept"], manifest["factor"]) == (1, 0.25)
    assert manifest["factors"] == [0, 0.25, 1, 2]
    assert manifest["seeds"] == SEEDS
    assert manifest["class_index"] == 4
    assert len(manifest["class_probabilities"]) == len(manifest["cosines"]) == 4
    assert manifest["scope_p_value"] is None
    stems = ["factor_0", "factor_0.25", "factor_1", "factor_2", "null_0"]
    assert manifest["outputs"] == [f"{stem}_{j}.png" for stem in stems for j in range(2)]
    # The maps again, from the pictures alone.
    effect = (distance("factor_0.25_0", "factor_1_0") + distance("factor_0.25_1", "factor_1_1")) / 2
    null = (distance("null_0_0", "factor_1_0") + distance("null_0_1", "factor_1_1")) / 2
    signed = sum(pixels(f"factor_0.25_{j}") - pixels(f"factor_1_{j}") for j in range(2)) / 2
    noise = distance("factor_1_0", "factor_1_1")
    table = parquet.read_table("out/viz.parquet").to_pydict()
    maps = {"distance": effect, "null_natural": null, "signed": signed.mean(axis=2)}
    for name, expected in maps.items():
        np.testing.assert_allclose(np.reshape(table[name], (64, 64)), expected, atol=1e-6)
    np.testing.assert_allclose(
        np.reshape(table["normalised"], (64, 64)), effect / effect.max(), atol=1e-5
    )
    assert manifest["effect"] == pytest.approx(effect.mean(), abs=1e-6)
    assert manifest["other_noise"] == pytest.approx(noise.mean(), abs=1e-6)
    assert manifest["null_natural"]["effect"] == pytest.approx(null.mean(), abs=1e-6)
    published = (effect >= 0.33 * effect.max()).mean()
    assert manifest["affected_as_published"] == pytest.approx(published, abs=1e-3)
    above = (effect > null).mean() if effect.mean() > null.mean() else 0
    assert manifest["affected"] == pytest.approx(above, abs=1e-3)
    written = load("viz")
    for key in ("activation_ratio", "realised_change", "arrived", "class_probability_change"):
        assert written[key]["low"] <= written[key]["value"] <= written[key]["high"]
        assert written["null_natural"][key] == written["nulls"][0][key]
    samples = load("viz")["samples"]
    assert [row["output"] for row in samples] == manifest["outputs"]
    before = [row["class_probability"] for row in samples if row["factor"] == 1]
    assert manifest["class_probabilities"][2] == pytest.approx(np.mean(before))
    assert "Class probability of class 4" in done.out
    figure = Path("out/f.svg").read_text()
    for words in ("original", "affected", "null, mean", "factor 0.25", "as published"):
        assert f">{words}</text>" in figure


def test_at_factor_one_nothing_changes(featinv: Featinv, photos: Path, concepts: str):
    assert featinv("sample", photos / "a.png", "--n-samples", 2, "--seed", 3, "-o", "s").code == 0
    assert run(featinv, photos, "--factor", 1, "--film", "1").code == 0
    manifest = load()
    assert manifest["factors"] == [1]
    assert (manifest["effect"], manifest["affected"], manifest["energy_inside"]) == (0, 0, None)
    assert manifest["null_natural"]["effect"] == 0
    assert set(parquet.read_table("out/viz.parquet").to_pydict()["normalised"]) == {0}
    for j in range(2):
        same = Path(f"out/factor_1_{j}.png").read_bytes() == Path(f"s/a_{j}.png").read_bytes()
        assert same


def test_a_script_gives_what_the_command_gives(featinv: Featinv, photos: Path, concepts: str):
    assert run(featinv, photos, "--film", "0").code == 0
    inverter = fi.load_inverter("tiny/convnext", device="cpu")
    arguments = {"film": [0], "n_directions": 1, "n_samples": 2, "seed": 3}
    found = fi.show_concept(inverter, photos / "a.png", concepts, **arguments)
    found.save("script")
    for path in Path("out").iterdir():
        if path.suffix != ".parquet":
            assert path.read_bytes() == Path("script", path.name).read_bytes(), path.name
    assert found.rows() == parquet.read_table("out/viz.parquet").to_pylist()


def test_with_a_deterministic_inverter(featinv: Featinv, photos: Path, tmp_path, monkeypatch):
    monkeypatch.setattr(reconstructor, "ASSETS", tmp_path / "assets")
    encoders.save_member(tmp_path / "assets/tiny/siglip")
    inverter = fi.load_inverter("siglip", device="cpu")
    fi.find_concepts(inverter, photos, method="pca", n_concepts=2).save("c.safetensors")
    done = run(featinv, photos, "--inverter", "siglip", "--film", "1", n_samples=1)
    assert (done.code, done.err) == (0, "")
    assert "a deterministic inverter has no other noise" in done.out
    manifest = load()
    assert (manifest["other_noise"], manifest["class_index"]) == (None, None)
    assert manifest["outputs"] == ["factor_0.25_0.png", "factor_1_0.png", "null_0_0.png"]
    assert "3 of 3 pictures are identical" in featinv("replay", "out", "-o", "again").out


def test_replay_makes_everything_again(featinv: Featinv, photos: Path, concepts: str):
    assert run(featinv, photos, "--film", "1").code == 0
    done = featinv("replay", "out", "-o", "again")
    assert (done.code, done.err) == (0, "")
    assert "6 of 6 pictures are identical" in done.out
    for path in Path("out").iterdir():
        if path.suffix != ".parquet":
            assert path.read_bytes() == Path("again", path.name).read_bytes(), path.name


def test_the_backbone_is_that_of_the_concepts(featinv: Featinv, photos: Path, concepts: str):
    loaded = ConceptDictionary.load(concepts)
    loaded.spec = FeatureSpec("tiny/resnet", "last", 32, (8, 8))
    loaded.save(concepts)
    done = run(featinv, photos)
    assert done.code == 2
    assert "'tiny/resnet'" in done.err


def test_concepts_of_another_backbone(featinv: Featinv, photos: Path, concepts: str):
    spec = FeatureSpec("tiny/resnet", "last", 16, (8, 8))
    DirectionConcepts(torch.eye(16), spec=spec).save(concepts)
    done = run(featinv, photos, "--backbone", "convnext")
    assert done.code == 2
    assert "tiny/resnet" in done.err
    assert "map of tiny/convnext" in done.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--concept", 2], "0 … 1, got 2"),
        (["--film", "0,half"], "'0,half'"),
        (["--factor", "nan"], "finite"),
        (["--n-directions", 0], "n_directions must be from 1"),
        (["--figure", "f.jpg"], "'f.jpg'"),
        (["--concepts", "none.safetensors"], "file of concepts at none.safetensors"),
    ],
)
def test_what_it_refuses(featinv: Featinv, photos: Path, concepts: str, options, words):
    done = run(featinv, photos, *options)
    assert done.code == 2
    assert done.err.startswith("Error: ")
    assert words in done.err
    assert "Traceback" not in done.err
    assert not Path("out/manifest.json").exists()


def test_one_sample_is_too_few(featinv: Featinv, photos: Path, concepts: str):
    done = run(featinv, photos, n_samples=1)
    assert done.code == 2
    assert "n_samples must be at least 2" in done.err


def test_a_latent_of_an_sae(featinv: Featinv, photos: Path, family: Path, monkeypatch):
    monkeypatch.setattr(names, "ASSETS", family)
    save_sae("c.pt")
    given = ["--concepts", "c.pt", "--sae-format", "overcomplete:top_k=5", "--concept", 7]
    common = ["--n-samples", 2, "--n-directions", 1, "--film", "1", "-o", "out"]
    done = featinv("viz", photos / "a.png", *given, *common)
    assert done.code == 2
    assert "--backbone and --layer" in done.err
    assert not Path("out").exists()
    done = featinv("viz", photos / "a.png", *given, *common, "--backbone", "tiny/convnext")
    assert (done.code, done.err) == (0, "")
    assert load()["concept"] == 7
    assert "6 of 6 pictures are identical" in featinv("replay", "out", "-o", "again").out


def test_steerability(featinv: Featinv, photos: Path, family: Path, monkeypatch):
    monkeypatch.setattr(names, "ASSETS", family)
    save_sae()
    given = ["--concepts", "sae.pt", "--sae-format", "overcomplete:top_k=5"]
    sizes = ["--n-latents", 2, "--n-pictures", 2, "--n-directions", 1]
    done = featinv("steerability", *given, *sizes, "--data", photos, "-o", "out")
    assert done.code == 2
    assert "--backbone and --layer" in done.err
    arguments = [*given, *sizes, "--data", photos, "--backbone", "tiny/convnext", "-o", "out"]
    done = featinv("steerability", *arguments)
    assert done.code == 0, done.err
    assert "random directions" in done.out
    table = parquet.read_table("out/steerability.parquet").to_pylist()
    assert len(table) == 48
    assert sum(row["tested"] for row in table) == 2
    assert load("metrics")["shares"]["seen"]["n"] == 2
    assert Path("out/steerability.png").is_file()
