"""`featinv scope`, and what the applications say, record and mark with its statistics."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from featinv_diffusion.diffusion.folders import SCOPE_FILE, CardInfo
from featinv_diffusion.diffusion.hub import export_pipeline
from featinv_diffusion.features.natural_maps import NaturalMaps
from tests import tiny
from tests.cli.conftest import Featinv

PER_CLASS, HELD_BACK = 150, 50


def load(folder: str | Path, name: str = "manifest") -> dict:
    return json.loads((Path(folder) / f"{name}.json").read_text())


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    for i, image in enumerate(tiny.make_images(2 * PER_CLASS)):
        path = folder / "ab"[i % 2] / f"{i:03d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray((image.permute(1, 2, 0) * 255).byte().numpy()).save(path)
    return folder


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipeline = tiny.make_pipeline()
    pipeline.register_to_config(default_num_inference_steps=1)
    return export_pipeline(pipeline, tmp_path_factory.mktemp("exported") / "p", CardInfo("a test"))


def scope_words(folder: Path, pictures: Path) -> list[object]:
    options = ["--held-back-per-class", HELD_BACK, "--n-reconstructions", 99, "--batch-size", 32]
    return ["scope", folder, "--data", pictures, *options, "--device", "cpu"]


@pytest.fixture(scope="session")
def fitted(exported: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline folder after `featinv scope` with reconstructions."""
    from featinv_diffusion.cli import app

    folder = tmp_path_factory.mktemp("fitted") / "p"
    shutil.copytree(exported, folder)
    arguments = map(str, scope_words(folder, pictures))
    done = CliRunner().invoke(app, [*arguments], catch_exceptions=False)
    assert done.exit_code == 0
    return folder


def test_the_statistics_are_of_the_images_that_were_asked_for(fitted: Path):
    natural = NaturalMaps.load(fitted / "scope.safetensors")
    assert natural.n_fitted == 2 * (PER_CLASS - HELD_BACK)
    assert len(natural.calibration.distances) == 2 * HELD_BACK
    assert len(natural.calibration.cosines) == 99
    assert (natural.spec.channels, natural.spec.grid) == (32, (8, 8))
    assert natural.sampling is not None
    assert natural.sampling["steps"] == 1
    assert (fitted / "scope.safetensors").stat().st_size < 1e6


def test_workers_fit_what_one_process_fits(
    featinv: Featinv, exported: Path, pictures: Path, fitted: Path, tmp_path: Path
):
    folder = shutil.copytree(exported, tmp_path / "p")
    for i in (1, 0):
        assert featinv(*scope_words(folder, pictures), "--worker", f"{i}/2").code == 0
        assert not (folder / SCOPE_FILE).exists()
    done = featinv("merge", folder / SCOPE_FILE)
    assert done.code == 0, done.err
    assert "natural maps of 200 images, calibrated on 100 others, 99 of them" in done.out
    assert (folder / SCOPE_FILE).read_bytes() == (fitted / SCOPE_FILE).read_bytes()


def test_sample_says_and_records_it(featinv: Featinv, fitted: Path, photos: Path):
    done = featinv("sample", photos, "--pipeline", fitted, "--n-samples", 1, "-o", "out")
    assert done.code == 0
    assert "of 3 maps unlike feature maps of sharp photos (scope p < 0.05)" in done.out
    assert "(map and reconstruction)" in done.out
    manifest = load("out")
    assert manifest["scope_basis"] == "map and reconstruction"
    p_values = [entry["scope_p_value"] for entry in manifest["images"]]
    assert all(1 / 100 <= p <= 1 for p in p_values)


def test_other_settings_leave_reconstructions_out(featinv: Featinv, fitted: Path, photos: Path):
    options = ["--pipeline", fitted, "--n-samples", 1, "-o", "out"]
    for steps, basis in ((3, "map"), (2, "map and reconstruction")):  # two are the draft's
        done = featinv("sample", photos / "a.png", *options, "--steps", steps)
        assert done.code == 0, done.err
        assert load("out")["scope_basis"] == basis


def test_studies_score_the_maps_that_they_edit(featinv: Featinv, fitted: Path, photos: Path):
    pair = [photos / "a.png", photos / "b.jpg"]
    common = ["--pipeline", fitted, "--n-samples", 2, "--figure", "f.svg"]
    done = featinv("interpolate", *pair, *common, "--weights", "0,1,30", "-o", "mixed")
    assert done.code == 0
    manifest = load("mixed")
    assert len(manifest["scope_p_value"]) == 3
    assert manifest["scope_p_value"][2] == pytest.approx(1 / 100, abs=0.04)
    n_out = sum(p < 0.05 for p in manifest["scope_p_value"])
    assert f"{n_out} of 3 maps unlike feature maps of sharp photos" in done.out
    figure = Path("mixed/f.svg").read_text()
    assert figure.count(" · outside") == 2 * n_out
    assert "unlike feature maps of sharp photos" in figure
    rows = load("mixed", "interpolate")["samples"]
    assert [row["scope_p_value"] for row in rows[::2]] == manifest["scope_p_value"]
    whole = featinv("compose", *pair, *common, "--box", "0,0,1,1", "-o", "composed")
    assert whole.code == 0
    alone = featinv("variability", photos / "a.png", *common, "-o", "one")
    assert alone.code == 0
    for folder, scored in (("composed", whole), ("one", alone)):
        p_value = load(folder)["scope_p_value"]
        assert f"p = {p_value:.3f} (map and reconstruction)" in scored.out
        marked = " · outside" in Path(f"{folder}/f.svg").read_text()
        assert marked == (p_value < 0.05)
    assert load("one")["scope_p_value"] == pytest.approx(manifest["scope_p_value"][1])


def test_replay_keeps_it(featinv: Featinv, fitted: Path, photos: Path):
    options = ["--pipeline", fitted, "--n-samples", 2, "-o", "out"]
    assert featinv("variability", photos / "a.png", *options).code == 0
    assert featinv("replay", "out").code == 0
    assert load("outputs/replay")["scope_p_value"] == load("out")["scope_p_value"]


def test_statistics_of_other_weights_are_refused(
    featinv: Featinv, fitted: Path, photos: Path, tmp_path: Path
):
    other = tiny.make_backbone()
    with torch.no_grad():
        next(other.parameters()).add_(1e-3)
    folder = export_pipeline(
        tiny.make_pipeline(backbone=other),
        tmp_path / "other",
        CardInfo("a test"),
        scope=fitted / "scope.safetensors",
    )
    done = featinv("sample", photos / "a.png", "--pipeline", folder)
    assert done.code == 2
    assert "other weights of tiny/convnext" in done.err
    assert "featinv scope" in done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny/convnext"], "there is nothing at tiny/convnext"),
        (["{exported}", "--n-reconstructions", 5], "no reconstructions or at least 99"),
        (["{exported}", "--held-back-per-class", 2], "At least 99 images must be held out"),
        (["{exported}"], "At least 99 images must be held out"),
    ],
)
def test_what_cannot_be_fitted(
    featinv: Featinv, exported: Path, pictures: Path, arguments: list, message: str
):
    given = [str(argument).format(exported=exported) for argument in arguments]
    if "reconstructions" in message:
        given += ["--held-back-per-class", str(HELD_BACK)]
    done = featinv("scope", *given, "--data", pictures)
    assert done.code == 2
    assert message in done.err
    assert not (exported / "scope.safetensors").exists()
