"""Representation autoencoders of diffusers as inverters, on tiny ones in a folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderRAE
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import SiglipVisionModel

from featinv_diffusion.errors import InputError
from featinv_diffusion.inverters import Inverter, rae
from featinv_diffusion.inverters.rae import RaeInverter, load_rae
from tests.tiny import make_images, seeded

PATCH = {"dinov2": 14, "siglip2": 16, "mae": 16}
SIDE = 4


@seeded
def make_rae(encoder: str, **overrides) -> AutoencoderRAE:
    """Features of 64×4×4, pictures of 64 px; statistics of latents as checkpoints have them."""
    settings = {
        "encoder_type": encoder,
        "encoder_hidden_size": 64,
        "encoder_patch_size": PATCH[encoder],
        "encoder_num_hidden_layers": 1,
        "encoder_input_size": SIDE * PATCH[encoder],
        "decoder_hidden_size": 32,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 32,
        "encoder_norm_mean": [0.4, 0.5, 0.6],
        "encoder_norm_std": [0.2, 0.3, 0.25],
        "latents_mean": torch.randn(64, SIDE, SIDE),
        "latents_std": torch.rand(64, SIDE, SIDE) + 0.5,
        "scaling_factor": 0.5,
    }
    with rae._nested_siglip():
        model = AutoencoderRAE(**(settings | overrides)).eval()
    nn.init.normal_(model.decoder.trainable_cls_token)
    return model


@pytest.fixture(scope="module", params=list(PATCH))
def saved(request, tmp_path_factory) -> tuple[AutoencoderRAE, Path]:
    model = make_rae(request.param)
    folder = tmp_path_factory.mktemp("rae") / request.param
    model.save_pretrained(folder)
    return model, folder


def test_it_inverts_the_latents_that_the_class_itself_makes(saved) -> None:
    model, folder = saved
    counts: list[float] = []
    inverter = load_rae(str(folder))
    inverter.on_progress = counts.append
    assert isinstance(inverter, Inverter)
    side = inverter.backbone.input_size[0]
    assert (inverter.spec.backbone, inverter.spec.layer) == (f"rae/{folder.name}", "last")
    assert (inverter.spec.channels, inverter.spec.grid) == (64, (SIDE, SIDE))
    images = nn.functional.interpolate(make_images(2), (side, side), mode="bilinear")
    features = inverter.backbone.features(images)
    latents = model.encode(images).latent
    torch.testing.assert_close(features, latents, rtol=1e-4, atol=1e-4)
    decoded = inverter.invert(latents.detach())
    wanted = model.decode(latents).sample
    torch.testing.assert_close(decoded, wanted.clamp(0, 1), rtol=1e-5, atol=1e-5)
    assert decoded.shape == (2, 3, 64, 64)
    assert 0 <= float(decoded.min()) < float(decoded.max()) <= 1
    assert counts == [2]


def test_images_of_another_size_are_resized(saved) -> None:
    inverter = RaeInverter(saved[0])
    assert inverter.backbone.features(torch.rand(1, 3, 90, 70)).shape == (1, 64, SIDE, SIDE)
    features, logits = inverter.backbone.features_and_logits(make_images(1))
    assert logits is None
    assert inverter.backbone.layers() == [inverter.spec]
    inverter.spec.check_features(features)


def test_latents_may_be_tokens_in_the_class() -> None:
    flat = {"reshape_to_2d": False, "latents_mean": None, "latents_std": None}
    inverter, images = RaeInverter(make_rae("mae", **flat)), make_images(1)
    as_map = RaeInverter(make_rae("mae", latents_mean=None, latents_std=None))
    features = inverter.backbone.features(images)
    torch.testing.assert_close(features, as_map.backbone.features(images))
    torch.testing.assert_close(inverter.invert(features), as_map.invert(features))


def test_features_of_another_shape_are_refused(saved) -> None:
    with pytest.raises(InputError, match="must have shape"):
        RaeInverter(saved[0]).invert(torch.zeros(1, 64, 3, 3))


def test_siglip_weights_from_before_transformers_5(tmp_path: Path) -> None:
    model = make_rae("siglip2")
    model.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    flat = load_file(file)
    nested = {
        key.replace("encoder.", "encoder.vision_model.", 1)
        if key.startswith(("encoder.embeddings", "encoder.encoder", "encoder.head"))
        else key: value
        for key, value in flat.items()
    }
    assert nested.keys() != flat.keys()
    save_file(nested, file)
    loaded = load_rae(str(tmp_path)).autoencoder.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in model.state_dict().items())
    assert not hasattr(SiglipVisionModel, "vision_model")


def test_folders_without_one_are_refused(tmp_path: Path) -> None:
    for name in (str(tmp_path), "nobody/nothing"):
        with pytest.raises(InputError, match="must be a folder or Hub repository"):
            load_rae(name)


def drop(prefix: str):
    def damage(weights: dict) -> None:
        for key in [key for key in weights if key.startswith(prefix)]:
            del weights[key]

    return damage


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (drop("decoder."), r"are missing, decoder\."),
        (drop("encoder."), r"are missing, encoder\."),
        (lambda weights: weights.update(colour=torch.zeros(1)), "1 are unexpected, colour among"),
    ],
)
def test_weights_that_do_not_fit_are_refused(saved, tmp_path: Path, damage, words: str) -> None:
    shutil.copytree(saved[1], tmp_path, dirs_exist_ok=True)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    damage(weights)
    save_file(weights, file)
    with pytest.raises(InputError, match=words):
        load_rae(str(tmp_path))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda config: [config], "group of named values"),
        (lambda config: config | {"encoder_hidden_size": "a"}, "could not be read"),
        (lambda config: config | {"_class_name": "AutoencoderKL"}, "is of class AutoencoderKL"),
    ],
)
def test_a_damaged_config_is_refused(saved, tmp_path: Path, damage, words: str) -> None:
    shutil.copytree(saved[1], tmp_path, dirs_exist_ok=True)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(damage(json.loads(file.read_text()))))
    with pytest.raises(InputError, match=words):
        load_rae(str(tmp_path))


def test_a_folder_in_the_home_folder(saved, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(saved[1].parent))
    inverter = load_rae(f"~/{saved[1].name}")
    assert inverter.spec.backbone == f"rae/{saved[1].name}"
    with pytest.raises(InputError, match="leads nowhere"):
        load_rae("~nobody-of-that-name/rae")
