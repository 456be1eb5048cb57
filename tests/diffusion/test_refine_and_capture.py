"""Refined samples, captured graphs and presets of quality."""

from __future__ import annotations

import copy
import functools

import pytest
import torch

import featinv_diffusion as fi
from featinv_diffusion.diffusion.featinv_pipeline import FeatInvPipeline
from featinv_diffusion.diffusion.objective import SCHEDULERS, make_scheduler
from featinv_diffusion.errors import InputError
from featinv_diffusion.inverters import DiffusionInverter
from featinv_diffusion.inverters.quality import with_quality
from featinv_diffusion.metrics import feature_cosine
from featinv_diffusion.settings import SampleSettings
from tests import tiny


@pytest.fixture
def pipeline() -> FeatInvPipeline:
    return tiny.make_pipeline()


def sample(pipeline: FeatInvPipeline, features: torch.Tensor, **kwargs) -> torch.Tensor:
    settings = {
        "num_inference_steps": 2,
        "output_type": "pt",
        "generator": tiny.make_generators(len(features)),
    }
    return pipeline(features=features, **(settings | kwargs)).images


def test_refinement_is_adam_on_the_cosine(pipeline):
    """Against a loop of its own over the plain modules, in whose place it must do the same."""
    features = pipeline.encode_features(tiny.make_images(2))
    latents = sample(pipeline, features, output_type="latent").requires_grad_()
    adam = torch.optim.Adam([latents], lr=0.05)
    with torch.enable_grad():
        for _ in range(3):
            pixels = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
            seen = pipeline._see((pixels / 2 + 0.5).clamp(0, 1))
            adam.zero_grad()
            (2 - feature_cosine(features, seen).sum()).backward()
            adam.step()
    found = sample(pipeline, features, output_type="latent", refine=3, refine_learning_rate=0.05)
    torch.testing.assert_close(found, latents.detach(), rtol=0, atol=1e-5)


def test_refinement_raises_the_agreement_and_leaves_the_weights_alone(pipeline):
    features = pipeline.encode_features(tiny.make_images(2))
    before = copy.deepcopy(pipeline.vae.state_dict())
    pipeline.vae.requires_grad_(True)
    cosines = [
        feature_cosine(features, pipeline.encode_features(sample(pipeline, features, refine=n)))
        for n in (0, 8)
    ]
    assert (cosines[1] > cosines[0] + 0.02).all()
    assert all(p.requires_grad and p.grad is None for p in pipeline.vae.parameters())
    assert all(
        torch.equal(value, before[name]) for name, value in pipeline.vae.state_dict().items()
    )


@pytest.mark.parametrize("name", SCHEDULERS)
def test_refining_predictions_moves_the_sample_and_nothing_else(pipeline, name):
    """With a rate of nothing the sampler is as it was; with one, the backbone sees more."""
    pipeline.scheduler = make_scheduler(name, pipeline.scheduler.config)
    features = pipeline.encode_features(tiny.make_images(2))
    settings = {"num_inference_steps": 6, "output_type": "latent", "guidance_scale": 1.0}
    plain = sample(pipeline, features, **settings)
    last = {**settings, "refine": 4, "refine_at": "steps"}
    same = sample(pipeline, features, **last, refine_learning_rate=1e-9)
    torch.testing.assert_close(same, plain, rtol=1e-3, atol=1e-3)
    moved = sample(pipeline, features, **last, refine_learning_rate=0.2)
    assert not torch.allclose(moved, plain, atol=0.05)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", ["ddim", "euler"])
def test_what_a_refined_prediction_stands_for(pipeline, monkeypatch, name, kind):
    """The scheduler itself reads the moved latents from it."""
    scheduler = make_scheduler(name, pipeline.scheduler.config)
    pipeline.scheduler = type(scheduler).from_config(scheduler.config, prediction_type=kind)
    features = pipeline.encode_features(tiny.make_images(1))
    wanted, found = [], []
    refine, step = pipeline._refine, pipeline.scheduler.step

    def refined(*arguments: object) -> torch.Tensor:
        wanted.append(refine(*arguments))
        return wanted[-1]

    @functools.wraps(step)
    def stepped(*arguments: object, **options: object) -> tuple[torch.Tensor]:
        output = step(*arguments, **{**options, "return_dict": True})
        found.append(output.pred_original_sample)
        return (output.prev_sample,)

    monkeypatch.setattr(pipeline, "_refine", refined)
    monkeypatch.setattr(pipeline.scheduler, "step", stepped)
    sample(pipeline, features, num_inference_steps=3, refine=2, refine_at="steps")
    assert len(found) == 3
    for seen, latents in zip(found[-2:], wanted, strict=True):
        torch.testing.assert_close(seen, latents, rtol=1e-3, atol=1e-3)


def test_a_refined_sample_does_not_depend_on_its_batch(pipeline):
    features = pipeline.encode_features(tiny.make_images(2))
    both = sample(pipeline, features, refine=2)
    alone = sample(pipeline, features[1:], refine=2, generator=tiny.make_generators(2)[1:])
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-4)


def test_a_half_precision_autoencoder_is_refined_in_full_precision(pipeline):
    pipeline.vae.to(torch.float16)
    features = pipeline.encode_features(tiny.make_images(1))
    assert sample(pipeline, features, refine=1).isfinite().all()
    assert pipeline.vae.dtype == torch.float16


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"refine": -1}, "refine must be at least 0, got -1"),
        ({"refine": 1, "refine_learning_rate": 0.0}, "refine_learning_rate must be positive"),
        ({"refine": 1, "refine_at": "start"}, "refine_at must be one of end, steps, got 'start'"),
    ],
)
def test_bad_refinement_is_refused_before_sampling(pipeline, kwargs, message):
    with pytest.raises(ValueError, match=message):
        sample(pipeline, tiny.make_features(1), **kwargs)


def test_refinement_needs_a_backbone():
    pipeline = tiny.make_pipeline(backbone=None)
    with pytest.raises(ValueError, match="backbone"):
        sample(pipeline, tiny.make_features(1), refine=1)
    with pytest.raises(InputError, match="backbone"):
        DiffusionInverter(pipeline, refine=1)


def test_captured_networks_give_the_same_pictures(pipeline):
    features = tiny.make_features(2)
    settings = {"guidance": "features", "guidance_scale": 2.0, "output_type": "latent"}
    plain = sample(pipeline, features, **settings)
    pipeline.enable_capture()
    captured = [sample(pipeline, features, **settings) for _ in range(2)]
    assert len(pipeline._graphs) == 1
    sample(pipeline, features[:1], **settings)
    assert len(pipeline._graphs) == 2
    assert not pipeline.unet.training
    with torch.no_grad():
        pipeline.unet.conv_out.weight.mul_(0.5)  # the graph reads the weights where they are
    changed = sample(pipeline, features, **settings)
    pipeline.disable_capture()
    for latents in captured:
        torch.testing.assert_close(latents, plain, rtol=0, atol=1e-5)
    torch.testing.assert_close(changed, sample(pipeline, features, **settings), rtol=0, atol=1e-5)
    assert not torch.allclose(changed, plain, atol=1e-2)


def test_presets_set_what_is_not_set(pipeline):
    pipeline.register_to_config(best_refine=3)
    found = {
        quality: with_quality(SampleSettings(quality=quality), pipeline)
        for quality in ("draft", "standard", "best", "published")
    }
    assert {name: one.refine for name, one in found.items()} == {
        "draft": 0, "standard": 0, "best": 3, "published": 0,
    }  # fmt: skip
    assert (found["draft"].steps, found["standard"].steps) == (2, None)
    published = found["published"]
    assert (published.steps, published.scheduler, published.guidance) == (50, "ddim", "text")
    given = with_quality(SampleSettings(quality="draft", steps=7, refine=1), pipeline)
    assert (given.steps, given.refine) == (7, 1)
    assert with_quality(SampleSettings(), pipeline).quality == "standard"


def test_quality_is_no_setting_of_a_deterministic_inverter():
    with pytest.raises(InputError, match="--quality"):
        fi.load_inverter("siglip2", quality="best")
    with pytest.raises(InputError, match="No quality is named 'bset'"):
        fi.load_inverter("tiny/convnext", quality="bset")
