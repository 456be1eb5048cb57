"""What ships in the package: sizes, a working default, and features that come back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from featinv_diffusion import load_backbone
from featinv_diffusion.diffusion.bundled import ASSETS, list_bundled
from featinv_diffusion.diffusion.pipeline_folder import SCOPE_FILE
from featinv_diffusion.images import builtin_photo, center_square, read_image, to_tensor
from featinv_diffusion.metrics.features import feature_cosine, shuffled_cosine
from featinv_diffusion.sampling import SampleSettings, open_inverter
from featinv_diffusion.seeds import make_generator

TINY = ASSETS / "tiny"
PHOTOS = ("flower.jpg", "china.jpg")


MEMBERS = {
    "convnext": (256, (8, 8)),
    "convnext-pooled": (256, (8, 8)),
    "convnext-stages.1": (128, (8, 8)),
    "resnet": (256, (8, 8)),
    "swin": (128, (8, 8)),
    "vit": (192, (8, 8)),
}


def test_the_members_ship_and_are_listed() -> None:
    assert {f"tiny/{name}" for name in MEMBERS} <= set(list_bundled())


def test_weights_are_half_precision_safetensors_of_at_most_16_mb() -> None:
    files = [path for path in TINY.rglob("*") if path.is_file()]
    assert not [p for p in files if p.suffix in {".bin", ".ckpt", ".pt", ".pkl"}]
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert len(weights) >= 5
    for path in weights:
        assert path.stat().st_size <= 16e6
        with safe_open(path, "pt") as tensors:
            dtypes = {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
        is_fit = path.name == SCOPE_FILE or path.parent.name == "operators"
        assert dtypes <= ({"F32"} if is_fit else {"F16", "I64"})
    assert sum(path.stat().st_size for path in files) <= 105e6


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


@pytest.mark.parametrize("name", MEMBERS)
def test_reconstructions_beat_the_shuffled_null(name: str) -> None:
    inverter, _ = open_inverter(SampleSettings(pipeline=f"tiny/{name}"))
    backbone = inverter.backbone
    assert backbone is not None
    assert (backbone.spec.channels, backbone.spec.grid) == MEMBERS[name]
    photos = [center_square(read_image(builtin_photo().with_name(n)), 64) for n in PHOTOS]
    features = backbone.features(to_tensor(photos))
    again = backbone.features(
        inverter.invert(features, generator=[make_generator(photo, 0) for photo in PHOTOS])
    )
    found = feature_cosine(features, again).mean()
    null = shuffled_cosine(features, again, torch.Generator().manual_seed(0)).mean()
    swapped = feature_cosine(features, again.flip(0)).mean()
    assert float(found - swapped) > 0.05
    assert float(found - null) > (0.0 if name.endswith("pooled") else 0.1)


def test_settings_of_the_pipeline_are_written_down() -> None:
    defaults = json.loads((TINY / "convnext/pipeline.json").read_text())
    assert defaults["default_guidance"] in {"text", "features"}
    assert defaults["default_num_inference_steps"] <= 50
