"""What ships in the package: sizes, a working default, and features that come back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from featinv_diffusion import load_backbone, load_pipeline
from featinv_diffusion.diffusion.bundled import ASSETS, list_bundled
from featinv_diffusion.images import builtin_photo
from featinv_diffusion.metrics.features import feature_cosine, shuffled_cosine
from featinv_diffusion.seeds import make_generator

TINY = ASSETS / "tiny"


def test_convnext_ships_and_is_listed() -> None:
    assert "tiny/convnext" in list_bundled()


def test_weights_are_half_precision_safetensors_of_at_most_16_mb() -> None:
    files = [path for path in TINY.rglob("*") if path.is_file()]
    assert not [p for p in files if p.suffix in {".bin", ".ckpt", ".pt", ".pkl"}]
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert len(weights) >= 5
    for path in weights:
        assert path.stat().st_size <= 16e6
        with safe_open(path, "pt") as tensors:
            dtypes = {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
        assert dtypes <= {"F16", "I64"}
    assert sum(path.stat().st_size for path in files) <= 65e6


def test_nothing_in_the_assets_names_the_machine_they_were_made_on() -> None:
    for path in TINY.rglob("*"):
        if path.suffix in {".json", ".md"}:
            text = path.read_text()
            assert str(Path.home()) not in text
            assert ".checkpoints" not in text


def test_the_card_has_figures_data_and_limits() -> None:
    card = (TINY / "convnext/README.md").read_text()
    for heading in ("## Recipe and figures", "## Data", "## Limits", "cosine_shuffled"):
        assert heading in card


def test_the_backbone_knows_its_hundred_classes() -> None:
    backbone = load_backbone("tiny/convnext")
    assert (backbone.spec.channels, backbone.spec.grid) == (256, (8, 8))
    assert backbone.labels is not None
    assert len(backbone.labels) == 100
    assert "goldfish" in backbone.labels


@pytest.mark.parametrize("photo", ["flower.jpg", "china.jpg"])
def test_reconstructions_beat_the_shuffled_null(photo: str) -> None:
    pipeline = load_pipeline("tiny/convnext")
    pipeline.set_progress_bar_config(disable=True)
    backbone = load_backbone("tiny/convnext")
    features = pipeline.encode_features(builtin_photo().with_name(photo))
    generators = [make_generator(photo, i) for i in range(4)]
    images = pipeline(
        features=features, num_images_per_prompt=4, generator=generators, output_type="pt"
    ).images
    again = backbone.features(images)
    wanted = features.expand(4, -1, -1, -1)
    null = shuffled_cosine(wanted, again, torch.Generator().manual_seed(0))
    assert float(feature_cosine(wanted, again).mean() - null.mean()) > 0.1


def test_settings_of_the_pipeline_are_written_down() -> None:
    defaults = json.loads((TINY / "convnext/pipeline.json").read_text())
    assert defaults["default_guidance"] in {"text", "features"}
    assert defaults["default_num_inference_steps"] <= 50
