"""FeatInvPipeline: what it samples, against hand-written loops and plain diffusers calls."""

from __future__ import annotations

import copy
import pickle
import re
from dataclasses import asdict

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import PipelineCallback
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

from featinv_diffusion.backbones import wrap_model
from featinv_diffusion.diffusion import featinv_pipeline
from featinv_diffusion.diffusion.featinv_pipeline import FeatInvPipeline
from featinv_diffusion.images import center_square, read_image, to_pil, to_tensor, write_png
from featinv_diffusion.inverters.diffusion import DiffusionInverter
from tests import tiny

# Kernels sum in another order at another batch size; measured 2e-6.
BATCH_TOLERANCE = 2e-5


def sample(pipeline: FeatInvPipeline, features=None, *, images=None, **kwargs):
    """Latents of two steps, one generator per sample."""
    if features is None and images is None:
        features = tiny.make_features(2)
    n = len(features if images is None else images) * kwargs.get("num_images_per_prompt", 1)
    settings = {
        "images": images,
        "features": features,
        "num_inference_steps": 2,
        "output_type": "latent",
        "generator": tiny.make_generators(n),
    }
    return pipeline(**(settings | kwargs)).images


@torch.no_grad()
def loop(pipeline: FeatInvPipeline, predict, n: int = 2, steps: int = 2) -> torch.Tensor:
    """DDIM by hand: `predict(x, t)` gives eps; alpha-bar is computed from the paper's betas."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, 0).float()
    x = torch.cat([torch.randn(1, 4, 8, 8, generator=g) for g in tiny.make_generators(n)])
    for t in [i * (1000 // steps) + 1 for i in reversed(range(steps))]:
        before = t - 1000 // steps
        a, a_before = alphas[t], alphas[before] if before >= 0 else alphas[0]
        eps = predict(x, t)
        x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
        x = a_before.sqrt() * x0 + (1 - a_before).sqrt() * eps
    return x


def embed(pipeline: FeatInvPipeline, prompt: str, n: int = 2) -> torch.Tensor:
    ids = pipeline.tokenizer(prompt, padding="max_length", max_length=77, return_tensors="pt")
    return pipeline.text_encoder(ids.input_ids).last_hidden_state.expand(n, -1, -1)


def predict_with(pipeline: FeatInvPipeline, x, t, prompt, features, strength=1.0, keep=None):
    """The published network call: the controlnet sees the raw map, nothing is cached."""
    embeds = embed(pipeline, prompt, len(x))
    time = torch.tensor(t)
    down, mid = pipeline.controlnet(
        x, time, embeds, controlnet_cond=features, keep=keep, return_dict=False
    )
    return pipeline.unet(
        x,
        time,
        encoder_hidden_states=embeds,
        down_block_additional_residuals=[r * strength for r in down],
        mid_block_additional_residual=mid * strength,
    ).sample


# ---- the sampler -------------------------------------------------------------------------------


def test_at_initialisation_it_is_the_frozen_model():
    pipeline = tiny.make_pipeline(controlnet=tiny.make_controlnet(zero=True))
    plain = StableDiffusionPipeline(
        **{k: getattr(pipeline, k) for k in tiny.STABLE_DIFFUSION},
        scheduler=tiny.make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    plain.set_progress_bar_config(disable=True)
    settings = {
        "prompt": ["a cat", "a dog"],
        "num_inference_steps": 3,
        "guidance_scale": 2.5,
        "latents": torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3)),
    }
    expected = plain(**settings, output_type="latent").images
    assert torch.equal(sample(pipeline, **settings), expected)
    expected = plain(**settings, output_type="np").images
    np.testing.assert_array_equal(sample(pipeline, **settings, output_type="np"), expected)


def test_one_prediction_at_initialisation_equals_the_unet(pipeline):
    pipeline.controlnet = tiny.make_controlnet(pipeline.unet, zero=True)
    x = torch.randn(2, 4, 8, 8)
    encoded = pipeline.controlnet.encode_condition(tiny.make_features(), (8, 8))
    embeds, t = embed(pipeline, "a cat"), torch.tensor(500)
    dtypes = (torch.float32, torch.float32)
    ours = pipeline._predict_noise(x, t, embeds, encoded, [1.0] * 5, dtypes)
    assert torch.equal(ours, pipeline.unet(x, t, embeds).sample)


def test_without_guidance_there_is_one_branch(pipeline):
    features = tiny.make_features()
    expected = loop(pipeline, lambda x, t: predict_with(pipeline, x, t, "a cat", features))
    actual = sample(pipeline, features, prompt="a cat", guidance_scale=1.0)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.75, 4.0])
def test_text_guidance_drops_only_the_prompt(pipeline, scale):
    features = tiny.make_features()

    def predict(x, t):
        negative = predict_with(pipeline, x, t, "", features)
        positive = predict_with(pipeline, x, t, "a cat", features)
        return negative + scale * (positive - negative)

    actual = sample(pipeline, features, prompt="a cat", guidance_scale=scale, guidance="text")
    torch.testing.assert_close(actual, loop(pipeline, predict), rtol=1e-4, atol=1e-4)


def test_feature_guidance_drops_both(pipeline):
    features = tiny.make_features()

    def predict(x, t):
        keep = torch.zeros(len(x), dtype=torch.bool)
        negative = predict_with(pipeline, x, t, "ugly", features, keep=keep)
        positive = predict_with(pipeline, x, t, "a cat", features)
        return negative + 2 * (positive - negative)

    settings = {"prompt": "a cat", "negative_prompt": "ugly", "guidance_scale": 2.0}
    actual = sample(pipeline, features, **settings, guidance="features")
    torch.testing.assert_close(actual, loop(pipeline, predict), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(actual, sample(pipeline, features, **settings), atol=1e-3)


def test_strength_zero_leaves_only_the_prompt(pipeline):
    a = sample(pipeline, tiny.make_features(), controlnet_conditioning_scale=0.0)
    b = sample(pipeline, -3 * tiny.make_features(), controlnet_conditioning_scale=0.0)
    assert torch.equal(a, b)
    zero = tiny.make_pipeline(controlnet=tiny.make_controlnet(zero=True))
    assert torch.equal(a, sample(zero))
    assert not torch.allclose(a, sample(pipeline), atol=1e-2)


def test_strength_scales_each_residual(pipeline):
    features = tiny.make_features()
    expected = loop(pipeline, lambda x, t: predict_with(pipeline, x, t, "", features, strength=0.3))
    n = len(pipeline.controlnet.controlnet_down_blocks) + 1
    settings = {"prompt": "", "guidance_scale": 1.0}
    one = sample(pipeline, features, **settings, controlnet_conditioning_scale=0.3)
    many = sample(pipeline, features, **settings, controlnet_conditioning_scale=[0.3] * n)
    torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(one, many)
    only_middle = [0.0] * (n - 1) + [1.0]
    other = sample(pipeline, features, **settings, controlnet_conditioning_scale=only_middle)
    assert not torch.allclose(other, one, atol=1e-3)


SCHEDULERS = [
    (DDIMScheduler, {}),
    (DPMSolverMultistepScheduler, {}),
    (UniPCMultistepScheduler, {}),
    (EulerDiscreteScheduler, {}),
    (EulerAncestralDiscreteScheduler, {}),
    (HeunDiscreteScheduler, {}),
]


@pytest.mark.parametrize(("scheduler", "kwargs"), SCHEDULERS)
def test_schedulers_agree_with_stable_diffusion(scheduler, kwargs):
    """Scaling of input and noise is the scheduler's business: compare with diffusers' own loop."""
    pipeline = tiny.make_pipeline(controlnet=tiny.make_controlnet(zero=True))
    config = tiny.make_scheduler().config
    pipeline.scheduler = scheduler.from_config(config, **kwargs)
    plain = StableDiffusionPipeline(
        **{k: getattr(pipeline, k) for k in tiny.STABLE_DIFFUSION},
        scheduler=scheduler.from_config(config, **kwargs),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    plain.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 4, "prompt": ["a cat"] * 2, "guidance_scale": 3.0}
    expected = plain(**settings, generator=tiny.make_generators(2), output_type="latent").images
    actual = sample(pipeline, **settings)
    assert actual.isfinite().all()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_eta_reaches_ddim_and_is_refused_elsewhere(pipeline):
    plain, noisy = (sample(pipeline, eta=eta) for eta in (0.0, 1.0))
    assert not torch.allclose(plain, noisy, atol=1e-2)
    assert torch.equal(noisy, sample(pipeline, eta=1.0))
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    with pytest.raises(ValueError, match="EulerDiscreteScheduler has no eta"):
        sample(pipeline, eta=1.0)


# ---- determinism -------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerAncestralDiscreteScheduler])
def test_a_sample_is_the_same_alone_and_in_a_batch_of_eight(pipeline, scheduler):
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    features = tiny.make_features(8)
    batch = sample(pipeline, features, output_type="pt", num_inference_steps=4)
    alone = sample(
        pipeline,
        features[7:],
        output_type="pt",
        num_inference_steps=4,
        generator=tiny.make_generators(1, first=7),
    )
    torch.testing.assert_close(alone[0], batch[7], rtol=0, atol=BATCH_TOLERANCE)
    assert (batch[7] - batch[6]).abs().max() > 0.05


def test_noise_is_that_of_each_generator_in_float32(pipeline):
    pipeline.unet.to(torch.bfloat16)
    noise = pipeline._prepare_latents(3, tiny.make_generators(3), None)
    drawn = [torch.randn(1, 4, 8, 8, generator=g) for g in tiny.make_generators(3)]
    assert torch.equal(noise, torch.cat(drawn))
    one = pipeline._prepare_latents(2, torch.Generator().manual_seed(5), None)
    first = pipeline._prepare_latents(1, torch.Generator().manual_seed(5), None)
    assert torch.equal(one[:1], first)
    assert not torch.equal(one[0], one[1])


def test_samples_of_an_image_follow_each_other(pipeline):
    features = tiny.make_features(2)
    together = sample(pipeline, features, num_images_per_prompt=3)
    generators = tiny.make_generators(6)
    prompts = ["a cat", "a dog"]
    assert together.shape == (6, 4, 8, 8)
    for i in range(2):
        for j in range(3):
            alone = sample(pipeline, features[i : i + 1], generator=[generators[i * 3 + j]])
            torch.testing.assert_close(alone[0], together[i * 3 + j], rtol=0, atol=1e-4)
    own = sample(pipeline, features, num_images_per_prompt=3, prompt=prompts)
    alone = sample(
        pipeline, features[1:], prompt="a dog", generator=tiny.make_generators(1, first=4)
    )
    torch.testing.assert_close(alone[0], own[4], rtol=0, atol=1e-4)
    assert not torch.allclose(own[4], together[4], atol=1e-3)


def test_given_latents_replace_the_noise_and_set_the_size(pipeline):
    noise = torch.cat([torch.randn(1, 4, 8, 8, generator=g) for g in tiny.make_generators(2)])
    assert torch.equal(sample(pipeline, latents=noise, generator=None), sample(pipeline))
    wide = sample(pipeline, latents=torch.randn(2, 4, 8, 16), output_type="pt")
    assert wide.shape == (2, 3, 64, 128)


# ---- work is done once -------------------------------------------------------------------------


class Calls:
    """Counts calls of a bound method or module, with the batch sizes they had."""

    def __init__(self, monkeypatch, owner, name):
        original = getattr(owner, name)
        self.sizes: list[int] = []

        def counted(first, *args, **kwargs):
            self.sizes.append(len(first))
            return original(first, *args, **kwargs)

        monkeypatch.setattr(owner, name, counted)


@pytest.mark.parametrize(
    ("kwargs", "sizes"),
    [
        ({"guidance_scale": 1.0}, [2]),
        ({"guidance": "text"}, [2]),
        ({"guidance": "features"}, [2, 1]),  # and one map of nothing
    ],
)
def test_a_map_is_encoded_once(pipeline, monkeypatch, kwargs, sizes):
    encoded = Calls(monkeypatch, pipeline.controlnet, "encode_condition")
    convolved = Calls(monkeypatch, pipeline.controlnet.feature_encoder.conv1, "forward")
    sample(pipeline, num_inference_steps=5, num_images_per_prompt=2, **kwargs)
    assert encoded.sizes == sizes
    assert convolved.sizes == sizes


def test_a_prompt_is_encoded_once(pipeline, monkeypatch):
    calls = Calls(monkeypatch, pipeline.text_encoder, "forward")
    first = sample(pipeline)
    assert len(calls.sizes) == 2  # the default prompt and the empty one
    assert torch.equal(sample(pipeline), first)
    assert len(calls.sizes) == 2
    sample(pipeline, prompt="another")
    assert len(calls.sizes) == 3
    pipeline.clear_prompt_cache()
    sample(pipeline)
    assert len(calls.sizes) == 5


def test_another_text_encoder_is_not_answered_from_the_cache(pipeline):
    before = pipeline.encode_prompt("a cat")
    other = tiny.make_text_encoder()
    torch.nn.init.normal_(other.get_input_embeddings().weight)
    pipeline.text_encoder = other
    assert not torch.allclose(pipeline.encode_prompt("a cat"), before, atol=1e-2)


def test_without_guidance_the_networks_see_each_sample_once(pipeline, monkeypatch):
    single = Calls(monkeypatch, pipeline.unet, "forward")
    sample(pipeline, guidance_scale=1.0)
    assert single.sizes == [2, 2]
    sample(pipeline, guidance_scale=2.0)
    assert single.sizes[2:] == [4, 4]


# ---- inputs ------------------------------------------------------------------------------------


def test_features_equal_those_of_the_backbone(pipeline):
    backbone = wrap_model(tiny.make_backbone(), name="convnext")
    for size in ((64, 64), (48, 48), (150, 150), (40, 70)):
        images = torch.nn.functional.interpolate(tiny.make_images(3), size=size)
        assert torch.equal(pipeline.encode_features(images), backbone.features(images))


def test_features_seen_through_a_smaller_size_equal_those_of_the_backbone(tmp_path):
    pipeline = tiny.make_pipeline(through=24)
    backbone = DiffusionInverter(pipeline).require_backbone()
    own = wrap_model(pipeline.backbone, name="tiny/convnext")
    given = DiffusionInverter(pipeline, backbone=own).require_backbone()
    assert given.picture_size == (24, 24)
    assert given.model is own.model
    assert own.picture_size == (64, 64)
    assert backbone.picture_size == (24, 24)
    assert "through 24×24" in repr(backbone)
    for size in ((64, 64), (24, 24), (40, 70)):
        images = torch.nn.functional.interpolate(tiny.make_images(3), size=size)
        seen = pipeline.encode_features(images)
        assert torch.equal(seen, backbone.features(images))
        small = torch.nn.functional.interpolate(
            images, (24, 24), mode="bicubic", antialias=True
        ).clamp(0, 1)
        torch.testing.assert_close(seen, pipeline.encode_features(small))
    write_png(to_pil(tiny.make_images(1))[0].resize((90, 70)), tmp_path / "a.png")
    path = tmp_path / "a.png"
    assert torch.equal(pipeline.encode_features(path), backbone.features(path))
    pipeline.save_pretrained(tmp_path / "saved")
    again = FeatInvPipeline.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.encode_features(path), backbone.features(path))


@pytest.mark.parametrize("layer", ["stages.1", "stages.2.blocks.0.conv_dw", "stages.3"])
def test_features_of_any_layer_equal_those_of_the_backbone(layer):
    backbone = wrap_model(tiny.make_backbone(), name="convnext", layer=layer)
    spec = tiny.FEATURE_SPEC | {"layer": layer, "channels": backbone.spec.channels}
    controlnet = tiny.make_controlnet(
        feature_channels=backbone.spec.channels,
        feature_spec=spec | {"grid": list(backbone.spec.grid)},
    )
    pipeline = tiny.make_pipeline(controlnet=controlnet)
    assert pipeline.config.feature_layer == layer
    images = tiny.make_images(2)
    assert torch.equal(pipeline.encode_features(images), backbone.features(images))


TIMM_MODELS = {
    "vit_tiny_patch16_224": {"img_size": 64, "depth": 2, "embed_dim": 24, "num_heads": 2},
    "swinv2_tiny_window8_256": {
        "img_size": 64,
        "embed_dim": 8,
        "depths": (1, 1),
        "num_heads": (1, 2),
        "window_size": 4,
    },
    "resnet18": {"block_args": {}},
}


def make_timm_pipeline(architecture: str) -> FeatInvPipeline:
    torch.manual_seed(0)
    config = TimmWrapperConfig(
        architecture=architecture,
        num_labels=10,
        model_args=TIMM_MODELS[architecture],
        pretrained_cfg={
            "input_size": (3, 64, 64),
            "mean": (0.5,) * 3,
            "std": (0.5,) * 3,
            "interpolation": "bicubic",
        },
    )
    wrapper = TimmWrapperForImageClassification(config).eval()
    spec = wrap_model(wrapper, name=architecture).spec
    controlnet = tiny.make_controlnet(feature_channels=spec.channels, feature_spec=asdict(spec))
    return tiny.make_pipeline(controlnet=controlnet, backbone=wrapper.requires_grad_(True))


@pytest.mark.parametrize("architecture", TIMM_MODELS)
def test_tokens_and_channels_last_become_maps(architecture):
    pipeline = make_timm_pipeline(architecture)
    images = tiny.make_images(2)
    backbone = wrap_model(copy.deepcopy(pipeline.backbone), name=architecture)
    torch.testing.assert_close(
        pipeline.encode_features(images), backbone.features(images), rtol=1e-5, atol=1e-6
    )


def noise_image(mode: str, size: tuple[int, int]) -> PIL.Image.Image:
    rng = np.random.default_rng(0)
    if mode == "I;16":
        return PIL.Image.fromarray(rng.integers(0, 65536, size[::-1], dtype=np.uint16))
    channels = len(PIL.Image.new(mode, (1, 1)).getbands())
    pixels = rng.integers(0, 256, (*size[::-1], channels), dtype=np.uint8)
    return PIL.Image.fromarray(pixels[..., 0] if channels == 1 else pixels, mode)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("RGB", "png"), ("RGBA", "png"), ("L", "png"), ("I;16", "png"), ("CMYK", "jpg")],
)
@pytest.mark.parametrize("size", [(64, 64), (90, 70), (1, 1)])
def test_pictures_and_paths_are_read_as_the_commands_read_them(
    pipeline, tmp_path, mode, suffix, size
):
    path = tmp_path / f"picture.{suffix}"
    image = noise_image(mode, size)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # lies on its side
    image.save(path, exif=exif)
    backbone = wrap_model(tiny.make_backbone(), name="convnext")
    expected = backbone.features(to_tensor(center_square(read_image(path), 64)))
    assert torch.equal(pipeline.encode_features(path), expected)
    assert torch.equal(pipeline.encode_features(str(path)), expected)
    with PIL.Image.open(path) as opened:
        assert torch.equal(pipeline.encode_features([opened, path]), expected.repeat(2, 1, 1, 1))


def test_images_are_sampled_from_as_their_features(pipeline):
    images = tiny.make_images(2)
    features = pipeline.encode_features(images)
    assert torch.equal(sample(pipeline, images=images), sample(pipeline, features))


def test_prompt_embeddings_replace_the_text_encoder(pipeline):
    settings = {"prompt": "a cat", "negative_prompt": "ugly"}
    expected = sample(pipeline, **settings)
    embeds = {
        "prompt_embeds": pipeline.encode_prompt("a cat"),
        "negative_prompt_embeds": pipeline.encode_prompt("ugly"),
    }
    light = tiny.make_pipeline(text_encoder=None, tokenizer=None)
    assert torch.equal(sample(light, **embeds), expected)
    del embeds["negative_prompt_embeds"]
    sample(light, **embeds, guidance_scale=1.0)
    with pytest.raises(ValueError, match="negative_prompt_embeds where guidance is used"):
        sample(light, **embeds)


def wrong(message: str, **kwargs):
    return pytest.param(kwargs, message, id=message[:40])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        wrong("Exactly one of images and features", features=None),
        wrong("Exactly one of images and features", images=tiny.make_images(1)),
        wrong(
            r"\[b, 32, 8, 8\].*'last' of 'tiny/convnext'.*\[1, 16, 8, 8\]",
            features=torch.zeros(1, 16, 8, 8),
        ),
        wrong(r"\[b, 32, 8, 8\].*\[1, 32, 7, 7\]", features=torch.zeros(1, 32, 7, 7)),
        wrong(r"shape \[32, 8, 8\]", features=torch.zeros(32, 8, 8)),
        wrong("must be finite", features=torch.full((1, 32, 8, 8), torch.nan)),
        wrong("must be finite", features=torch.full((1, 32, 8, 8), torch.inf)),
        wrong("guidance must be one of text, features", guidance="txt"),
        wrong("output_type must be one of", output_type="jpg"),
        wrong("2 generators, one per sample, got 3", generator=tiny.make_generators(3)),
        wrong(
            "one number or one for each of the 5 residuals, got 2",
            controlnet_conditioning_scale=[1.0, 1.0],
        ),
        wrong("one prompt or one per image", prompt=["a", "b", "c"]),
        wrong("one negative prompt or one per image", negative_prompt=["a", "b", "c"]),
        wrong("at least 1, got 0", num_inference_steps=0),
        wrong("at least 1, got 0", num_images_per_prompt=0),
        wrong("finite number", guidance_scale=float("nan")),
        wrong(r"latents must have shape \[2, 4, h, w\]", latents=torch.zeros(1, 4, 8, 8)),
        wrong(
            "tensor input must be one of latents", callback_on_step_end_tensor_inputs=["timestep"]
        ),
    ],
)
def test_bad_input_is_refused_with_a_sentence(pipeline, kwargs, message):
    settings = {"features": tiny.make_features(2), "num_inference_steps": 2}
    with pytest.raises(ValueError, match=message):
        pipeline(**(settings | kwargs))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 64, 64), r"\[b, 3, h, w\], got \[3, 64, 64\]"),
        (torch.full((1, 3, 64, 64), 255.0), r"in \[0, 1\]"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "floating point"),
        ([], "empty list"),
    ],
)
def test_bad_images_are_refused_with_a_sentence(pipeline, images, message):
    with pytest.raises(ValueError, match=message):
        pipeline.encode_features(images)


def test_images_need_a_backbone():
    pipeline = tiny.make_pipeline(backbone=None)
    with pytest.raises(ValueError, match="Images need a backbone"):
        pipeline(images=tiny.make_images(1))
    assert sample(pipeline).shape == (2, 4, 8, 8)


def test_a_backbone_with_other_features_is_refused():
    pipeline = tiny.make_pipeline(backbone=tiny.make_backbone(dims=(8, 16, 24, 40)))
    with pytest.raises(
        ValueError, match=r"\[b, 32, 8, 8\].*'convnext_atto' gives.*\[1, 40, 8, 8\]"
    ):
        pipeline(images=tiny.make_images(1))


def test_a_backbone_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="must be a TimmWrapperForImageClassification, got a CLIP"):
        tiny.make_pipeline(backbone=tiny.make_text_encoder()).encode_features(tiny.make_images(1))


def test_a_backbone_without_the_layer_is_refused():
    spec = tiny.FEATURE_SPEC | {"layer": "layer4"}
    pipeline = tiny.make_pipeline(controlnet=tiny.make_controlnet(feature_spec=spec))
    with pytest.raises(ValueError, match="ConvNeXt has no layer 'layer4'"):
        pipeline.encode_features(tiny.make_images(1))


@pytest.mark.parametrize(("layer", "shape"), [("head.fc", [1, 10]), ("head.flatten", [1, 32])])
def test_a_layer_without_a_map_is_refused(layer, shape):
    spec = tiny.FEATURE_SPEC | {"layer": layer}
    pipeline = tiny.make_pipeline(controlnet=tiny.make_controlnet(feature_spec=spec))
    with pytest.raises(ValueError, match=f"backbone gives shape {re.escape(str(shape))}"):
        pipeline.encode_features(tiny.make_images(1))


def test_tokens_of_another_number_are_refused():
    pipeline = make_timm_pipeline("vit_tiny_patch16_224")
    spec = dict(pipeline.controlnet.config.feature_spec) | {"grid": [5, 5]}
    pipeline.controlnet.register_to_config(feature_spec=spec)
    with pytest.raises(ValueError, match=r"gives tokens of shape \[1, 17, 24\]"):
        pipeline.encode_features(tiny.make_images(1))


def test_without_a_declared_grid_the_model_lays_out_its_tokens():
    pipeline = make_timm_pipeline("vit_tiny_patch16_224")
    expected = pipeline.encode_features(tiny.make_images(1))
    pipeline.controlnet.register_to_config(feature_spec=None)
    torch.testing.assert_close(pipeline.encode_features(tiny.make_images(1)), expected)


def test_a_picture_without_a_declared_range_is_refused(pipeline):
    with pytest.raises(ValueError, match="32-bit image has no declared range"):
        pipeline.encode_features(PIL.Image.new("F", (8, 8)))


def test_a_prompt_that_is_cut_is_announced(pipeline, monkeypatch):
    warnings = []
    monkeypatch.setattr(featinv_pipeline.logger, "warning", lambda *args: warnings.append(args))
    pipeline.encode_prompt("a" * 75)
    assert not warnings
    pipeline.encode_prompt("a" * 76)
    assert len(warnings) == 1
    for i in range(2 * featinv_pipeline.PROMPT_CACHE_SIZE):
        pipeline.encode_prompt(str(i))
    assert len(pipeline._prompt_cache) <= featinv_pipeline.PROMPT_CACHE_SIZE


def test_a_controlnet_that_reads_images_is_refused(unet):
    with pytest.raises(ValueError, match=r"must be a FeatureControlNet.*got a ControlNetModel"):
        tiny.make_pipeline(controlnet=ControlNetModel.from_unet(unet))


def test_a_layer_that_the_controlnet_does_not_read_is_refused():
    with pytest.raises(ValueError, match=r"layer 'last', but feature_layer is 'stages\.2'"):
        tiny.make_pipeline(feature_layer="stages.2")


# ---- outputs and callbacks ---------------------------------------------------------------------


def test_output_types_show_the_same_images(pipeline):
    tensors = sample(pipeline, output_type="pt")
    assert tensors.shape == (2, 3, 64, 64)
    assert tensors.dtype == torch.float32
    assert tensors.min() >= 0
    assert tensors.max() <= 1
    arrays = sample(pipeline, output_type="np")
    np.testing.assert_array_equal(arrays, tensors.permute(0, 2, 3, 1).numpy())
    pictures = sample(pipeline, output_type="pil")
    assert [p.size for p in pictures] == [(64, 64)] * 2
    np.testing.assert_array_equal(np.asarray(pictures[1]), (arrays[1] * 255).round().astype("u1"))
    settings = {"features": tiny.make_features(2), "num_inference_steps": 2}
    assert isinstance(pipeline(**settings, return_dict=False), tuple)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"scaling_factor": 0.5, "shift_factor": 0.25},
        {"scaling_factor": 0.5, "latents_mean": (0.1, 0.2, 0.3, 0.4), "latents_std": (1, 2, 3, 4)},
    ],
)
def test_latents_are_unscaled_as_the_autoencoder_declares(config):
    pipeline = tiny.make_pipeline(vae=tiny.make_vae(**config))
    latents = torch.randn(2, 4, 8, 8)
    z = latents / config.get("scaling_factor", 0.18215) + config.get("shift_factor", 0)
    if "latents_mean" in config:
        mean, std = (
            torch.tensor(config[k]).view(1, 4, 1, 1) for k in ("latents_mean", "latents_std")
        )
        z = latents / 0.5 * std + mean
    expected = pipeline.vae.decode(z).sample
    torch.testing.assert_close(pipeline._decode_latents(latents), expected)


def test_callback_sees_each_step_and_changes_the_latents(pipeline):
    seen = []

    def note(pipe, step, t, tensors):
        assert pipe is pipeline
        seen.append((step, int(t), {k: tuple(v.shape) for k, v in tensors.items()}))
        return {}

    plain = sample(pipeline)
    names = ["latents", "prompt_embeds", "encoded_cond"]
    noted = sample(pipeline, callback_on_step_end=note, callback_on_step_end_tensor_inputs=names)
    assert torch.equal(noted, plain)
    shapes = {"latents": (2, 4, 8, 8), "prompt_embeds": (4, 77, 32), "encoded_cond": (4, 16, 8, 8)}
    assert seen == [(0, 501, shapes), (1, 1, shapes)]
    zeroed = sample(pipeline, callback_on_step_end=lambda p, i, t, d: {"latents": d["latents"] * 0})
    assert not zeroed.any()


def test_callback_objects_of_diffusers_name_their_tensors(pipeline):
    class Halve(PipelineCallback):
        tensor_inputs = ["latents", "encoded_cond"]  # noqa: RUF012

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            assert set(callback_kwargs) == set(self.tensor_inputs)
            assert pipeline.num_timesteps == 2
            return callback_kwargs | {"latents": callback_kwargs["latents"] / 2}

    changed = sample(
        pipeline, callback_on_step_end=Halve(cutoff_step_ratio=None, cutoff_step_index=0)
    )
    by_hand = sample(
        pipeline, callback_on_step_end=lambda p, i, t, d: {"latents": d["latents"] / 2}
    )
    assert torch.equal(changed, by_hand)


def test_callback_can_stop_after_a_step(pipeline):
    steps = []

    def stop(pipe, step, t, tensors):
        steps.append(step)
        pipe._interrupt = True
        return {}

    stopped = sample(pipeline, callback_on_step_end=stop, num_inference_steps=10)
    assert steps == [0]
    assert pipeline.interrupt
    assert not torch.equal(stopped, sample(pipeline, num_inference_steps=10))


def test_progress_bar_counts_the_evaluations(pipeline, capsys):
    pipeline.set_progress_bar_config(disable=False)
    sample(pipeline, num_inference_steps=3)
    assert "3/3" in capsys.readouterr().err
    pipeline.set_progress_bar_config(disable=True)
    sample(pipeline)
    assert capsys.readouterr().err == ""


# ---- a diffusers pipeline ----------------------------------------------------------------------


def test_defaults_come_from_its_config():
    defaults = {
        "default_prompt": "a cat",
        "default_num_inference_steps": 3,
        "default_guidance_scale": 2,
        "default_guidance": "features",
    }
    pipeline, plain = tiny.make_pipeline(**defaults), tiny.make_pipeline()
    features = tiny.make_features(1)
    ours = pipeline(features=features, generator=tiny.make_generators(1), output_type="latent")
    explicit = sample(
        plain,
        features,
        prompt="a cat",
        num_inference_steps=3,
        guidance_scale=2.0,
        guidance="features",
    )
    assert torch.equal(ours.images, explicit)
    assert isinstance(pipeline.config.default_guidance_scale, float)


def test_offload_sequence_names_its_components(pipeline):
    named = set(pipeline.model_cpu_offload_seq.split("->"))
    assert named <= set(pipeline.components)
    assert "controlnet" not in named  # called in every step: it stays with the UNet


def test_offloading_changes_no_pixel(pipeline):
    """The CPU stands in for the accelerator; the hooks are the same."""
    images = tiny.make_images(2)
    expected = sample(pipeline, images=images, output_type="pt")
    pipeline.enable_model_cpu_offload(device="cpu")
    hooks = [m._hf_hook for m in pipeline.components.values() if hasattr(m, "_hf_hook")]
    assert len(hooks) == 5  # all models
    for _ in range(2):  # the hooks are there again after a call
        pipeline.clear_prompt_cache()
        assert torch.equal(sample(pipeline, images=images, output_type="pt"), expected)


def test_offloaded_weights_come_back_before_every_use(pipeline):
    """Also where a method other than `forward` is called, which accelerate does not see."""
    uses = {"backbone": 0, "text_encoder": 0, "controlnet": 0, "unet": 0, "vae": 0}

    class Note(ModelHook):
        def __init__(self, name):
            self.name = name

        def pre_forward(self, module, *args, **kwargs):
            uses[self.name] += 1
            return args, kwargs

    for name in uses:
        add_hook_to_module(getattr(pipeline, name), Note(name))
    sample(pipeline, images=tiny.make_images(2), output_type="pt", num_inference_steps=3)
    # Twice the prompt; the controlnet once for the encoding and once per step.
    assert uses == {"backbone": 1, "text_encoder": 2, "controlnet": 4, "unet": 3, "vae": 1}


def test_half_precision_parts_keep_float32_latents(pipeline):
    reference = sample(pipeline)
    for name in ("unet", "vae", "text_encoder"):
        getattr(pipeline, name).to(torch.bfloat16)
    mixed = sample(pipeline)
    assert mixed.dtype == torch.float32
    cosine = torch.nn.functional.cosine_similarity(mixed.flatten(1), reference.flatten(1))
    assert cosine.min() > 0.99
    assert sample(pipeline, output_type="pt").dtype == torch.float32


def test_float16_autoencoder_decodes_in_float32(pipeline):
    expected = sample(pipeline, output_type="pt")
    pipeline.vae.half()
    actual = sample(pipeline, output_type="pt")
    assert pipeline.vae.dtype == torch.float16
    torch.testing.assert_close(actual, expected, rtol=0, atol=5e-3)


def test_components_build_it_again(pipeline):
    again = FeatInvPipeline(**pipeline.components, **pipeline.parameters)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(sample(again), sample(pipeline))


def test_from_pipe_of_stable_diffusion(pipeline):
    names = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    plain = StableDiffusionPipeline(
        **{k: getattr(pipeline, k) for k in names},
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made = FeatInvPipeline.from_pipe(
        plain, controlnet=pipeline.controlnet, backbone=pipeline.backbone
    )
    made.set_progress_bar_config(disable=True)
    assert torch.equal(sample(made), sample(pipeline))


def test_survives_deepcopy_and_pickle(pipeline):
    expected = sample(pipeline)
    assert torch.equal(sample(copy.deepcopy(pipeline)), expected)
    assert torch.equal(sample(pickle.loads(pickle.dumps(pipeline))), expected)


def test_sampling_changes_no_weight(pipeline):
    def state():
        models = [v for v in pipeline.components.values() if isinstance(v, torch.nn.Module)]
        return [t.clone() for m in models for t in m.state_dict().values()]

    before = state()
    sample(pipeline, images=tiny.make_images(2))
    assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))


# ---- edits ---------------------------------------------------------------------------------------


def test_an_edit_is_that_of_the_features(pipeline):
    features = tiny.make_features(2)
    edited = sample(pipeline, features, feature_edit=lambda f: 0.5 * f.flip(0))
    assert torch.equal(edited, sample(pipeline, 0.5 * features.flip(0)))
    assert not torch.equal(edited, sample(pipeline, features))
    assert torch.equal(features, tiny.make_features(2))


def test_an_edit_applies_to_the_features_of_images(pipeline):
    images = tiny.make_images(2)
    edited = sample(pipeline, images=images, feature_edit=torch.zeros_like)
    assert torch.equal(edited, sample(pipeline, torch.zeros(2, 32, 8, 8)))


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda f: f[:, :3], r"the feature_edit gives shape \[2, 3, 8, 8\]"),
        (lambda f: f / 0, "finite"),
        (lambda f: f[:1], "each of the 2 it is given, but returned 1"),
    ],
)
def test_edits_that_break_the_features(pipeline, edit, words):
    with pytest.raises(ValueError, match=words):
        sample(pipeline, feature_edit=edit)
