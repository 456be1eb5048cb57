"""Determined or invented: how far the true picture may lie from samples of its features.

Samples of one map differ where the features leave something open, but they differ less than they
err: they share the faults of their model. So the error is predicted from the spread, on pictures
that are held out, and intervals get their width from the errors on others of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from featinv_diffusion.errors import InputError
from featinv_diffusion.features.pixel_operations import GREY_WEIGHTS
from featinv_diffusion.types import Features, Images

LEVELS = (0.5, 0.8, 0.95)
"""Shares of the places at which intervals hold the truth."""
MIN_IMAGES = 40
"""Smallest number of held-out pictures: an interval of 95 % needs 19 in its half."""
N_BANDS = 5
PARTS = ("luminance", "chroma", "cell_luminance", "cell_chroma", "cell_features")
"""Of each pixel: luminance, and the two differences of colour. Of each cell of the map: the means
of both over its pixels, and its features, in units of their deviation among natural maps."""

_MAX_PLACES = 1024  # of one picture, in a fit
_ROUNDING = (1 / 255) ** 2 / 12  # variance of rounding to 8 bits
_MAX_STEPS = 100
_BLUE, _RED = 0.564, 0.713  # Rec. 601: then both differences lie in [-0.5, 0.5]


def to_luminance_chroma(images: Images) -> Float[Tensor, "b 3 height width"]:
    """Returns luminance Y in [0, 1], 0.564 (B − Y) and 0.713 (R − Y) (Rec. 601) of images."""
    grey = (images * images.new_tensor(GREY_WEIGHTS)[:, None, None]).sum(dim=1)
    return torch.stack([grey, _BLUE * (images[:, 2] - grey), _RED * (images[:, 0] - grey)], dim=1)


def to_parts(
    images: Images, features: Features, scale: Float[Tensor, " c"]
) -> dict[str, Float[Tensor, "b d _ _"]]:
    """Returns the values of each of `PARTS`: at each pixel, or at each cell.

    Args:
        scale: deviation of each channel of the features among natural maps.
    """
    colours = to_luminance_chroma(images.float())
    height, width = features.shape[2:]
    cells = F.adaptive_avg_pool2d(colours, (height, width))
    return {
        "luminance": colours[:, :1],
        "chroma": colours[:, 1:],
        "cell_luminance": cells[:, :1],
        "cell_chroma": cells[:, 1:],
        "cell_features": features.float() / scale[:, None, None],
    }


@dataclass(frozen=True, eq=False)
class Spread:
    """Samples of one map: in each of `PARTS` their mean, and their variance at a place (n − 1; of
    several values at a place its mean)."""

    mean: dict[str, Float[Tensor, "d _ _"]]
    variance: dict[str, Float[Tensor, "_ _"]]

    @classmethod
    def of(cls, images: Images, features: Features, scale: Float[Tensor, " c"]) -> Spread:
        """Takes it of samples and of what the backbone sees in them, see `to_parts`."""
        parts = {name: v.double() for name, v in to_parts(images, features, scale).items()}
        variance = {name: values.var(dim=0).mean(dim=0) for name, values in parts.items()}
        return cls({name: values.mean(dim=0) for name, values in parts.items()}, variance)

    def distance(self, part: str, truth: Float[Tensor, "d h w"]) -> Float[Tensor, "h w"]:
        """Returns the error of the mean at each place; of several values its root mean square."""
        return (truth.double() - self.mean[part]).square().mean(dim=0).sqrt()

    def predictors(self, part: str) -> Float[Tensor, "9 h w"]:
        """Returns what the error of a part is predicted from.

        1; logarithms of the part's variance at the place, among its 3 × 3 neighbours and in the
        whole picture, and of the features' variance there; luminance and its square; logarithms of
        the saturation at the place and in the whole picture, both of the mean of samples.
        """
        size, of_cells = self.variance[part].shape, "cell_" if part.startswith("cell_") else ""
        luminance = self.mean[of_cells + "luminance"][0]
        saturation = self.mean[of_cells + "chroma"].square().mean(dim=0)
        own, features = self.variance[part], _resized(self.variance["cell_features"], size)
        around = F.avg_pool2d(own[None], 3, stride=1, padding=1, count_include_pad=False)[0]
        whole, colours = (one.mean().expand(size) for one in (own, saturation))
        return torch.stack(
            [
                torch.ones_like(own),
                *map(_log, (own, around, whole, features)),
                luminance,
                luminance.square(),
                *map(_log, (saturation, colours)),
            ]
        )


def _log(values: Tensor) -> Tensor:
    return (values + _ROUNDING).log()


def _resized(values: Float[Tensor, "h w"], size: Sequence[int]) -> Float[Tensor, "_ _"]:
    if values.shape == tuple(size):
        return values
    return F.interpolate(values[None, None], tuple(size), mode="bilinear")[0, 0]


# ---- The error of one part -----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ErrorModel:
    """Predicts the error of the mean of samples at each place, and how far it may reach.

    Args:
        weights: of `Spread.predictors`, for the logarithm of the mean square error.
        edges: of the bands of predicted errors, rising.
        reach: for each of `LEVELS` and each band, what a predicted error is multiplied by.
        natural: variance of natural pictures about their mean, at each cell of the map.
    """

    weights: Float[Tensor, " p"]
    edges: Float[Tensor, " cuts"]
    reach: Float[Tensor, "levels bands"]
    natural: Float[Tensor, "gh gw"]

    def error(self, predictors: Float[Tensor, "p h w"]) -> Float[Tensor, "h w"]:
        """Returns the root mean square error that is expected at each place."""
        return (torch.einsum("phw,p->hw", predictors, self.weights) / 2).exp()

    def radii(self, error: Float[Tensor, "h w"]) -> dict[float, Float[Tensor, "h w"]]:
        """Returns how far from the mean of samples the truth lies at most, for each of `LEVELS`."""
        band = torch.bucketize(error, self.edges)
        return {level: error * self.reach[i][band] for i, level in enumerate(LEVELS)}


def fit_error_model(
    predictors: Float[Tensor, "n k p"],
    errors: Float[Tensor, "n k"],
    natural: Float[Tensor, "gh gw"],
) -> ErrorModel:
    """Fits the prediction on every second picture, and its reach on the others.

    The logarithm of the mean square error is linear in the predictors; its weights maximise the
    likelihood of normal errors of that size. The reach at a level is the quantile of error by
    predicted error in a band, at the level (1 + 1 / n) of the n pictures in it: split conformal
    prediction by groups, with the places of a picture pooled (Vovk, Gammerman and Shafer 2005,
    §4.5; Dunn, Wasserman and Ramdas 2022).

    Args:
        predictors: at k places of each of n pictures, which come in random order.
        errors: of the mean of samples there.
    """
    inputs, squares = predictors.double(), errors.double().square() + _ROUNDING
    weights = _fit_scale(inputs[::2].flatten(0, 1), squares[::2].flatten())
    # The mean square must be right on pictures that the weights were not fitted on.
    weights[0] += (squares[1::2] / (inputs[1::2] @ weights).exp()).mean().log()
    scales = (inputs @ weights / 2).exp()
    cuts = torch.linspace(0, 1, N_BANDS + 1, dtype=torch.float64)[1:-1]
    edges = torch.quantile(_thinned(scales[::2].flatten()), cuts)
    held = scales[1::2].contiguous()
    reach = _reach(torch.bucketize(held, edges), errors[1::2].double() / held)
    return ErrorModel(weights, edges, reach, natural.double())


def _thinned(values: Float[Tensor, " n"]) -> Float[Tensor, " m"]:
    """Takes so many at even steps that torch's quantile takes them."""
    return values[:: 1 + len(values) // 2**23]


def _fit_scale(inputs: Float[Tensor, "n p"], squares: Float[Tensor, " n"]) -> Float[Tensor, " p"]:
    """Minimises the mean of square / s + ln s over the weights of ln s, by Newton's method."""
    mean, scale = inputs.mean(dim=0), inputs.std(dim=0)
    held = scale > 1e-9  # what does not vary cannot predict
    rows = torch.cat([torch.ones_like(inputs[:, :1]), ((inputs - mean) / scale)[:, held]], dim=1)
    found = torch.zeros(rows.shape[1], dtype=torch.float64)
    found[0] = squares.mean().log()
    ridge = 1e-6 * torch.eye(len(found), dtype=torch.float64)
    for _ in range(_MAX_STEPS):
        ratio = squares / (rows @ found).exp()
        gradient = rows.T @ (1 - ratio) / len(rows)
        curvature = (rows * ratio[:, None]).T @ rows / len(rows)
        step = torch.linalg.solve(curvature + ridge, gradient)
        found = found - step / max(1.0, step.abs().max().item())
        if step.abs().max() < 1e-8:
            break
    weights = torch.zeros(inputs.shape[1], dtype=torch.float64)
    weights[held] = found[1:] / scale[held]
    weights[0] = found[0] - (weights[held] * mean[held]).sum()
    return weights


def _reach(
    bands: Int[Tensor, "n k"], ratios: Float[Tensor, "n k"]
) -> Float[Tensor, "levels bands"]:
    """Returns the quantiles of the ratios in each band; those of all where a band has too few."""
    everywhere = torch.ones_like(bands, dtype=torch.bool)
    columns = []
    for band in range(N_BANDS):
        inside = bands == band
        n = int(inside.any(dim=1).sum())
        if n < MIN_IMAGES // 2:
            inside, n = everywhere, len(bands)
        levels = torch.tensor(LEVELS, dtype=torch.float64) * (1 + 1 / n)
        columns.append(torch.quantile(_thinned(ratios[inside]), levels.clamp(max=1)))
    return torch.stack(columns, dim=1)


# ---- All parts -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Certainty:
    """What the features fix of one picture, at each place and in each of `PARTS`.

    Args:
        n_samples: samples that it rests on.
        n_images: held-out pictures that it is calibrated on.
        spread: mean and variance of the samples; intervals lie about the mean.
        error: root mean square error that is expected there.
        radii: by level, half the width of the interval that holds the truth at this share of the
            places; of several values at a place, of their root mean square.
        natural: variance of natural pictures at the place.
    """

    n_samples: int
    n_images: int
    spread: Spread
    error: dict[str, Float[Tensor, "_ _"]]
    radii: dict[str, dict[float, Float[Tensor, "_ _"]]]
    natural: dict[str, Float[Tensor, "_ _"]]

    def determined(self, part: str) -> Float[Tensor, "_ _"]:
        """Returns the share of the natural variance that the features fix at each place: 1 − error²
        / natural, in [0, 1]. 1 is determined, 0 is invented: no better than a guess."""
        return (1 - self.error[part].square() / self.natural[part]).clamp(0, 1)

    def share(self, part: str) -> float:
        """Returns the share of the natural variance of the whole picture."""
        ratio = self.error[part].square().sum() / self.natural[part].sum()
        return max(0.0, 1 - ratio.item())

    @property
    def shares(self) -> dict[str, float]:
        """`share` of each of `PARTS`."""
        return {part: self.share(part) for part in PARTS}

    def holds(self, part: str, truth: Float[Tensor, "d h w"], level: float) -> Tensor:
        """Returns whether the interval of a level holds the truth at each place."""
        return self.spread.distance(part, truth) <= self.radii[part][level]

    def numbers(self) -> dict[str, Any]:
        """Returns shares, expected errors and intervals of each part, and the maps of cells."""
        return {
            "n_samples": self.n_samples,
            "n_calibration_images": self.n_images,
            "determined_share": self.shares,
            "expected_error": {
                part: self.error[part].square().mean().sqrt().item() for part in PARTS
            },
            "interval_radius": {
                part: {f"{level:g}": radius.mean().item() for level, radius in radii.items()}
                for part, radii in self.radii.items()
            },
            "determined_per_cell": {
                part: self.determined(part).tolist() for part in PARTS if part.startswith("cell_")
            },
        }

    def summary(self) -> str:
        """Returns what is determined, in words."""
        luminance, chroma, coarse, colour = (f"{self.share(part):.0%}" for part in PARTS[:4])
        return (
            f"Determined by the features: {luminance} of the variance of luminance and {chroma} of "
            f"that of colour at a pixel, {coarse} and {colour} at a cell of the map; the rest is "
            f"invented (calibrated on {self.n_images} held-out pictures)."
        )


@dataclass(frozen=True, eq=False)
class CertaintyModel:
    """The error models of all parts for one number of samples.

    Args:
        n_samples: whose mean and variance are taken.
        n_images: held-out pictures.
        scale: see `to_parts`.
    """

    n_samples: int
    n_images: int
    scale: Float[Tensor, " c"]
    models: Mapping[str, ErrorModel]

    def judge(self, images: Images, features: Features) -> Certainty:
        """Returns the certainty of a picture.

        Args:
            images: at least `n_samples` samples of it, of which the first are taken.
            features: what the backbone sees in them.

        Raises:
            InputError: too few samples.
        """
        if len(images) < self.n_samples:
            raise InputError(
                f"Certainty is calibrated for {self.n_samples} samples, got {len(images)}."
            )
        n = self.n_samples
        spread = Spread.of(images[:n].cpu(), features[:n].cpu(), self.scale)
        error = {p: m.error(spread.predictors(p)) for p, m in self.models.items()}
        return Certainty(
            n,
            self.n_images,
            spread,
            error,
            {p: m.radii(error[p]) for p, m in self.models.items()},
            {p: _resized(m.natural, error[p].shape) for p, m in self.models.items()},
        )


def fit_certainty_models(
    pictures: Iterable[tuple[Images, Features, Images, Features]],
    counts: Iterable[int],
    scale: Float[Tensor, " c"],
) -> list[CertaintyModel]:
    """Fits a model for each number of samples.

    Args:
        pictures: of each held-out picture, in random order, itself and its map, `[1, …]`, its
            samples and what the backbone sees in them.
        counts: numbers of samples, at least 2 each.
        scale: see `to_parts`.

    Raises:
        InputError: too few pictures or samples.
    """
    counts = sorted(set(counts))
    if not counts or counts[0] < 2:
        raise InputError(f"Certainty needs at least 2 samples of each picture, got {counts}.")
    draw = torch.Generator().manual_seed(0)
    truths: list[dict[str, Tensor]] = []
    seen = {(n, part): ([], []) for n in counts for part in PARTS}
    for image, maps, images, features in pictures:
        truth = {k: v[0] for k, v in to_parts(image.cpu(), maps.cpu(), scale).items()}
        truths.append(truth)
        for n in counts:
            spread = Spread.of(images[:n].cpu(), features[:n].cpu(), scale)
            for part in PARTS:
                inputs = spread.predictors(part).flatten(1).T
                places = torch.randperm(len(inputs), generator=draw)[:_MAX_PLACES]
                seen[n, part][0].append(inputs[places].float())
                seen[n, part][1].append(spread.distance(part, truth[part]).flatten()[places])
    if len(truths) < MIN_IMAGES:
        raise InputError(
            f"At least {MIN_IMAGES} pictures must be held out to calibrate certainty, got "
            f"{len(truths)}. Give more pictures."
        )
    natural, found = _natural_variances(truths), []
    for n in counts:
        models = {}
        for part in PARTS:
            inputs, errors = map(torch.stack, seen[n, part])
            models[part] = fit_error_model(inputs, errors, natural[part])
        found.append(CertaintyModel(n, len(truths), scale, models))
    return found


def _natural_variances(truths: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Returns the variance of pictures about their mean in each cell, smoothed over neighbours."""
    found = {}
    height, width = truths[0]["cell_features"].shape[1:]
    for part in PARTS:
        values = torch.stack([truth[part] for truth in truths]).double()
        cells = F.adaptive_avg_pool2d(values.var(dim=0).mean(dim=0)[None], (height, width))
        smooth = F.avg_pool2d(cells, 3, stride=1, padding=1, count_include_pad=False)[0]
        found[part] = smooth.clamp_min(_ROUNDING)
    return found
