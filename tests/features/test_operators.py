"""Operators against planted rotations, numpy's least squares and what theory says of each form."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from featinv_diffusion.errors import InputError
from featinv_diffusion.features.operator_methods import (
    METHODS,
    PairMoments,
    least_squares,
    orthogonal,
    self_adjoint,
    self_adjoint_direct,
    solve,
    to_unit_rows,
)
from featinv_diffusion.features.operators import MAX_POWER, Operator, apply_matrix
from featinv_diffusion.types import FeatureSpec

C, H, W = 12, 3, 4
SPEC = FeatureSpec("small", "last", C, (H, W))


def make_generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_matrix(n: int = C, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, n, dtype=torch.float64, generator=make_generator(seed))


def random_rotation(n: int = C, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(random_matrix(n, seed)).Q


def make_maps(n: int, seed: int = 0, c: int = C) -> torch.Tensor:
    """Maps whose channels have unequal scales, so that XᵀX is no multiple of the identity."""
    maps = torch.randn(n, c, H, W, dtype=torch.float64, generator=make_generator(seed))
    return maps * torch.linspace(0.2, 2, c, dtype=torch.float64)[:, None, None]


def turn(maps: torch.Tensor, matrix: torch.Tensor, noise: float = 0.0) -> torch.Tensor:
    """Location vectors at unit norm, times the matrix, plus noise of this deviation."""
    rows = maps.movedim(1, -1)
    rows = rows / rows.norm(dim=-1, keepdim=True) @ matrix
    drawn = torch.randn(rows.shape, dtype=rows.dtype, generator=make_generator(99))
    return (rows + noise * drawn).movedim(-1, 1)


def moments_of(x: torch.Tensor, y: torch.Tensor, size: int = 1000) -> PairMoments:
    moments = PairMoments(x.shape[1])
    for a, b in zip(x.split(size), y.split(size), strict=True):
        moments.update(a, b)
    return moments


def fitted(method: str = "orthogonal", noise: float = 0.0, **options) -> Operator:
    maps = make_maps(40)
    moments = moments_of(maps, turn(maps, random_rotation(), noise))
    return solve(moments, SPEC, "turn", method, **options)


# ---- moments -----------------------------------------------------------------------------------


def test_moments_are_sums_of_products_of_unit_vectors():
    maps, others = make_maps(5), make_maps(5, seed=1)
    moments = moments_of(maps, others)
    x, y = (m.permute(0, 2, 3, 1).reshape(-1, C).numpy() for m in (maps, others))
    x, y = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, y))
    for found, expected in ((moments.xx, x.T @ x), (moments.xy, x.T @ y), (moments.yy, y.T @ y)):
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)
    assert moments.n == 5 * H * W
    assert moments.xx.trace().item() == pytest.approx(moments.n)


@pytest.mark.parametrize("size", [1, 3, 7])
def test_streaming_equals_one_batch(size, monkeypatch):
    maps, others = make_maps(21), make_maps(21, seed=1)
    whole = moments_of(maps, others)
    monkeypatch.setattr("featinv_diffusion.features.operator_methods._BLOCK", 2 * H * W)
    parts = moments_of(maps, others, size)
    assert parts.n == whole.n
    for name in ("xx", "xy", "yy"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name))


def test_single_precision_features_are_summed_in_double():
    maps = make_maps(50).float()
    assert moments_of(maps, maps).xx.dtype == torch.float64
    exact = to_unit_rows(maps)
    torch.testing.assert_close(moments_of(maps, maps).xx, exact.T @ exact, rtol=1e-14, atol=1e-13)


def test_a_vector_of_zeros_adds_nothing():
    maps = make_maps(3)
    maps[:, :, 0, 0] = 0
    moments = moments_of(maps, maps)
    assert moments.n == 3 * H * W
    assert moments.xx.trace().item() == pytest.approx(moments.n - 3)


def test_the_residual_is_that_of_the_rows():
    maps = make_maps(9)
    y = turn(maps, random_rotation(), noise=0.3)
    moments, matrix = moments_of(maps, y), random_matrix(seed=5)
    rows, wanted = to_unit_rows(maps), to_unit_rows(y)
    expected = (rows @ matrix - wanted).square().sum() / wanted.square().sum()
    assert moments.residual(matrix) == pytest.approx(expected.item())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value):
    maps = make_maps(2)
    broken = maps.clone()
    broken[1, 0, 0, 0] = value
    for pair in ((broken, maps), (maps, broken)):
        with pytest.raises(InputError, match="must be finite"):
            PairMoments(C).update(*pair)


def test_pairs_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="one shape and 12 channels"):
        PairMoments(C).update(make_maps(2), make_maps(3))
    with pytest.raises(InputError, match="one shape and 12 channels"):
        PairMoments(C).update(make_maps(2, c=5), make_maps(2, c=5))


# ---- solvers -----------------------------------------------------------------------------------


def test_procrustes_recovers_a_planted_rotation():
    operator = fitted()
    torch.testing.assert_close(operator.matrix, random_rotation())
    assert operator.record.residual == pytest.approx(0, abs=1e-12)
    assert operator.record.residual_of_identity > 0.5
    assert (operator.record.rank, operator.record.n_locations) == (C, 40 * H * W)


def test_its_error_in_noise_falls_as_one_over_the_square_root_of_n():
    errors = []
    for n in (30, 480):
        maps = make_maps(n)
        found = orthogonal(moments_of(maps, turn(maps, random_rotation(), noise=0.3)).xy)
        errors.append((found.matrix - random_rotation()).norm().item())
        torch.testing.assert_close(found.matrix @ found.matrix.T, torch.eye(C).double())
    assert errors[1] < 0.02 * C
    assert 2 < errors[0] / errors[1] < 8  # √16 = 4


def test_no_rotation_near_it_fits_better():
    maps = make_maps(30)
    moments = moments_of(maps, turn(maps, random_rotation(), noise=0.5))
    best = orthogonal(moments.xy).matrix
    for seed in range(20):
        skew = random_matrix(seed=seed)
        other = best @ torch.linalg.matrix_exp(0.05 * (skew - skew.T))
        assert moments.residual(best) < moments.residual(other)


def test_the_self_adjoint_forms_square_to_the_identity():
    maps = make_maps(30)
    xy = moments_of(maps, turn(maps, random_rotation(), noise=0.2)).xy
    for solver in (self_adjoint, self_adjoint_direct):
        matrix = solver(xy).matrix
        assert matrix.equal(matrix.T)
        torch.testing.assert_close(matrix @ matrix, torch.eye(C).double())


def test_each_self_adjoint_form_is_best_at_what_it_optimises_and_they_differ():
    maps = make_maps(30)
    xy = moments_of(maps, turn(maps, random_rotation(), noise=0.2)).xy
    rotation = orthogonal(xy).matrix
    nearest, direct = self_adjoint(xy).matrix, self_adjoint_direct(xy).matrix
    assert (nearest - direct).norm() > 0.1
    assert (nearest - rotation).norm() < (direct - rotation).norm()
    assert (direct * xy).sum() > (nearest * xy).sum()


def test_they_agree_where_features_are_isotropic_or_the_rotation_is_a_reflection():
    rotation = random_rotation()
    torch.testing.assert_close(
        self_adjoint(3 * rotation).matrix, self_adjoint_direct(rotation).matrix
    )
    axis = random_rotation(seed=3)[:, :2]
    reflection = torch.eye(C).double() - 2 * axis @ axis.T
    axes = random_rotation(seed=4)
    scales = axes @ torch.diag(torch.linspace(1, 9, C).double()) @ axes.T
    for xx in (torch.eye(C).double(), scales):
        both = (solver(xx @ reflection).matrix for solver in (self_adjoint, orthogonal))
        for matrix in both:
            torch.testing.assert_close(matrix, reflection)
    # Only where scales and reflection commute is XᵀY symmetric, and then it is its own sign.
    alike = torch.eye(C).double() + 4 * axis @ axis.T
    torch.testing.assert_close(self_adjoint_direct(alike @ reflection).matrix, reflection)


def test_an_eigenvalue_of_zero_counts_as_one():
    quarter = torch.eye(C).double()
    quarter[:2, :2] = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])  # symmetric part: 0 in this plane
    for solver in (self_adjoint, self_adjoint_direct):
        torch.testing.assert_close(solver(quarter).matrix, torch.eye(C).double())
    turns = torch.block_diag(*[quarter[:2, :2]] * (C // 2))
    found = self_adjoint_direct(turns)
    torch.testing.assert_close(found.matrix, torch.eye(C).double())
    assert (found.rank, found.condition_number) == (0, None)


def test_directions_that_no_feature_has_are_turned_as_little_as_can_be(caplog):
    maps = make_maps(40)
    maps[:, -3:] = 0  # X spans the first 9 axes
    planted = torch.block_diag(random_rotation(C - 3), torch.eye(3))
    moments = moments_of(maps, turn(maps, planted))
    with caplog.at_level(logging.WARNING):
        operator = solve(moments, SPEC, "turn")
    torch.testing.assert_close(operator.matrix, planted)
    assert (operator.record.rank, operator.record.condition_number) == (C - 3, None)
    assert "determine 9 of 12 directions" in caplog.text


@pytest.mark.parametrize("ridge", [0.0, 1e-6, 0.3])
def test_linear_is_numpys_least_squares(ridge):
    maps = make_maps(30)
    y = turn(maps, random_matrix(), noise=0.2)
    rows, wanted = to_unit_rows(maps).numpy(), to_unit_rows(y).numpy()
    weight = ridge * (rows**2).sum() / C
    above = np.vstack([rows, np.sqrt(weight) * np.eye(C)])  # a ridge is C rows more
    below = np.sqrt(weight) * np.eye(C)  # that the identity fits
    expected, *_ = np.linalg.lstsq(above, np.vstack([wanted, below]), rcond=None)
    found = solve(moments_of(maps, y), SPEC, "any", "linear", ridge=ridge)
    np.testing.assert_allclose(found.matrix.numpy(), expected, atol=1e-9)
    condition = np.linalg.cond(rows) ** 2
    assert found.record.condition_number == pytest.approx(condition, rel=1e-6)
    assert (found.record.ridge, found.record.rank) == (ridge, C)


def test_linear_without_a_ridge_refuses_what_is_singular_and_with_one_says_it(caplog):
    maps = make_maps(40)
    maps[:, -1] = 0
    planted = random_matrix()
    moments = moments_of(maps, turn(maps, planted))
    with pytest.raises(InputError, match=r"span 11\. Set a ridge"):
        solve(moments, SPEC, "any", "linear", ridge=0)
    with caplog.at_level(logging.WARNING):
        found = solve(moments, SPEC, "any", "linear", ridge=1e-9)
    assert "determine 11 of 12 directions" in caplog.text
    assert (found.record.rank, found.record.condition_number) == (C - 1, None)
    torch.testing.assert_close(found.matrix[-1], torch.eye(C).double()[-1])


@pytest.mark.parametrize("ridge", [1e-9, 1e-6, 1e-2])
def test_linear_leaves_the_direction_that_a_layer_norm_removes(ridge):
    maps = torch.randn(300, C, H, W, generator=make_generator())  # float32, as a backbone gives it
    maps = maps - maps.mean(1, keepdim=True)
    planted = random_rotation(C - 1, seed=2).float()
    basis = torch.linalg.qr(torch.cat([torch.ones(C, 1), torch.eye(C)[:, 1:]], 1)).Q
    within = basis @ torch.block_diag(torch.ones(1, 1), planted) @ basis.T
    others = torch.einsum("bchw,cd->bdhw", maps, within)
    found = solve(moments_of(maps, others), SPEC, "any", "linear", ridge=ridge)
    assert (found.record.rank, found.record.condition_number) == (C - 1, None)
    ones = torch.ones(C, dtype=torch.float64)
    torch.testing.assert_close(ones @ found.matrix, ones)
    assert torch.linalg.eigvals(found.matrix).abs().min() > 0.9
    torch.testing.assert_close(found.matrix, within.double(), atol=3 * ridge + 1e-5, rtol=0)


def test_a_great_ridge_leaves_features_as_they_are():
    maps = make_maps(30)
    moments = moments_of(maps, turn(maps, random_matrix()))
    found = solve(moments, SPEC, "any", "linear", ridge=1e9)
    torch.testing.assert_close(found.matrix, torch.eye(C).double(), atol=1e-7, rtol=0)


def test_a_condition_number_of_a_rotation_is_that_of_the_products():
    maps = make_maps(40)
    moments = moments_of(maps, turn(maps, random_rotation()))
    expected = np.linalg.cond(moments.xy.numpy())
    assert orthogonal(moments.xy).condition_number == pytest.approx(expected)
    values = np.abs(np.linalg.eigvalsh((moments.xy + moments.xy.T).numpy()))
    expected = values.max() / values.min()
    assert self_adjoint_direct(moments.xy).condition_number == pytest.approx(expected)


def test_a_ridge_does_not_hide_rank_and_condition_number():
    flat = torch.diag(torch.tensor([1.0] + [0.0] * (C - 1), dtype=torch.float64))
    found = least_squares(flat, flat, 1e-3)
    assert (found.rank, found.condition_number) == (1, None)
    steep = torch.diag(torch.logspace(0, -9, C, dtype=torch.float64))
    found = least_squares(steep, steep, 1e-3)
    assert (found.rank, found.condition_number) == (C, pytest.approx(1e9))


# ---- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_fewer_locations_than_channels_are_rank_deficient(method):
    wide = replace(SPEC, channels=30)
    maps = make_maps(2, c=30)
    with pytest.raises(InputError, match="as many locations, got 24"):
        solve(moments_of(maps, maps), wide, "any", method)


def test_what_cannot_be_solved():
    maps = make_maps(10)
    moments = moments_of(maps, maps)
    with pytest.raises(InputError, match="did you mean 'orthogonal'"):
        solve(moments, SPEC, "any", "orthogonl")
    with pytest.raises(InputError, match="finite number, at least 0"):
        solve(moments, SPEC, "any", "linear", ridge=-1)
    with pytest.raises(InputError, match="got 12 channels"):
        solve(moments, replace(SPEC, channels=5), "any")
    zeros = torch.zeros(10, C, H, W)
    with pytest.raises(InputError, match="not all be zero"):
        solve(moments_of(zeros, zeros), SPEC, "any")


def test_features_of_another_spec_are_refused():
    operator = fitted()
    with pytest.raises(InputError, match="acts on a map of small"):
        operator.edit(spec=replace(SPEC, layer="blocks.3"))
    with pytest.raises(InputError, match="acts on a map of small"):
        operator.edit(spec=replace(SPEC, grid=(4, 3)))
    operator.edit(spec=replace(SPEC, backbone="the same by another name"))
    with pytest.raises(InputError, match="must have shape"):
        operator.edit()(make_maps(2, c=5))
    with pytest.raises(InputError, match="must be finite"):
        operator.edit()(torch.full((1, C, H, W), float("nan")))


def test_other_weights_are_refused_where_both_are_known():
    operator = fitted(backbone_sha256="a")
    operator.check(SPEC)
    operator.check(SPEC, "a")
    fitted().check(SPEC, "b")
    with pytest.raises(InputError, match=r"weights of small.* features come from other weights"):
        operator.check(SPEC, "b")


@pytest.mark.parametrize("power", [-1, 1.5, True, "2", MAX_POWER + 1, 10**20])
def test_a_power_is_a_whole_number(power):
    with pytest.raises((InputError, TypeError), match="power"):
        fitted().edit(power)


def test_a_power_that_overflows_is_refused():
    operator = replace(fitted(), matrix=3.0 * torch.eye(C).double())
    assert operator.power(100).isfinite().all()
    with pytest.raises(InputError, match="to the power 700 must be finite"):
        operator.edit(700)


@pytest.mark.parametrize("factor", [0.7, 1.3])
def test_powers_beyond_float32_are_applied_all_the_same(factor):
    rotation = random_rotation()
    scaled = replace(fitted(), matrix=factor * rotation)
    maps = make_maps(1).float()
    expected = replace(fitted(), matrix=rotation).edit(600)(maps)  # 0.7⁶⁰⁰ = 1e-93, 1.3⁶⁰⁰ = 2e68
    torch.testing.assert_close(scaled.edit(600)(maps), expected, atol=1e-5, rtol=0)


def test_a_matrix_that_is_none_is_refused():
    record = fitted().record
    for matrix in (torch.eye(5), torch.eye(C).half(), torch.full((C, C), float("inf"))):
        with pytest.raises(InputError, match="must be a finite 12×12 matrix"):
            Operator(matrix, SPEC, record)


# ---- edits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_an_edit_keeps_the_norm_of_each_location_and_its_input(method):
    maps = 7 * make_maps(3, seed=8)
    before = maps.clone()
    after = fitted(method, noise=0.3).edit()(maps)
    torch.testing.assert_close(after.norm(dim=1), maps.norm(dim=1))
    assert (after - maps).abs().max() > 0.1
    assert maps.equal(before)


def test_an_edit_is_a_row_times_the_matrix():
    operator, maps = fitted(), make_maps(2, seed=8)
    after = operator.edit()(maps)
    torch.testing.assert_close(after[1, :, 2, 3], maps[1, :, 2, 3] @ operator.matrix)


def test_linear_operators_are_scaled_to_unit_norm_after_them():
    operator, maps = fitted("linear", noise=0.5), make_maps(2, seed=8)
    row = maps[1, :, 2, 3] @ operator.matrix
    expected = row / row.norm() * maps[1, :, 2, 3].norm()
    torch.testing.assert_close(operator.edit()(maps)[1, :, 2, 3], expected)


@pytest.mark.parametrize("method", ["orthogonal", "linear"])
def test_powers_are_repeated_edits(method):
    operator, maps = fitted(method, noise=0.3), make_maps(2, seed=8)
    repeated = maps
    torch.testing.assert_close(operator.edit(0)(maps), maps)
    for power in (1, 2, 3, 4):
        repeated = operator.edit()(repeated)
        torch.testing.assert_close(operator.edit(power)(maps), repeated)


def test_zeros_stay_zeros_and_half_precision_stays_half():
    maps = make_maps(1)
    maps[:, :, 1, 1] = 0
    after = fitted().edit()(maps.half())
    assert after.dtype == torch.float16
    assert after[:, :, 1, 1].abs().max() == 0
    assert apply_matrix(maps, torch.zeros(C, C)).abs().max() == 0


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 5), st.integers(0, 5))
def test_powers_add_up(seed, a, b):
    operator, maps = fitted(noise=0.2), make_maps(1, seed=seed)
    both = operator.edit(b)(operator.edit(a)(maps))
    torch.testing.assert_close(operator.edit(a + b)(maps), both)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_a_reflection_twice_is_nothing(seed):
    operator, maps = fitted("self-adjoint", noise=0.2), make_maps(1, seed=seed)
    torch.testing.assert_close(operator.edit(2)(maps), maps)


# ---- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("method", ["orthogonal", "linear"])
def test_a_file_holds_it_bit_for_bit(method, dtype, tmp_path: Path):
    operator = fitted(
        method,
        parameters={"alpha": 0.9, "channel": "blue"},
        backbone_sha256="a1",
        image_digests=("00ff", "11ee"),
    )
    operator = replace(operator, matrix=operator.matrix.to(dtype))
    operator.save(tmp_path / "turn.safetensors")
    again = Operator.load(tmp_path / "turn.safetensors")
    assert again.matrix.dtype == dtype
    assert again.matrix.equal(operator.matrix)
    assert (again.spec, again.record) == (operator.spec, operator.record)
    with safe_open(tmp_path / "turn.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["header"])["record"]["operation"] == "turn"


def test_files_that_are_no_operators(tmp_path: Path):
    with pytest.raises(InputError, match="but there is nothing at"):
        Operator.load(tmp_path / "nothing")
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(InputError, match="featinv operator fit"):
        Operator.load(tmp_path / "text")
    from featinv_diffusion.files import write_tensors

    write_tensors(tmp_path / "part", {"matrix": torch.eye(C)}, {"spec": {}}, "featinv-operator/1")
    with pytest.raises(InputError, match="Object missing required field"):
        Operator.load(tmp_path / "part")
