"""The inverters that need no training: `optimise`, `guided`, and the pull that both share."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import featinv_diffusion as fi
from featinv_diffusion.backbones import wrap_model, wrap_module
from featinv_diffusion.backbones.base import Backbone
from featinv_diffusion.diffusion import folders
from featinv_diffusion.errors import InputError
from featinv_diffusion.images import to_pil
from featinv_diffusion.inverters.guided import GuidedInverter
from featinv_diffusion.inverters.open import name_inverter, open_inverter
from featinv_diffusion.inverters.optimise import OptimiseInverter
from featinv_diffusion.inverters.refine import FourierPixels, Latents, feature_loss, pull, shift
from featinv_diffusion.runs.second_eye import second_eye_of
from featinv_diffusion.settings import SampleSettings
from tests import tiny

HALF = ((0.5,) * 3, (0.5,) * 3)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return wrap_model(tiny.make_backbone(), name="tiny/convnext")


def make_optimise(backbone: Backbone, vae: bool = True, **settings) -> OptimiseInverter:
    return OptimiseInverter(
        backbone, tiny.make_vae() if vae else None, **({"n_steps": 4} | settings)
    )


def make_guided(backbone: Backbone, **settings) -> GuidedInverter:
    prompt = torch.zeros(1, 3, 32)
    scheduler = tiny.make_scheduler()
    options = {"n_steps": 3, "n_pulls": 1, "n_travels": 0} | settings
    return GuidedInverter(backbone, tiny.make_vae(), tiny.make_unet(), scheduler, prompt, **options)


KINDS = {
    "latents": make_optimise,
    "pixels": lambda backbone: make_optimise(backbone, vae=False),
    "guided": make_guided,
    "guided through the UNet": lambda backbone: make_guided(backbone, through_unet=True),
}


@pytest.fixture(params=KINDS)
def inverter(request, backbone: Backbone):
    return KINDS[request.param](backbone)


def test_runs_are_repeated_bit_for_bit_and_seeds_differ(inverter, backbone: Backbone) -> None:
    features = backbone.features(tiny.make_images(1))
    once, again = (inverter.invert(features, generator=tiny.make_generators(1)) for _ in "ab")
    assert not inverter.is_deterministic
    assert once.shape == (1, 3, 64, 64)
    assert once.dtype == torch.float32
    assert 0 <= once.min() < once.max() <= 1
    assert torch.equal(once, again)
    other = inverter.invert(features, generator=tiny.make_generators(1, 5))
    assert (once - other).abs().max() > 1e-3


def test_a_sample_does_not_depend_on_its_company(inverter, backbone: Backbone) -> None:
    features = backbone.features(tiny.make_images(2))
    together = inverter.invert(features, generator=tiny.make_generators(2))
    alone = inverter.invert(features[:1], generator=tiny.make_generators(1))
    torch.testing.assert_close(together[:1], alone, rtol=0, atol=1 / 255)


def test_weights_stay_as_they_are(inverter, backbone: Backbone) -> None:
    parts = [*inverter.networks.values(), backbone]
    before = [p.clone() for part in parts for p in part.parameters()]
    inverter.invert(backbone.features(tiny.make_images(1)), generator=tiny.make_generators(1))
    after = [p for part in parts for p in part.parameters()]
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("kind", ["latents", "pixels"])
def test_the_loss_falls_with_steps(kind: str, backbone: Backbone) -> None:
    target = backbone.features(tiny.make_images(2))
    decode = (
        Latents(tiny.make_vae(), (64, 64))
        if kind == "latents"
        else FourierPixels((64, 64), torch.device("cpu"))
    )
    losses: list[torch.Tensor] = []
    start = decode.start(2, tiny.make_generators(2))
    kept = start.clone()
    moved = pull(
        start, target, backbone, decode, n_steps=12, learning_rate=0.1, on_step=losses.append
    )
    assert torch.equal(start, kept)
    assert not moved.requires_grad
    assert len(losses) == 12
    assert (losses[-1] < 0.7 * losses[0]).all()


def test_no_steps_change_nothing(backbone: Backbone) -> None:
    decode = Latents(tiny.make_vae(), (64, 64))
    start = decode.start(1, None)
    target = backbone.features(tiny.make_images(1))
    assert torch.equal(pull(start, target, backbone, decode, n_steps=0, learning_rate=1), start)


def test_the_loss_counts_direction_and_length() -> None:
    maps = tiny.make_features(2)
    assert feature_loss(maps, maps).abs().max() < 1e-6
    torch.testing.assert_close(feature_loss(2 * maps, maps), torch.full((2,), 0.1))
    torch.testing.assert_close(feature_loss(-maps, maps), torch.full((2,), 2.4))


def test_a_shift_moves_whole_pixels() -> None:
    image = torch.arange(64.0).view(1, 1, 8, 8).expand(1, 3, 8, 8)
    assert shift(image, 0) is image
    moved = [shift(image, 1, tiny.make_generators(9)[i : i + 1]) for i in range(9)]
    inner = {(one[0, 0, 4, 4] - image[0, 0, 4, 4]).item() for one in moved}
    assert inner <= {dy * 8.0 + dx for dy in (-1, 0, 1) for dx in (-1, 0, 1)}
    assert len(inner) > 2


def test_a_prior_without_features_is_sampled_and_round_trips(backbone: Backbone) -> None:
    inverter = make_guided(backbone)
    assert inverter.image_size == (64, 64)
    assert inverter.sample_prior(2, generator=tiny.make_generators(2)).shape == (2, 3, 64, 64)
    assert inverter.round_trip(tiny.make_images(1)).shape == (1, 3, 64, 64)


def test_a_sample_without_pull_is_that_of_diffusers(backbone: Backbone) -> None:
    inverter = make_guided(backbone)
    scheduler = inverter.scheduler
    scheduler.register_to_config(set_alpha_to_one=True)
    scheduler.final_alpha_cumprod = torch.tensor(1.0)
    x = inverter.decode.start(1, tiny.make_generators(1))
    scheduler.set_timesteps(3)
    with torch.no_grad():
        for t in scheduler.timesteps:
            noise = inverter.unet(x, t, encoder_hidden_states=inverter.prompt)[0]
            x = scheduler.step(noise, t, x)[0]
        wanted = inverter.decode(x).clamp(0, 1)
    found = inverter.sample_prior(1, generator=tiny.make_generators(1))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


# ---- any model, by name or from memory -----------------------------------------------------------


@pytest.fixture
def base(monkeypatch, tmp_path):
    """A bundled `tiny/base` of random weights."""
    monkeypatch.setattr(folders, "ASSETS", tmp_path)
    components = tiny.make_components()
    components["unet"].register_to_config(sample_size=8)
    for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler"):
        components[name].save_pretrained(tmp_path / "tiny/base" / name)
    return tmp_path / "tiny/base"


def make_cnn() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Tanh(), nn.Conv2d(8, 12, 2, 2))


@pytest.mark.parametrize("name", ["optimise", "guided"])
def test_a_wrapped_network_of_ones_own(base, name: str) -> None:
    own = wrap_module(make_cnn(), "2", input_size=32, preprocess=HALF, name="own")
    inverter = fi.load_inverter(name, backbone=own, steps=2, device="cpu")
    found = fi.sample(inverter, to_pil(tiny.make_images(1)), n_samples=2)
    settings = found.settings
    assert found.images.shape[:2] == (1, 2)
    assert (settings.backbone, settings.layer, settings.steps) == ("own", "2", 2)
    assert settings.pipeline == "tiny/base"
    assert found.manifest.second_eye["second"]["backbone"] == second_eye_of("own")


def test_a_wrapped_torchvision_resnet() -> None:
    models = pytest.importorskip("torchvision.models")
    own = wrap_module(models.resnet18(), "layer4", input_size=64, preprocess=HALF)
    inverter = make_optimise(own, n_steps=2)
    images = inverter.invert(own.features(tiny.make_images(1)), generator=tiny.make_generators(1))
    assert images.shape == (1, 3, 64, 64)


class Rounds(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.avg_pool2d(images, 4).round()


def test_a_model_without_gradients_is_refused(backbone: Backbone) -> None:
    with pytest.raises(InputError, match="Gradients must flow"):
        wrap_module(Rounds(), input_size=32, preprocess=HALF)

    class Blind(type(backbone)):
        def _features(self, images):
            return super()._features(images).detach()

    blind = Blind(tiny.make_backbone().timm_model, name="blind")
    with pytest.raises(InputError, match="Gradients must flow from the map of 'blind'"):
        make_optimise(blind)


@pytest.mark.parametrize("parametrise", ["latents", "pixels"])
def test_resolved_settings_open_the_same_inverter(base, parametrise: str) -> None:
    asked = SampleSettings(
        inverter="optimise", backbone="tiny/convnext", device="cpu", parametrise=parametrise
    )
    resolved = open_inverter(asked).settings
    assert resolved.steps == 150
    assert (resolved.pipeline is None) == (parametrise == "pixels")
    assert open_inverter(resolved).settings == resolved


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(inverter="optimise", strength=2.0), "takes --backbone, --layer, --steps, --param"),
        (dict(inverter="guided", guidance_scale=2.0), "got --guidance-scale"),
        (dict(inverter="guided", parametrise="pixels"), "got --parametrise"),
        (dict(inverter="optimise", stage="last"), "got --stage"),
        (dict(inverter="optimise", parametrise="pixels", pipeline="x"), "need no autoencoder"),
        (dict(parametrise="pixels"), "got --parametrise"),
        (dict(inverter="siglip2", backbone="tiny/vit"), "has its own backbone"),
    ],
)
def test_settings_that_it_does_not_have_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        name_inverter(SampleSettings(**settings))


def test_a_prior_that_is_none_is_refused(base, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("optimise", "guided"):
        with pytest.raises(InputError, match="must be a Stable Diffusion folder"):
            fi.load_inverter(name, pipeline=str(tmp_path / "empty"), device="cpu")


def test_guided_takes_no_more_steps_than_the_prior_has(base) -> None:
    with pytest.raises(InputError, match="steps must be at most 1000"):
        fi.load_inverter("guided", steps=1001, device="cpu")
