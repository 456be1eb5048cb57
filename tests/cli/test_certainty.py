"""`featinv certainty`, and what `sample --certainty` and `variability` then draw and record."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from featinv_diffusion.diffusion.folders import CardInfo
from featinv_diffusion.diffusion.hub import export_pipeline, load_pipeline
from featinv_diffusion.runs.certainty import CertaintyCalibration
from tests import tiny
from tests.cli.conftest import Featinv

N = 40


def load(folder: str | Path, name: str = "manifest") -> dict:
    return json.loads((Path(folder) / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipeline = tiny.make_pipeline()
    pipeline.register_to_config(default_num_inference_steps=1)
    return export_pipeline(pipeline, tmp_path_factory.mktemp("exported") / "p", CardInfo("a test"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for i, image in enumerate(tiny.make_images(N)):
        pixels = (image.permute(1, 2, 0) * 255).byte().numpy()
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="module")
def calibrated(exported: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline folder after `featinv certainty`, of both standard and draft."""
    from featinv_diffusion.cli import app

    folder = tmp_path_factory.mktemp("calibrated") / "p"
    shutil.copytree(exported, folder)
    for quality, n_samples in (("standard", 3), ("draft", 2)):
        options = ["--data", pictures, "--n-samples", n_samples, "--quality", quality]
        arguments = ["certainty", folder, *options, "--batch-size", 20, "--device", "cpu"]
        done = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
        assert done.exit_code == 0
        assert f"calibrated on {N} held-out pictures" in done.stdout
    return folder


def test_each_quality_keeps_its_own(calibrated: Path):
    found = CertaintyCalibration.load(calibrated / "certainty.safetensors")
    known = [(settings["steps"], model.n_samples) for settings, model in found.models]
    assert sorted(known) == [(1, 2), (1, 3), (2, 2)]


def test_sample_draws_and_records_it(featinv: Featinv, calibrated: Path, photos: Path):
    options = ["--pipeline", calibrated, "--n-samples", 3]
    done = featinv("sample", photos, *options, "--certainty", "-o", "out")
    assert done.code == 0, done.err
    assert "Determined by the features:" in done.out
    plain = featinv("sample", photos, *options, "-o", "plain")
    assert plain.code == 0
    assert Image.open("out/grid.png").width > Image.open("plain/grid.png").width
    manifest = load("out")
    for entry in manifest["images"]:
        assert entry["certainty"]["n_samples"] == 3
        assert 0 <= entry["certainty"]["determined_share"]["chroma"] <= 1
    assert "certainty" not in load("plain")["images"][0]
    again = featinv("replay", "out")
    assert again.code == 0
    assert load("outputs/replay")["images"] == manifest["images"]


def test_variability_records_the_same(featinv: Featinv, calibrated: Path, photos: Path):
    options = ["--pipeline", calibrated, "--n-samples", 3]
    featinv("sample", photos / "a.png", *options, "--certainty", "-o", "out")
    done = featinv("variability", photos / "a.png", *options, "--figure", "f.svg", "-o", "one")
    assert done.code == 0, done.err
    found = load("one", "variability")["certainty"]
    assert found == load("out")["images"][0]["certainty"]
    assert load("one")["determined_share"] == found["determined_share"]
    assert "light of pixels" in Path("one/f.svg").read_text()


def test_what_is_not_calibrated(featinv: Featinv, exported: Path, calibrated: Path, photos: Path):
    picture = photos / "a.png"
    without = featinv("variability", picture, "--pipeline", exported, "--n-samples", 2, "-o", "a")
    assert without.code == 0
    assert load("a", "variability")["certainty"] is None
    assert "Certainty: uncalibrated, since this pipeline holds none." in without.out
    for options, message in (
        (["--pipeline", exported], "this pipeline holds none"),
        (["--pipeline", calibrated, "--steps", 3], "other settings of the sampler"),
        (["--pipeline", calibrated, "--n-samples", 1], "at least 2 samples"),
        (["--pipeline", calibrated, "--worker", "0/2"], "--worker shares"),
    ):
        done = featinv("sample", picture, *options, "--certainty", "-o", "b")
        assert done.code == 2
        assert message in done.err
        assert not Path("b").exists()


def test_an_export_carries_it_over(featinv: Featinv, calibrated: Path):
    assert featinv("export", "again", "--pipeline", calibrated).code == 0
    written = (Path("again") / "certainty.safetensors").read_bytes()
    assert written == (calibrated / "certainty.safetensors").read_bytes()
    assert load_pipeline("again").certainty_file is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--n-images", 39], "at least 40 held-out pictures"),
        (["--n-samples", 1], "n_samples must be at least 2"),
        (["--held-back-per-class", 3], "needs images with classes"),
    ],
)
def test_what_cannot_be_calibrated(
    featinv: Featinv, exported: Path, pictures: Path, options: list, message: str
):
    done = featinv("certainty", exported, "--data", pictures, *options)
    assert done.code == 2
    assert message in done.err
    assert not (exported / "certainty.safetensors").exists()
