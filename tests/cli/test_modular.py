"""`featinv sample` and `featinv evaluate` with a modular inverter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from featinv_diffusion.inverters import modular
from featinv_diffusion.inverters.open import open_inverter
from featinv_diffusion.settings import SampleSettings
from tests.cli.conftest import Featinv
from tests.inverters import small
from tests.tiny import make_images


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    from featinv_diffusion.images import to_pil, write_png

    for i, image in enumerate(to_pil(make_images(4))):
        write_png(image, tmp_path / "pictures" / f"{i}.png")
    return tmp_path / "pictures"


@pytest.fixture
def detr(tmp_path: Path) -> Path:
    path = small.make_detr_path()
    path.model.save_pretrained(tmp_path / "detr/detector")
    small.make_detr_inverses(path).save_pretrained(tmp_path / "detr/inverter")
    return tmp_path / "detr/inverter"


@pytest.fixture
def vit(tmp_path: Path, monkeypatch) -> Path:
    path = small.make_vit_path()
    monkeypatch.setattr(modular, "load_path", lambda _info: small.make_vit_path())
    small.make_vit_inverses(path).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def test_sample_takes_the_default_stage_and_one_sample(featinv: Featinv, detr, pictures, tmp_path):
    output = tmp_path / "out"
    done = featinv("sample", str(pictures), "--inverter", str(detr), "--output", str(output))
    assert done.code == 0, done.err
    manifest = json.loads((output / "manifest.json").read_text())
    assert (manifest["inverter"], manifest["stage"]) == (str(detr), "encoder")
    assert manifest["backbone"] == "small/detr"
    assert [entry["outputs"] for entry in manifest["images"]] == [[f"{i}_0.png"] for i in range(4)]
    assert (output / "grid.png").exists()


def test_sample_of_another_stage_is_replayed_alike(featinv: Featinv, detr, pictures, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    arguments = ["--inverter", str(detr), "--stage", "decoder", "--output", str(first)]
    assert featinv("sample", str(pictures), *arguments).code == 0
    done = featinv("replay", str(first), "--output", str(second))
    assert done.code == 0, done.err
    assert (first / "2_0.png").read_bytes() == (second / "2_0.png").read_bytes()


def test_evaluate_puts_tokens_in_the_same_table(featinv: Featinv, vit, pictures, tmp_path):
    output = tmp_path / "out"
    arguments = ["--inverter", str(vit), "--data", str(pictures), "--output", str(output)]
    done = featinv("evaluate", *arguments, "--n-null-images", "2")
    assert done.code == 0, done.err
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["settings"]["stage"] == "encoder"
    assert -1 <= metrics["cosine"]["value"] <= 1
    assert {"psnr", "top1_match"} <= metrics.keys()
    assert "the inverter" in (output / "metrics.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--stage", "decoder"], "Only modular inverters have stages"),
        (["--inverter", "DETR", "--steps", "5"], "got --steps"),
        (["--inverter", "DETR", "--stage", "decodr"], "did you mean 'decoder'"),
        (["--inverter", "nothing"], "An inverter must be a name"),
    ],
)
def test_what_does_not_fit_is_bad_input(featinv: Featinv, detr, pictures, arguments, words):
    arguments = [str(detr) if a == "DETR" else a for a in arguments]
    done = featinv("sample", str(pictures), *arguments)
    assert done.code == 2
    assert words in done.err


def test_resolved_settings_open_the_same_inverter(detr) -> None:
    resolved = open_inverter(SampleSettings(inverter=str(detr))).settings
    again = open_inverter(resolved)
    assert again.settings == resolved
    assert again.spec.layer == "encoder"
