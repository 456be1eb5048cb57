"""Detectors, inverters and encoders with reconstructors are packed as members of a family."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from featinv_diffusion.backbones import load_backbone
from featinv_diffusion.inverters.detr import load_detr
from featinv_diffusion.inverters.modular import InverseSet
from featinv_diffusion.inverters.reconstructor import load_reconstructor
from tests.inverters import encoders, small
from train.tiny_family.family import pack_inverters, pack_reconstructors


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    """Recipes of a trained DETR with its inverter, and of a ViT's that is not trained yet."""
    outputs = {"detr.yaml": "detr", "inverter-detr.yaml": "inverse", "inverter-vit.yaml": "absent"}
    for name, output in outputs.items():
        (tmp_path / name).write_text(f"run: {{output: {tmp_path / output}}}\n")
    path = small.make_detr_path()
    path.model.save_pretrained(tmp_path / "detr/final/detector")
    small.make_detr_inverses(path).save_pretrained(tmp_path / "inverse/final/inverter")
    records = [{"step": 1, "backbone": 0.9}, {"step": 2, "backbone": 0.25, "psnr_backbone": 21.5}]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "inverse/validation.jsonl").write_text(lines)
    return tmp_path


def test_members_hold_detector_inverter_and_their_last_figures(configs: Path) -> None:
    family = configs / "tiny"
    assert list(pack_inverters(family, configs)) == [family / "detr"]
    inverses = InverseSet.from_pretrained(family / "detr/inverter")
    path = small.make_detr_path()
    wanted = small.make_detr_inverses(path).half().float().state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in inverses.state_dict().items())
    stored = load_detr(str(family / "detr/detector")).state_dict()
    wanted = path.model.half().float().state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in stored.items())
    card = (family / "detr/inverter/README.md").read_text()
    assert "| backbone | 0.250 |" in card
    assert "| psnr_backbone | 21.500 |" in card
    assert "Warning" not in card


def test_the_card_warns_of_weak_modules(configs: Path) -> None:
    record = {"step": 2, "backbone": 0.25, "psnr_backbone": 21.5, "head": 0.81, "psnr_head": 9.0}
    (configs / "inverse/validation.jsonl").write_text(json.dumps(record) + "\n")
    list(pack_inverters(configs / "tiny", configs))
    warning = (configs / "tiny/detr/inverter/README.md").read_text().splitlines()[-1]
    assert warning.startswith("Warning: weak")
    assert warning.endswith("its stage: `head` (0.81).")


def test_packing_again_replaces_the_member(configs: Path) -> None:
    family = configs / "tiny"
    list(pack_inverters(family, configs))
    (family / "detr/inverter/stray").touch()
    list(pack_inverters(family, configs))
    assert not (family / "detr/inverter/stray").exists()
    assert sorted(p.name for p in (family / "detr").iterdir()) == ["detector", "inverter"]


@pytest.fixture
def encoders_configs(tmp_path: Path) -> Path:
    """Recipes of a trained encoder with its reconstructor, and of one without."""
    encoder = encoders.save_encoder(tmp_path / "siglip/final/backbone")
    encoders.make_reconstructor().save_pretrained(tmp_path / "recon/final/reconstructor")
    for name, output, weights in (
        ("siglip", tmp_path / "recon", encoder),
        ("siglip2", tmp_path / "absent", tmp_path / "none"),
    ):
        text = f"model: {{weights: {weights}}}\nrun: {{output: {output}}}\n"
        (tmp_path / f"reconstructor-{name}.yaml").write_text(text)
    (tmp_path / "siglip/validation.jsonl").write_text(json.dumps({"step": 9, "top1": 0.5}))
    (tmp_path / "recon/validation.jsonl").write_text(json.dumps({"step": 4, "psnr": 18.25}))
    return tmp_path


def test_encoders_are_packed_with_their_reconstructor(encoders_configs: Path) -> None:
    family = encoders_configs / "tiny"
    assert list(pack_reconstructors(family, encoders_configs)) == [family / "siglip"]
    inverter = load_reconstructor(str(family / "siglip"))
    wanted = encoders.make_reconstructor().half().float().state_dict()
    found = inverter.reconstructor.state_dict()
    assert all(torch.equal(found[key], wanted[key].to(found[key].dtype)) for key in wanted)
    assert inverter.backbone.preprocessing.std == encoders.STD
    stored = load_file(family / "siglip/backbone/model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    assert not any("head" in key for key in stored)
    images = torch.rand(2, 3, *inverter.backbone.input_size, generator=torch.manual_seed(0))
    whole = load_backbone(f"hf/{encoders_configs}/siglip/final/backbone")
    torch.testing.assert_close(
        inverter.backbone.features(images), whole.features(images), rtol=0, atol=2e-2
    )
    card = (family / "siglip/README.md").read_text()
    assert "| top1 | 0.500 |" in card
    assert "| psnr | 18.250 |" in card
    files = [path for path in (family / "siglip").rglob("*") if path.suffix in {".json", ".md"}]
    assert not any(str(encoders_configs) in path.read_text() for path in files)
