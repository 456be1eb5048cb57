"""Pipelines out of a ControlNet, a Stable Diffusion folder and a backbone."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file
from transformers import TimmWrapperForImageClassification

from featinv_diffusion.diffusion import folders as assemble_module
from featinv_diffusion.diffusion.folders import (
    CardInfo,
    assemble,
    load_controlnet,
    make_timm_wrapper,
)
from featinv_diffusion.diffusion.hub import export_pipeline, load_pipeline
from featinv_diffusion.errors import InputError
from featinv_diffusion.training.controlnet import ControlNetModelConfig, load_frozen_parts
from tests import tiny
from tests.diffusion.probe import sample

INFO = CardInfo(command="featinv export out")


@pytest.mark.parametrize("inner", ["", "controlnet"])
def test_assemble_joins_controlnet_base_and_backbone(
    pipeline, base, backbone_name, tmp_path, expected, inner
):
    pipeline.controlnet.save_pretrained(tmp_path / "checkpoint" / inner)
    made = assemble(tmp_path / "checkpoint", base, backbone_name)
    assert isinstance(made.scheduler, DDIMScheduler)
    assert made.scheduler.config.steps_offset == 1
    assert isinstance(made.backbone, TimmWrapperForImageClassification)
    assert torch.equal(sample(made), expected)
    folder = export_pipeline(made, tmp_path / "out", INFO)
    assert torch.equal(sample(load_pipeline(folder)), expected)


def test_assemble_takes_the_backbone_that_the_controlnet_names(
    pipeline, base, backbone_name, tmp_path
):
    spec = tiny.FEATURE_SPEC | {"backbone": backbone_name}
    tiny.make_controlnet(feature_spec=spec).save_pretrained(tmp_path / "net")
    made = assemble(tmp_path / "net", base)
    images = tiny.make_images(1)
    assert torch.equal(made.encode_features(images), pipeline.encode_features(images))


def test_assemble_refuses_what_does_not_fit(pipeline, base, backbone_name, tmp_path):
    pipeline.controlnet.save_pretrained(tmp_path / "net")
    other = tmp_path / "other"
    tiny.make_backbone(dims=(8, 16, 24, 40)).save_pretrained(other)
    with pytest.raises(InputError, match=r"32×8×8, but the features are .*40×8×8"):
        assemble(tmp_path / "net", base, f"hf/{other}")
    with pytest.raises(InputError, match="there is nothing at"):
        assemble(tmp_path / "nothing", base, backbone_name)
    with pytest.raises(InputError, match=r"must hold a FeatureControlNet, but .*UNet2DCondition"):
        assemble(base / "unet", base, backbone_name)
    with pytest.raises(InputError, match=r"model_index\.json is missing"):
        assemble(tmp_path / "net", tmp_path / "net", backbone_name)
    with pytest.raises(InputError, match="must be a Stable Diffusion folder or Hub repository"):
        assemble(tmp_path / "net", "user/base", backbone_name)
    wide = tiny.make_unet(block_out_channels=(32, 32))
    wide.save_pretrained(base / "unet")
    with pytest.raises(InputError, match=r"block_out_channels .*16, 32.*32, 32"):
        assemble(tmp_path / "net", base, backbone_name)


def test_a_controlnet_must_say_what_it_reads(base, tmp_path):
    tiny.make_controlnet(feature_spec=None).save_pretrained(tmp_path / "net")
    with pytest.raises(InputError, match="must declare which backbone it reads"):
        assemble(tmp_path / "net", base)
    weights = tmp_path / "net/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(InputError, match="truncated"):
        load_controlnet(tmp_path / "net")


@pytest.mark.parametrize("timm_id", ["resnet18.a1_in1k", "vit_tiny_patch16_224.augreg_in21k"])
def test_timm_weights_go_into_a_stock_wrapper(monkeypatch, tmp_path, timm_id):
    torch.manual_seed(0)
    model = timm.create_model(timm_id, pretrained=False).eval()
    monkeypatch.setattr(assemble_module, "create_timm", lambda name, pretrained: model)
    wrapper = make_timm_wrapper(timm_id)
    wrapper.save_pretrained(tmp_path / "w")
    loaded = type(wrapper).from_pretrained(tmp_path / "w").eval()
    images = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images).logits, model(images), rtol=1e-4, atol=1e-5)
    weights = loaded.timm_model.state_dict()
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
    assert loaded.config.pretrained_cfg["hf_hub_id"] == f"timm/{timm_id}"
    if timm_id.endswith("in1k"):
        assert loaded.config.id2label[1].startswith("goldfish")


class Evil:
    """Writes a file where it is unpickled by something that runs pickles."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "it ran")


def to_pickles(base):
    """Rewrites the networks of a folder as older repositories hold them, `miniSD-diffusers` too."""
    for name, stem in PICKLED.items():
        (stored,) = (base / name).glob("*.safetensors")
        torch.save(load_file(stored), base / name / f"{stem}.bin")
        stored.unlink()


PICKLED = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"} | {
    "text_encoder": "pytorch_model"
}


def test_a_base_of_pickled_tensors_is_read_and_exported_as_safetensors(
    pipeline, base, backbone_name, tmp_path, expected
):
    pipeline.controlnet.save_pretrained(tmp_path / "net")
    to_pickles(base)
    made = assemble(tmp_path / "net", base, backbone_name)
    assert torch.equal(sample(made), expected)
    folder = export_pipeline(made, tmp_path / "out", INFO)
    assert not list(folder.rglob("*.bin"))
    assert torch.equal(sample(load_pipeline(folder)), expected)
    parts = load_frozen_parts(ControlNetModelConfig(base=str(base), backbone=backbone_name))
    weights = pipeline.unet.state_dict()
    assert all(torch.equal(v, weights[k]) for k, v in parts.unet.state_dict().items())


@pytest.mark.parametrize("name", list(PICKLED))
def test_a_pickle_that_holds_more_than_tensors_never_runs(
    pipeline, base, backbone_name, tmp_path, name
):
    pipeline.controlnet.save_pretrained(tmp_path / "net")
    to_pickles(base)
    ran = tmp_path / "ran"
    torch.save({"conv_in.weight": Evil(ran)}, base / name / f"{PICKLED[name]}.bin")
    with pytest.raises(InputError, match="loading it failed"):
        assemble(tmp_path / "net", base, backbone_name)
    with pytest.raises(InputError, match=rf"{name} of .* could not be loaded"):
        load_frozen_parts(ControlNetModelConfig(base=str(base), backbone=backbone_name))
    assert not ran.exists()
