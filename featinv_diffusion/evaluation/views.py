"""What backbones see in pictures, and how two such views agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from featinv_diffusion.metrics import feature_cosine, top_k_match
from featinv_diffusion.metrics.features import centred_cosine
from featinv_diffusion.metrics.similarity import sketch
from featinv_diffusion.runs.sampling import finite_rows
from featinv_diffusion.types import Features

OWN = ""
"""The name of the inverter's own backbone among those that look."""

Columns = dict[str, Tensor]
"""One value per image under each name."""


@dataclass(frozen=True, eq=False)
class View:
    """What a backbone sees in pictures; `logits` is None where it has no head."""

    features: Features
    logits: Tensor | None

    def __getitem__(self, rows: Sequence[int]) -> View:
        index = list(rows)
        logits = None if self.logits is None else self.logits[index]
        return View(self.features[index], logits)

    def to(self, device: torch.device) -> View:
        """Returns the view on a device."""
        logits = None if self.logits is None else self.logits.to(device)
        return View(self.features.to(device), logits)

    @property
    def is_finite(self) -> Bool[Tensor, " b"]:
        """Whether features and class scores of each picture are finite."""
        finite = finite_rows(self.features)
        return finite if self.logits is None else finite & finite_rows(self.logits)


Views = dict[str, View]
"""What each of the backbones sees."""


def take_views(views: Views, rows: Sequence[int]) -> Views:
    """Returns the views of some pictures."""
    return {name: view[rows] for name, view in views.items()}


def join_views(parts: Sequence[Views]) -> Views:
    """Joins the views of batches."""
    joined: Views = {}
    for name in parts[0]:
        views = [part[name] for part in parts]
        logits = [view.logits for view in views if view.logits is not None]
        features = torch.cat([view.features for view in views])
        joined[name] = View(features, torch.cat(logits) if logits else None)
    return joined


@dataclass(frozen=True, eq=False)
class Natural:
    """What natural maps of a backbone have in common.

    Args:
        mean: of their cells, by channel.
        scale: root mean square of the cells less that mean.
    """

    mean: Float[Tensor, "c 1 1"]
    scale: float

    @classmethod
    def of(cls, moments: Float[Tensor, "n 2 c"]) -> Natural:
        """Joins the `moments_of` natural maps."""
        mean, square = moments.mean(dim=0)
        variance = (square - mean.square()).clamp_min(0).mean()
        return cls(mean.float()[:, None, None], float(variance.sqrt()) or 1.0)

    def vectors(self, maps: Features) -> Float[Tensor, "b k"]:
        """Returns a short vector of each centred map, see `metrics.similarity.sketch`.

        float16 on the CPU, scaled so that a typical number of a map is 1.
        """
        centred = (maps.float() - self.mean.to(maps.device)) / self.scale
        return sketch(centred).half().cpu()


def moments_of(maps: Features) -> Float[Tensor, "n 2 c"]:
    """Returns mean and mean square of the cells of each map that is finite, float64."""
    cells = maps[finite_rows(maps)].double().cpu().flatten(2)
    return torch.stack([cells.mean(dim=2), cells.square().mean(dim=2)], dim=1)


def compare_views(originals: Views, seen: Views, natural: Mapping[str, Natural]) -> Columns:
    """Compares what the backbones saw; NaN where one of the two views holds such values.

    Args:
        natural: by backbone; without one its centred cosine is not taken.
    """
    columns: Columns = {}
    for name, original in originals.items():
        view, prefix = seen[name], f"evaluated_by_{name}_" if name != OWN else ""
        found = {"cosine": feature_cosine(original.features, view.features)}
        if name in natural:
            mean = natural[name].mean
            found["centred_cosine"] = centred_cosine(original.features, view.features, mean)
        if original.logits is not None and view.logits is not None:
            for k in (1, 5):
                match = top_k_match(original.logits, view.logits, min(k, view.logits.shape[1]))
                found[f"top{k}_match"] = match.float()
        broken = ~(original.is_finite & view.is_finite)
        for metric, values in found.items():
            columns[prefix + metric] = values.float().cpu().masked_fill(broken.cpu(), torch.nan)
    return columns
