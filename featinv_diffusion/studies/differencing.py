"""Two models through one inverter: what one of them keeps that the other does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import t as student_t
from torch import Tensor
from torch.nn import functional as F

from featinv_diffusion.backbones import Backbone
from featinv_diffusion.errors import InputError
from featinv_diffusion.figures import board as figures
from featinv_diffusion.figures.board import Board
from featinv_diffusion.images import Pictures
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.metrics.colour import to_lab
from featinv_diffusion.metrics.statistics import bootstrap_mean, holm, wilcoxon_signed_rank
from featinv_diffusion.runs.progress import advancing
from featinv_diffusion.runs.sampling import sample_maps
from featinv_diffusion.seeds import derive_seed, make_generator
from featinv_diffusion.studies.study import Analysis
from featinv_diffusion.types import FeatureMaps, Features, Images

LEVEL = 0.05
MAX_SHOWN, MAX_BOOTSTRAP = 6, 1000
MIN_PICTURES = 8
"""A paired test of fewer pictures cannot reach the level for any of the attributes."""
DIRECT = 0.5
"""Mean cosine of centred cells above which two models of one architecture share coordinates."""
RIDGE = 1e-2
"""Of the mean variance of the features that are mapped."""


def compare_models(
    inverter: Inverter,
    other: Backbone,
    pictures: Pictures,
    *,
    fit_on: Pictures | None = None,
    nulls: Sequence[Backbone] = (),
    mapping: Literal["auto", "none", "ridge"] = "auto",
    n_bootstrap: int = 5,
    seed: int = 0,
    batch_size: int = 8,
    progress: bool = False,
) -> Analysis:
    """Decodes the maps of the inverter's own model A and of another model B, with the same noise.

    For each picture, attributes of the two decoded pictures are compared: colourfulness,
    brightness, contrast, fine detail, and the probability that A gives its own class. An attribute
    is an alarm where B's change differs from that of the nulls at 5 % over all attributes
    (Holm's correction) both over the pictures (Wilcoxon's signed ranks) and over the nulls, whose
    means differ too (a t test with one degree of freedom fewer than there are nulls; give three or
    more). The nulls are further models, such as other
    training seeds of A; without any, the ridge map is fitted anew on bootstrap resamples of the
    pictures, or, where there is no map, no change at all.

    Args:
        inverter: of model A.
        other: model B, at the layer to compare.
        pictures: to decode, at least 8.
        fit_on: pictures for the ridge map from B's cells to A's; default is the first half of the
            pictures, which are then not decoded.
        nulls: models that differ from A by nothing that matters.
        mapping: `none` decodes the maps as they are; `ridge` maps cells linearly first; `auto`
            takes `none` where two models of one architecture agree in their coordinates.
        n_bootstrap: resamples of the ridge map.
        seed: random seed.
        batch_size: samples per batch.
        progress: show a progress bar on stderr.

    Raises:
        InputError: too few pictures, maps of another shape without a map, or pictures that cannot
            be read.
    """
    if not 0 <= n_bootstrap <= MAX_BOOTSTRAP:
        raise InputError(f"n_bootstrap must be from 0 to {MAX_BOOTSTRAP}, got {n_bootstrap}.")
    own = inverter.require_backbone()
    a = inverter.encode(pictures)
    names = [source.name for source in a.sources]
    split = 0 if fit_on is not None else len(a) // 2
    if len(a) - split < MIN_PICTURES:
        raise InputError(
            f"At least {MIN_PICTURES} pictures must be decoded, got {len(a) - split}"
            + (f" beside {split} for the ridge map." if split else ".")
            + " Give more pictures."
        )
    fit_a: Any = a[:split] if fit_on is None else inverter.encode(fit_on)
    kept = slice(split, None)
    seeds = [derive_seed(seed, name or str(j), 0) for j, name in enumerate(names[kept])]
    logits = [source.logits for source in a.sources[kept]]
    classes = None
    if all(row is not None for row in logits):
        classes = torch.stack([row for row in logits if row is not None]).argmax(1).cpu()
    models = [_Mapped(own, model, mapping, fit_a) for model in (other, *nulls)]
    for model in models:
        model.read(pictures, fit_on, split)
    without_map = models[0].ridge is None
    n_boot = 0 if nulls or without_map else n_bootstrap
    plain = a[kept].as_subclass(Tensor)

    def decode(maps: Features) -> tuple[Images, dict[str, np.ndarray]]:
        pairs = list(zip(maps, seeds, strict=True))
        batches = list(sample_maps(inverter, pairs, batch_size))
        images = torch.cat([batch.images for batch in batches])
        scores = [batch.logits for batch in batches if batch.logits is not None]
        return images, _attributes(images, torch.cat(scores) if scores else None, classes)

    with advancing(inverter, len(plain) * (1 + len(models) + n_boot), progress):
        of_a, values_a = decode(plain)
        decoded = [decode(model.maps) for model in models]
        resampled = [decode(models[0].resampled(k, seed))[1] for k in range(n_boot)]
    of_b, values_b = decoded[0]
    null_changes = [
        {name: values[name] - values_a[name] for name in values_a} for _, values in decoded[1:]
    ] or [{name: values[name] - values_b[name] for name in values_a} for values in resampled]
    basis = "bootstrap of the ridge map" if n_boot else "no change at all"
    if nulls:
        basis = ", ".join(model.name for model in nulls)
    rows = _test(values_a, values_b, null_changes)
    return _report(
        inverter, models[0], rows, basis, (a.sources[kept], of_a, of_b), len(nulls) or n_boot
    )


# ---- From B's cells to A's -----------------------------------------------------------------------


class _Mapped:
    """The maps of a model in the coordinates of A's."""

    def __init__(self, own: Backbone, model: Backbone, mapping: str, fit_a: FeatureMaps):
        self.own, self.model, self.mapping = own, model, mapping
        self.fit_a = fit_a.as_subclass(Tensor).float().cpu()
        self.ridge: _Ridge | None = None
        self.agreement: float | None = None

    @torch.no_grad()
    def read(self, pictures: Pictures, fit_on: Pictures | None, split: int) -> None:
        maps = _encode(self.model, pictures)
        self.fit_b = maps[:split] if fit_on is None else _encode(self.model, fit_on)
        maps = maps[split:]
        same_shape = maps.shape[1:] == self.fit_a.shape[1:]
        if same_shape:
            self.agreement = _centred_cosine(self.fit_b, self.fit_a)
        if self.mapping == "none" and not same_shape:
            raise InputError(
                f"Maps can be decoded as they are only if they have A's shape "
                f"{list(self.fit_a.shape[1:])}, but {self.model.name!r} makes "
                f"{list(maps.shape[1:])}. Use the ridge map."
            )
        agree = same_shape and _same_architecture(self.own, self.model)
        agree = agree and self.agreement is not None and self.agreement > DIRECT
        direct = self.mapping == "none" or (self.mapping == "auto" and agree)
        self.ridge = None if direct else _Ridge.fit(self.fit_b, self.fit_a)
        self.raw = maps
        self.maps = maps if self.ridge is None else self.ridge(maps)

    def resampled(self, k: int, seed: int) -> Features:
        """Returns the maps by a ridge map that was fitted on a resample of the pictures."""
        generator = make_generator(seed, "ridge", k)
        chosen = torch.randint(len(self.fit_b), (len(self.fit_b),), generator=generator)
        return _Ridge.fit(self.fit_b[chosen], self.fit_a[chosen])(self.raw)


def _encode(model: Backbone, pictures: Pictures) -> Features:
    images, _ = model.read(pictures)
    return torch.cat([model.features(image[None]).float().cpu() for image in images])


def _same_architecture(one: Backbone, other: Backbone) -> bool:
    shapes = [{k: v.shape for k, v in m.model.state_dict().items()} for m in (one, other)]
    return shapes[0] == shapes[1]


def _centred_cosine(maps: Features, others: Features) -> float:
    pairs = [x - x.mean(dim=(0, 2, 3), keepdim=True) for x in (maps, others)]
    return F.cosine_similarity(*pairs, dim=1).mean().item()


@dataclass(frozen=True)
class _Ridge:
    """A linear map of cells: y = W x + b."""

    weight: Float[Tensor, "c d"]
    bias: Float[Tensor, " c"]
    grid: tuple[int, int]

    @classmethod
    def fit(cls, source: Features, target: Features) -> _Ridge:
        grid = (target.shape[2], target.shape[3])
        x, y = (_cells(_to_grid(maps, grid)) for maps in (source, target))
        mean_x, mean_y = x.mean(0), y.mean(0)
        x, y = x - mean_x, y - mean_y
        gram = x.T @ x
        penalty = RIDGE * gram.diagonal().mean()
        weight = torch.linalg.solve(gram + penalty * torch.eye(len(gram)).double(), x.T @ y).T
        return cls(weight, mean_y - weight @ mean_x, grid)

    def __call__(self, maps: Features) -> Features:
        cells = _to_grid(maps, self.grid).double()
        mapped = torch.einsum("bdhw,cd->bchw", cells, self.weight) + self.bias[:, None, None]
        return mapped.float()


def _to_grid(maps: Features, grid: tuple[int, int]) -> Features:
    if (maps.shape[2], maps.shape[3]) == grid:
        return maps
    return F.interpolate(maps, grid, mode="bilinear", align_corners=False, antialias=True)


def _cells(maps: Features) -> Float[Tensor, "n c"]:
    return maps.permute(0, 2, 3, 1).flatten(0, 2).double()


# ---- Attributes of decoded pictures --------------------------------------------------------------


def _attributes(
    images: Images, logits: Tensor | None, classes: Tensor | None
) -> dict[str, np.ndarray]:
    lab = to_lab(images)
    lightness = lab[:, 0]
    smooth = F.avg_pool2d(lightness[:, None], 3, 1, 1, count_include_pad=False)[:, 0]
    found = {
        "colour": lab[:, 1:].norm(dim=1).mean(dim=(1, 2)),
        "brightness": lightness.mean(dim=(1, 2)),
        "contrast": lightness.flatten(1).std(dim=1),
        "fine detail": (lightness - smooth).flatten(1).std(dim=1),
    }
    if logits is not None and classes is not None:
        shares = logits.float().cpu().softmax(dim=1)
        found["own class"] = shares.gather(1, classes[:, None])[:, 0]
    return {name: values.double().cpu().numpy() for name, values in found.items()}


def _test(
    a: dict[str, np.ndarray], b: dict[str, np.ndarray], nulls: list[dict[str, np.ndarray]]
) -> list[dict[str, Any]]:
    """Returns one row per attribute, largest change beyond the null first."""
    rows = []
    for name in a:
        change = b[name] - a[name]
        null = np.mean([one[name] for one in nulls], axis=0) if nulls else np.zeros_like(change)
        beyond = change - null
        spread = a[name].std(ddof=1)  # as A's own pictures differ, whatever the attribute's unit
        p_value = wilcoxon_signed_rank(change.tolist(), null.tolist()).p_value
        means = [float(one[name].mean()) for one in nulls]
        p_value = max(p_value, _p_of_training(float(change.mean()), means))
        interval = bootstrap_mean(change)
        rows.append(
            {
                "attribute": name,
                "mean_a": float(a[name].mean()),
                "change": interval.value,
                "change_low": interval.low,
                "change_high": interval.high,
                "null": float(null.mean()),
                "effect": float(beyond.mean() / spread) if spread > 0 else 0.0,
                "p_value": p_value,
            }
        )
    for row, p_value in zip(rows, holm([row["p_value"] for row in rows]), strict=True):
        row["p_value"] = p_value
        row["alarm"] = p_value < LEVEL
    return sorted(rows, key=lambda row: -abs(row["effect"]))


def _p_of_training(change: float, nulls: list[float]) -> float:
    """Returns the p-value of one more mean among those of the nulls, which differ too.

    Pictures alone would call any two trainings different. With fewer than two nulls it is 0: then
    nothing is known of how trainings differ.
    """
    if len(nulls) < 2:
        return 0.0
    spread = float(np.std(nulls, ddof=1)) * (1 + 1 / len(nulls)) ** 0.5
    beyond = abs(change - float(np.mean(nulls)))
    if spread == 0:
        return float(beyond == 0)
    return float(2 * student_t.sf(beyond / spread, len(nulls) - 1))


# ---- What is shown -------------------------------------------------------------------------------


def _report(
    inverter: Inverter,
    model: _Mapped,
    rows: list[dict[str, Any]],
    basis: str,
    shown: tuple[Any, Images, Images],
    n_null: int,
) -> Analysis:
    how = "as they are" if model.ridge is None else "by a ridge map of cells"
    alarms = [row for row in rows if row["alarm"]]
    named = [
        f"{row['attribute']} {_direction(row['change'], row['null'])} "
        f"({row['mean_a']:.3g} → {row['mean_a'] + row['change']:.3g}, null {row['null']:+.3g})"
        for row in alarms
    ]
    lines = [
        f"{model.model.name} against {model.own.name}: {len(shown[1])} pictures, maps decoded "
        f"{how}; null: {basis}.",
        ("Beyond the null: " + "; ".join(named) + ".")
        if named
        else "No attribute of the decoded pictures changes beyond the null.",
    ]
    metrics = {
        "model_a": model.own.name,
        "model_b": model.model.name,
        "n": len(shown[1]),
        "mapping": "none" if model.ridge is None else "ridge",
        "centred_cosine": model.agreement,
        "null_basis": basis,
        "n_null": n_null,
        "attributes": rows,
    }
    return Analysis(metrics, {"compare.png": _draw(shown, lines)}, lines, rows)


def _direction(change: float, null: float) -> str:
    verb = "falls" if change < 0 else "rises"
    return verb if (change < 0) == (change < null) else f"{verb} less than in the null"


def _draw(shown: tuple[Any, Images, Images], lines: list[str]) -> Any:
    sources, of_a, of_b = shown
    n = min(len(of_a), MAX_SHOWN)
    has_originals = any(source.square is not None for source in sources[:n])
    names = ("original",) * has_originals + ("A", "B", "|A − B|")
    board = Board(len(names), n, "One inverter, two models", lines, right=0.75)
    figure = board.make()
    change = (of_a - of_b).abs().mean(dim=1)
    high = max(change[:n].max().item(), 1e-3)
    image = None
    for j in range(n):
        tiles = [board.tile_axes(figure, row, j) for row in range(len(names))]
        if has_originals and sources[j].square is not None:
            figures.show_picture(tiles[0], sources[j].square)
            figures.caption(tiles[0], figures.short_name(sources[j].name, 14), color=figures.GREY)
        figures.show_picture(tiles[-3], of_a[j])
        figures.show_picture(tiles[-2], of_b[j])
        image = figures.show_map(tiles[-1], change[j], 0, high)
        figures.caption(tiles[-1], f"mean {change[j].mean().item():.3f}")
        if j == 0:
            for axes, name in zip(tiles, names, strict=True):
                figures.side_label(axes, name)
    figures.add_colour_bar(board, figure, len(names) - 1, image, "mean |ΔRGB|")
    return figure
