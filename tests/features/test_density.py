"""The score of a map, its p-value, and what is out of scope."""

from __future__ import annotations

import math

import pytest
import torch

from featinv_diffusion.errors import InputError
from featinv_diffusion.features import interpolate, paste, permute_cells
from featinv_diffusion.features.map_summary import summarise
from featinv_diffusion.features.natural_maps import (
    Calibration,
    MapDensity,
    fit_density,
    tail_p_values,
)
from tests.features.natural import CHANNELS, GRID, make_maps

N_FITTED = 600


@pytest.fixture(scope="module")
def density() -> MapDensity:
    return fit_density(make_maps(N_FITTED, 1).split(50))


@pytest.fixture(scope="module")
def calibration(density: MapDensity) -> Calibration:
    return Calibration(density.distance(make_maps(399, 2)), torch.zeros(0))


def test_tail_p_values_worked_by_hand():
    reference = torch.tensor([3.0, 1.0, 2.0, 2.0])
    scores = torch.tensor([0.5, 1.0, 2.0, 2.5, 3.0, 9.0])
    expected = [5 / 5, 5 / 5, 4 / 5, 2 / 5, 2 / 5, 1 / 5]
    assert tail_p_values(scores, reference).tolist() == pytest.approx(expected)


def test_distance_is_that_of_mahalanobis(density: MapDensity):
    figures = summarise(make_maps(N_FITTED, 1), density.basis).double()
    maps = make_maps(7, 3)
    centred = summarise(maps, density.basis).double() - figures.mean(dim=0)
    covariance = torch.cov(figures.T)
    covariance += torch.diag(1e-3 * covariance.diag() + 1e-9)
    expected = (centred * torch.linalg.solve(covariance, centred.T).T).sum(dim=1)
    assert torch.allclose(density.distance(maps).double(), expected, rtol=1e-2)


def test_batches_do_not_matter(density: MapDensity):
    other = fit_density(make_maps(N_FITTED, 1).split(77))
    maps = make_maps(5, 3)
    assert torch.allclose(other.distance(maps), density.distance(maps), rtol=1e-2)


def test_p_values_of_new_natural_maps_are_uniform(density, calibration):
    p_values = calibration.of_maps(density.distance(make_maps(400, 4)))
    for level in (0.05, 0.2, 0.5, 0.8):
        error = math.sqrt(level * (1 - level) * (1 / 400 + 1 / 399))
        assert (p_values <= level).double().mean().item() == pytest.approx(level, abs=4 * error)


def test_maps_that_are_not_natural_are_out_of_scope(density, calibration):
    maps = make_maps(100, 5)
    other = make_maps(100, 6)
    generator = torch.Generator().manual_seed(0)
    right = (torch.arange(GRID[1]) >= GRID[1] // 2).expand(GRID)
    edits = {
        "permuted": permute_cells(maps, generator),
        "amplified": 4 * maps,
        "attenuated": 0.1 * maps,
        "noise": 1 + torch.randn(maps.shape, generator=generator),
        "zeros": torch.zeros(1, CHANNELS, *GRID),
    }
    for name, edited in edits.items():
        p_values = calibration.of_maps(density.distance(edited))
        assert (p_values < 0.05).double().mean() > 0.9, name
    natural = density.distance(maps)
    for joined in (interpolate(maps, other, 0.5), paste(maps, other, right)):
        higher = density.distance(joined)[:, None] > natural
        assert higher.double().mean() > 0.6  # these maps are almost linear and have seams


def test_reconstructions_join_both_tails(density):
    """By the definition, with each held-out map left out of its own reference."""
    generator = torch.Generator().manual_seed(0)
    distances, cosines = (torch.rand(n, generator=generator) for n in (150, 120))
    found = Calibration(distances, cosines).of_reconstructions(
        torch.tensor([0.5, 0.99, 2.0]), torch.tensor([0.5, 0.01, 0.5])
    )

    def product(distance: float, cosine: float, skip: int | None = None) -> float:
        higher = sum(d >= distance for i, d in enumerate(distances.tolist()) if i != skip)
        lower = sum(c <= cosine for i, c in enumerate(cosines.tolist()) if i != skip)
        return (1 + higher) / 151 * (1 + lower) / 121

    held = [
        product(d, c, skip=i)
        for i, (d, c) in enumerate(zip(distances.tolist(), cosines.tolist(), strict=False))
    ]
    expected = []
    for distance, cosine in ((0.5, 0.5), (0.99, 0.01), (2.0, 0.5)):
        value = product(torch.tensor(distance).item(), torch.tensor(cosine).item())
        expected.append((1 + sum(other <= value * (1 + 1e-9) for other in held)) / 121)
    assert found.tolist() == pytest.approx(expected)
    assert found[1] < 0.05 < found[0]


def test_a_poor_reconstruction_lowers_the_p_value(density, calibration):
    distances = calibration.distances
    both = Calibration(distances, torch.linspace(0.2, 0.9, 399))
    typical = distances.median()[None]
    poor, good = (both.of_reconstructions(typical, torch.tensor([c])).item() for c in (0.0, 0.9))
    assert poor < 0.05 < 0.3 < good


@pytest.mark.parametrize(("n", "r"), [(98, 0), (200, 98), (100, 101)])
def test_too_little_calibration_is_refused(n: int, r: int):
    with pytest.raises(InputError, match="at least 99"):
        Calibration(torch.rand(n), torch.rand(r))


def test_too_few_maps_to_fit_are_refused():
    with pytest.raises(InputError, match="images, got 60"):
        fit_density(make_maps(60, 1).split(50))
    with pytest.raises(InputError, match="got none"):
        fit_density([])
