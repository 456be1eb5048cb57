"""Any edit of a feature map, seen beside edits of the same size that mean nothing."""

from __future__ import annotations

import math
import runpy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from featinv_diffusion.backbones import Backbone
from featinv_diffusion.backbones.base import LayerEdit
from featinv_diffusion.errors import InputError
from featinv_diffusion.features import box_mask, paste
from featinv_diffusion.features.edits import FeatureEdit, frame_of_cells, in_sequence, random_like
from featinv_diffusion.features.maps import is_maps_file, read_arrays
from featinv_diffusion.figures import board as figures
from featinv_diffusion.figures.board import Board
from featinv_diffusion.files import expand_path
from featinv_diffusion.images import Pictures, to_pil
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.runs.progress import advancing
from featinv_diffusion.runs.record import Result
from featinv_diffusion.runs.sampling import SampleBatch, read_maps, sample_all, to_list
from featinv_diffusion.runs.scope import Scope, caption, open_scope, scope_notes
from featinv_diffusion.seeds import make_generator
from featinv_diffusion.studies.study import choose_seeds, draw_original, settings_line, settings_of
from featinv_diffusion.types import FeatureMaps, Features, Images, Source

MAX_ROWS, MAX_NULL = 4, 1000
KINDS = (
    "steer",
    "ablate-channels",
    "ablate-box",
    "replace-from",
    "scale",
    "noise",
    "function",
)


def edit(
    inverter: Inverter,
    picture: Any,
    edits: FeatureEdit | str | Sequence[FeatureEdit | str],
    *,
    at: str | None = None,
    box: Sequence[float] | None = None,
    n_null: int = 9,
    n_samples: int = 4,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    batch_size: int = 8,
    progress: bool = False,
) -> Edited:
    """Samples a picture's map before and after an edit, and after edits that mean nothing.

    The nulls change each cell of the inverter's map as much as the edit does, all cells along one
    random direction of the span of natural maps, with the same noise.

    Args:
        picture: a picture, or a feature map `[1, c, h, w]`; the noise depends on its file name.
        edits: one or several, applied in order: functions of a map `[b, c, h, w]` that return one
            of the same shape, or words: `steer FILE:FACTOR` adds a vector of a file times the
            factor to each cell; `ablate-channels 3,17` and `ablate-box y0,x0,y1,x1` set to zero;
            `replace-from PICTURE` takes the map of another picture; `scale F` multiplies; `noise
            F` adds F standard deviations of each channel; `function FILE.py:NAME` calls yours.
        at: edit the map of this earlier layer instead and let the model compute the rest; the
            picture must then be one. None edits the inverter's own map.
        box: region y0,x0,y1,x1 outside of which the edits change nothing.
        n_null: number of random directions.
        n_samples: samples of each map; deterministic inverters make one.
        seed: random seed.
        seeds: the seed of each sample itself, as a manifest keeps them.
        batch_size: samples per batch.
        progress: show a progress bar on stderr.

    Raises:
        InputError: an edit that is not one, gives another shape or values that are not finite, a
            picture that cannot be read, no such layer, samples that are not finite.
    """
    if not 1 <= n_null <= MAX_NULL:
        raise InputError(f"n_null must be from 1 to {MAX_NULL}, got {n_null}.")
    given = [edits] if isinstance(edits, str) or callable(edits) else list(edits)
    if not given:
        raise InputError("At least one edit must be given, got none.")
    backbone = inverter.require_backbone()
    maps = read_maps(inverter, picture)
    seeds = choose_seeds(inverter, maps, seed, n_samples, seeds)
    source, before = maps.sources[0], maps.as_subclass(Tensor)
    change = _whole(given, backbone, at, box, seeds[0])
    after = change(before) if at is None else _through(backbone, picture, at, change)
    inverter.spec.check_features(after)
    scope = open_scope(inverter)
    frame, basis = _frame(scope, before)
    asked = after - before
    generators = [make_generator(seeds[0], "null", k) for k in range(n_null)]
    nulls = [before + random_like(asked, frame, generator) for generator in generators]
    with advancing(inverter, (2 + n_null) * len(seeds), progress):
        samples = [sample_all(inverter, each, seeds, batch_size) for each in (before, after)]
        null_samples = [sample_all(inverter, each, seeds, batch_size) for each in nulls]
    class_index = _class_of(backbone, source, samples[0])
    labels = backbone.labels
    return Edited(
        settings=settings_of(inverter, len(seeds), seed, batch_size),
        arguments={
            "seeds": seeds,
            "image": source.location,
            "edits": [each if isinstance(each, str) else None for each in given],
            "at": at,
            "box": None if box is None else [float(value) for value in box],
            "n_null": n_null,
        },
        scope_p_value=scope.p_value(after, samples[1].cosine.double().mean().item()),
        scope_basis=scope.basis,
        picture=source,
        words=[each if isinstance(each, str) else _name_of(each) for each in given],
        size=_share(asked, before),
        null_basis=basis,
        before=samples[0],
        after=samples[1],
        effect=_effect(samples[0], samples[1], asked, class_index),
        nulls=[
            _effect(samples[0], done, null - before, class_index)
            for null, done in zip(nulls, null_samples, strict=True)
        ],
        null_images=null_samples[0].images,
        class_index=class_index,
        class_name=None if class_index is None or labels is None else labels[class_index],
    )


# ---- From words to functions ---------------------------------------------------------------------


def _whole(
    given: Sequence[FeatureEdit | str],
    backbone: Backbone,
    at: str | None,
    box: Sequence[float] | None,
    seed: int,
) -> FeatureEdit:
    """Returns all edits as one, which is held to the shape and to the box."""
    steps = [
        _held(each if not isinstance(each, str) else _parse(each, backbone, at, seed + i), each)
        for i, each in enumerate(given)
    ]
    together = in_sequence(*steps)

    def change(features: Features) -> Features:
        edited = together(features)
        if box is None:
            return edited
        return paste(features, edited, box_mask(box, (features.shape[2], features.shape[3])))

    return change


def _held(function: FeatureEdit, given: FeatureEdit | str) -> FeatureEdit:
    def step(features: Features) -> Features:
        edited = function(features.clone())
        if not isinstance(edited, Tensor) or edited.shape != features.shape:
            got = list(edited.shape) if isinstance(edited, Tensor) else type(edited).__name__
            raise InputError(
                f"The edit {_name_of(given)} must return a map of the shape "
                f"{list(features.shape)}, but gives {got}."
            )
        return edited.to(features)

    return step


def _name_of(given: Any) -> str:
    return given if isinstance(given, str) else getattr(given, "__name__", type(given).__name__)


def _parse(words: str, backbone: Backbone, at: str | None, seed: int) -> FeatureEdit:
    kind, _, value = words.strip().partition(" ")
    value = value.strip()
    if kind not in KINDS or not value:
        raise InputError(
            f"An edit must be one of {', '.join(KINDS)} with a value behind a space, got {words!r}."
        )
    if kind == "steer":
        return _steer(value)
    if kind == "ablate-channels":
        return _ablate_channels(value)
    if kind == "ablate-box":
        box = _numbers(kind, value)
        return lambda features: paste(
            features,
            torch.zeros_like(features),
            box_mask(box, (features.shape[2], features.shape[3])),
        )
    if kind == "replace-from":
        other = map_of(backbone, value, at)
        return lambda features: other.to(features).expand_as(features)
    if kind == "function":
        return _load_function(value)
    (factor,) = _numbers(kind, value, 1)
    if kind == "scale":
        return lambda features: factor * features
    return lambda features: features + factor * _noise(features, seed)


def _noise(features: Features, seed: int) -> Features:
    drawn = torch.randn(features.shape, generator=make_generator(seed, "noise"))
    return drawn.to(features) * features.std(dim=(0, 2, 3), keepdim=True)


def _numbers(kind: str, text: str, n: int | None = None) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(map(math.isfinite, found)) or (n is not None and len(found) != n):
        want = "a finite number" if n == 1 else "finite numbers with commas between"
        raise InputError(f"{kind} takes {want}, got {text!r}.")
    return found


def _ablate_channels(text: str) -> FeatureEdit:
    try:
        channels = [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(
            "ablate-channels takes channel numbers with commas between, such as 3,17, got "
            f"{text!r}."
        ) from None

    def ablate(features: Features) -> Features:
        n = features.shape[1]
        if wrong := [c for c in channels if not 0 <= c < n]:
            raise InputError(f"Channels are numbered from 0 to {n - 1} here, got {wrong[0]}.")
        features[:, channels] = 0
        return features

    return ablate


def _steer(text: str) -> FeatureEdit:
    place, colon, factor = text.rpartition(":")
    if not colon or not place:
        raise InputError(f"steer takes FILE:FACTOR, such as vector.safetensors:2, got {text!r}.")
    (strength,) = _numbers("steer", factor, 1)
    vector = load_vector(expand_path(place))

    def add(features: Features) -> Features:
        if len(vector) != features.shape[1]:
            raise InputError(
                f"A vector must have as many numbers as the map has channels, {features.shape[1]}, "
                f"but {place} holds {len(vector)}."
            )
        return features + strength * vector.to(features)[:, None, None]

    return add


def load_vector(path: Path) -> Float[Tensor, " c"]:
    """Reads one vector of a .safetensors, .npy or .npz file.

    Raises:
        InputError: no such file, not one vector, or values that are not finite.
    """
    arrays = read_arrays(path)
    vectors = [array.float().flatten() for array in arrays.values() if array.squeeze().ndim == 1]
    if len(arrays) != 1 or len(vectors) != 1 or not bool(vectors[0].isfinite().all()):
        raise InputError(
            f"{path} must hold one vector of finite numbers, but holds "
            f"{', '.join(f'{name} {list(array.shape)}' for name, array in arrays.items())}."
        )
    return vectors[0]


def _load_function(text: str) -> FeatureEdit:
    place, colon, name = text.rpartition(":")
    path = expand_path(place) if colon else None
    if path is None or path.suffix != ".py" or not path.is_file():
        raise InputError(
            f"function takes FILE.py:NAME of a file that exists, got {text!r}; its code is run."
        )
    try:
        found = runpy.run_path(str(path)).get(name)
    except Exception as error:  # whatever the user's code raises
        raise InputError(f"{path} fails: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise InputError(f"{path} must define a function {name!r}, but does not.")
    return found  # pyright: ignore[reportReturnType]


# ---- At an earlier layer -------------------------------------------------------------------------


def at_layer(backbone: Backbone, layer: str, change: FeatureEdit) -> LayerEdit:
    """Makes of an edit of maps one of the layer's own output; prefix tokens stay as they are."""
    layout = backbone.layout(layer)

    def apply(output: Tensor) -> Tensor:
        edited = layout.from_map(change(layout.to_map(output)))
        if layout.axes == "NLC" and layout.n_prefix:
            edited = torch.cat([output[:, : layout.n_prefix], edited[:, layout.n_prefix :]], dim=1)
        return edited

    return apply


def _through(backbone: Backbone, picture: Any, at: str, change: FeatureEdit) -> Features:
    check_picture(picture, at)
    with torch.no_grad(), backbone.intervene({at: at_layer(backbone, at, change)}):
        return backbone.features(picture).as_subclass(Tensor)


def map_of(backbone: Backbone, picture: Pictures, at: str | None) -> Features:
    """Returns the map of another picture, at the layer where the edit is."""
    with torch.no_grad():
        if at is None:
            return backbone.features(picture).as_subclass(Tensor)
        seen: list[Tensor] = []
        layout = backbone.layout(at)

        def keep(output: Tensor) -> Tensor:
            seen.append(layout.to_map(output).clone())
            return output

        with backbone.intervene({at: keep}):
            backbone.features(picture)
        if not seen:
            raise InputError(f"No forward pass reached {at!r} before the layer that is inverted.")
        return seen[0]


def check_picture(picture: Any, at: str) -> None:
    """Raises `InputError` where a feature map was given, of which no earlier layer is known."""
    if isinstance(picture, FeatureMaps) or is_maps_file(picture):
        raise InputError(
            f"An edit at the layer {at!r} needs the picture itself, but a feature map was given."
        )


# ---- Measures ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Effect:
    """What an edit did to the samples; every list has one value per seed.

    Args:
        rgb: absolute change of RGB, mean over pixels and channels.
        realised: cosine between the change of the samples' own features and the one asked for.
        arrived: how much of the change asked for is in the samples' features: its projection,
            where 1 is all of it.
        probability: change of the class probability; None without a head.
    """

    rgb: list[float]
    realised: list[float]
    arrived: list[float]
    probability: list[float] | None

    def means(self) -> dict[str, float | None]:
        """Returns the mean of each over the seeds."""
        return {
            name: None if values is None else sum(values) / len(values)
            for name, values in vars(self).items()
        }


def _effect(
    before: SampleBatch, after: SampleBatch, asked: Features, class_index: int | None
) -> Effect:
    change = (after.features - before.features).flatten(1).double().cpu()
    wanted = asked.flatten(1).double().cpu().expand_as(change)
    dot = (change * wanted).sum(1)
    norms = change.norm(dim=1) * wanted.norm(dim=1)
    probability = None
    if class_index is not None and before.logits is not None and after.logits is not None:
        shares = [x.logits.float().softmax(1)[:, class_index].cpu() for x in (before, after)]  # pyright: ignore[reportOptionalMemberAccess]
        probability = to_list(shares[1] - shares[0])
    return Effect(
        to_list((after.images - before.images).abs().double().mean(dim=(1, 2, 3))),
        to_list(dot / norms.clamp_min(1e-30)),
        to_list(dot / wanted.square().sum(1).clamp_min(1e-30)),
        probability,
    )


def _frame(scope: Scope, features: Features) -> tuple[Tensor, str]:
    """Returns the directions that the nulls are drawn from, and what they are of."""
    if scope.natural is None:
        return frame_of_cells(features), "the cells of this picture"
    return scope.natural.density.basis.frame, "natural maps"


def _share(change: Features, features: Features) -> float:
    total = features.double().square().sum().item()
    return (change.double().square().sum().item() / total) ** 0.5 if total > 0 else 0.0


def _class_of(backbone: Backbone, source: Source, before: SampleBatch) -> int | None:
    if not backbone.has_head:
        return None
    if source.logits is not None:
        return int(source.logits.argmax())
    return None if before.logits is None else int(before.logits.mean(0).argmax())


def _mean(values: Sequence[float | None]) -> float | None:
    """Returns None where one of the values is not known."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


@dataclass(frozen=True, eq=False, repr=False)
class Edited(Result):
    """Samples of a map before and after an edit, and what edits of the same size do.

    Args:
        picture: that the map comes from.
        words: the edits, in order.
        size: length of the change of the inverter's map over the length of the map.
        null_basis: what the random directions are drawn from.
        before, after: the samples.
        effect: of the edit.
        nulls: of each random direction.
        null_images: samples of the first random direction.
        class_index: class whose probability is followed: the picture's own; None without a head.
    """

    command: ClassVar[str] = "edit"

    picture: Source
    words: list[str]
    size: float
    null_basis: str
    before: SampleBatch
    after: SampleBatch
    effect: Effect
    nulls: list[Effect]
    null_images: Images
    class_index: int | None
    class_name: str | None

    def n_null_above(self, measure: str) -> int:
        """Number of random directions whose mean effect is at least as large as the edit's."""
        own = self.effect.means()[measure]
        others = [null.means()[measure] for null in self.nulls]
        return sum(abs(v or 0.0) >= abs(own or 0.0) for v in others)

    def main_figures(self) -> dict[str, Any]:
        """Returns the mean effects of the edit and of the nulls."""
        found = self.effect.means()
        nulls = {name: [null.means()[name] for null in self.nulls] for name in found}
        return {
            "size": self.size,
            "class_name": self.class_name,
            "effect": found,
            "null": {name: _mean(values) for name, values in nulls.items()},
            "n_null_above": {
                name: self.n_null_above(name) for name in found if found[name] is not None
            },
            "cosines": [self.after.cosine.double().mean().item()],
        }

    def numbers(self) -> dict[str, Any]:
        """Returns everything that was measured."""
        return {
            **self.main_figures(),
            "edits": self.words,
            "null_basis": self.null_basis,
            "samples": self.rows(),
            "nulls": [vars(null) for null in self.nulls],
        }

    def rows(self) -> list[dict[str, Any]]:
        """Returns one dict per seed."""
        return [
            {
                "sample": j,
                "seed": seed,
                "output": f"edited_{j}.png",
                "output_unedited": f"unedited_{j}.png",
                "cosine": self.after.cosine[j].mean().item(),
                "cosine_unedited": self.before.cosine[j].mean().item(),
                **{name: None if v is None else v[j] for name, v in vars(self.effect).items()},
            }
            for j, seed in enumerate(self.arguments["seeds"])
        ]

    def pictures(self) -> dict[str, Image.Image]:
        """Returns the samples by file name, the edited ones first."""
        names = [row[key] for key in ("output", "output_unedited") for row in self.rows()]
        return dict(
            zip(names, [*to_pil(self.after.images), *to_pil(self.before.images)], strict=True)
        )

    def summary(self) -> str:
        """Returns what changed, and whether it is more than a change without meaning makes."""
        if self.size == 0:
            return f"{self._edits()} changes nothing in this map."
        found, n = self.main_figures(), len(self.nulls)
        above = found["n_null_above"]["rgb"]
        verdict = f"more than each of {n} random edits of the same size does"
        if above:
            verdict = f"and {above} of {n} random edits of the same size do as much or more"
        parts = [
            f"{self._edits()} changes the map by {self.size:.0%} of its length and the pictures by "
            f"{found['effect']['rgb']:.3f} in mean RGB, {verdict} ({found['null']['rgb']:.3f} on "
            "average).",
            f"{found['effect']['arrived']:.0%} of the asked change arrives in the samples' own "
            f"features (random: {found['null']['arrived']:.0%}).",
        ]
        if (change := found["effect"]["probability"]) is not None:
            n_above = found["n_null_above"]["probability"]
            parts.append(
                f"The probability of {self.class_name or 'its class'} changes by {change:+.2f} "
                f"(random: {found['null']['probability']:+.2f}; {n_above} of {n} at least as "
                "much)."
            )
        return " ".join(parts)

    def _edits(self) -> str:
        at = self.arguments["at"]
        return " then ".join(self.words) + (f" at {at}" if at else "")

    def figure(self) -> Figure:
        """Draws a row per seed: before, after, their difference, and one null with its own."""
        n_rows = min(len(self.before.images), MAX_ROWS)
        board = Board(
            n_rows,
            6,
            f"Edited: {self._edits()}",
            [settings_line(self.settings), self.summary(), *scope_notes(self.scope_basis)],
            right=0.75,
            after_first=0.22,
            headers="first",
        )
        figure = board.make()
        changes = [
            (images - self.before.images).abs().mean(dim=1)
            for images in (self.after.images, self.null_images)
        ]
        high = max(max(change.max().item() for change in changes), 1e-3)
        names = ("before", "after", "difference", "random edit", "its difference")
        draw_original(board.tile_axes(figure, 0, 0), self.picture)
        image = None
        for j in range(n_rows):
            axes = [board.tile_axes(figure, j, k + 1) for k in range(5)]
            figures.show_picture(axes[0], self.before.images[j])
            figures.caption(axes[0], figures.number(self.before.cosine[j].mean().item()))
            figures.show_picture(axes[1], self.after.images[j])
            caption(axes[1], figures.number(self.after.cosine[j].mean().item()), self.scope_p_value)
            figures.show_picture(axes[3], self.null_images[j])
            for column, change, effect in (
                (2, changes[0], self.effect),
                (4, changes[1], self.nulls[0]),
            ):
                image = figures.show_map(axes[column], change[j], 0, high)
                figures.caption(axes[column], f"mean {effect.rgb[j]:.3f}")
            if j == 0:
                for one, name in zip(axes, names, strict=True):
                    figures.label(one, name)
        figures.add_colour_bar(board, figure, 0, image, "mean |ΔRGB|")
        return figure
