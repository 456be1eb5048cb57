"""Certainty where the posterior is known: coverage, and planted blindness that must show."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from featinv_diffusion.errors import InputError
from featinv_diffusion.features.pixel_operations import GREY_WEIGHTS, to_grey
from featinv_diffusion.metrics.certainty import (
    LEVELS,
    PARTS,
    Certainty,
    CertaintyModel,
    fit_certainty_models,
    to_luminance_chroma,
    to_parts,
)

N, K, SIZE, GRID, FLAW = 80, 4, 32, 8, 0.03
SCALE = torch.ones(3)
Blind = Callable[[Tensor], Tensor]
Picture = tuple[Tensor, Tensor, Tensor, Tensor]


def draw_pictures(n: int, generator: torch.Generator) -> Tensor:
    """Coloured blobs around mid-grey; far from 0 and 1, so that nothing is clamped."""
    coarse = torch.randn(n, 3, 8, 8, generator=generator)
    return 0.5 + 0.1 * F.interpolate(coarse, SIZE, mode="bilinear")


def sees_all(images: Tensor) -> Tensor:
    return images


def sees_three_quadrants(images: Tensor) -> Tensor:
    seen = images.clone()
    seen[..., : SIZE // 2, : SIZE // 2] = 0.5
    return seen


def observe(seed: int, blind: Blind, n: int = N, flaw: float = FLAW) -> Iterator[Picture]:
    """Yields pictures with samples that keep exactly what the blind backbone saw.

    What it did not see comes from another picture of the same kind: the true posterior, for pixels
    of `draw_pictures` are independent over channels and over distant places. All samples of a
    picture share a flaw, which their spread cannot show.
    """
    generator = torch.Generator().manual_seed(seed)
    for image in draw_pictures(n, generator).split(1):
        seen = blind(image)
        others = draw_pictures(K, generator)
        shared = flaw * torch.randn(1, 3, SIZE, SIZE, generator=generator)
        own = flaw * torch.randn(K, 3, SIZE, SIZE, generator=generator)
        samples = seen + (others - blind(others)) + shared + own
        yield image, cells(image), samples, cells(samples)


def cells(images: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(images, GRID)


@cache
def fitted(blind: Blind) -> CertaintyModel:
    (model,) = fit_certainty_models(observe(0, blind), [K], SCALE)
    return model


@cache
def judged(blind: Blind) -> list[tuple[dict[str, Tensor], Certainty]]:
    found = []
    for image, maps, samples, features in observe(1, blind):
        truth = {part: value[0] for part, value in to_parts(image, maps, SCALE).items()}
        found.append((truth, fitted(blind).judge(samples, features)))
    return found


def mean_determined(blind: Blind, part: str) -> Tensor:
    return torch.stack([c.determined(part) for _, c in judged(blind)]).mean(dim=0)


def test_luminance_and_chroma_are_those_of_rec_601():
    red, grey = torch.tensor([1.0, 0, 0]), torch.full((3,), 0.3)
    found = to_luminance_chroma(torch.stack([red, grey])[:, :, None, None])[:, :, 0, 0]
    torch.testing.assert_close(found[0], torch.tensor([0.2989, -0.1686, 0.4999]), atol=1e-3, rtol=0)
    torch.testing.assert_close(found[1], torch.tensor([0.3, 0, 0]), atol=1e-3, rtol=0)


@pytest.mark.parametrize("blind", [sees_all, to_grey, sees_three_quadrants])
def test_intervals_hold_the_truth_as_often_as_they_say(blind: Blind):
    """Also where all samples share a flaw, so that their spread is too small for the error."""
    found = judged(blind)
    for part in PARTS:
        for level in LEVELS:
            inside = [c.holds(part, truth[part], level).double().mean() for truth, c in found]
            assert torch.stack(inside).mean().item() == pytest.approx(level, abs=0.04)


def test_expected_errors_are_those_that_are_made():
    found = judged(sees_all)
    for part in PARTS:
        expected = torch.stack([c.error[part].square() for _, c in found]).mean()
        made = torch.stack([c.spread.distance(part, t[part]).square() for t, c in found]).mean()
        assert expected.item() == pytest.approx(made.item(), rel=0.1)
    spread = torch.stack([c.spread.variance["luminance"] for _, c in found]).mean()
    flaw = torch.stack([c.error["luminance"].square() for _, c in found]).mean()
    assert flaw.item() == pytest.approx((1 + 1 / K) * spread.item(), rel=0.1)  # not spread / K


def test_a_backbone_that_sees_grey_leaves_colour_invented():
    weights = torch.tensor(GREY_WEIGHTS)
    error = FLAW**2 * (1 + 1 / K) * weights.square().sum()
    luminance = to_grey(draw_pictures(500, torch.Generator().manual_seed(2)))[:, 0]
    exact = 1 - error.item() / luminance.var(dim=0).mean().item()
    assert mean_determined(to_grey, "luminance").mean().item() == pytest.approx(exact, abs=0.03)
    for part in ("chroma", "cell_chroma"):
        assert mean_determined(to_grey, part).mean() < 0.05
        assert mean_determined(sees_all, part).mean() > 0.6


def test_a_backbone_that_is_blind_in_a_quadrant_leaves_it_invented():
    for part in ("luminance", "chroma", "cell_luminance", "cell_chroma"):
        shares = mean_determined(sees_three_quadrants, part)
        half = len(shares) // 2
        blind, seen = shares[:half, :half], shares[half:, half:]
        assert blind.mean() < 0.1
        assert seen.mean() > 0.6
        assert mean_determined(sees_all, part)[:half, :half].mean() > 0.6


def test_numbers_are_plain_and_whole():
    _, found = judged(sees_all)[0]
    numbers = found.numbers()
    assert numbers["n_samples"] == K
    assert numbers["n_calibration_images"] == N
    assert set(numbers["determined_share"]) == set(PARTS)
    assert numbers["determined_share"]["chroma"] == pytest.approx(
        1 - (found.error["chroma"].square().sum() / found.natural["chroma"].sum()).item()
    )
    assert [len(row) for row in numbers["determined_per_cell"]["cell_features"]] == [GRID] * GRID
    radii = numbers["interval_radius"]["luminance"]
    assert radii["0.5"] < radii["0.8"] < radii["0.95"]
    assert f"calibrated on {N} held-out pictures" in found.summary()


def test_what_cannot_be_calibrated_or_judged():
    with pytest.raises(InputError, match="At least 40 pictures"):
        fit_certainty_models(observe(0, sees_all, n=39), [K], SCALE)
    with pytest.raises(InputError, match="at least 2 samples"):
        fit_certainty_models(observe(0, sees_all), [1], SCALE)
    image, _, samples, features = next(observe(1, sees_all))
    with pytest.raises(InputError, match="calibrated for 4 samples, got 3"):
        fitted(sees_all).judge(samples[:3], features[:3])
    assert image.shape == (1, 3, SIZE, SIZE)
