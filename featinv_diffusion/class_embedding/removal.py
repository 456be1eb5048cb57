"""What is left when something is taken away: attention, the other tokens, tokens by relevance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from featinv_diffusion.class_embedding.anatomy import (
    Anatomy,
    AttentionEdit,
    attention_weights,
    editing_attention,
    keeping_tokens,
    merge_heads,
)
from featinv_diffusion.class_embedding.reading import (
    MEASURES,
    STATES,
    Reading,
    attention_rollout_relevance,
    read_images,
)
from featinv_diffusion.errors import InputError, choices_hint
from featinv_diffusion.metrics.statistics import bootstrap_difference, bootstrap_mean
from featinv_diffusion.seeds import make_generator
from featinv_diffusion.types import Images

# ---- Without attention to others, or without the others ------------------------------------------

AttentionAblation = Literal["self_only", "no_cls"]


@contextmanager
def ablating_attention(anatomy: Anatomy, kind: str) -> Iterator[None]:
    """Changes the attention of image tokens in every block; prefix rows stay as they are.

    Args:
        kind: `self_only`: each image token attends to itself with weight 1; `no_cls`: the weight of
            the class token is set to 0 without renormalising the others.

    Raises:
        InputError: another kind, or `no_cls` where the head reads no class token.
    """
    kinds = list(get_args(AttentionAblation))
    if kind not in kinds:
        raise InputError(f"No attention ablation is named {kind!r}; {choices_hint(kind, kinds)}")
    if kind == "no_cls" and not anatomy.has_class_token:
        raise InputError(
            f"The ablation no_cls needs a class token, but the head of {anatomy.backbone.name!r} "
            "reads the mean of the tokens. Use self_only."
        )
    edit = _self_only if kind == "self_only" else _without_class_token
    with editing_attention(anatomy, edit(anatomy.n_prefix)):
        yield


def read_ablated(
    anatomy: Anatomy,
    images: Images,
    labels: Int[Tensor, " b"],
    kind: str,
    measures: frozenset[str] = MEASURES,
) -> Reading:
    """Reads a batch under `ablating_attention`."""
    with ablating_attention(anatomy, kind):
        return read_images(anatomy, images, labels, measures)


@dataclass(frozen=True, eq=False)
class TokensAlone:
    """Image tokens that went through the model without the others.

    Args:
        rate: share of the kept tokens with rank 0 after the last block; NaN where none is kept.
        correct: whether the model still predicts the label; NaN likewise.
    """

    rate: Float[Tensor, " b"]
    correct: Float[Tensor, " b"]


def read_tokens_alone(
    anatomy: Anatomy,
    images: Images,
    labels: Int[Tensor, " b"],
    kept: Bool[Tensor, "b patches"],
) -> TokensAlone:
    """Drops the image tokens that are not `kept` after the position embeddings, and reads the rest.

    Prefix tokens stay and are not counted. Images that keep as many tokens run as one batch.
    """
    rate = torch.full((len(images),), torch.nan)
    correct = rate.clone()
    counts = kept.sum(dim=1)
    for count in counts[counts > 0].unique().tolist():
        chosen = (counts == count).nonzero()[:, 0]
        index = kept[chosen].nonzero()[:, 1].view(len(chosen), count)
        with keeping_tokens(anatomy, index):
            found = read_images(anatomy, images[chosen], labels[chosen], STATES)
        assert found.states is not None
        last = found.states.rank[:, -1, anatomy.n_prefix :]
        rate[chosen] = (last == 0).float().mean(dim=1)
        correct[chosen] = (found.logits.argmax(dim=1) == labels[chosen]).float()
    return TokensAlone(rate, correct)


def _self_only(n_prefix: int) -> AttentionEdit:
    def edit(_q: Tensor, _k: Tensor, v: Tensor, mixed: Tensor) -> Tensor:
        return torch.cat([mixed[:, :n_prefix], merge_heads(v)[:, n_prefix:]], dim=1)

    return edit


def _without_class_token(n_prefix: int) -> AttentionEdit:
    def edit(q: Tensor, k: Tensor, v: Tensor, mixed: Tensor) -> Tensor:
        to_class = attention_weights(q, k)[:, :, n_prefix:, :1]
        lost = merge_heads(to_class * v[:, :, :1])
        return torch.cat([mixed[:, :n_prefix], mixed[:, n_prefix:] - lost], dim=1)

    return edit


# ---- Tokens removed in the order of their relevance: the perturbation test -----------------------

Direction = Literal["negative", "positive"]


@dataclass(frozen=True, eq=False)
class RemovalCurve:
    """Whether each image is still classified correctly when only some image tokens are kept.

    Args:
        n_kept: increasing, the last is all tokens.
        correct: 0 or 1, or a mean of several orders.
    """

    n_kept: tuple[int, ...]
    correct: Float[Tensor, "b points"]

    def at_each_count(self) -> Float[Tensor, "b patches"]:
        """Returns the curve at 1 … n kept tokens, linear between the counts that were run."""
        counts = np.arange(1, self.n_kept[-1] + 1)
        rows = [np.interp(counts, self.n_kept, row) for row in self.correct.double().numpy()]
        return torch.from_numpy(np.stack(rows)).float()

    def with_rows(self, rows: Int[Tensor, " r"], found: RemovalCurve | None) -> RemovalCurve:
        """Returns the curve with these images' rows taken from another; None changes nothing."""
        if found is None:
            return self
        correct = self.correct.clone()
        correct[rows] = found.correct
        return replace(self, correct=correct)

    def area(self) -> Float[Tensor, " b"]:
        """Returns the area under the raw curve of each image: its mean over 1 … n kept tokens."""
        return self.at_each_count().mean(dim=1)

    def published_area(self) -> float | None:
        """Returns Σ_{k<n} accuracy_k / (n · max_k accuracy_k), the figure of Vilas et al. 2023.

        It leaves out the whole image and is 1 − 1/n at most; None where nothing is right.
        """
        accuracy = self.at_each_count().mean(dim=0)[:-1]
        peak = float(accuracy.max())
        return None if peak == 0 else float(accuracy.sum()) / (self.n_kept[-1] * peak)


def order_by(relevance: Float[Tensor, "b patches"]) -> Int[Tensor, "b patches"]:
    """Returns the indices of the patches, the most relevant first; ties in raster order."""
    return relevance.argsort(dim=1, descending=True, stable=True)


@torch.no_grad()
def removal_curve(
    anatomy: Anatomy,
    images: Images,
    labels: Int[Tensor, " b"],
    order: Int[Tensor, "b patches"],
    direction: Direction,
    n_points: int | None = None,
) -> RemovalCurve:
    """Classifies images while tokens are removed, after the position embeddings, by relevance.

    Args:
        order: what `order_by` returns.
        direction: `negative` removes the least relevant tokens first, `positive` the most.
        n_points: how many numbers of kept tokens to try, evenly spread over 1 … n; None is all.

    Raises:
        InputError: fewer than two points or more than tokens.
    """
    n = anatomy.n_patches
    counts = spread_counts(n, n if n_points is None else n_points)
    lasting = order if direction == "negative" else order.flip(dims=(1,))
    columns = []
    for count in counts:
        with keeping_tokens(anatomy, lasting[:, :count]):
            top = anatomy.backbone.classify(images).argmax(dim=1).cpu()
        columns.append((top == labels.cpu()).float())
    return RemovalCurve(counts, torch.stack(columns, dim=1))


def spread_counts(n: int, n_points: int) -> tuple[int, ...]:
    """Returns `n_points` whole numbers from 1 to n, evenly spread.

    Raises:
        InputError: fewer than two points or more than n.
    """
    if not 2 <= n_points <= n:
        raise InputError(f"There must be 2 to {n} points of a removal curve, got {n_points}.")
    return tuple(round(float(x)) for x in np.linspace(1, n, n_points))


def join_curves(curves: list[RemovalCurve]) -> RemovalCurve:
    """Joins batches that were run at the same counts."""
    return RemovalCurve(curves[0].n_kept, torch.cat([curve.correct for curve in curves]))


def mean_curve(curves: list[RemovalCurve]) -> RemovalCurve:
    """Averages the curves of several orders of the same images."""
    return RemovalCurve(
        curves[0].n_kept, torch.stack([curve.correct for curve in curves]).mean(dim=0)
    )


METHODS = ("gradient", "gradient_of_probability", "chefer")
PROBE = "probe"
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
PREDICTED, WRONG = "predicted", "wrong"
"""Other classes than the label by which patches are ordered: the one that the model predicts of the
whole image, and one drawn from those that it neither shows nor is taken for."""

Importance = Callable[[Images, Tensor], Float[Tensor, "b patches"]]
"""From images and classes to the relevance of each patch for the class."""


@dataclass
class RemovalTest:
    """The perturbation test over many images, batch by batch.

    Patches are ordered by their relevance for the label, as published, for the predicted class, and
    for a wrong one. The first order knows the answer that is asked for afterwards, so that its area
    also counts images that are right only because patches of the label were kept.

    Args:
        n_points: how many numbers of kept tokens to try, see `removal_curve`.
        n_random: random orders of each image, drawn from (seed, image id, number), so that no two
            images share one.
        methods: some of `METHODS`.
        probe: also orders by probes.
        label_is_predicted: whether the labels are what the model predicts, which is then not
            reported a second time.
    """

    anatomy: Anatomy
    n_points: int | None = None
    n_random: int = 3
    seed: int = 0
    methods: Sequence[str] = METHODS
    probe: Importance | None = None
    label_is_predicted: bool = False
    curves: dict[str, list[RemovalCurve]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.anatomy.n_classes < 3:
            raise InputError(
                "The perturbation test needs a model of at least 3 classes, since its control is a "
                f"class that is neither right nor predicted, got {self.anatomy.n_classes}."
            )

    def add(self, images: Images, reading: Reading, ids: Sequence[str]) -> None:
        """Adds a batch with what `read_images` said of it."""
        labels, predicted = reading.labels, reading.logits.argmax(dim=1)
        published = self._curves(images, labels, labels)
        self._keep(published)
        if not self.label_is_predicted:
            # Where the prediction is the label, so are order and curve.
            rows = (predicted != labels).nonzero()[:, 0]
            found = self._curves(images[rows], labels[rows], predicted[rows]) if len(rows) else {}
            self._keep(
                {name: curve.with_rows(rows, found.get(name)) for name, curve in published.items()},
                PREDICTED,
            )
        self._keep(self._curves(images, labels, self._wrong(labels, predicted, ids)), WRONG)
        orders = [self._random_order(ids, number) for number in range(self.n_random)]
        self._keep({"random": self._mean_curve(images, labels, orders, "negative")})

    def to_metrics(self) -> dict[str, Any]:
        """Returns areas with intervals, and differences paired by image.

        Names are method/direction for the label, with /predicted or /wrong behind for the others.
        For `negative` more is better, for `positive` less.
        """
        joined = {name: join_curves(curves) for name, curves in self.curves.items()}
        areas = {name: curve.area() for name, curve in joined.items()}
        result: dict[str, Any] = {"n_kept": list(joined["random"].n_kept)}
        for name, curve in joined.items():
            result[name] = {
                "accuracy": curve.correct.double().mean(dim=0).tolist(),
                "area": asdict(bootstrap_mean(areas[name])),
                "published_area": curve.published_area(),
            }
            if name == "random":
                continue
            nulls = {"random": "random"}
            if not name.endswith(f"/{WRONG}"):
                nulls["wrong"] = f"{name.removesuffix(f'/{PREDICTED}')}/{WRONG}"
            for null, held in nulls.items():
                difference = bootstrap_difference(areas[name], areas[held])
                result[name][f"area_minus_{null}"] = asdict(difference)
        return result

    def _curves(self, images: Images, labels: Tensor, chosen: Tensor) -> dict[str, RemovalCurve]:
        """Returns the curves of all orders by the relevance for the chosen classes."""
        reading = read_images(self.anatomy, images, chosen, frozenset({"relevance"}))
        curves: dict[str, RemovalCurve] = {}
        for method in (*self.methods, *([PROBE] if self.probe else [])):
            order = order_by(self._relevance(method, images, reading))
            for direction in DIRECTIONS:
                curves[f"{method}/{direction}"] = self._mean_curve(
                    images, labels, [order], direction
                )
        return curves

    def _relevance(self, method: str, images: Images, reading: Reading) -> Tensor:
        if method == PROBE:
            assert self.probe is not None
            return self.probe(images, reading.labels)
        if method == "chefer":
            found = attention_rollout_relevance(self.anatomy, images, reading.labels)
            return found[:, self.anatomy.n_prefix :].cpu()
        assert reading.relevance is not None
        assert reading.confidence is not None
        weight = 1.0 if method == "gradient" else reading.confidence[..., None]
        return (reading.relevance * weight).sum(dim=1)[:, self.anatomy.n_prefix :]

    def _wrong(
        self, labels: Int[Tensor, " b"], predicted: Int[Tensor, " b"], ids: Sequence[str]
    ) -> Int[Tensor, " b"]:
        drawn: list[int] = []
        for label, top, image_id in zip(labels.tolist(), predicted.tolist(), ids, strict=True):
            others = [c for c in range(self.anatomy.n_classes) if c not in (label, top)]
            generator = make_generator(self.seed, "wrong class", image_id, 0)
            drawn.append(others[int(torch.randint(len(others), (), generator=generator))])
        return torch.tensor(drawn)

    def _random_order(self, ids: Sequence[str], number: int) -> Int[Tensor, "b patches"]:
        n = self.anatomy.n_patches
        generators = [make_generator(self.seed, "order", image_id, number) for image_id in ids]
        return torch.stack([torch.randperm(n, generator=g) for g in generators])

    def _mean_curve(
        self, images: Images, labels: Tensor, orders: Sequence[Tensor], direction: Direction
    ) -> RemovalCurve:
        return mean_curve(
            [
                removal_curve(self.anatomy, images, labels, order, direction, self.n_points)
                for order in orders
            ]
        )

    def _keep(self, curves: Mapping[str, RemovalCurve], source: str = "") -> None:
        for name, curve in curves.items():
            self.curves.setdefault(f"{name}/{source}" if source else name, []).append(curve)
