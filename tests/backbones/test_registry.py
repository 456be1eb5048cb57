from __future__ import annotations

import pytest
import timm
import torch
from typer.testing import CliRunner

from featinv_diffusion import backbones
from featinv_diffusion.backbones import SHORT_NAMES, list_backbones, load_backbone
from featinv_diffusion.cli import app
from featinv_diffusion.errors import InputError
from tests.backbones import zoo


def test_short_names_are_weights_that_timm_has():
    for target in SHORT_NAMES.values():
        assert target.removeprefix("timm/") in timm.list_pretrained()


def test_a_timm_id_with_and_without_its_prefix_is_the_same_model():
    shapes = []
    for name in ("resnet50.a1_in1k", "timm/resnet50.a1_in1k"):
        backbone = load_backbone(name, pretrained=False, input_size=64, **zoo.RESNET)
        assert backbone.spec.backbone == backbone.name == name
        assert backbone.model.pretrained_cfg["tag"] == "a1_in1k"  # pyright: ignore
        shapes.append((backbone.spec.channels, backbone.spec.grid))
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("convnxt", "convnext"),
        ("resnet5", "resnet50"),
        ("timm/resnet50.tv_in1", "resnet50.tv_in1k"),
        ("swinn", "swin"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(name, nearest):
    with pytest.raises(InputError, match=rf"Nearest names: (.*[ ])?{nearest}\b"):
        load_backbone(name, pretrained=False)


def test_a_repository_without_its_prefix_is_explained():
    with pytest.raises(InputError, match="hf/google/siglip-base-patch16-224"):
        load_backbone("google/siglip-base-patch16-224")


@pytest.mark.parametrize(
    ("layer", "problem", "near"),
    [
        ("layer9", "is not a layer of 'resnet'", "layer4"),
        ("layer4.0.con2", "is not a layer of 'resnet'", "layer4.0.conv2"),
        ("fc", "does not hold a spatial map in 'resnet'", ""),
        ("global_pool", "does not hold a spatial map in 'resnet'", ""),
    ],
)
def test_an_unknown_layer_is_refused_with_the_nearest(layer, problem, near):
    with pytest.raises(InputError) as caught:
        load_backbone("resnet", layer, pretrained=False, input_size=64, **zoo.RESNET)
    assert problem in str(caught.value)
    assert near in str(caught.value)
    assert "featinv layers resnet" in str(caught.value)


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


def test_bundled_models_are_registered(timm_wrapper, tmp_path, monkeypatch):
    timm_wrapper.save_pretrained(tmp_path / "tiny" / "toy" / "backbone")
    monkeypatch.setattr(backbones, "_ASSETS", tmp_path)
    assert list_backbones() == [*SHORT_NAMES, "tiny/toy"]
    backbone = load_backbone("tiny/toy")
    assert backbone.spec.backbone == "tiny/toy"
    images = zoo.make_images()
    expected = timm_wrapper(backbone.preprocess(images)).logits
    assert torch.equal(backbone.classify(images), expected)


@pytest.mark.parametrize("name", ["convnext", "vit"])
def test_the_command_lists_layers_without_weights(name):
    result = CliRunner().invoke(app, ["layers", name])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    listed = {line.split()[0]: line.split()[1] for line in lines}
    assert lines[0].startswith("last ")
    expected = {
        "convnext": {"last": "1024×9×9", "stages.0": "128×72×72", "stages.3.blocks.2": "1024×9×9"},
        "vit": {"last": "768×14×14", "blocks.11": "768×14×14", "norm": "768×14×14"},
    }[name]
    assert expected.items() <= listed.items()


def test_the_command_refuses_an_unknown_backbone():
    result = CliRunner().invoke(app, ["layers", "convnxt"])
    assert isinstance(result.exception, InputError)
    assert "convnext" in str(result.exception)
