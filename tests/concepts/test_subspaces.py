"""Decompositions against least squares, angles against hand-worked planes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featinv_diffusion.concepts.base import (
    check_direction,
    completeness,
    decompose,
    orthogonalise,
    principal_angles,
    principal_basis,
)
from featinv_diffusion.errors import InputError
from tests.concepts.planted import make_generator

EYE = torch.eye(4, dtype=torch.float64)


@settings(max_examples=20, deadline=None)
@given(k=st.integers(1, 9), rank=st.integers(1, 6), seed=st.integers(0, 99))
def test_any_vector_is_the_sum_of_its_parts_whatever_the_rank(k, rank, seed):
    generator = make_generator(seed)
    rows = torch.randn(k, rank, generator=generator) @ torch.randn(rank, 6, generator=generator)
    split = decompose(rows)
    assert split.rank == min(k, rank)
    assert len(split.complement) == 6 - split.rank
    rows = rows.double()
    identity = rows.T @ split.encoder + split.complement.T @ split.complement
    torch.testing.assert_close(identity, torch.eye(6, dtype=torch.float64), atol=1e-6, rtol=0)


def test_coefficients_are_those_of_least_norm():
    rows = torch.randn(7, 5, generator=make_generator()).double()
    vector = torch.randn(5, generator=make_generator(1)).double()
    expected = torch.linalg.pinv(rows.T) @ vector
    torch.testing.assert_close(decompose(rows).encoder @ vector, expected)


def test_principal_basis_through_the_origin_holds_the_mean_and_a_centred_one_does_not():
    spread = torch.randn(200, 1, generator=make_generator()) * EYE[1].float()
    rows = 5 * EYE[0].float() + spread
    uncentred = principal_basis(rows, centred=False, threshold=0.01)
    centred = principal_basis(rows, centred=True, threshold=0.01)
    assert principal_angles(uncentred, EYE[:2]).max() < 1e-5
    assert principal_angles(centred, EYE[1:2]).max() < 1e-5


def test_directions_below_the_share_of_the_largest_are_dropped():
    scales = torch.tensor([1.0, 0.5, 0.23, 0.22])  # squares: 1, 0.25, 0.0529, 0.0484
    rows = torch.cat([torch.diag(scales), -torch.diag(scales)])
    for centred in (True, False):
        basis = principal_basis(rows, centred=centred)
        torch.testing.assert_close(basis.abs(), EYE[:3])


def test_rows_without_spread_have_no_centred_direction():
    rows = torch.ones(5, 4)
    assert len(principal_basis(rows, centred=True)) == 0
    assert len(principal_basis(rows, centred=False)) == 1


def test_angles_of_two_planes():
    tilt = torch.tensor(0.3, dtype=torch.float64)
    tilted = torch.stack([EYE[0], tilt.cos() * EYE[1] + tilt.sin() * EYE[2]])
    torch.testing.assert_close(
        principal_angles(EYE[:2], tilted), torch.tensor([0.0, 0.3]).double(), atol=1e-7, rtol=0
    )
    assert float(principal_angles(EYE[:1], EYE[3:])) == pytest.approx(math.pi / 2)
    tiny = EYE[0] + 1e-6 * EYE[1]
    assert float(principal_angles(EYE[:1], tiny[None])) == pytest.approx(1e-6, rel=1e-3)


def test_completeness_is_a_norm():
    direction = torch.tensor([3.0, 0.0, 4.0, 0.0])
    assert completeness(EYE[:2], direction) == pytest.approx(0.6)
    with pytest.raises(InputError, match="finite and not zero"):
        completeness(EYE[:2], torch.zeros(4))
    with pytest.raises(InputError, match="one vector of 4 channels"):
        check_direction(torch.ones(5), 4)


def test_the_most_complete_subspace_comes_first_and_one_inside_the_others_is_left_out():
    direction = torch.tensor([1.0, 3.0, 2.0, 0.0])
    diagonal = (EYE[0] + EYE[1])[None] / math.sqrt(2)
    bases, order = orthogonalise([EYE[:1], diagonal, EYE[1:2], EYE[2:3]], direction)
    assert order[:2] == [2, 3]
    assert order[2] in (0, 1)  # what the chosen ones leave of both is the first axis
    torch.testing.assert_close(torch.cat(bases).abs(), EYE[[1, 2, 0]], atol=1e-6, rtol=0)
