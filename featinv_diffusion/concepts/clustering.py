"""Grouping cells: outliers and spectral clustering of sparse self-representations."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_array, diags_array
from scipy.sparse.linalg import eigsh
from sklearn.cluster import KMeans

_DENSE = 1000
"""Up to so many rows the affinities are decomposed as a full matrix, which never fails."""


def find_inliers(coefficients: csr_array, quantile: float) -> np.ndarray:
    """Marks rows whose coefficients' L1 norm is at most this quantile of all rows' norms.

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
