"""The layout in which trained pipelines ship inside the package."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from featinv_diffusion.diffusion.featinv_pipeline import FeatInvPipeline
from featinv_diffusion.diffusion.folders import SCOPE_FILE, CardInfo, list_bundled
from featinv_diffusion.diffusion.hub import find_scope_file, load_pipeline
from featinv_diffusion.errors import InputError
from tests import tiny
from tests.diffusion.probe import sample
from train.tiny_family import pack
from train.tiny_family.pack import to_half, write_bundled, write_bundled_backbone

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
    for name in list_bundled():
        pipeline = load_pipeline(name)
        images = tiny.make_images(1)
        features = pipeline.encode_features(images)
        made = pipeline(features=features, num_inference_steps=1, output_type="pt").images
        assert made.isfinite().all(), name
