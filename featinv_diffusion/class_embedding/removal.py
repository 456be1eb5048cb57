"""The perturbation test over many images: gradient relevance, Chefer's and random orders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, get_args

import torch
from jaxtyping import Int
from torch import Tensor

from featinv_diffusion.class_embedding.anatomy import Anatomy
from featinv_diffusion.class_embedding.perturbation import (
    Direction,
    RemovalCurve,
    join_curves,
    mean_curve,
    order_by,
    removal_curve,
)
from featinv_diffusion.class_embedding.reading import Reading
from featinv_diffusion.class_embedding.relevance import attention_rollout_relevance
from featinv_diffusion.metrics.statistics import bootstrap_difference, bootstrap_mean
from featinv_diffusion.seeds import make_generator
from featinv_diffusion.types import Images

METHODS = ("gradient", "gradient_of_probability", "chefer")
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)


@dataclass
class RemovalTest:
    """Runs batches and sums up.

    Args:
        n_points: counts of kept tokens that are run, see `removal_curve`; None is all.
        n_random: random orders of each image, drawn from (seed, image id, number); none is shared
            by images.
        methods: of `METHODS`.
    """

    anatomy: Anatomy
    n_points: int | None = None
    n_random: int = 3
    seed: int = 0
    methods: Sequence[str] = METHODS
    curves: dict[str, list[RemovalCurve]] = field(default_factory=dict)

    def add(self, images: Images, reading: Reading, ids: Sequence[str]) -> None:
        """Takes a batch with its reading, which holds the gradient relevance."""
        for method in self.methods:
            order = order_by(self._relevance(method, images, reading))
            for direction in DIRECTIONS:
                self._run(f"{method}/{direction}", images, reading, [order], direction)
        orders = [self._random_order(ids, number) for number in range(self.n_random)]
        self._run("random", images, reading, orders, "negative")

    def to_metrics(self) -> dict[str, Any]:
        """Returns areas with intervals, and differences from random, paired by image.

        For `negative` more is better, for `positive` less.
        """
        joined = {name: join_curves(curves) for name, curves in self.curves.items()}
        random = joined["random"].area()
        result: dict[str, Any] = {"n_kept": list(joined["random"].n_kept)}
        for name, curve in joined.items():
            result[name] = {
                "accuracy": curve.correct.double().mean(dim=0).tolist(),
                "area": asdict(bootstrap_mean(curve.area())),
                "published_area": curve.published_area(),
            }
            if name != "random":
                difference = bootstrap_difference(curve.area(), random)
                result[name]["area_minus_random"] = asdict(difference)
        return result

    def _relevance(self, method: str, images: Images, reading: Reading) -> Tensor:
        if method == "chefer":
            found = attention_rollout_relevance(self.anatomy, images, reading.labels)
            return found[:, self.anatomy.n_prefix :].cpu()
        assert reading.relevance is not None
        assert reading.confidence is not None
        weight = 1.0 if method == "gradient" else reading.confidence[..., None]
        return (reading.relevance * weight).sum(dim=1)[:, self.anatomy.n_prefix :]

    def _random_order(self, ids: Sequence[str], number: int) -> Int[Tensor, "b patches"]:
        n = self.anatomy.n_patches
        generators = [make_generator(self.seed, "order", image_id, number) for image_id in ids]
        return torch.stack([torch.randperm(n, generator=g) for g in generators])

    def _run(
        self,
        name: str,
        images: Images,
        reading: Reading,
        orders: Sequence[Tensor],
        direction: Direction,
    ) -> None:
        curves = [
            removal_curve(self.anatomy, images, reading.labels, order, direction, self.n_points)
            for order in orders
        ]
        self.curves.setdefault(name, []).append(mean_curve(curves))
