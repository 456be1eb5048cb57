"""Dictionaries of one direction per concept: PCA, NMF and k-means, through scikit-learn."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from sklearn import cluster, decomposition
from torch import Tensor

from featinv_diffusion.concepts.base import ConceptDictionary, check_n_concepts
from featinv_diffusion.concepts.elastic_net import minimise
from featinv_diffusion.concepts.subspaces import energy_share, principal_directions
from featinv_diffusion.errors import InputError
from featinv_diffusion.types import Features, FeatureSpec

_ROWS = 4096
"""Cells that NMF encodes at once."""


class PCAConcepts(ConceptDictionary):
    """Principal directions of the cells, not scaled, each a concept.

    Args:
        n_concepts: number of directions.
        basis: `centred` subtracts the mean of all cells, which then stays in the remainder;
            `uncentred` goes through the origin; `auto` takes whichever directions hold more of the
            cells' energy. By construction that is the uncentred one; `report` has both figures.
        seed: of scikit-learn's solver.
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
            raise InputError(f"basis must be auto, uncentred or centred, but {basis!r} came.")

    def fit(self, features: Features, *, progress: bool = False) -> PCAConcepts:
        """Finds the directions of maps; there is no bar, `progress` is for the shared signature."""
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
    """Non-negative parts: cells ≈ codes · directions, nothing below zero.

    Args:
        n_concepts: number of directions.
        max_iter: updates of scikit-learn's solver.
        seed: of its initialisation.
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
        """Factorises maps of a layer after ReLU; `progress` is for the shared signature.

        Raises:
            InputError: values below zero.
        """
        cells = self._cells_to_fit(features)
        n_concepts = self.settings["n_concepts"]
        check_n_concepts(n_concepts, len(cells))
        least = float(cells.min())
        if least < 0:
            raise InputError(
                f"NMF needs features that are nowhere below zero, but {least:.3g} came. "
                "Take a layer after a ReLU, or MCD or PCA."
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
    """Centres of the cells' directions; a cell belongs to the nearest concept alone.

    Centres are those of unit-norm cells, and the code of a cell is its component along its centre.

    Args:
        n_concepts: number of centres.
        seed: of the 20 starts.
        spec: as in `ConceptDictionary`.
    """

    kind = "kmeans"

    def __init__(self, n_concepts: int, *, seed: int = 42, spec: FeatureSpec | None = None):
        super().__init__(spec, n_concepts=n_concepts, seed=seed)

    def fit(self, features: Features, *, progress: bool = False) -> KMeansConcepts:
        """Clusters the cells of maps; there is no bar, `progress` is for the shared signature."""
        cells = self._cells_to_fit(features)
        rows = _to_unit(cells)[cells.norm(dim=1) > 0]
        n_concepts = self.settings["n_concepts"]
        check_n_concepts(n_concepts, len(rows))
        n_init: Any = 20  # annotated as a string
        model = cluster.KMeans(n_concepts, n_init=n_init, random_state=self.settings["seed"])
        labels = model.fit_predict(rows.cpu().numpy())
        centres = torch.from_numpy(model.cluster_centers_)
        if not bool((centres.norm(dim=1) > 0).all()):
            raise InputError("Centres must not be zero, but cells of opposite sign met in one.")
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
