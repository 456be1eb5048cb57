"""Multi-dimensional concept discovery: concepts as linear subspaces (Vielhaben et al., 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse import csr_array, diags_array
from scipy.sparse.linalg import eigsh
from sklearn.cluster import KMeans
from torch import Tensor

from featinv_diffusion.concepts.base import (
    ConceptDictionary,
    check_direction,
    check_n_concepts,
    completeness,
    decompose,
    energy_share,
    orthogonalise,
    principal_basis,
)
from featinv_diffusion.concepts.elastic_net import ElasticNet, self_representation
from featinv_diffusion.errors import InputError
from featinv_diffusion.types import Features, FeatureSpec

# ---- Groups of cells: outliers, and spectral clustering of sparse self-representations -----------

_DENSE = 1000
"""With at most this many rows, affinities are decomposed as a full matrix, which never fails."""


def find_inliers(coefficients: csr_array, quantile: float) -> np.ndarray:
    """Marks rows whose coefficients have an L1 norm of at most this quantile of all such norms.

    A cell far from every subspace needs many others to be represented. 1 keeps all.
    """
    norms = abs(coefficients).sum(axis=1)
    return norms <= np.quantile(norms, quantile)


def make_affinity(coefficients: csr_array) -> csr_array:
    """Returns (|C| + |C|ᵀ) / 2 with the rows of C scaled to unit L2 norm."""
    norms = np.sqrt(coefficients.power(2).sum(axis=1))
    scale = np.divide(1.0, norms, out=np.zeros_like(norms, dtype=float), where=norms > 0)
    scaled = abs(diags_array(scale) @ coefficients.astype(np.float64))
    return csr_array((scaled + scaled.T) / 2)


def spectral_embedding(affinity: csr_array, n_vectors: int, seed: int) -> np.ndarray:
    """Returns the leading eigenvectors `[n, k]` of D^-½ A D^-½, greatest eigenvalue first."""
    n: int = affinity.shape[0]  # pyright: ignore[reportOptionalSubscript]
    degree = affinity.sum(axis=1)
    root = np.divide(1.0, np.sqrt(degree), out=np.zeros_like(degree), where=degree > 0)
    matrix = diags_array(root) @ affinity @ diags_array(root)
    if n <= max(_DENSE, n_vectors + 1):
        values, vectors = np.linalg.eigh(matrix.toarray())
    else:
        start = np.random.default_rng(seed).standard_normal(n)
        width = min(4 * n_vectors + 20, len(start))
        values, vectors = eigsh(matrix, k=n_vectors, which="LA", v0=start, ncv=width)
    return vectors[:, np.argsort(values)[::-1][:n_vectors]]


def cluster_embedding(
    embedding: Float[np.ndarray, "n k"], n_clusters: int, seed: int
) -> Int[np.ndarray, " n"]:
    """Runs k-means on the first `n_clusters` eigenvectors, rows scaled to unit norm."""
    rows = embedding[:, :n_clusters]
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return cluster_rows(
        np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0), n_clusters, seed
    )


def cluster_rows(
    rows: Float[np.ndarray, "n c"], n_clusters: int, seed: int
) -> Int[np.ndarray, " n"]:
    """Runs k-means, the best of 20 starts."""
    n_init: Any = 20  # annotated as a string
    return KMeans(n_clusters, n_init=n_init, random_state=seed).fit_predict(rows).astype(np.int64)


Basis = Literal["auto", "uncentred", "centred"]
_BASES: tuple[Literal["uncentred", "centred"], ...] = ("uncentred", "centred")


class MCD(ConceptDictionary):
    """Concepts as subspaces, found by clustering cells that represent each other sparsely.

    The steps: cells of unit norm → sparse self-representation → the same without outliers →
    spectral clustering → the principal directions of each cluster. What no concept holds is the
    complement subspace. There are as many codes of concepts and complement together as channels
    (more where subspaces intersect), and they decode to the features without loss.

    Args:
        n_concepts: K; None takes the smallest that reaches `min_completeness` for the class
            direction given to `fit`.
        clustering: `sparse` self-representation, or `kmeans` on the unit cells as a baseline.
        basis: of each cluster: `centred` subtracts its mean, as published; `uncentred` goes
            through the origin and may hold the mean; `auto` takes whichever concepts hold more of
            the unit cells' energy with equally many directions for each cluster, the fewer of the
            two, because noisy cells keep so many centred directions that these hold everything.
            `report` has the shares of both, at equal dimensions and at their own.
        gamma, tau, n_nonzero: of `ElasticNet`; tau 1 is the lasso.
        outlier_quantile: share of the cells to keep, those whose coefficients have the smallest
            L1 norm; 1 keeps all.
        fo_threshold: eigenvalues above this share of the cluster's largest count (Fukunaga-Olsen).
        one_dimensional: keep only the leading direction of each cluster.
        orthogonal: make the subspaces orthogonal, see `orthogonalise`; needs a class direction.
        min_completeness: ‖P w‖ / ‖w‖ to reach where `n_concepts` is None.
        max_concepts: largest K to try.
        max_cells: cells drawn without replacement where there are more; None takes all. Time grows
            with the square.
        seed: random seed of the draw, of the eigenvectors' start and of k-means.
        spec: as in `ConceptDictionary`.

    Attributes:
        labels: `[b, h, w]` after `fit`: the concept of each cell; -1 for outliers, cells of zeros
            and those not drawn. Not saved.
    """

    kind = "mcd"

    def __init__(
        self,
        n_concepts: int | None = None,
        *,
        clustering: Literal["sparse", "kmeans"] = "sparse",
        basis: Basis = "auto",
        gamma: float = 10.0,
        tau: float = 1.0,
        n_nonzero: int | None = None,
        outlier_quantile: float = 0.75,
        fo_threshold: float = 0.05,
        one_dimensional: bool = False,
        orthogonal: bool = False,
        min_completeness: float = 0.5,
        max_concepts: int = 19,
        max_cells: int | None = 20_000,
        seed: int = 42,
        spec: FeatureSpec | None = None,
    ):
        settings = {k: v for k, v in locals().items() if k not in ("self", "spec", "__class__")}
        super().__init__(spec, **settings)
        _check_settings(settings)
        self.problem = ElasticNet(gamma, tau, n_nonzero=n_nonzero)
        self.labels: Tensor | None = None

    def fit(
        self,
        features: Features,
        *,
        direction: Float[Tensor, " d"] | None = None,
        progress: bool = False,
    ) -> MCD:
        """Finds the concepts of maps, usually of images of one class.

        Concepts are sorted by global relevance where there is a direction, else by their number
        of cells.

        Args:
            features: `[b, c, h, w]`.
            direction: w of the class, `PooledHead.direction`, d = c; needed to choose the number of
                concepts and to make them orthogonal.
            progress: show a progress bar on stderr.

        Raises:
            InputError: too few cells, no direction where one is needed, or a completeness that is
                not reached.
        """
        cells = self._cells_to_fit(features)
        self._check_direction(direction, cells.shape[1])
        used, rows = self._draw(cells)
        groups = self._group(rows, progress)
        clusters = self._choose(groups, direction)
        bases, order = self._arrange(clusters, direction)
        self._set(torch.cat(bases), [len(basis) for basis in bases])
        self.report = self._describe(cells, rows, groups, clusters)
        labels = torch.full((len(cells),), -1, dtype=torch.int64)
        position = torch.full((len(clusters.bases) + 1,), -1)
        position[order] = torch.arange(len(order))
        labels[used[torch.from_numpy(groups.inliers)]] = position[torch.from_numpy(clusters.labels)]
        self.labels = labels.reshape(len(features), *features.shape[2:])
        return self

    def reorder(self, order: Sequence[int]) -> MCD:
        super().reorder(order)
        if self.labels is not None:
            places = torch.full((max(int(self.labels.max()), *order) + 2,), -1)
            places[list(order)] = torch.arange(len(order))
            self.labels = places[self.labels]  # -1 is the last place, which stays -1
        return self

    def complement(self) -> Float[Tensor, "r c"]:
        """Returns an orthonormal basis of what no concept holds."""
        return self._split.complement.float()

    def _encode(self, cells: Tensor) -> Tensor:
        return cells @ torch.cat([self._split.encoder, self._split.complement]).T.to(cells)

    @property
    def _decoder(self) -> Tensor:
        return torch.cat([self.directions.double(), self._split.complement])

    # ---- The steps of a fit

    def _check_direction(self, direction: Tensor | None, channels: int) -> None:
        if direction is not None:
            check_direction(direction, channels)
        elif self.settings["n_concepts"] is None:
            raise InputError(
                "Choosing the number of concepts by completeness needs the direction of a class, "
                "got none. Give fit a direction, or MCD n_concepts."
            )
        elif self.settings["orthogonal"]:
            raise InputError(
                "Orthogonal subspaces are ordered by their completeness, which needs the direction "
                "of a class, got none. Give fit a direction."
            )

    def _draw(self, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the indices of the cells used, and these cells scaled to unit norm."""
        norms = cells.norm(dim=1)
        used = (norms > 0).nonzero()[:, 0].cpu()
        limit = self.settings["max_cells"]
        if limit is not None and len(used) > limit:
            generator = torch.Generator().manual_seed(self.settings["seed"])
            used = used[torch.randperm(len(used), generator=generator)[:limit].sort().values]
        if len(used) < 2:
            raise InputError(f"Concepts need at least 2 cells that are not zero, got {len(used)}.")
        chosen = used.to(cells.device)
        return used, cells[chosen] / norms[chosen, None]

    def _group(self, rows: Tensor, progress: bool) -> _Groups:
        settings = self.settings
        if settings["clustering"] == "kmeans":
            return _Groups(rows, np.arange(len(rows)), None, settings["seed"])
        coefficients = self_representation(rows, self.problem, progress=progress)
        inliers = np.flatnonzero(find_inliers(coefficients, settings["outlier_quantile"]))
        if len(inliers) < len(rows):
            rows = rows[torch.from_numpy(inliers).to(rows.device)]
            coefficients = self_representation(rows, self.problem, progress=progress)
        most = settings["n_concepts"] or settings["max_concepts"]
        embedding = spectral_embedding(
            make_affinity(coefficients), min(most, len(rows)), settings["seed"]
        )
        return _Groups(rows, inliers, embedding, settings["seed"], coefficients.nnz / len(rows))

    def _choose(self, groups: _Groups, direction: Tensor | None) -> _Clusters:
        """Returns K clusters: the given K, or the smallest that is complete enough."""
        n_concepts = self.settings["n_concepts"]
        if n_concepts is not None:
            check_n_concepts(n_concepts, len(groups.rows))
            return self._cut(groups, n_concepts, direction)
        reached = 0.0
        for k in range(1, min(self.settings["max_concepts"], len(groups.rows)) + 1):
            clusters = self._cut(groups, k, direction)
            reached = max(reached, clusters.completeness[clusters.chosen])
            if reached >= self.settings["min_completeness"]:
                return clusters
        raise InputError(
            f"Completeness must reach {self.settings['min_completeness']}, but up to "
            f"{self.settings['max_concepts']} concepts reach only {reached:.3f}. "
            "Lower min_completeness, raise max_concepts, or give n_concepts."
        )

    def _cut(self, groups: _Groups, k: int, direction: Tensor | None) -> _Clusters:
        labels = groups.cut(k)
        members = [groups.rows[torch.from_numpy(np.flatnonzero(labels == i))] for i in range(k)]
        clusters = _Clusters(labels)
        for name in _BASES:
            clusters.add(
                name, [self._basis(rows, name) for rows in members], groups.rows, direction
            )
        clusters.choose(self.settings["basis"], groups.rows)
        return clusters

    def _basis(self, rows: Tensor, name: str) -> Tensor:
        threshold = self.settings["fo_threshold"]
        basis = principal_basis(rows, centred=name == "centred", threshold=threshold).cpu()
        return basis[:1] if self.settings["one_dimensional"] else basis

    def _arrange(
        self, clusters: _Clusters, direction: Tensor | None
    ) -> tuple[list[Tensor], list[int]]:
        """Returns the bases in their final order, and the cluster each comes from."""
        bases, order = clusters.bases, list(range(len(clusters.bases)))
        if self.settings["orthogonal"] and direction is not None:
            bases, order = orthogonalise(bases, direction)
        if direction is None:
            counts = np.bincount(clusters.labels, minlength=len(bases))
            rank = np.argsort(-counts, kind="stable")
        else:
            split = decompose(torch.cat(bases))
            codes = (split.encoder @ direction.to(split.encoder)).split([len(b) for b in bases])
            norms = [float((c @ b).norm()) for c, b in zip(codes, bases, strict=True)]
            rank = np.argsort(-np.array(norms), kind="stable")
        return [bases[i] for i in rank], [order[i] for i in rank]

    def _describe(
        self, cells: Tensor, rows: Tensor, groups: _Groups, clusters: _Clusters
    ) -> dict[str, Any]:
        return {
            "n_cells": len(cells),
            "n_zero_cells": int((cells.norm(dim=1) == 0).sum()),
            "n_cells_used": len(rows),
            "n_outliers": len(rows) - len(groups.inliers),
            "mean_nonzero": groups.mean_nonzero,
            "basis": clusters.chosen,
            "energy": clusters.energy,
            "energy_at_equal_dimensions": clusters.energy_at_equal_dimensions,
            "dimensions": clusters.dimensions,
            "completeness": clusters.completeness or None,
            "rank": self._split.rank,
            "rank_deficiency": len(self.directions) - self._split.rank,
            "n_absorbed": len(clusters.bases) - self.n_concepts,
        }


@dataclass(frozen=True)
class _Groups:
    """Unit cells without outliers, ready to be cut into any number of clusters."""

    rows: Tensor
    inliers: np.ndarray
    embedding: np.ndarray | None
    seed: int
    mean_nonzero: float | None = None

    def cut(self, k: int) -> Int[np.ndarray, " n"]:
        if self.embedding is None:
            return cluster_rows(self.rows.cpu().numpy(), k, self.seed)
        return cluster_embedding(self.embedding, k, self.seed)


@dataclass
class _Clusters:
    """K clusters with both kinds of basis, and numbers for each kind."""

    labels: np.ndarray
    candidates: dict[str, list[Tensor]] = field(default_factory=dict)
    energy: dict[str, float] = field(default_factory=dict)
    energy_at_equal_dimensions: dict[str, float] = field(default_factory=dict)
    completeness: dict[str, float] = field(default_factory=dict)
    dimensions: dict[str, list[int]] = field(default_factory=dict)
    chosen: str = ""

    @property
    def bases(self) -> list[Tensor]:
        return self.candidates[self.chosen]

    def add(self, name: str, bases: list[Tensor], rows: Tensor, direction: Tensor | None) -> None:
        """Adds a kind of basis if it has a direction in every cluster."""
        self.dimensions[name] = [len(basis) for basis in bases]
        if not all(self.dimensions[name]):
            return
        span = decompose(torch.cat(bases)).span
        self.candidates[name] = bases
        self.energy[name] = energy_share(span, rows)
        if direction is not None:
            self.completeness[name] = completeness(span, direction)

    def choose(self, basis: str, rows: Tensor) -> None:
        sizes = [min(map(len, pair)) for pair in zip(*self.candidates.values(), strict=True)]
        for name, bases in self.candidates.items():
            cut = [basis[:size] for basis, size in zip(bases, sizes, strict=True)]
            share = energy_share(decompose(torch.cat(cut)).span, rows)
            self.energy_at_equal_dimensions[name] = share
        if basis == "auto":
            basis = max(self.candidates, key=lambda name: self.energy_at_equal_dimensions[name])
        elif basis not in self.candidates:
            raise InputError(
                "A centred basis needs cells that differ in every cluster, but all cells of one "
                "cluster are the same. Use fewer concepts, or an uncentred basis."
            )
        self.chosen = basis


def _check_settings(settings: dict[str, Any]) -> None:
    choices = {"clustering": ("sparse", "kmeans"), "basis": ("auto", *_BASES)}
    for name, allowed in choices.items():
        if settings[name] not in allowed:
            raise InputError(f"{name} must be one of {', '.join(allowed)}, got {settings[name]!r}.")
    for name in ("outlier_quantile", "min_completeness"):
        if not 0 < settings[name] <= 1:
            raise InputError(f"{name} must lie in (0, 1], got {settings[name]}.")
    if not 0 <= settings["fo_threshold"] < 1:
        raise InputError(f"fo_threshold must lie in [0, 1), got {settings['fo_threshold']}.")
    for name in ("n_concepts", "max_cells", "max_concepts"):
        value = cast("int | None", settings[name])
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, got {value}.")
