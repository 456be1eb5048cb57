"""Anybody's module as a backbone, and edits inside a model."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from featinv_diffusion.backbones import load_backbone, wrap_model, wrap_module
from featinv_diffusion.errors import InputError
from tests import tiny

HALF = ((0.5,) * 3, (0.25,) * 3)
FACTORY = """
import torch
from torch import nn
import featinv_diffusion as fi

def make():
    torch.manual_seed(0)
    return fi.wrap_module(nn.Conv2d(3, 8, 8, 8), input_size=64, preprocess=((.5,) * 3, (.5,) * 3))

def wrong():
    return 3

def fails():
    raise KeyError("x")
"""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 6, 4, 4), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        maps = self.stem(x).relu()
        return {"scores": self.head(maps.mean((2, 3))), "map": maps}


class Channelslast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 4, 4)
        self.last = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.stem(x).permute(0, 2, 3, 1))


def images(n: int = 2) -> torch.Tensor:
    return torch.rand(n, 3, 48, 80, generator=torch.Generator().manual_seed(1))


@tiny.seeded
def make_resnet() -> nn.Module:
    return torchvision.models.resnet18(num_classes=7)


def test_resnet_of_torchvision_gives_its_own_map_and_scores():
    model = make_resnet()
    backbone = wrap_module(model, "layer3", input_size=64, preprocess=HALF, classify=True)
    pixels = (backbone.preprocessing._resize(images(), backbone.input_size) - 0.5) / 0.25
    x = model.maxpool(model.relu(model.bn1(model.conv1(pixels))))
    expected = model.layer3(model.layer2(model.layer1(x)))
    features, logits = backbone.features_and_logits(images())
    torch.testing.assert_close(features, expected)
    torch.testing.assert_close(logits, model(pixels))
    assert (backbone.spec.channels, backbone.spec.grid) == (256, (4, 4))
    assert not any(p.requires_grad for p in model.parameters())
    assert "layer2" in {spec.layer for spec in backbone.layers()}
    assert "avgpool" not in {spec.layer for spec in backbone.layers()}


def test_own_preprocessing_and_own_classes():
    backbone = wrap_module(
        Net(),
        "stem",
        input_size=(32, 32),
        preprocess=lambda x: x * 4,
        classify=lambda output: output["scores"],
        labels=("a", "b", "c", "d", "e"),
        name="mine",
    )
    torch.testing.assert_close(
        backbone.preprocess(images()),
        backbone.preprocessing._resize(images(), backbone.input_size) * 4,
    )
    assert backbone.classify(images()).shape == (2, 5)
    assert str(backbone.spec) == "map of mine at layer 'stem', 6×8×8"


def test_axes_are_found_or_asked_for():
    backbone = wrap_module(Channelslast(), "last", input_size=32, preprocess=HALF)
    assert (backbone.spec.channels, backbone.spec.grid) == (6, (8, 8))
    square = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 4, 4)))
    with pytest.raises(InputError, match="NCHW or NHWC"):
        wrap_module(square, "0", input_size=32, preprocess=HALF)


def test_tokens_of_registers_are_found_and_told(caplog):
    config = Dinov2WithRegistersConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )
    model = Dinov2WithRegistersModel(config)
    with caplog.at_level(logging.WARNING, "featinv_diffusion"):
        backbone = wrap_module(model, "encoder.layer.1", input_size=56, preprocess=HALF, n_prefix=5)
    assert not caplog.records
    assert (backbone.spec.channels, backbone.spec.grid) == (16, (4, 4))
    with caplog.at_level(logging.WARNING, "featinv_diffusion"):
        wrap_module(model, "encoder.layer.1", input_size=56, preprocess=HALF)
    assert "21 tokens" in caplog.text
    given = wrap_module(model, "encoder.layer.1", input_size=56, preprocess=HALF, grid=(4, 4))
    torch.testing.assert_close(given.features(images()), backbone.features(images()))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"layer": "nosuch"}, "not a layer"),
        ({"layer": "fc"}, "must be a map"),
        ({"preprocess": lambda x: x.round()}, "Gradients must flow"),
        ({"preprocess": lambda x: x - x.mean(0, keepdim=True)}, "rest of its batch"),
        ({"preprocess": ((0.5,) * 3, (0.0,) * 3)}, "must be a pair"),
        ({"input_size": 0}, "input_size"),
        ({"labels": ("a",), "classify": True}, "one label per class"),
        ({"classify": lambda scores: scores[0]}, "Class scores must be"),
    ],
)
def test_what_cannot_be_used_is_refused(arguments, words):
    given = {"layer": "layer4", "input_size": 64, "preprocess": HALF, **arguments}
    with pytest.raises(InputError, match=words):
        wrap_module(make_resnet(), **given)


def test_factory_of_a_file_is_run_and_of_a_module_only_when_trusted(tmp_path: Path, monkeypatch):
    path = tmp_path / "my_models.py"
    path.write_text(FACTORY)
    backbone = load_backbone(f"{path}:make")
    assert backbone.spec.backbone == f"{path}:make"
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InputError, match="--trust-code"):
        load_backbone("my_models:make")
    trusted = load_backbone("my_models:make", trust_code=True)
    assert torch.equal(trusted.features(images()), backbone.features(images()))
    for name, words in (
        (f"{path}:wrong", "gives a int"),
        (f"{path}:fails", "KeyError"),
        (f"{path}:nosuch", "has none"),
        (f"{tmp_path}/no.py:make", "is none"),
    ):
        with pytest.raises(InputError, match=words):
            load_backbone(name)


def test_weights_of_a_timm_model_come_from_a_file(tmp_path: Path):
    model = timm.create_model("resnet10t", num_classes=1000)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    torch.save({"state_dict": model.state_dict()}, tmp_path / "w.pth")
    plain = wrap_model(model, name="x", input_size=64).features(images())
    for name in ("w.safetensors", "w.pth"):
        loaded = load_backbone(f"resnet10t@{tmp_path / name}", input_size=64)
        assert torch.equal(loaded.features(images()), plain)
    with pytest.raises(InputError, match="missing, left over or of other shapes"):
        load_backbone(f"resnet18@{tmp_path / 'w.safetensors'}")
    with pytest.raises(InputError, match="no file is at"):
        load_backbone("resnet18@nowhere.safetensors")


def test_weights_file_runs_nothing(tmp_path: Path):
    class Bad:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"state_dict": Bad()}, tmp_path / "w.pth")
    with pytest.raises(InputError, match="weights and nothing else"):
        load_backbone(f"resnet18@{tmp_path / 'w.pth'}")
    assert not (tmp_path / "ran").exists()


# ---- Edits inside a model ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=4, num_classes=10)
    return wrap_model(model, name="vit", input_size=64)


def test_identity_changes_nothing_and_a_hook_gives_the_same(vit):
    plain = vit.features(images())

    def half(tokens: torch.Tensor) -> torch.Tensor:
        return 0.5 * tokens

    with vit.intervene({"blocks.1": lambda tokens: tokens}):
        assert torch.equal(vit.features(images()), plain)
    with vit.intervene({"blocks.1": half}):
        edited, (again, scores) = vit.features(images()), vit.features_and_logits(images())
    hook = vit.model.get_submodule("blocks.1").register_forward_hook(lambda _m, _i, o: half(o))
    hooked = vit.features(images())
    hook.remove()
    assert not torch.allclose(edited, plain)
    assert torch.equal(edited, again)
    assert torch.equal(edited, hooked)
    assert torch.equal(vit.features(images()), plain)
    assert not torch.allclose(scores, vit.classify(images()))


def test_nnsight_gives_the_same(vit):
    nnsight = pytest.importorskip("nnsight")
    wrapped = nnsight.NNsight(vit.model)
    pixels = vit.preprocess(images())
    with torch.no_grad(), wrapped.trace(pixels):
        wrapped.blocks[1].output = wrapped.blocks[1].output * 0.5
        seen = wrapped.norm.output.save()
    with torch.no_grad(), vit.intervene({"blocks.1": lambda tokens: tokens * 0.5}):
        edited = vit.features(images())
    assert torch.equal(vit.layout("last").to_map(seen), edited)


def test_what_is_no_edit_is_refused(vit, caplog):
    with pytest.raises(InputError, match="module inside"), vit.intervene({"nosuch": lambda x: x}):
        pass
    with (
        pytest.raises(InputError, match="must return a tensor of the shape"),
        vit.intervene({"blocks.1": lambda tokens: tokens[:, 1:]}),
    ):
        vit.features(images())
    assert not vit.model.get_submodule("blocks.1")._forward_hooks
    early = wrap_model(vit.model, name="vit", layer="blocks.0", input_size=64)
    with caplog.at_level(logging.WARNING), early.intervene({"blocks.2": lambda tokens: tokens}):
        early.features(images())
    assert "No forward pass reached 'blocks.2'" in caplog.text


def test_layout_converts_tokens_to_a_map_and_back(vit):
    layout = vit.layout("blocks.1")
    tokens = torch.rand(2, 17, 192)
    maps = layout.to_map(tokens)
    assert maps.shape == (2, 192, 4, 4)
    assert torch.equal(maps[0, :, 1, 2], tokens[0, 1 + 4 + 2])
    assert torch.equal(layout.from_map(maps)[:, 1:], tokens[:, 1:])


def test_code_that_a_file_names_never_runs(tmp_path: Path, monkeypatch):
    from featinv_diffusion.config import load_config
    from featinv_diffusion.runs.record import from_values
    from featinv_diffusion.settings import SampleSettings
    from featinv_diffusion.training.controlnet import ControlNetConfig
    from featinv_diffusion.trust import trusting_code

    ran = tmp_path / "ran"
    path = tmp_path / "evil.py"
    path.write_text(f"open({str(ran)!r}, 'w')\n")
    name = f"{path}:make"
    with pytest.raises(InputError, match="not run because a file says so"):
        from_values(SampleSettings, {"backbone": name}, tmp_path / "manifest.json")
    config = tmp_path / "config.yaml"
    config.write_text(f"model:\n  backbone: {name}\n")
    with pytest.raises(InputError, match="not run because a file says so"):
        load_config(ControlNetConfig, config)
    with trusting_code():
        assert load_config(ControlNetConfig, config).model.backbone == name
    said = load_config(ControlNetConfig, None, [f"model.backbone={name}"])
    assert said.model.backbone == name
    assert not ran.exists()
