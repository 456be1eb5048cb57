"""Directions from elsewhere: activation vectors (CAV), decoders of sparse autoencoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from featinv_diffusion.concepts.base import ConceptDictionary, to_cells
from featinv_diffusion.concepts.elastic_net import ElasticNet, sparse_codes
from featinv_diffusion.concepts.subspaces import energy_share
from featinv_diffusion.errors import InputError
from featinv_diffusion.types import Features, FeatureSpec

Encoding = Literal["least_squares", "projection", "sparse"]
_ENCODINGS: tuple[Encoding, ...] = ("least_squares", "projection", "sparse")


class DirectionConcepts(ConceptDictionary):
    """Concepts given as a matrix of directions, for example a CAV or the decoder of an SAE.

    Args:
        directions: `[k, c]`, one row per direction; k may exceed c.
        offset: `[d]`, d = c, subtracted before encoding, such as the decoder bias of an SAE.
        encoding: `least_squares` (of least norm where directions depend on each other),
            `projection` on each direction by itself, as a CAV is read, or `sparse`, an elastic net
            over the directions, for an SAE.
        sizes: directions per concept, where concepts have more than one; they must add up to k.
        gamma, positive: of the sparse encoding, see `ElasticNet`; the codes of an SAE are positive.
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
        if encoding not in _ENCODINGS:
            raise InputError(
                f"encoding must be one of {', '.join(_ENCODINGS)}, but {encoding!r} came."
            )
        self.problem = ElasticNet(gamma, positive=positive)
        sizes = [1] * len(directions) if sizes is None else sizes
        _check_directions(directions, offset, sizes, spec)
        self._set(directions, sizes, offset)

    def fit(self, features: Features, *, progress: bool = False) -> DirectionConcepts:
        """Changes nothing but `report`: the share of the features' energy that is held."""
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
            f"but shape {list(directions.shape)} came."
        )
    if not bool(directions.isfinite().all()) or not bool(directions.any(dim=1).all()):
        raise InputError("Directions must be finite and none of them zero. Leave out dead rows.")
    if offset is not None and offset.shape != (channels,):
        raise InputError(
            f"The offset must be one vector of {channels} channels, "
            f"but shape {list(offset.shape)} came."
        )
    if min(sizes) < 1 or sum(sizes) != len(directions):
        raise InputError(
            f"Sizes must be positive and add up to {len(directions)} directions, "
            f"but {list(sizes)} came."
        )
