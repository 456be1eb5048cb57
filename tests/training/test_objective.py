import pytest
import torch
from diffusers import DDPMScheduler

from featinv_diffusion.diffusion.objective import (
    draw_dropout,
    gaussian_floor,
    make_noise_scheduler,
    prediction_target,
)
from featinv_diffusion.training.config import OptimConfig
from featinv_diffusion.training.latents import SampleNoise
from featinv_diffusion.training.loop import learning_rate
from tests import tiny


def test_noise_belongs_to_the_sample_not_to_the_batch() -> None:
    cpu = torch.device("cpu")
    together, alone = SampleNoise([1, 2, 3], cpu), SampleNoise([3], cpu)
    assert torch.equal(together.normal(4, 2)[2], alone.normal(4, 2)[0])
    assert torch.equal(together.timesteps(1000)[2], alone.timesteps(1000)[0])
    assert torch.equal(together.uniform(2)[2], alone.uniform(2)[0])


def test_joint_dropout_hides_both_and_independent_each_alone() -> None:
    uniform = torch.rand(4000, 2, generator=torch.Generator().manual_seed(0))
    features, prompt = draw_dropout(uniform, 0.15, "joint")
    assert torch.equal(features, prompt)
    assert float((~features).float().mean()) == pytest.approx(0.15, abs=0.02)
    features, prompt = draw_dropout(uniform, 0.15, "independent")
    assert float((~features & ~prompt).float().mean()) == pytest.approx(0.15**2, abs=0.01)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_target_recovers_the_latents(kind: str) -> None:
    scheduler = DDPMScheduler(prediction_type=kind)
    latents, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    t = torch.tensor([3, 700])
    a = scheduler.alphas_cumprod[t].sqrt()[:, None, None, None]
    b = (1 - scheduler.alphas_cumprod[t]).sqrt()[:, None, None, None]
    noisy = a * latents + b * noise
    target = prediction_target(scheduler, latents, noise, t)
    recovered = (noisy - b * target) / a if kind == "epsilon" else a * noisy - b * target
    torch.testing.assert_close(recovered, latents, atol=1e-4, rtol=1e-4)


def test_unknown_prediction_type_is_refused() -> None:
    scheduler = DDPMScheduler(prediction_type="sample")
    x = torch.zeros(1, 1, 1, 1)
    with pytest.raises(ValueError, match="'sample'"):
        prediction_target(scheduler, x, x, torch.tensor([0]))


def test_noise_scheduler_has_the_sampler_s_betas_and_the_known_floor() -> None:
    scheduler = make_noise_scheduler(tiny.make_scheduler())
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    expected = torch.cumprod(1 - betas, 0)
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), expected, rtol=1e-4, atol=1e-6)
    assert gaussian_floor(scheduler) == pytest.approx(float(expected.mean()), abs=1e-4)


def test_learning_rate_by_hand() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=2, schedule="linear")
    rates = [learning_rate(config, step, 6) for step in range(6)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25])
    cosine = OptimConfig(lr=1.0, schedule="cosine")
    assert learning_rate(cosine, 5, 10) == pytest.approx(0.5)
    assert learning_rate(OptimConfig(lr=1.0), 5, 10) == 1.0
