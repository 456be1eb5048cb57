"""`featinv sample` and `featinv evaluate` with a reconstructor and with diffusers' autoencoder."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from featinv_diffusion.errors import InputError
from featinv_diffusion.inverters import reconstructor
from featinv_diffusion.inverters.open import list_named, open_inverter
from featinv_diffusion.settings import DIFFUSION, SampleSettings
from tests.cli.conftest import Featinv
from tests.inverters import encoders
from tests.inverters.test_rae import make_rae


@pytest.fixture
def siglip(tmp_path: Path, monkeypatch) -> Path:
    """A member `siglip` as it is bundled."""
    monkeypatch.setattr(reconstructor, "ASSETS", tmp_path / "assets")
    return encoders.save_member(tmp_path / "assets/tiny/siglip")


@pytest.fixture
def rae(tmp_path: Path) -> Path:
    make_rae("mae").save_pretrained(tmp_path / "autoencoder")
    return tmp_path / "autoencoder"


def test_sample_by_name_is_replayed_alike(featinv: Featinv, siglip, photos, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    done = featinv("sample", photos, "--inverter", "siglip", "--output", first)
    assert done.code == 0, done.err
    assert "only pipelines of the diffusion inverter hold statistics" in done.out
    assert "Fit them" not in done.out
    manifest = json.loads((first / "manifest.json").read_text())
    assert (manifest["inverter"], manifest["stage"]) == ("siglip", "last")
    assert (manifest["backbone"], manifest["pipeline"]) == (encoders.NAME, None)
    assert featinv("replay", first, "--output", second).code == 0
    assert (first / "a_0.png").read_bytes() == (second / "a_0.png").read_bytes()


def test_evaluate_records_the_weights(featinv: Featinv, siglip, photos, tmp_path):
    def evaluate(output: Path) -> dict:
        arguments = ["--inverter", "siglip", "--data", photos, "--n-null-images", "2"]
        done = featinv("evaluate", *arguments, "--output", output)
        assert done.code == 0, done.err
        return json.loads((output / "metrics.json").read_text())

    metrics = evaluate(tmp_path / "out")
    assert {"cosine", "psnr", "ssim"} <= metrics.keys()
    assert len(metrics["modules_sha256"]) == 64
    assert "the inverter siglip" in (tmp_path / "out/metrics.md").read_text()
    path = siglip / "reconstructor/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["decoder.layers.0.weight"][0, 0, 0, 0] += 1e-3
    save_file(weights, path)
    assert evaluate(tmp_path / "other")["modules_sha256"] != metrics["modules_sha256"]


def test_rae_takes_its_weights_from_the_pipeline(featinv: Featinv, rae, photos, tmp_path):
    output = tmp_path / "out"
    chosen = ["--inverter", "rae", "--pipeline", rae]
    done = featinv("sample", photos, *chosen, "--output", output)
    assert done.code == 0, done.err
    manifest = json.loads((output / "manifest.json").read_text())
    assert (manifest["pipeline"], manifest["backbone"]) == (str(rae), "rae/autoencoder")
    done = featinv("replay", output, "--output", tmp_path / "again")
    assert "3 of 3 pictures are identical" in done.out, done.err
    arguments = ["--data", photos, "--n-null-images", "2", "--output", tmp_path / "table"]
    done = featinv("evaluate", *chosen, *arguments)
    assert done.code == 0, done.err
    assert f"the inverter rae of {rae}" in (tmp_path / "table/metrics.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--inverter", "siglip", "--stage", "encoder"], "reads the layer 'last' and no other"),
        (["--inverter", "siglip", "--pipeline", "tiny/vit"], "takes no pipeline"),
        (["--inverter", "siglip", "--guidance", "text"], "got --guidance"),
        (["--inverter", "siglip", "--dtype", "float16"], "got --dtype"),
        (["--inverter", "siglip", "--attention", "xformers"], "got --attention"),
        (["--inverter", "siglip", "--strength", "0.5"], "got --strength"),
        (["--inverter", "~nobody-of-that-name/x"], "leads nowhere"),
        (["--pipeline", "~nobody-of-that-name/x"], "leads nowhere"),
        (["--inverter", "siglop"], "did you mean 'siglip'"),
        (["--inverter", "rae"], "give --pipeline"),
        (["--inverter", "rae", "--pipeline", "nobody/nothing"], "AutoencoderRAE"),
    ],
)
def test_what_does_not_fit_is_bad_input(featinv: Featinv, siglip, photos, arguments, words):
    done = featinv("sample", photos, *arguments)
    assert done.code == 2
    assert words in done.err


def test_resolved_settings_open_the_same_inverter(siglip, rae) -> None:
    for settings in (
        SampleSettings(inverter="siglip"),
        SampleSettings(inverter=str(siglip)),
        SampleSettings(inverter="rae", pipeline=str(rae)),
    ):
        inverter = open_inverter(settings)
        again = open_inverter(inverter.settings)
        assert again.settings == inverter.settings
        assert again.spec == inverter.spec


@pytest.mark.parametrize(
    ("backbone", "layer", "words"),
    [
        ("convnext", "last", "reads the backbone 'small/siglip', but the backbone 'convnext'"),
        (encoders.NAME, "encoder.layers.0", "layer 'last' and no other"),
    ],
)
def test_resolved_settings_of_another_inverter_are_refused(siglip, backbone, layer, words) -> None:
    settings = SampleSettings(inverter="siglip", backbone=backbone, layer=layer, stage=layer)
    with pytest.raises(InputError, match=words):
        open_inverter(settings)


def test_a_pipeline_in_the_home_folder(rae: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(rae.parent))
    inverter = open_inverter(SampleSettings(inverter="rae", pipeline=f"~/{rae.name}"))
    assert inverter.settings.pipeline == str(rae)


def test_the_help_names_inverters_that_exist() -> None:
    (field,) = [field for field in fields(SampleSettings) if field.name == "inverter"]
    *names, folder = field.metadata["metavar"].split("|")
    assert folder == "FOLDER"
    assert names == [DIFFUSION, *list_named()]
