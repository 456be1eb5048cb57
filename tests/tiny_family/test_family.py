"""Packing: what the recipes left behind becomes bundled members that load and sample."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from featinv_diffusion.backbones import load_backbone
from featinv_diffusion.diffusion import folders as bundled
from featinv_diffusion.errors import InputError
from featinv_diffusion.features.natural_maps import NaturalMaps
from featinv_diffusion.images import to_pil, write_png
from featinv_diffusion.schema import dump_yaml, parse_yaml
from tests import tiny
from train.tiny_family import family

RECORDS = [{"step": 3, "figure": 0.25}, {"step": 7, "minutes": 1.5, "figure": 0.5}]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Finished runs of a base and a classifier, and configs of two ControlNets not yet trained."""
    for name in ("vae", "unet", "text_encoder", "tokenizer", "scheduler"):
        getattr(tiny, f"make_{name}")().save_pretrained(str(tmp_path / "base/final" / name))
    tiny.make_backbone().save_pretrained(str(tmp_path / "classifier/final/classifier"))
    for stage in ("base", "classifier", "autoencoder"):
        write_records(tmp_path / stage)
    vae = {"vae": str(tmp_path / "autoencoder/final/vae")}
    write_config(tmp_path / "text_to_image.yaml", tmp_path / "base", vae)
    write_config(tmp_path / "vit.yaml", tmp_path / "classifier", {})
    for member in ("convnext", "convnext-pooled"):
        model = {
            "base": str(tmp_path / "base/final"),
            "backbone": str(tmp_path / "classifier/final/classifier"),
            "backbone_name": "tiny/convnext",
        }
        write_config(tmp_path / f"{member}.yaml", tmp_path / member, model)
    monkeypatch.setattr(family, "CONFIGS", tmp_path)
    monkeypatch.setattr(
        family, "MEMBERS", {name: f"{name}.yaml" for name in ("convnext", "convnext-pooled")}
    )
    monkeypatch.setattr(bundled, "ASSETS", tmp_path / "assets")
    return tmp_path


def write_records(output: Path) -> None:
    output.mkdir(exist_ok=True)
    (output / "validation.jsonl").write_text("".join(json.dumps(r) + "\n" for r in RECORDS))


def write_config(path: Path, output: Path, model: dict[str, str]) -> None:
    validation = {"num_inference_steps": 3, "guidance": "features", "scheduler": "unipc"}
    settings = {"model": model, "validation": validation, "run": {"output": str(output)}}
    path.write_text(dump_yaml(settings))


def train(runs: Path, member: str, **overrides: object) -> None:
    spec = tiny.FEATURE_SPEC | {"backbone": "tiny/convnext"}
    controlnet = tiny.make_controlnet(feature_spec=spec, **overrides)
    controlnet.save_pretrained(runs / member / "final/controlnet")
    write_records(runs / member)


def test_a_packed_family_loads_with_its_defaults(runs: Path) -> None:
    train(runs, "convnext")
    train(runs, "convnext-pooled", feature_pooled=True)
    members = list(family.pack_family(runs / "assets/tiny"))
    assert [member.name for member in members] == ["convnext", "convnext-pooled", "vit"]
    assert bundled.list_bundled() == ["tiny/convnext", "tiny/convnext-pooled"]
    card = (members[0] / "README.md").read_text()
    assert "convnext.yaml): step | minutes | figure |" in card
    assert card.count("| 3 | – | 0.250 |\n| 7 | 1.500 | 0.500 |") == 4
    assert (members[2] / "README.md").read_text().count("| 7 | 1.500 | 0.500 |") == 1
    pipeline = bundled.load_bundled("tiny/convnext")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.config["default_num_inference_steps"] == 3
    assert pipeline.config["default_guidance"] == "features"
    assert type(pipeline.scheduler).__name__ == "UniPCMultistepScheduler"
    image = pipeline(features=tiny.make_features(1), output_type="pt").images
    assert image.shape == (1, 3, 64, 64)
    expected = tiny.make_controlnet().state_dict()["conv_in.weight"].half().float()
    assert torch.equal(pipeline.controlnet.state_dict()["conv_in.weight"], expected)
    backbone = load_backbone(f"hf/{members[2] / 'backbone'}")
    weights = tiny.make_backbone().timm_model.state_dict()
    assert backbone.state_dict().keys() >= {f"model.{key}" for key in weights}


def test_only_finished_members_are_packed_but_the_first_must_be(runs: Path) -> None:
    with pytest.raises(InputError, match="must hold trained weights"):
        list(family.pack_family(runs / "assets/tiny"))
    assert not (runs / "assets").exists()
    train(runs, "convnext")
    (runs / "assets/tiny/trained-on-another-base").mkdir(parents=True)
    names = [member.name for member in family.pack_family(runs / "assets/tiny")]
    assert names == ["convnext", "vit"]
    folders = {path.name for path in (runs / "assets/tiny").iterdir()}
    assert folders == {"base", "convnext", "vit"}


def test_each_pipeline_gets_the_statistics_of_its_natural_maps_once(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(runs, "convnext")
    data = parse_yaml((runs / "convnext.yaml").read_text(), "the config")
    data["data"] = {"root": str(runs / "images"), "held_back_per_class": 50}
    (runs / "convnext.yaml").write_text(dump_yaml(data))
    for i, image in enumerate(to_pil(tiny.make_images(300))):
        write_png(image, runs / f"images/{'ab'[i % 2]}/{i:03d}.png")
    quick = partial(family.fit_scope, n_reconstructions=0)
    monkeypatch.setattr(family, "fit_scope", quick)
    members = list(family.pack_family(runs / "assets/tiny"))
    (path,) = family.fit_scopes(runs / "assets/tiny")
    assert path == members[0] / "scope.safetensors"
    natural = NaturalMaps.load(path)
    assert natural.spec.backbone == "tiny/convnext"
    assert (natural.n_fitted, len(natural.calibration.distances)) == (200, 100)
    assert not list(family.fit_scopes(runs / "assets/tiny"))
    list(family.pack_family(runs / "assets/tiny"))
    assert path.is_file()
