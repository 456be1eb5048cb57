"""One word means one model: `resolve_backbone` and what compares, records and reads names."""

from __future__ import annotations

import logging

import pytest
import timm
import torch

from featinv_diffusion.backbones import (
    list_backbones,
    load_backbone,
    names,
    resolve_backbone,
    same_backbone,
)
from featinv_diffusion.backbones.names import PUBLISHED, ResolvedName, read_spec, recorded_name
from featinv_diffusion.errors import InputError
from featinv_diffusion.types import FeatureSpec
from tests.backbones import zoo


@pytest.fixture
def heard(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What the resolver logs, as if nothing had been said before."""
    names._tell_short_name.cache_clear()
    caplog.set_level(logging.WARNING, "featinv_diffusion")
    return caplog


def test_the_papers_models_are_weights_that_timm_has() -> None:
    for timm_id in PUBLISHED.values():
        assert timm_id in timm.list_pretrained()
        assert resolve_backbone(timm_id) == ResolvedName(timm_id, "timm", timm_id)


@pytest.mark.parametrize("word", ["convnext", "resnet", "swin", "vit", "siglip", "siglip2"])
def test_a_short_name_is_the_bundled_model(word: str) -> None:
    folder = str(names.ASSETS / "tiny" / word / "backbone")
    assert resolve_backbone(word) == ResolvedName(f"tiny/{word}", "bundled", folder)
    assert resolve_backbone(f"tiny/{word}") == resolve_backbone(word)


def test_a_short_name_is_explained_once(heard: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        resolve_backbone("convnext")
        resolve_backbone("siglip")
        resolve_backbone("tiny/resnet")
        resolve_backbone("resnet50.tv_in1k")
    assert heard.messages == [
        "'convnext' means the bundled tiny/convnext; the paper's model is the timm id "
        "convnext_base.fb_in22k_ft_in1k.",
        "'siglip' means the bundled tiny/siglip.",
    ]


def test_comparing_and_reading_names_says_nothing(heard: pytest.LogCaptureFixture) -> None:
    assert same_backbone("convnext", "tiny/convnext")
    assert same_backbone("timm/resnet50.tv_in1k", "resnet50.tv_in1k")
    assert not same_backbone("convnext", PUBLISHED["convnext"])
    assert not same_backbone("small/vit", "vit")
    assert heard.messages == []


def test_a_name_of_transformers_leads_to_its_folder_or_repository() -> None:
    name = "hf/google/siglip-base-patch16-224"
    assert resolve_backbone(name) == ResolvedName(name, "transformers", name.removeprefix("hf/"))


def test_a_file_of_an_earlier_version_means_the_papers_model() -> None:
    """Only pipelines that were trained by those names recorded them."""
    fields = {"backbone": "convnext", "layer": "last", "channels": 1024, "grid": [9, 9]}
    expected = FeatureSpec(PUBLISHED["convnext"], "last", 1024, (9, 9))
    assert read_spec(fields) == expected
    assert recorded_name("tiny/convnext") == "tiny/convnext"
    assert recorded_name("timm/resnet50.a1_in1k") == "resnet50.a1_in1k"
    assert recorded_name("mine") == "mine"


def test_a_timm_id_with_and_without_its_prefix_is_the_same_model() -> None:
    shapes = []
    for name in ("resnet50.a1_in1k", "timm/resnet50.a1_in1k"):
        backbone = load_backbone(name, pretrained=False, input_size=64, **zoo.RESNET)
        assert backbone.spec.backbone == backbone.name == "resnet50.a1_in1k"
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
        ("tiny/convnxt", "tiny/convnext"),
        ("google/siglip-base-patch16-224", "hf/google/siglip-base-patch16-224"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(InputError, match=rf"did you mean ('.*' or )?'{nearest}'") as caught:
        resolve_backbone(name)
    assert "one of tiny/convnext, tiny/resnet" in str(caught.value)


def test_bundled_models_are_listed_and_loaded(timm_wrapper, tmp_path, monkeypatch) -> None:
    timm_wrapper.save_pretrained(tmp_path / "tiny" / "toy" / "backbone")
    monkeypatch.setattr(names, "ASSETS", tmp_path)
    assert list_backbones() == ["tiny/toy"]
    images = zoo.make_images()
    for name in ("tiny/toy", "toy"):
        backbone = load_backbone(name)
        assert backbone.name == backbone.spec.backbone == "tiny/toy"
        expected = timm_wrapper(backbone.preprocess(images)).logits
        assert torch.equal(backbone.classify(images), expected)
