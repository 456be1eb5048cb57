"""Dictionaries of given directions, and of those that PCA, NMF and k-means find."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from sklearn import cluster, decomposition
from torch import Tensor

from featinv_diffusion.concepts.base import (
    ConceptDictionary,
    check_n_concepts,
    energy_share,
    principal_directions,
    to_cells,
)
from featinv_diffusion.concepts.elastic_net import ElasticNet, minimise, sparse_codes
from featinv_diffusion.errors import InputError
from featinv_diffusion.settings import ENCODINGS
from featinv_diffusion.types import Features, FeatureSpec

# ---- Given directions: concept activation vectors (CAV), decoders of sparse autoencoders ---------

Encoding = Literal["least_squares", "projection", "sparse"]


class DirectionConcepts(ConceptDictionary):
    """Concepts given as a matrix of directions, for example a CAV or the decoder of an SAE.

    Args:
        directions: `[k, c]`, one row per direction; k may exceed c.
        offset: `[d]`, d = c, subtracted before encoding, such as the decoder bias of an SAE.
        encoding: `least_squares` (of least norm where directions depend on each other);
            `projection` on each direction by itself, as a CAV is read; or `sparse`, an elastic net
            over the directions, for an SAE.
        sizes: directions per concept, where concepts have more than one; they must add up to k.
        gamma, positive: for the sparse encoding, see `ElasticNet`; codes of an SAE are positive.
        spec: as in `ConceptDictionary`.

    Raises:
        InputError: not a finite matrix, a row of zeros, sizes that do not add up.
    """

    kind = "directions"

    def __init__(
        self,
        directions: Float[Tensor, "k c"],
        *,
        offset: Float[Tensor, " d"] | None = None,
        encoding: Encoding = "least_squares",
        sizes: Sequence[int] | None = None,
        gamma: float = 10.0,
        positive: bool = False,
        spec: FeatureSpec | None = None,
    ):
        super().__init__(spec, encoding=encoding, gamma=gamma, positive=positive)
        if encoding not in ENCODINGS:
            raise InputError(f"encoding must be one of {', '.join(ENCODINGS)}, got {encoding!r}.")
        self.problem = ElasticNet(gamma, positive=positive)
        sizes = [1] * len(directions) if sizes is None else sizes
        _check_directions(directions, offset, sizes, spec)
        self._set(directions, sizes, offset)

    def fit(self, features: Features, *, progress: bool = False) -> DirectionConcepts:
        """Only sets `report`: the share of the features' energy that the directions span."""
        cells = to_cells(features.detach(), self.channels)
        span = self._split.span.to(cells)
        self.report = {"n_cells": len(cells), "energy": energy_share(span, cells)}
        return self

    def _encode(self, cells: Tensor) -> Tensor:
        rows = self.directions.to(cells)
        if self.settings["encoding"] == "least_squares":
            return cells @ self._split.encoder.T.to(cells)
        if self.settings["encoding"] == "projection":
            return cells @ rows.T / rows.square().sum(dim=1)
        codes = sparse_codes(cells, rows, self.problem).toarray()
        return torch.from_numpy(codes).to(cells)

    @classmethod
    def _rebuild(
        cls, tensors: dict[str, Tensor], settings: dict[str, Any], spec: FeatureSpec | None
    ) -> DirectionConcepts:
        return cls(tensors["directions"], spec=spec, **settings)


def _check_directions(
    directions: Tensor, offset: Tensor | None, sizes: Sequence[int], spec: FeatureSpec | None
) -> None:
    channels = directions.shape[1] if directions.ndim == 2 else 0
    wanted = spec.channels if spec else channels
    if not directions.numel() or channels != wanted:
        raise InputError(
            f"Directions must be a matrix [number, {wanted or 'channels'}], "
            f"got the shape {list(directions.shape)}."
        )
    if not bool(directions.isfinite().all()) or not bool(directions.any(dim=1).all()):
        raise InputError("Directions must be finite and not zero. Leave out dead rows.")
    if offset is not None and offset.shape != (channels,):
        raise InputError(
            f"The offset must be one vector of {channels} channels, "
            f"got the shape {list(offset.shape)}."
        )
    if min(sizes) < 1 or sum(sizes) != len(directions):
        raise InputError(
            f"Sizes must be positive and add up to {len(directions)} directions, got {list(sizes)}."
        )


# ---- Found directions, through scikit-learn ------------------------------------------------------

_ROWS = 4096
"""Cells that NMF encodes at once."""


class PCAConcepts(ConceptDictionary):
    """Principal directions of the cells, not scaled, each a concept.

    Args:
        n_concepts: number of directions.
        basis: `centred` subtracts the mean of all cells, which then stays in the remainder;
            `uncentred` goes through the origin; `auto` takes whichever directions hold more of the
            cells' energy. By construction that is the uncentred one; `report` has both shares.
        seed: random seed of scikit-learn's solver.
        spec: as in `ConceptDictionary`.
    """

    kind = "pca"

    def __init__(
        self,
        n_concepts: int,
        *,
        basis: Literal["auto", "uncentred", "centred"] = "auto",
        seed: int = 42,
        spec: FeatureSpec | None = None,
    ):
        super().__init__(spec, n_concepts=n_concepts, basis=basis, seed=seed)
        if basis not in ("auto", "uncentred", "centred"):
            raise InputError(f"basis must be auto, uncentred or centred, got {basis!r}.")

    def fit(self, features: Features, *, progress: bool = False) -> PCAConcepts:
        """Finds the principal directions of maps; there is no progress bar."""
        cells = self._cells_to_fit(features)
        n_concepts = self.settings["n_concepts"]
        check_n_concepts(n_concepts, min(cells.shape))
        model = decomposition.PCA(n_concepts, random_state=self.settings["seed"])
        model.fit(cells.cpu().numpy())
        bases = {
            "uncentred": principal_directions(cells, centred=False)[1][:n_concepts].cpu(),
            "centred": torch.from_numpy(model.components_),
        }
        energy = {name: energy_share(basis, cells.cpu()) for name, basis in bases.items()}
        chosen = self.settings["basis"]
        chosen = max(energy, key=lambda name: energy[name]) if chosen == "auto" else chosen
        offset = torch.from_numpy(model.mean_) if chosen == "centred" else None
        self._set(bases[chosen], [1] * n_concepts, offset)
        self.report = {"n_cells": len(cells), "basis": chosen, "energy": energy}
        return self

    def _encode(self, cells: Tensor) -> Tensor:
        return cells @ self._split.encoder.T.to(cells)


class NMFConcepts(ConceptDictionary):
    """Non-negative parts: cells ≈ codes · directions, all at least zero.

    Args:
        n_concepts: number of directions.
        max_iter: updates of scikit-learn's solver.
        seed: random seed of its initialisation.
        spec: as in `ConceptDictionary`.
    """

    kind = "nmf"

    def __init__(
        self,
        n_concepts: int,
        *,
        max_iter: int = 500,
        seed: int = 42,
        spec: FeatureSpec | None = None,
    ):
        super().__init__(spec, n_concepts=n_concepts, max_iter=max_iter, seed=seed)

    def fit(self, features: Features, *, progress: bool = False) -> NMFConcepts:
        """Factorises maps of a layer after ReLU; there is no progress bar.

        Raises:
            InputError: values below zero.
        """
        cells = self._cells_to_fit(features)
        n_concepts = self.settings["n_concepts"]
        check_n_concepts(n_concepts, len(cells))
        least = float(cells.min())
        if least < 0:
            raise InputError(
                f"NMF needs features that are nowhere below zero, got {least:.3g}. "
                "Use a layer after a ReLU, or the methods mcd or pca."
            )
        init = "nndsvda" if n_concepts <= min(cells.shape) else "random"
        model = decomposition.NMF(
            n_concepts,
            init=init,
            max_iter=self.settings["max_iter"],
            random_state=self.settings["seed"],
        ).fit(cells.cpu().numpy())
        self._set(torch.from_numpy(model.components_), [1] * n_concepts)
        error = float(model.reconstruction_err_**2 / cells.double().square().sum())
        self.report = {"n_cells": len(cells), "energy_left": error, "n_iter": int(model.n_iter_)}
        return self

    @torch.no_grad()
    def _encode(self, cells: Tensor) -> Tensor:
        """Solves the non-negative least squares of each cell."""
        rows = self.directions.to(cells)
        gram = rows @ rows.T
        codes = []
        for part in cells.split(_ROWS):
            zero = part.new_zeros(len(part), 1)
            grams = gram.expand(len(part), -1, -1)
            start = part.new_zeros(len(part), len(rows))
            codes.append(minimise(grams, part @ rows.T, zero, zero, start, positive=True))
        return torch.cat(codes)


class KMeansConcepts(ConceptDictionary):
    """Centres of the cells' directions; each cell belongs to the nearest concept only.

    Centres are those of unit-norm cells, and the code of a cell is its component along its centre.

    Args:
        n_concepts: number of centres.
        seed: random seed of the 20 starts.
        spec: as in `ConceptDictionary`.
    """

    kind = "kmeans"

    def __init__(self, n_concepts: int, *, seed: int = 42, spec: FeatureSpec | None = None):
        super().__init__(spec, n_concepts=n_concepts, seed=seed)

    def fit(self, features: Features, *, progress: bool = False) -> KMeansConcepts:
        """Clusters the cells of maps; there is no progress bar."""
        cells = self._cells_to_fit(features)
        rows = _to_unit(cells)[cells.norm(dim=1) > 0]
        n_concepts = self.settings["n_concepts"]
        check_n_concepts(n_concepts, len(rows))
        n_init: Any = 20  # annotated as a string
        model = cluster.KMeans(n_concepts, n_init=n_init, random_state=self.settings["seed"])
        labels = model.fit_predict(rows.cpu().numpy())
        centres = torch.from_numpy(model.cluster_centers_)
        if not bool((centres.norm(dim=1) > 0).all()):
            raise InputError(
                "Centres must not be zero, but one cluster holds cells of opposite sign. "
                "Use another number of concepts."
            )
        self._set(centres, [1] * n_concepts)
        counts = np.bincount(labels, minlength=n_concepts).tolist()
        self.report = {"n_cells": len(cells), "cluster_sizes": counts}
        return self

    def _encode(self, cells: Tensor) -> Tensor:
        centres = self.directions.to(cells)
        nearest = torch.cdist(_to_unit(cells), centres).argmin(dim=1, keepdim=True)
        along = cells @ centres.T / centres.square().sum(dim=1)
        return torch.zeros_like(along).scatter(1, nearest, along.gather(1, nearest))


def _to_unit(cells: Tensor) -> Tensor:
    return cells / cells.norm(dim=1, keepdim=True).clamp(min=torch.finfo(cells.dtype).tiny)
