"""Settings → inverter: what is resolved, what is refused."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from featinv_diffusion.backbones import wrap_model
from featinv_diffusion.errors import InputError
from featinv_diffusion.inverters import modular, reconstructor
from featinv_diffusion.inverters import open as sampling
from featinv_diffusion.inverters.chain import MapChain
from featinv_diffusion.inverters.open import (
    find_device,
    list_inverters,
    list_named,
    load_inverter,
    name_inverter,
    open_inverter,
)
from featinv_diffusion.inverters.reconstructor import ReconstructorInverter
from featinv_diffusion.settings import SampleSettings
from tests import tiny
from tests.inverters import encoders, small
from tests.inverters.test_rae import make_rae


def open_saved(folder, **settings):
    return open_inverter(SampleSettings(pipeline=str(folder), device="cpu", **settings))


def test_resolved_settings_have_no_gaps(saved_pipeline):
    resolved = open_saved(saved_pipeline).settings
    gaps = [f.name for f in fields(resolved) if getattr(resolved, f.name) is None]
    assert gaps == ["stage"]  # which deterministic inverters have
    assert (resolved.backbone, resolved.layer, resolved.scheduler) == (
        "tiny/convnext",
        "last",
        "ddim",
    )
    assert resolved.steps == 50
    assert resolved.device == "cpu"


def test_resolved_settings_open_the_same_inverter(saved_pipeline):
    resolved = open_saved(saved_pipeline, scheduler="unipc", steps=3, guidance_scale=2.0).settings
    assert open_inverter(resolved).settings == resolved


def test_the_backbone_stays_in_float32_where_the_rest_is_half(saved_pipeline):
    inverter = open_saved(saved_pipeline, dtype="bfloat16", steps=2)
    assert inverter.pipeline.unet.dtype == inverter.pipeline.controlnet.dtype == torch.bfloat16
    assert inverter.backbone.dtype == torch.float32
    exact = open_saved(saved_pipeline)  # weights that went through bfloat16 would differ
    features = [i.backbone.features(tiny.make_images(1)) for i in (inverter, exact)]
    torch.testing.assert_close(*features, rtol=0, atol=0)
    images = inverter.invert(inverter.backbone.features(tiny.make_images(1)))
    assert images.isfinite().all()


def test_half_precision_changes_little(saved_pipeline):
    features = tiny.make_features(1)
    images = [
        open_saved(saved_pipeline, dtype=dtype, steps=2).invert(
            features, generator=tiny.make_generators(1)
        )
        for dtype in ("float32", "float16")
    ]
    assert 0 < (images[0] - images[1]).abs().max() < 0.05


def test_a_pipeline_without_backbone_loads_the_one_it_declares(tmp_path, monkeypatch):
    tiny.make_pipeline(backbone=None).save_pretrained(tmp_path / "bare")
    asked = []

    def load(name, layer):
        asked.append((name, layer))
        return wrap_model(tiny.make_backbone(), name=name, layer=layer)

    monkeypatch.setattr(sampling, "load_named_backbone", load)
    inverter = open_saved(tmp_path / "bare")
    assert asked == [("tiny/convnext", "last")]
    assert inverter.backbone.input_size == (64, 64)


def test_devices():
    assert find_device("cpu") == torch.device("cpu")
    assert find_device("auto").type in ("cpu", "cuda", "mps", "xpu")
    for name in ("nonsense", "cuda:99"):
        with pytest.raises(InputError, match=name):
            find_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_xformers_without_a_gpu(saved_pipeline, monkeypatch):
    monkeypatch.setattr(sampling.importlib.util, "find_spec", lambda _name: object())
    with pytest.raises(InputError, match="needs a CUDA device, but the device is cpu"):
        open_saved(saved_pipeline, attention="xformers")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_picture_of_the_cpu(saved_pipeline):
    features = tiny.make_features(1)
    images = []
    for device in ("cpu", "cuda"):
        settings = SampleSettings(pipeline=str(saved_pipeline), device=device, steps=4)
        inverter = open_inverter(settings)
        assert inverter.settings.device == device
        images.append(inverter.invert(features.to(device), generator=tiny.make_generators(1)).cpu())
    torch.testing.assert_close(images[0], images[1], rtol=0, atol=0.02)


# ---- deterministic inverters: by name, by folder, and what they refuse ---------------------------


def named(inverter: str, **settings) -> SampleSettings:
    return SampleSettings(inverter=inverter, device="cpu", **settings)


@pytest.fixture
def folders(tmp_path: Path, monkeypatch) -> Path:
    """Assets with a reconstructor `siglip`, and beside them a modular inverter."""
    encoders.save_member(tmp_path / "tiny/siglip")
    monkeypatch.setattr(reconstructor, "ASSETS", tmp_path)
    monkeypatch.setattr(modular, "load_path", lambda _info: small.make_vit_path())
    small.make_vit_inverses(small.make_vit_path()).save_pretrained(tmp_path / "vit")
    return tmp_path


def test_names_and_folders_lead_to_their_kind(folders: Path) -> None:
    assert {"rae", "siglip"} <= set(list_named())
    by_name = open_inverter(named("siglip"))
    beside = open_inverter(named(str(folders / "tiny/siglip/reconstructor")))
    chain = open_inverter(named(str(folders / "vit"), stage="blocks.1"))
    assert isinstance(by_name, ReconstructorInverter)
    assert isinstance(beside, ReconstructorInverter)
    assert isinstance(chain, MapChain)
    assert chain.spec.layer == "blocks.1"
    for inverter in (by_name, beside, chain):
        assert inverter.is_deterministic
    assert list(by_name.networks) == ["reconstructor"]
    assert list(chain.networks) == ["blocks.1", "patches"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(inverter="siglop"), "did you mean 'siglip'"),
        (dict(inverter="siglip", stage="encoder"), "reads the layer 'last' and no other"),
        (dict(inverter="siglip", pipeline="tiny/vit"), "takes no pipeline"),
        (dict(inverter="rae"), "give --pipeline"),
        (dict(inverter="~nobody-of-that-name/x"), "leads nowhere"),
    ],
)
def test_what_does_not_fit_is_refused(folders: Path, settings: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        open_inverter(named(**settings))


def test_its_own_layer_is_a_stage(folders: Path) -> None:
    assert open_inverter(named("siglip", stage="last")).spec == encoders.SPEC


def test_an_autoencoder_is_named_by_the_pipeline(tmp_path: Path) -> None:
    make_rae("mae").save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"use --inverter rae --pipeline {tmp_path}"):
        open_inverter(named(str(tmp_path)))


# ---- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "inverter", "pipeline"),
    [
        ("diffusion", "diffusion", "tiny/convnext"),
        ("tiny/resnet", "diffusion", "tiny/resnet"),
        ("resnet", "diffusion", "tiny/resnet"),  # no other inverter has this name
        ("tiny/vit", "diffusion", "tiny/vit"),
        ("vit", "vit", None),
        ("siglip2", "siglip2", None),
        ("tiny/siglip2", "siglip2", None),
        ("someone/featinv", "diffusion", "someone/featinv"),
    ],
)
def test_a_word_means_one_inverter(given: str, inverter: str, pipeline: str | None) -> None:
    settings = name_inverter(named(given))
    assert (settings.inverter, settings.pipeline) == (inverter, pipeline)
    assert name_inverter(settings) == settings
    assert settings.n_samples == (1 if pipeline is None else 4)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(pipeline="siglip2"), ["another kind of inverter", "--inverter siglip2"]),
        (dict(pipeline="tiny/siglip2"), ["--inverter siglip2"]),
        (dict(pipeline="vit"), ["--inverter vit", "--pipeline tiny/vit"]),
        (
            dict(inverter="tiny/vit", stage="encoder"),
            ["tiny/vit", "--inverter vit --stage encoder"],
        ),
        (dict(inverter="tiny/vit", pipeline="tiny/swin"), ["--pipeline tiny/swin"]),
        (dict(stage="encoder"), ["Only modular inverters have stages"]),
        (dict(inverter="siglip", steps=3), ["draws no noise", "--steps"]),
        (dict(inverter="tiny/none"), ["tiny/none", "Choices"]),
    ],
)
def test_mixed_up_names_are_told_apart(settings: dict, words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        name_inverter(SampleSettings(**settings))
    for word in words:
        assert word in str(error.value)


def test_every_listed_inverter_but_the_autoencoder_opens() -> None:
    names = [name for name in list_inverters() if name != "rae"]
    assert {"tiny/convnext", "tiny/vit", "vit", "siglip2", "detr"} <= set(names)
    for name in ("tiny/convnext", "siglip2", "vit"):
        assert load_inverter(name, device="cpu").settings is not None


def test_wide_networks_run_with_channels_last_and_give_the_same_pictures(monkeypatch):
    def is_laid_out(inverter: Any) -> bool:
        weight = inverter.pipeline.unet.down_blocks[0].resnets[0].conv1.weight
        return weight.is_contiguous(memory_format=torch.channels_last)

    options: Any = {"device": "cpu", "steps": 2}
    narrow = load_inverter("tiny/convnext", **options)
    monkeypatch.setattr("featinv_diffusion.inverters.open.WIDE", 1)
    wide = load_inverter("tiny/convnext", **options)
    assert not is_laid_out(narrow)
    assert is_laid_out(wide)
    features = torch.randn(1, narrow.spec.channels, *narrow.spec.grid)
    images = [
        one.invert(features, generator=torch.Generator().manual_seed(0)) for one in (narrow, wide)
    ]
    torch.testing.assert_close(images[0], images[1], atol=1e-3, rtol=0)
