"""Packing: what the recipes left behind becomes a bundled member that loads and samples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from featinv_diffusion.diffusion import bundled
from featinv_diffusion.errors import InputError
from featinv_diffusion.training import family
from tests import tiny


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A ControlNet config whose base, backbone and outputs stand in `tmp_path`."""
    for name in ("vae", "unet", "text_encoder", "tokenizer", "scheduler", "backbone"):
        getattr(tiny, f"make_{name}")().save_pretrained(str(tmp_path / "base" / name))
    stages = []
    for stage in ("classifier", "controlnet"):
        (tmp_path / stage).mkdir()
        record = {"step": 7, "figure": 0.5, "step_of_old": 1}
        (tmp_path / stage / "validation.jsonl").write_text(json.dumps(record) + "\n")
        path = tmp_path / f"{stage}.yaml"
        settings = {
            "model": {
                "base": str(tmp_path / "base"),
                "backbone": str(tmp_path / "base/backbone"),
                "backbone_name": "tiny/convnext",
            },
            "validation": {"num_inference_steps": 3, "guidance": "features"},
            "run": {"output": str(tmp_path / stage)},
        }
        OmegaConf.save(settings, path)
        stages.append((stage, str(path)))
    monkeypatch.setattr(family, "STAGES", tuple(stages))
    return tmp_path / "controlnet.yaml"


def test_a_packed_member_loads_with_its_defaults(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.make_controlnet().save_pretrained(tmp_path / "controlnet/final/controlnet")
    member = family.pack_member(str(config), tmp_path / "assets/tiny")
    assert member == tmp_path / "assets/tiny/convnext"
    card = (member / "README.md").read_text()
    assert "| controlnet, 7 steps | figure | 0.500 |" in card
    assert str(tmp_path) not in card
    monkeypatch.setattr(bundled, "ASSETS", tmp_path / "assets")
    pipeline = bundled.load_bundled("tiny/convnext")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.config["default_num_inference_steps"] == 3
    assert pipeline.config["default_guidance"] == "features"
    image = pipeline(features=tiny.make_features(1), output_type="pt").images
    assert image.shape == (1, 3, 64, 64)
    expected = tiny.make_controlnet().state_dict()["conv_in.weight"].half().float()
    assert torch.equal(pipeline.controlnet.state_dict()["conv_in.weight"], expected)


def test_packing_before_training_is_refused(config: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must hold trained weights"):
        family.pack_member(str(config), tmp_path / "assets/tiny")
    assert not (tmp_path / "assets").exists()
