"""Detectors and inverters are packed as members of a family."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from featinv_diffusion.inverters.detr_model import load_detr
from featinv_diffusion.inverters.modular import InverseSet
from featinv_diffusion.training.pack_inverters import pack_inverters
from tests.inverters import small


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


def test_packing_again_replaces_the_member(configs: Path) -> None:
    family = configs / "tiny"
    list(pack_inverters(family, configs))
    (family / "detr/inverter/stray").touch()
    list(pack_inverters(family, configs))
    assert not (family / "detr/inverter/stray").exists()
    assert sorted(p.name for p in (family / "detr").iterdir()) == ["detector", "inverter"]
