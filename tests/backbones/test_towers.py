"""Towers inside larger models: SAM's encoder, InternViT, and types that are not what they seem."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import (
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionModel,
    SamConfig,
    SamImageProcessor,
    SamModel,
    SiglipVisionModel,
)

from featinv_diffusion.backbones import load_backbone, wrap_model
from featinv_diffusion.errors import InputError
from tests.backbones import zoo
from tests.tiny import seeded

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
TEXT = {
    "model_type": "qwen2",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "vocab_size": 10,
}


@seeded
def make_internvl() -> InternVLForConditionalGeneration:
    config = InternVLConfig(vision_config=zoo.ViT, text_config=TEXT)
    return zoo.randomise(InternVLForConditionalGeneration(config))  # pyright: ignore


@seeded
def make_sam() -> SamModel:
    small = {"hidden_size": 24, "num_attention_heads": 2, "mlp_dim": 8}
    prompt = {"hidden_size": 24, "image_size": zoo.SIZE}
    return zoo.randomise(  # pyright: ignore
        SamModel(
            SamConfig(
                vision_config=zoo.SAM, mask_decoder_config=small, prompt_encoder_config=prompt
            )
        )
    )


def at(model: Any, layer: str) -> torch.Tensor:
    return wrap_model(model, name="sam", layer=layer).features(zoo.make_images())


def test_sam_ends_behind_its_neck_and_its_blocks_are_maps_before_it():
    model, images = zoo.make_tower("sam"), zoo.make_images()
    backbone = wrap_model(model, name="sam")
    output = model(backbone.preprocess(images), output_hidden_states=True)
    assert backbone.spec.channels == 24
    assert torch.equal(backbone.features(images), output.last_hidden_state)
    assert torch.equal(at(model, "neck"), output.last_hidden_state)
    for i, layer in ((-1, "layers.1"), (-2, "layers.0")):
        rows, columns = output.hidden_states[i].shape[1:3]
        found = at(model, layer)
        assert found.shape == (2, 32, rows, columns)
        assert torch.equal(found[:, :, 3, 1], output.hidden_states[i][:, 3, 1])


def test_sam_lists_windowed_and_global_blocks_but_no_windows():
    listed = {s.layer: (s.channels, s.grid) for s in zoo.make("sam").layers()}
    assert listed["last"] == listed["neck"] == (24, (4, 4))
    assert listed["patch_embed"] == listed["layers.0"] == listed["layers.1"] == (32, (4, 4))
    assert "layers.0.attn" not in listed
    assert listed["layers.1.attn"] == (32, (4, 4))


def test_sam_has_one_input_size():
    with pytest.raises(InputError, match=r"must accept images of 96×48 pixels.*\(64\*64\)"):
        wrap_model(zoo.make_tower("sam"), name="sam", input_size=(96, 48))


def test_sam_has_the_same_layers_from_every_class_that_holds_it(tmp_path):
    model, images = make_sam(), zoo.make_images()
    model.save_pretrained(tmp_path)
    loaded, direct = load_backbone(f"hf/{tmp_path}"), wrap_model(model, name="sam")
    assert loaded.model is not direct.model
    assert [s.layer for s in loaded.layers()] == [s.layer for s in direct.layers()]
    assert torch.equal(loaded.features(images), direct.features(images))
    assert torch.equal(at(model, "layers.1"), at(loaded.model, "layers.1"))
    assert load_backbone(f"hf/{tmp_path}", pretrained=False).spec.grid == direct.spec.grid


def test_sams_resize_and_pad_becomes_a_squash(tmp_path):
    """Its processor would leave the lower half of a wide image's map to padding."""
    zoo.save_tower("sam", tmp_path)
    SamImageProcessor().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert settings["size"] == {"longest_edge": 1024}
    assert settings["do_pad"]
    backbone = load_backbone(f"hf/{tmp_path}")
    preprocessing = backbone.preprocessing
    assert (preprocessing.size, preprocessing.interpolation) == ((64, 64), "bilinear")
    assert (preprocessing.mean, preprocessing.std) == IMAGENET
    wide = zoo.make_images(1, (48, 96))
    mean, std = (torch.tensor(v)[:, None, None] for v in IMAGENET)
    squashed = F.interpolate(wide, (64, 64), mode="bilinear", antialias=True)
    assert torch.allclose(backbone.preprocess(wide), (squashed - mean) / std, atol=1e-5)


@pytest.fixture
def internvl(tmp_path: Path) -> InternVLForConditionalGeneration:
    model = make_internvl()
    model.save_pretrained(tmp_path)
    return model


@pytest.mark.parametrize("prefix", ["vision_tower.", "model.vision_tower."])
def test_of_internvl_the_vision_tower_alone_is_loaded(internvl, tmp_path, prefix):
    """Checkpoints call it either way; a name that is not found would be left random."""
    path = tmp_path / "model.safetensors"
    weights = {k.replace("vision_tower.", prefix): v for k, v in load_file(path).items()}
    assert any(name.startswith(prefix) for name in weights)
    save_file(weights, path, {"format": "pt"})
    backbone, images = load_backbone(f"hf/{tmp_path}"), zoo.make_images()
    assert type(backbone.model) is InternVLVisionModel
    tokens = internvl.model.vision_tower(backbone.preprocess(images)).last_hidden_state
    assert torch.equal(backbone.features(images).flatten(2).transpose(1, 2), tokens[:, 1:])
    assert torch.equal(
        wrap_model(internvl, name="internvl").features(images), backbone.features(images)
    )


def test_internvls_processor_is_found_inside_that_of_the_whole_model(internvl, tmp_path):
    size = {"height": 64, "width": 64}
    processor = GotOcr2ImageProcessor(size=size, image_mean=IMAGENET[0], image_std=[0.5] * 3)
    whole = {"image_processor": processor.to_dict(), "processor_class": "InternVLProcessor"}
    (tmp_path / "processor_config.json").write_text(json.dumps(whole, default=int))
    preprocessing = load_backbone(f"hf/{tmp_path}").preprocessing
    assert (preprocessing.size, preprocessing.interpolation) == ((64, 64), "bicubic")
    assert (preprocessing.mean, preprocessing.std) == (IMAGENET[0], (0.5, 0.5, 0.5))


def test_a_tower_with_missing_weights_is_refused_instead_of_left_random(internvl, tmp_path):
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    del weights["vision_tower.embeddings.cls_token"]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(InputError, match=r"but 1 are missing, embeddings\.cls_token among them"):
        load_backbone(f"hf/{tmp_path}")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "intern_vit_6b"}, r"timm/vit_intern300m_patch14_448\.ogvl_dist"),
        ({"model_type": "siglip2"}, r"NaFlex.*hf/google/siglip2-base-patch16-256"),
        (
            {"model_type": "unheard_of", "auto_map": {"AutoConfig": "code.Config"}},
            "loading it failed.*custom code",
        ),
    ],
)
def test_what_cannot_be_loaded_says_what_can(config, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text("raise SystemExit")
    with pytest.raises(InputError, match=message):
        load_backbone(f"hf/{tmp_path}")


def test_siglip2_of_one_resolution_is_of_the_type_siglip(tmp_path):
    """As its public configurations write it; depths and vocabulary are small here."""
    config = {
        "model_type": "siglip",
        "text_config": {"model_type": "siglip_text_model", "vocab_size": 10},
        "vision_config": {
            "image_size": 512,
            "model_type": "siglip_vision_model",
            "num_hidden_layers": 1,
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    backbone = load_backbone(f"hf/{tmp_path}", "encoder.layers.0", pretrained=False)
    assert isinstance(backbone.model, SiglipVisionModel)
    assert (backbone.spec.channels, backbone.spec.grid) == (768, (32, 32))
    assert isinstance(backbone.model.post_layernorm, nn.LayerNorm)
