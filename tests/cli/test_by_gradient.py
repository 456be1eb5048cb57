"""`--inverter optimise` and `guided`: any backbone, a second eye, and the same pictures again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from featinv_diffusion import load_inverter, sample
from featinv_diffusion.images import read_image
from featinv_diffusion.runs import second_eye
from featinv_diffusion.runs.second_eye import second_eye_line
from tests.cli.conftest import Featinv

FACTORY = """
import torch
from featinv_diffusion import wrap_module

def make():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 8, 8), torch.nn.Tanh())
    return wrap_module(net, input_size=32, preprocess=((.5,) * 3, (.5,) * 3))
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    (tmp_path / "own.py").write_text(FACTORY)
    return f"{tmp_path / 'own.py'}:make"


def load(folder: str) -> dict:
    return json.loads((Path(folder) / "manifest.json").read_text())


@pytest.fixture(autouse=True)
def _without_outside_eye(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes away the extra `real`, so that these tests do not depend on it."""
    monkeypatch.setattr(second_eye, "packed_weights", lambda _name: None)


@pytest.mark.parametrize("inverter", ["optimise", "guided"])
def test_any_backbone_is_inverted_and_replayed(
    featinv: Featinv, photos: Path, own: str, inverter: str
) -> None:
    options = ["--inverter", inverter, "--backbone", own, "--steps", 2, "--n-samples", 2]
    done = featinv("sample", photos / "a.png", photos / "b.jpg", *options, "-o", "out")
    assert done.code == 0, done.err
    manifest = load("out")
    assert (manifest["inverter"], manifest["backbone"]) == (inverter, own)
    assert (manifest["pipeline"], manifest["steps"]) == ("tiny/base", 2)
    assert [len(entry["outputs"]) for entry in manifest["images"]] == [2, 2]
    eyes = manifest["second_eye"]
    assert [eye["backbone"] for eye in eyes.values()] == [own, "tiny/convnext"]
    assert second_eye_line(eyes) in done.out
    assert "only pipelines of the diffusion inverter" in done.out
    refused = featinv("replay", "out", "-o", "again")
    assert refused.code == 2
    assert "not run because a file says so" in refused.err
    done = featinv("replay", "out", "-o", "again", "--trust-code")
    assert done.code == 0, done.err
    assert "4 of 4 pictures are identical" in done.out


def test_python_and_pixels_and_maps_give_the_pictures_of_the_command(
    featinv: Featinv, photos: Path
) -> None:
    options = ["--inverter", "optimise", "--steps", 2, "--n-samples", 1]
    pixels = ["--parametrise", "pixels"]
    done = featinv("sample", photos / "a.png", *options, *pixels, "-o", "out")
    assert done.code == 0, done.err
    assert load("out")["second_eye"]["second"]["backbone"] == "tiny/resnet"
    inverter = load_inverter("optimise", steps=2, parametrise="pixels", device="cpu")
    found = sample(inverter, [photos / "a.png"], n_samples=1)
    made = read_image("out/a_0.png")
    assert found.reconstructions[0].samples[0].tobytes() == made.tobytes()
    assert featinv("encode", photos / "a.png", "-o", "maps.safetensors").code == 0
    done = featinv("decode", "maps.safetensors", *options, *pixels, "-o", "decoded")
    assert done.code == 0, done.err
    assert read_image("decoded/a_0.png").tobytes() == made.tobytes()
    assert "second_eye" not in load("decoded")  # the pictures themselves are not known


def test_evaluate(featinv: Featinv, photos: Path, own: str) -> None:
    options = ["--inverter", "optimise", "--backbone", own, "--steps", 2, "--batch-size", 2]
    done = featinv(
        "evaluate", "--data", photos, "--n-images", 2, *options, "--evaluated-by", "tiny/resnet",
        "-o", "out",
    )  # fmt: skip
    assert done.code == 0, done.err
    metrics = json.loads(Path("out/metrics.json").read_text())
    assert metrics["n_images"] == 2
    assert metrics["settings"]["backbone"] == own
    assert list(metrics["evaluated_by"]) == ["tiny/resnet"]
    assert metrics["optimised_for"] == own
    assert f"optimised for {own}" in Path("out/metrics.md").read_text()
    assert "\n2 images: cosine by tiny/resnet" in done.out
    assert "2 steps, seed 0" in Path("out/metrics.md").read_text()


def test_a_manifest_from_before_the_setting_is_replayed(featinv: Featinv, photos: Path) -> None:
    assert featinv("sample", photos / "a.png", "--n-samples", 1, "-o", "out").code == 0
    manifest = load("out")
    del manifest["parametrise"]
    Path("out/manifest.json").write_text(json.dumps(manifest))
    done = featinv("replay", "out")
    assert "1 of 1 pictures are identical" in done.out, done.err


def test_the_line_warns_where_the_second_eye_does_not_agree() -> None:
    own = {"backbone": "a", "cosine": 0.93, "other_image": 0.11}
    line = second_eye_line(
        {"own": own, "second": {"backbone": "b", "cosine": 0.58, "other_image": 0.57}}
    )
    assert "b, which took no part, sees cosine 0.58 (another image 0.57); a, which" in line
    assert "optimised for, sees cosine 0.93 (another image 0.11)." in line
    assert "fool the backbone" in line
    line = second_eye_line(
        {"own": own, "second": {"backbone": "b", "cosine": 0.8, "other_image": 0.57}}
    )
    assert "fool" not in line


def test_the_second_eye_is_one_that_took_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    assert second_eye.second_eye_of("tiny/vit") == "tiny/convnext"
    assert second_eye.second_eye_of("tiny/convnext") == "tiny/resnet"
    monkeypatch.setattr(second_eye, "packed_weights", lambda name: Path(name))
    assert second_eye.second_eye_of("tiny/convnext") == "tf_efficientnet_lite0"
    assert second_eye.second_eye_of("tf_efficientnet_lite0") == "tiny/convnext"


def test_a_refined_sample_says_who_judges(featinv: Featinv, photos: Path) -> None:
    options = ["--steps", 1, "--refine", 2, "--n-samples", 1]
    done = featinv("sample", photos / "a.png", *options, "-o", "out")
    assert done.code == 0, done.err
    manifest = load("out")
    assert (manifest["refine"], manifest["quality"]) == (2, "standard")
    assert manifest["second_eye"]["second"]["backbone"] == "tiny/resnet"
    lines = done.out.splitlines()[1:]
    assert lines[0].startswith("Second eye: tiny/resnet, which took no part, sees")
    assert "for which the pictures were optimised" in lines[1]
    assert "1 of 1 pictures are identical" in featinv("replay", "out").out


def test_a_trained_inverter_has_no_second_eye(featinv: Featinv, photos: Path) -> None:
    done = featinv("sample", photos / "a.png", "--n-samples", 1, "-o", "out")
    assert done.code == 0
    assert "Second eye" not in done.out
    assert "second_eye" not in load("out")


def test_the_own_backbone_gets_the_target_of_the_second_eye_too(photos: Path) -> None:
    inverter = load_inverter("optimise", steps=1, parametrise="pixels", device="cpu")
    found = sample(inverter, [photos / "a.png"], n_samples=1)
    assert found.second_eye is not None
    torch.testing.assert_close(
        found.second_eye["own"]["cosine"], found.cosine.item(), rtol=0, atol=1e-4
    )
