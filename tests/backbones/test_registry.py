from __future__ import annotations

import pytest
import timm
import torch
from typer.testing import CliRunner

from featinv_diffusion.backbones import load_backbone
from featinv_diffusion.backbones.names import PUBLISHED
from featinv_diffusion.cli import app
from featinv_diffusion.errors import InputError
from tests.backbones import zoo


@pytest.mark.parametrize(
    ("layer", "problem", "near"),
    [
        ("layer9", "is not a layer of 'resnet18'", "layer4"),
        ("layer4.0.con2", "is not a layer of 'resnet18'", "layer4.0.conv2"),
        ("fc", "does not hold a spatial map in 'resnet18'", ""),
        ("global_pool", "does not hold a spatial map in 'resnet18'", ""),
    ],
)
def test_an_unknown_layer_is_refused_with_the_nearest(layer, problem, near):
    with pytest.raises(InputError) as caught:
        load_backbone("resnet18", layer, pretrained=False, input_size=64, **zoo.RESNET)
    assert problem in str(caught.value)
    assert near in str(caught.value)
    assert "featinv layers resnet18" in str(caught.value)


def test_weights_that_cannot_be_downloaded_are_an_input_error():
    with pytest.raises(InputError, match="must be in the Hugging Face cache or be downloadable"):
        load_backbone("resnet18.a1_in1k")


def test_a_model_without_weights_is_refused_instead_of_left_random():
    name = next(n for n in timm.list_models("coatnet*") if not timm.is_model_pretrained(n))
    with pytest.raises(InputError, match=r"has none\. Choose one with weights"):
        load_backbone(name)


def test_pretrained_weights_are_loaded(tmp_path):
    model = zoo.make_timm("test_resnet")
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth")}
    backbone = load_backbone("test_resnet", input_size=64, pretrained_cfg_overlay=overlay)
    pixels = backbone.preprocess(zoo.make_images())
    assert torch.equal(backbone._run_last(pixels), model.forward_features(pixels))


def test_broken_weights_are_an_input_error(tmp_path):
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth")}
    with pytest.raises(InputError, match="loading them failed"):
        load_backbone("test_resnet", pretrained_cfg_overlay=overlay)


@pytest.mark.parametrize("name", ["convnext_base.fb_in22k_ft_in1k", "tiny/vit"])
def test_the_command_lists_layers_without_weights(name):
    result = CliRunner().invoke(app, ["layers", name])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    listed = {line.split()[0]: line.split()[1] for line in lines}
    assert lines[0].startswith("last ")
    expected = {
        PUBLISHED["convnext"]: {"last": "1024×9×9", "stages.0": "128×72×72"},
        "tiny/vit": {"last": "192×8×8", "blocks.5": "192×8×8", "norm": "192×8×8"},
    }[name]
    assert expected.items() <= listed.items()


def test_the_command_refuses_an_unknown_backbone():
    result = CliRunner().invoke(app, ["layers", "convnxt"])
    assert isinstance(result.exception, InputError)
    assert "convnext" in str(result.exception)
