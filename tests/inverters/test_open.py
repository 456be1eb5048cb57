"""Settings → inverter: what is resolved, what is refused."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from featinv_diffusion.backbones import wrap_model
from featinv_diffusion.errors import InputError
from featinv_diffusion.inverters import open as sampling
from featinv_diffusion.inverters.open import find_device, open_inverter
from featinv_diffusion.settings import SampleSettings
from tests import tiny


def open_saved(folder, **settings):
    return open_inverter(SampleSettings(pipeline=str(folder), device="cpu", **settings))


def test_resolved_settings_have_no_gaps(saved_pipeline):
    resolved = open_saved(saved_pipeline).settings
    gaps = [f.name for f in fields(resolved) if getattr(resolved, f.name) is None]
    assert gaps == ["stage"]  # which deterministic inverters have
    assert (resolved.backbone, resolved.layer, resolved.scheduler) == ("convnext", "last", "ddim")
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

    monkeypatch.setattr(sampling, "load_backbone", load)
    inverter = open_saved(tmp_path / "bare")
    assert asked == [("convnext", "last")]
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
