"""What ships in the package: sizes, a working default, and features that come back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from featinv_diffusion import load_backbone
from featinv_diffusion.backbones.base import weights_sha256
from featinv_diffusion.diffusion.folders import (
    ASSETS,
    CERTAINTY_FILE,
    SCOPE_FILE,
    is_complete,
    list_bundled,
)
from featinv_diffusion.features.operators import open_operator
from featinv_diffusion.features.pixel_operations import make_operation
from featinv_diffusion.images import builtin_photo, center_square, read_image, to_tensor
from featinv_diffusion.inverters.open import open_inverter
from featinv_diffusion.metrics.features import feature_cosine, psnr, shuffled_cosine
from featinv_diffusion.seeds import make_generator
from featinv_diffusion.settings import SampleSettings

TINY = ASSETS / "tiny"
PHOTOS = ("flower.jpg", "china.jpg")


MEMBERS = {
    "convnext": (256, (8, 8)),
    "convnext-pooled": (256, (8, 8)),
    "convnext-stages.1": (128, (8, 8)),
    "resnet": (256, (8, 8)),
    "swin": (128, (8, 8)),
    "vit": (192, (8, 8)),
    "efficientnet-lite0": (1280, (7, 7)),
}
WEAK = ("convnext-pooled", "efficientnet-lite0")
"""Members whose samples need not beat shuffled cells by much."""


def load_photos() -> torch.Tensor:
    paths = [builtin_photo().with_name(name) for name in PHOTOS]
    return to_tensor([center_square(read_image(path), 64) for path in paths])


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
        is_fit = path.name in (SCOPE_FILE, CERTAINTY_FILE) or path.parent.name == "operators"
        assert dtypes <= ({"F32", "F64"} if is_fit else {"F16", "I64"})


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
    if not is_complete(f"tiny/{name}"):
        pytest.skip("the extra `real` is not installed")
    inverter = open_inverter(SampleSettings(pipeline=f"tiny/{name}"))
    backbone = inverter.backbone
    assert backbone is not None
    assert (backbone.spec.channels, backbone.spec.grid) == MEMBERS[name]
    features = backbone.features(load_photos())
    again = backbone.features(
        inverter.invert(features, generator=[make_generator(photo, 0) for photo in PHOTOS])
    )
    found = feature_cosine(features, again).mean()
    null = shuffled_cosine(features, again, torch.Generator().manual_seed(0)).mean()
    swapped = feature_cosine(features, again.flip(0)).mean()
    assert float(found - swapped) > 0.05
    assert float(found - null) > (0.0 if name in WEAK else 0.1)


DETERMINISTIC = {"detr": 9.0, "vit": 17.0, "siglip": 17.0, "siglip2": 18.0}
"""Least PSNR in dB of the photos from the default stage."""


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_deterministic_inverters_bring_the_photos_back(name: str) -> None:
    inverter = open_inverter(SampleSettings(inverter=name))
    assert inverter.backbone is not None
    photos = to_tensor(
        [center_square(read_image(builtin_photo().with_name(n)), 64) for n in PHOTOS]
    )
    found = inverter.invert(inverter.backbone.features(photos))
    assert float(psnr(found, photos).min()) > DETERMINISTIC[name]
    assert float(psnr(found, photos.flip(0)).max()) < DETERMINISTIC[name]


@pytest.mark.parametrize("name", ["swap", "suppress", "colourise"])
def test_operators_do_to_features_what_is_done_to_pixels(name: str) -> None:
    operator = open_operator(f"tiny/siglip2/{name}")
    operation = make_operation(operator.record.operation, **operator.record.parameters)
    backbone = load_backbone("tiny/siglip2")
    operator.check(backbone.spec, weights_sha256({"": backbone.model}))
    photos = to_tensor(
        [center_square(read_image(builtin_photo().with_name(n)), 64) for n in PHOTOS]
    )
    before = backbone.features(operation.source(photos))
    after = backbone.features(operation.target(photos))
    edited = feature_cosine(operator.edit()(before), after).mean()
    assert float(edited) > float(feature_cosine(before, after).mean())


def test_settings_of_the_pipeline_are_written_down() -> None:
    defaults = json.loads((TINY / "convnext/pipeline.json").read_text())
    assert defaults["default_guidance"] in {"text", "features"}
    assert defaults["default_num_inference_steps"] <= 50
