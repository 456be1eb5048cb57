"""The diffusion inverter: one signature over the pipeline, and the checks around it."""

from __future__ import annotations

import pytest
import torch

from featinv_diffusion.backbones import wrap_model
from featinv_diffusion.diffusion.featinv_pipeline import FeatInvPipeline
from featinv_diffusion.diffusion.objective import SCHEDULERS, make_scheduler, scheduler_name
from featinv_diffusion.errors import InputError
from featinv_diffusion.images import to_tensor
from featinv_diffusion.inverters import DiffusionInverter, Inverter
from featinv_diffusion.types import FeatureSpec
from tests import tiny

STEPS = 3


def make_inverter(pipeline: FeatInvPipeline, **settings) -> DiffusionInverter:
    return DiffusionInverter(pipeline, **({"num_inference_steps": STEPS} | settings))


def test_it_is_an_inverter_of_the_declared_features(pipeline):
    inverter = make_inverter(pipeline)
    assert isinstance(inverter, Inverter)
    assert inverter.spec == FeatureSpec("tiny/convnext", "last", tiny.CHANNELS, tiny.GRID)
    assert inverter.backbone is not None
    assert inverter.backbone.spec == inverter.spec


def test_images_are_the_pipelines_and_in_range(pipeline):
    features = tiny.make_features(2)
    images = make_inverter(pipeline).invert(features, generator=tiny.make_generators(2))
    assert images.shape == (2, 3, 64, 64)
    assert images.dtype == torch.float32
    assert 0 <= images.min() < images.max() <= 1
    pictures = pipeline(
        features=features, num_inference_steps=STEPS, generator=tiny.make_generators(2)
    ).images
    torch.testing.assert_close(images, to_tensor(pictures), rtol=0, atol=0.5 / 255 + 1e-6)


@pytest.mark.parametrize(
    ("setting", "argument"),
    [
        ({"strength": 0.3}, {"controlnet_conditioning_scale": 0.3}),
        ({"guidance_scale": 4.0}, {"guidance_scale": 4.0}),
        ({"guidance": "features"}, {"guidance": "features"}),
        ({"num_inference_steps": 5}, {"num_inference_steps": 5}),
    ],
)
def test_every_setting_reaches_the_pipeline(pipeline, setting, argument):
    features = tiny.make_features(1)
    images = make_inverter(pipeline, **setting).invert(features, generator=tiny.make_generators(1))
    call = {"num_inference_steps": STEPS, "output_type": "pt"} | argument
    (expected,) = pipeline(
        features=features, generator=tiny.make_generators(1), return_dict=False, **call
    )
    plain = make_inverter(pipeline).invert(features, generator=tiny.make_generators(1))
    torch.testing.assert_close(images, expected, rtol=0, atol=0)
    assert not torch.equal(images, plain)


def test_settings_left_out_are_the_pipelines_defaults(pipeline):
    pipeline.register_to_config(default_num_inference_steps=7, default_guidance_scale=2.5)
    inverter = DiffusionInverter(pipeline)
    assert (inverter.num_inference_steps, inverter.guidance_scale) == (7, 2.5)
    assert inverter.guidance == "text"
    assert DiffusionInverter(pipeline, guidance_scale=0.0).guidance_scale == 0


def test_progress_adds_up_to_the_number_of_images(pipeline):
    for name in ("ddim", "heun", "pndm"):  # the latter two evaluate more often than asked
        pipeline.scheduler = make_scheduler(name, pipeline.scheduler.config)
        shares: list[float] = []
        inverter = make_inverter(pipeline)
        inverter.on_progress = shares.append
        inverter.invert(tiny.make_features(2))
        assert sum(shares) == pytest.approx(2)


def test_features_of_another_shape_are_refused(pipeline):
    with pytest.raises(
        InputError, match=r"shape \[batch, 32, 8, 8\].*got the shape \[1, 7, 8, 8\]"
    ):
        make_inverter(pipeline).invert(torch.zeros(1, 7, 8, 8))


def test_nan_features_are_refused(pipeline):
    features = tiny.make_features(2)
    features[1, 3, 2, 2] = float("nan")
    with pytest.raises(InputError, match="must be finite"):
        make_inverter(pipeline).invert(features)


def test_a_backbone_of_other_features_is_refused_and_both_are_named(pipeline):
    other = wrap_model(tiny.make_backbone(dims=(8, 16, 24, 40)), name="other")
    with pytest.raises(InputError, match=r"convnext.*32×8×8.*other.*40×8×8"):
        make_inverter(pipeline, backbone=other)


def test_a_pipeline_without_its_backbone_takes_one_or_none(pipeline):
    bare = tiny.make_pipeline(backbone=None)
    assert make_inverter(bare).backbone is None
    backbone = wrap_model(tiny.make_backbone(), name="convnext")
    assert make_inverter(bare, backbone=backbone).backbone is backbone


def test_a_controlnet_must_declare_its_features():
    undeclared = tiny.make_pipeline(controlnet=tiny.make_controlnet(feature_spec=None))
    with pytest.raises(InputError, match="feature_spec"):
        make_inverter(undeclared)


def test_an_image_looks_the_same_alone_and_in_a_batch(pipeline):
    features = tiny.make_features(8)
    inverter = make_inverter(pipeline)
    batch = inverter.invert(features, generator=tiny.make_generators(8))
    alone = inverter.invert(features[7:], generator=tiny.make_generators(1, first=7))
    torch.testing.assert_close(alone, batch[7:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_is_seeded_per_image(pipeline, name):
    """Also the stochastic ones, whose noise of each step comes from the image's own generator."""
    pipeline.scheduler = make_scheduler(name, pipeline.scheduler.config)
    assert scheduler_name(pipeline.scheduler) == name
    inverter = make_inverter(pipeline, num_inference_steps=4)
    features = tiny.make_features(2)
    batch = inverter.invert(features, generator=tiny.make_generators(2))
    alone = inverter.invert(features[1:], generator=tiny.make_generators(1, first=1))
    assert batch.isfinite().all()
    torch.testing.assert_close(alone, batch[1:], rtol=0, atol=1e-3)


def test_schedulers_keep_the_noise_schedule_and_unknown_ones_are_named(pipeline):
    config = make_scheduler("unipc", pipeline.scheduler.config).config
    assert (config["beta_start"], config["beta_schedule"]) == (0.00085, "scaled_linear")
    with pytest.raises(InputError, match=r"did you mean 'unipc'\? Choices: ddim"):
        make_scheduler("unpic", pipeline.scheduler.config)


def test_nothing_is_trained_by_inverting(pipeline):
    features = tiny.make_features(1).requires_grad_()
    assert not make_inverter(pipeline).invert(features).requires_grad
