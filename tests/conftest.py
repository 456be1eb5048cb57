"""Shared fixtures: tiny models built from config (`tests/tiny.py`), no network, shapes checked."""

# ruff: noqa: E402 - the environment must be set before the libraries are imported

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Read when the libraries are imported: no network, and nothing of the user's own caches.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="featinv-tests-")
os.environ.pop("HF_ENDPOINT", None)
os.environ.pop("HF_TOKEN", None)

from jaxtyping import install_import_hook

import tests.typechecker  # noqa: F401 - the hook finds it by name

# The annotations of the package, shapes included, are checked at every call.
install_import_hook("featinv_diffusion", "tests.typechecker.check")

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import UNet2DConditionModel
from diffusers.utils.logging import disable_progress_bar as disable_diffusers_bar
from transformers import TimmWrapperForImageClassification
from transformers.utils.logging import disable_progress_bar as disable_transformers_bar

from featinv_diffusion.diffusion.featinv_controlnet import FeatureControlNet
from featinv_diffusion.diffusion.featinv_pipeline import FeatInvPipeline
from tests import tiny


@pytest.fixture(scope="session", autouse=True)
def _session() -> Iterator[None]:
    torch.set_num_threads(1)
    disable_diffusers_bar()
    disable_transformers_bar()
    yield
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


@pytest.fixture
def unet() -> UNet2DConditionModel:
    return tiny.make_unet()


@pytest.fixture
def controlnet() -> FeatureControlNet:
    """As after training: its zero convolutions are not zero."""
    return tiny.make_controlnet()


@pytest.fixture
def timm_wrapper() -> TimmWrapperForImageClassification:
    """A ConvNeXt classifier of ten classes at 64 px; its last map is 32×8×8."""
    return tiny.make_backbone()


@pytest.fixture
def pipeline() -> FeatInvPipeline:
    return tiny.make_pipeline()


@pytest.fixture(scope="session")
def saved_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that `save_pretrained` wrote; copy it before changing it."""
    folder = tmp_path_factory.mktemp("saved") / "tiny-pipeline"
    tiny.make_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """accelerate keeps the first precision of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
