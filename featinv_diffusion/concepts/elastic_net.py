"""Elastic net and lasso for many rows at once, each on a support that grows."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from rich.console import Console
from rich.progress import track
from scipy.sparse import csr_array
from torch import Tensor

from featinv_diffusion.errors import InputError

_MAX_STEPS = 200
_MAX_ROUNDS = 40
_TOLERANCE = 1e-5
_RIDGE = 1e-6
"""Relative: added to the curvature of Newton steps, so that equal atoms do not stop them."""
_SLACK = 1e-4
"""Relative: how much a correlation may exceed the penalty before it counts as a violation."""
_BATCH_FLOATS = {"cpu": 2**25, "cuda": 2**29}
"""Numbers that the supports of one batch may hold: 128 MiB and 2 GiB in float32."""


@dataclass(frozen=True)
class ElasticNet:
    """The problem whose solution is the coefficients c of each row x over atoms A.

        min_c  τ ‖c‖₁ + (1 − τ)/2 ‖c‖² + 1/(2α) ‖x − c A‖² ,   α = max_i |⟨x, a_i⟩| / (τ γ)

    α γ is the smallest penalty for which c = 0, so γ says how far the penalty lies below it.

    Args:
        gamma: γ > 1; greater values give denser coefficients.
        tau: τ in (0, 1]; 1 is the lasso.
        positive: coefficients may not be negative.
        n_nonzero: keep this many coefficients of each row, the largest; None keeps all.
        support: number of atoms tried first for each row, those most correlated with it.
    """

    gamma: float = 10.0
    tau: float = 1.0
    positive: bool = False
    n_nonzero: int | None = None
    support: int = 100

    def __post_init__(self) -> None:
        if not self.gamma > 1:
            raise InputError(f"gamma must be above 1, else nothing is kept, got {self.gamma}.")
        if not 0 < self.tau <= 1:
            raise InputError(f"tau must lie in (0, 1], where 1 is the lasso, got {self.tau}.")
        if self.n_nonzero is not None and self.n_nonzero < 1:
            raise InputError(f"n_nonzero must be at least 1 or None, got {self.n_nonzero}.")
        if self.support < 1:
            raise InputError(f"support must be at least 1, got {self.support}.")


def self_representation(
    rows: Float[Tensor, "n c"], problem: ElasticNet, *, progress: bool = False
) -> csr_array:
    """Returns the sparse `[n, n]` coefficients of each row over all other rows."""
    if len(rows) < 2:
        raise InputError(f"Self-representation needs at least 2 cells, got {len(rows)}.")
    return _solve(rows, rows, problem, exclude_self=True, progress=progress)


def sparse_codes(
    rows: Float[Tensor, "n c"], atoms: Float[Tensor, "k c"], problem: ElasticNet
) -> csr_array:
    """Returns the sparse `[n, k]` coefficients of each row over the atoms."""
    return _solve(rows, atoms, problem, exclude_self=False, progress=False)


@torch.no_grad()
def _solve(
    rows: Tensor, atoms: Tensor, problem: ElasticNet, *, exclude_self: bool, progress: bool
) -> csr_array:
    """Collects triples batch by batch, so that nothing of size n·n is ever held."""
    n, c = rows.shape
    width = min(problem.support, len(atoms) - exclude_self)
    size = max(1, _BATCH_FLOATS.get(rows.device.type, 2**25) // (width * (c + 2 * width)))
    size = min(size, max(64, 2**28 // len(atoms)), n)
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    unfinished = 0
    for first in track(
        range(0, n, size),
        "sparse representation",
        console=Console(stderr=True),
        disable=not progress,
    ):
        batch = _Batch(rows[first : first + size], atoms, problem, first if exclude_self else None)
        for positions, indices, values in batch.run():
            found.append(_triples(positions + first, indices, values, problem.n_nonzero))
        unfinished += batch.n_unfinished
    if unfinished:
        warnings.warn(
            f"{unfinished} of {n} sparse representations had not settled after {_MAX_ROUNDS} "
            "rounds; a smaller gamma makes them easier.",
            stacklevel=3,
        )
    row, column, value = (np.concatenate(part) for part in zip(*found, strict=True))
    return csr_array((value, (row, column)), shape=(n, len(atoms)))


def _triples(
    positions: Tensor, indices: Tensor, values: Tensor, n_nonzero: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if n_nonzero is not None and n_nonzero < values.shape[1]:
        kept = values.abs().topk(n_nonzero, dim=1).indices
        indices, values = indices.gather(1, kept), values.gather(1, kept)
    row, place = values.nonzero(as_tuple=True)
    arrays = positions[row], indices[row, place], values[row, place]
    row, column, value = (array.cpu().numpy() for array in arrays)
    return row.astype(np.int32), column.astype(np.int32), value


class _Batch:
    """Rows solved together, each on a small support that grows until no atom outside matters."""

    def __init__(self, rows: Tensor, atoms: Tensor, problem: ElasticNet, first: int | None):
        self.rows, self.atoms, self.problem = rows, atoms, problem
        self.positions = torch.arange(len(rows), device=rows.device)
        self.own = None if first is None else self.positions + first
        self.n_unfinished = 0
        self.width = min(problem.support, len(atoms) - (first is not None))
        size = self._correlate(rows)
        self.l1 = size.amax(dim=1, keepdim=True).clamp(min=0) / problem.gamma
        self.l2 = self.l1 * (1 - problem.tau) / problem.tau
        self.indices = size.topk(self.width, dim=1).indices
        self.values = torch.zeros_like(self.indices, dtype=rows.dtype)

    def run(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yields (positions, indices, values) of rows as they are done."""
        for round_ in range(_MAX_ROUNDS):
            size = self._correlate(self._descend())
            size.scatter_(1, self.indices, -torch.inf)
            open_ = (size > self.l1 * (1 + _SLACK) + 1e-7).any(dim=1)
            if round_ == _MAX_ROUNDS - 1:
                self.n_unfinished = int(open_.sum())
                open_ = torch.zeros_like(open_)
            yield self.positions[~open_], self.indices[~open_], self.values[~open_]
            if not bool(open_.any()):
                return
            self._keep(open_)
            self._change_support(size[open_])

    def _correlate(self, rest: Tensor) -> Tensor:
        """Returns how much of each row's residual each atom explains; -inf for a row itself."""
        size = rest @ self.atoms.T
        if not self.problem.positive:
            size = size.abs_()
        if self.own is not None:
            size.scatter_(1, self.own[:, None], -torch.inf)
        return size

    def _descend(self) -> Tensor:
        """Solves on the supports; returns the residuals of the rows."""
        atoms = self.atoms[self.indices]
        gram = torch.bmm(atoms, atoms.transpose(1, 2))
        linear = torch.bmm(atoms, self.rows[:, :, None])[:, :, 0]
        self.values = minimise(
            gram, linear, self.l1, self.l2, self.values, positive=self.problem.positive
        )
        return self.rows - torch.bmm(self.values[:, None], atoms)[:, 0]

    def _keep(self, chosen: Tensor) -> None:
        for name in ("rows", "positions", "own", "l1", "l2", "indices", "values"):
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else tensor[chosen])

    def _change_support(self, size: Tensor) -> None:
        """Keeps the non-zero coefficients and fills the support up with the worst violators."""
        active = self.values != 0
        most = int(active.sum(dim=1).max())
        limit = len(self.atoms) - (self.own is not None)
        if most > 0.8 * self.width:
            self.width = min(2 * self.width, limit)
        before = torch.zeros_like(size).scatter_(1, self.indices, self.values)
        size = size.scatter(1, self.indices, torch.where(active, torch.inf, -1.0))
        if self.own is not None:
            size.scatter_(1, self.own[:, None], -torch.inf)
        self.indices = size.topk(self.width, dim=1).indices
        self.values = before.gather(1, self.indices)


def minimise(
    gram: Float[Tensor, "b m m"],
    linear: Float[Tensor, "b m"],
    l1: Float[Tensor, "b 1"],
    l2: Float[Tensor, "b 1"],
    start: Float[Tensor, "b m"],
    *,
    positive: bool = False,
) -> Float[Tensor, "b m"]:
    """Minimises ½ cᵀ G c − qᵀ c + l1 ‖c‖₁ + l2/2 ‖c‖² of every row.

    Sweeps over the coefficients alternate with a Newton step on those that are not zero; neither
    ever raises the objective. A row is done once its optimality conditions hold to 1e-5 of max |q|.
    """
    result = start.clone()
    rows = torch.arange(len(start), device=start.device)
    problem = _Problem(gram, linear, l1, l2, start, positive)
    for _ in range(_MAX_STEPS):
        problem.sweep()
        problem.newton()
        open_ = problem.violation() > _TOLERANCE * problem.scale
        if not bool(open_.any()):
            break
        if open_.float().mean() < 0.7:  # dropping rows copies the Gram matrices of the others
            result[rows[~open_]] = problem.values.T[~open_]
            rows = rows[open_]
            problem.keep(open_)
    result[rows] = problem.values.T
    return result


class _Problem:
    """State of a minimisation; the batch is the last axis, so that each step is contiguous."""

    def __init__(
        self, gram: Tensor, linear: Tensor, l1: Tensor, l2: Tensor, start: Tensor, positive: bool
    ):
        self.columns = gram.permute(1, 2, 0).contiguous()
        self.diagonal = torch.diagonal(self.columns, dim1=0, dim2=1).T.contiguous()
        self.linear = linear.T.contiguous()
        self.values = start.T.contiguous()
        self.l1, self.l2 = l1[:, 0].contiguous(), l2[:, 0].contiguous()
        self.scale = linear.abs().amax(dim=1)
        self.positive = positive
        self._find_gradient()

    def _find_gradient(self) -> None:
        """Updates q − G c, the correlation of each atom with the residual."""
        self.gradient = self.linear - torch.einsum("ijb,jb->ib", self.columns, self.values)

    def sweep(self) -> None:
        """Minimises over each coefficient in turn."""
        curvature = self.diagonal + self.l2
        inverse = torch.where(curvature > 0, 1 / curvature, 0.0)
        for j, column in enumerate(self.columns):
            target = torch.addcmul(self.gradient[j], self.diagonal[j], self.values[j])
            if self.positive:
                new = (target - self.l1).clamp_(min=0)
            else:
                new = target - target.clamp(-self.l1, self.l1)
            new *= inverse[j]
            self.gradient.addcmul_(column, new - self.values[j], value=-1)
            self.values[j] = new

    def newton(self) -> None:
        """Steps towards the minimum for the current signs, at most until the first sign flips."""
        n_active = int((self.values != 0).sum(dim=0).max())
        if not n_active:
            return
        chosen = self.values.abs().topk(n_active, dim=0).indices
        values = self.values.gather(0, chosen)
        step = self._newton_step(chosen, values)
        reach = torch.where(values * step < 0, -values / step, torch.inf)
        length = reach.amin(dim=0).clamp(max=1)
        new = values + length * step
        new = torch.where(reach <= length, 0.0, new)
        self.values = torch.zeros_like(self.values).scatter_(0, chosen, new)
        self._find_gradient()

    def _newton_step(self, chosen: Tensor, values: Tensor) -> Tensor:
        batch = torch.arange(chosen.shape[1], device=chosen.device)
        hessian = self.columns[chosen[:, None], chosen[None], batch].permute(2, 0, 1)
        active = (values != 0).T
        hessian = hessian * (active[:, :, None] & active[:, None])
        ridge = self.l2[:, None] + _RIDGE * self.diagonal.amax(dim=0)[:, None]
        hessian.diagonal(dim1=1, dim2=2).add_(torch.where(active, ridge, 1.0))
        slope = self.gradient.gather(0, chosen) - self.l2 * values - self.l1 * values.sign()
        factor, failed = torch.linalg.cholesky_ex(hessian)
        step = torch.cholesky_solve((slope * (values != 0)).T[:, :, None], factor)[:, :, 0].T
        return torch.where((failed == 0) & step.isfinite().all(dim=0), step, 0.0)

    def violation(self) -> Tensor:
        """Returns how far each row is from its optimality conditions."""
        slope = self.gradient - self.l2 * self.values
        idle = (slope if self.positive else slope.abs()) - self.l1
        active = (slope - self.l1 * self.values.sign()).abs()
        return torch.where(self.values == 0, idle, active).amax(dim=0)

    def keep(self, chosen: Tensor) -> None:
        for name in ("columns", "diagonal", "linear", "values", "gradient", "l1", "l2", "scale"):
            setattr(self, name, getattr(self, name)[..., chosen])
