"""Fixtures for what is saved to folders and loaded from them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import PNDMScheduler, StableDiffusionPipeline

from featinv_diffusion.diffusion import folders as bundled
from featinv_diffusion.diffusion.featinv_pipeline import FeatInvPipeline
from tests import tiny
from tests.diffusion.probe import sample


@pytest.fixture(scope="session")
def expected(saved_pipeline: Path) -> torch.Tensor:
    """What `probe.sample` gives for `saved_pipeline`."""
    return sample(FeatInvPipeline.from_pretrained(saved_pipeline))


@pytest.fixture
def copied(saved_pipeline: Path, tmp_path: Path) -> Path:
    """A pipeline folder that a test may damage."""
    return Path(shutil.copytree(saved_pipeline, tmp_path / "copied"))


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A family folder, not there yet, where the package looks for bundled pipelines."""
    monkeypatch.setattr(bundled, "ASSETS", tmp_path / "assets")
    return tmp_path / "assets" / "tiny"


@pytest.fixture
def base(pipeline: FeatInvPipeline, tmp_path: Path) -> Path:
    """A Stable Diffusion folder as they are published: PNDM, and entries for parts left out."""
    StableDiffusionPipeline(
        **{name: getattr(pipeline, name) for name in tiny.STABLE_DIFFUSION},
        scheduler=PNDMScheduler.from_config(pipeline.scheduler.config, skip_prk_steps=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def backbone_name(tmp_path: Path) -> str:
    """The tiny backbone of `saved_pipeline`, by a name that `load_backbone` takes."""
    tiny.make_backbone().save_pretrained(tmp_path / "classifier")
    return f"hf/{tmp_path / 'classifier'}"
