"""The figures that sum a map up: worked by hand, and what edits do to them."""

from __future__ import annotations

import math

import pytest
import torch

from featinv_diffusion.errors import InputError
from featinv_diffusion.features import permute_cells
from featinv_diffusion.features.map_summary import CellBasis, fit_basis, summarise
from tests.features.natural import CHANNELS, GRID, make_maps


def test_coordinates_of_the_fitted_cells_are_standardised_and_the_axes_orthonormal():
    maps = make_maps(80, 1)
    basis = fit_basis(maps)
    assert torch.allclose(basis.axes.T @ basis.axes, torch.eye(CHANNELS), atol=1e-5)
    assert (basis.std.diff() <= 0).all()
    cells = basis.coordinates(maps).permute(0, 2, 3, 1).flatten(0, 2).double()
    assert torch.allclose(cells.mean(dim=0), torch.zeros(CHANNELS).double(), atol=1e-4)
    assert torch.allclose(torch.cov(cells.T), torch.eye(CHANNELS).double(), atol=1e-3)
    assert torch.allclose(basis.place_mean, basis.coordinates(maps).mean(dim=0), atol=1e-5)


def test_axes_without_variance_are_left_out():
    flat = make_maps(80, 1)
    flat[:, -1] = flat[:, 0]
    flat[:, -2] = 3.0
    assert fit_basis(flat).axes.shape == (CHANNELS, CHANNELS - 2)


def test_figures_worked_by_hand():
    """Two channels, a row of two cells: (3, 0) and (1, 2), about the origin with unit axes."""
    basis = CellBasis(
        mean=torch.zeros(2),
        axes=torch.eye(2),
        std=torch.ones(2),
        place_mean=torch.tensor([[[1.0, 1.0]], [[0.0, 2.0]]]),
        cell_centres=torch.tensor([[3.0, 1.0], [1.0, 2.0]]),
        map_centres=torch.tensor([[2.0, 0.0]]),
    )
    features = torch.tensor([[[[3.0, 1.0]], [[0.0, 2.0]]]])
    logs = [math.log(9), math.log(5)]
    expected = [
        sum(logs) / 2,  # mean log of square norms
        math.log(((logs[0] - logs[1]) / 2) ** 2),  # their variance
        math.log(1e-4 * (9 + 5) / 2 + 1e-8),  # nothing lies off the axes: rounding
        math.log(0.5),  # square distances of cells to the nearest centres: 1 and 0
        math.log(1),  # the mean (2, 1) to (2, 0)
        0.0,  # one seam, as sharp as the mean of all
        0.0,  # both cells differ as much from their neighbour
        math.log(14 / 4),  # energy
        math.log((81 + 1 + 16) / 4) - 2 * math.log(14 / 4),  # kurtosis
        math.log((4 + 1) / 2),  # of the mean
        math.log(4 / 4),  # off the place's mean
        math.log((4 + 4) / 2),  # neighbours in a row
    ]
    assert summarise(features, basis)[0].tolist() == pytest.approx(expected, abs=1e-5)


def test_permuted_cells_change_differences_and_places_alone():
    maps = make_maps(20, 2)
    basis = fit_basis(make_maps(80, 1))
    before = summarise(maps, basis)
    after = summarise(permute_cells(maps, torch.Generator().manual_seed(0)), basis)
    n_bands, per_band = len(basis.bands), (before.shape[1] - 7) // len(basis.bands)
    same = [*range(5), *(7 + per_band * band + k for band in range(n_bands) for k in range(3))]
    assert per_band == 8  # energy, kurtosis, mean, off place; lags 1 and 3 down, 1 and 4 across
    assert torch.allclose(before[:, same], after[:, same], atol=1e-3)
    first_differences = after[:, 11] - before[:, 11]
    assert (first_differences > 0.5).float().mean() > 0.9


def test_the_oddest_cell_worked_by_hand():
    """4 amid zeros: 16 there, (4/3)² at its four neighbours, 0 at corners."""
    maps = torch.zeros(1, 1, 3, 3)
    maps[0, 0, 1, 1] = 4
    one = torch.ones(1)
    basis = CellBasis(0 * one, one[:, None], one, 0 * maps[0], one[:, None], one[:, None])
    mean = (16 + 4 * 16 / 9) / 9
    assert summarise(maps, basis)[0, 6].item() == pytest.approx(math.log(16 / mean), abs=1e-5)


def test_centres_are_of_the_first_axes_alone():
    generator = torch.Generator().manual_seed(0)
    basis = fit_basis(torch.randn(40, 80, 2, 3, generator=generator))
    assert basis.axes.shape == (80, 80)
    assert basis.cell_centres.shape[1] == basis.map_centres.shape[1] == 64
    assert basis.place_mean.shape == (64, 2, 3)
    assert basis.frame.shape == (80, 64)
    assert [(band.start, band.stop) for band in basis.bands] == [
        (0, 4),
        (4, 12),
        (12, 28),
        (28, 64),
    ]
    assert [(band.start, band.stop) for band in basis.fine_bands] == [(64, 80)]


def test_maps_of_zeros_and_of_one_cell_have_finite_figures():
    basis = fit_basis(make_maps(80, 1))
    assert summarise(torch.zeros(2, CHANNELS, *GRID), basis).isfinite().all()
    single = make_maps(200, 1)[:, :, :1, :1]
    assert summarise(single, fit_basis(single)).isfinite().all()


def test_the_input_is_left_as_it_was_and_precision_does_not_matter():
    basis, maps = fit_basis(make_maps(80, 1)), make_maps(3, 2)
    kept = maps.clone()
    assert torch.allclose(summarise(maps.double(), basis), summarise(maps, basis))
    assert torch.equal(maps, kept)


def test_maps_that_are_all_the_same_are_refused():
    with pytest.raises(InputError, match="must differ"):
        fit_basis(torch.ones(5, 3, 2, 2))
