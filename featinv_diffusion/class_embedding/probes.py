"""Linear probes of the tokens, which the projection on the class embedding is compared with.

One ridge classifier per block and patch, of the state behind the block and of what each of its
sub-layers adds (Vilas et al. 2023).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from featinv_diffusion.class_embedding.anatomy import Anatomy, record
from featinv_diffusion.class_embedding.images import TokenImages
from featinv_diffusion.class_embedding.reading import rank_of
from featinv_diffusion.data.crops import split_held_back
from featinv_diffusion.errors import InputError
from featinv_diffusion.metrics.statistics import bootstrap_difference, bootstrap_mean
from featinv_diffusion.types import Images

STATE = "hidden"
POINTS = (STATE, "attention", "mlp")
"""What is probed at each block: the state behind it, what its attention and its MLP add."""


@dataclass(frozen=True, eq=False)
class Probes:
    """One linear classifier per token position.

    Args:
        weight: float64.
        bias: float64.
    """

    weight: Float[Tensor, "n d k"]
    bias: Float[Tensor, "n k"]

    def predict(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n k"]:
        """Returns class scores, about −1 and 1."""
        return torch.einsum("bnd,ndk->bnk", tokens.double(), self.weight) + self.bias

    def rank(self, tokens: Float[Tensor, "b n d"], labels: Int[Tensor, " b"]) -> Tensor:
        """Returns the 0-based rank `[b, n]` of the label at each token, ties half."""
        scores = self.predict(tokens)
        index = labels[:, None, None].expand(-1, scores.shape[1], 1)
        return rank_of(scores, scores.gather(2, index))


def fit_probes(
    tokens: Float[Tensor, "b n d"], labels: Int[Tensor, " b"], n_classes: int, alpha: float = 1.0
) -> Probes:
    """Fits min ‖y − w·x − b‖² + α‖w‖² for every position and class; y is 1 for the label, else −1.

    Raises:
        InputError: fewer than two images, or α that is not positive.
    """
    if len(tokens) < 2 or alpha <= 0:
        raise InputError(
            f"Probes need at least 2 images and a positive alpha, got {len(tokens)} images and "
            f"alpha {alpha}."
        )
    x = tokens.double().transpose(0, 1)
    y = torch.full((len(labels), n_classes), -1.0, dtype=torch.float64)
    y[torch.arange(len(labels)), labels] = 1
    x_mean, y_mean = x.mean(dim=1, keepdim=True), y.mean(dim=0)
    x = x - x_mean
    ridge = alpha * torch.eye(x.shape[2], dtype=torch.float64)
    weight = torch.linalg.solve(x.mT @ x + ridge, x.mT @ (y - y_mean))
    return Probes(weight, y_mean - (x_mean @ weight)[:, 0])


def split_off(images: TokenImages, per_class: int) -> tuple[TokenImages, TokenImages]:
    """Returns (images to measure, the last `per_class` of each class to fit probes on).

    Raises:
        InputError: images that are not read for their own classes, or none that is left to measure.
    """
    if images.labels is None or not images.has_labels:
        raise InputError(
            "Linear probes learn the images' own classes, but what is read here is the "
            f"{images.label_source} class. Give class folders or a labelled data set, without a "
            "target, or leave --probes-per-class out."
        )
    measured, held = split_held_back(images.labels, per_class)
    if not measured:
        raise InputError(
            f"Probes take {per_class} images of each class, and none of these {len(images)} would "
            "be left to measure. Give more images, or a smaller --probes-per-class."
        )
    return images.only(measured), images.only(held)


@dataclass
class ProbeTest:
    """Probes of all blocks, and how often they and the projection name the class, batch by batch.

    Args:
        probes: by point, one per block.
        n_fitted: number of images that they were fitted on.
    """

    anatomy: Anatomy
    probes: dict[str, list[Probes]]
    n_fitted: int
    columns: dict[tuple[str, str, int], list[Tensor]] = field(
        default_factory=lambda: defaultdict(list)
    )

    @classmethod
    def fit(
        cls,
        anatomy: Anatomy,
        images: TokenImages,
        batch_size: int,
        on_progress: Callable[[int], None] | None = None,
    ) -> ProbeTest:
        """Fits the probes; the tokens of all images are held in memory, in half precision."""
        held: dict[tuple[str, int], list[Tensor]] = defaultdict(list)
        for batch in images.batches(anatomy.backbone, batch_size):
            for place, tokens in _tokens(anatomy, batch.images).items():
                held[place].append(tokens.half())
            if on_progress is not None:
                on_progress(len(batch.indices))
        labels = torch.tensor(images.labels)
        probes: dict[str, list[Probes]] = {point: [] for point in POINTS}
        for (point, _), tokens in held.items():
            probes[point].append(fit_probes(torch.cat(tokens).float(), labels, anatomy.n_classes))
        return cls(anatomy, probes, len(images))

    def add(self, images: Images, labels: Int[Tensor, " b"]) -> None:
        """Adds a batch that no probe was fitted on."""
        for (point, block), tokens in _tokens(self.anatomy, images).items():
            by_probe = self.probes[point][block].rank(tokens, labels) == 0
            device = self.anatomy.head.weight.device
            top = self.anatomy.project(tokens.to(device)).argmax(dim=-1).cpu()
            self.columns[point, "probe", block].append(by_probe.float().mean(dim=1))
            by_projection = (top == labels[:, None]).float().mean(dim=1)
            self.columns[point, "projection", block].append(by_projection)

    def importance(self, images: Images, labels: Int[Tensor, " b"]) -> Float[Tensor, "b patches"]:
        """Returns how early the probes of a patch rank the label: −Σ_blocks rank, of the states."""
        found = _tokens(self.anatomy, images, points=(STATE,))
        ranks = [self.probes[STATE][block].rank(x, labels) for (_, block), x in found.items()]
        return -torch.stack(ranks).sum(dim=0)

    def to_metrics(self) -> dict[str, Any]:
        """Returns the shares of image tokens that name the class, with intervals over images.

        For each point one per block: of the probes, of the projection, and projection − probes,
        paired by image.
        """
        result: dict[str, Any] = {"n_fitted": self.n_fitted}
        for point in POINTS:
            rows: dict[str, list[Any]] = {"projection": [], "probe": [], "difference": []}
            for block in range(len(self.anatomy.blocks)):
                projection, probe = (
                    torch.cat(self.columns[point, name, block]) for name in ("projection", "probe")
                )
                rows["projection"].append(asdict(bootstrap_mean(projection)))
                rows["probe"].append(asdict(bootstrap_mean(probe)))
                rows["difference"].append(asdict(bootstrap_difference(projection, probe)))
            result[point] = rows
        return result


@torch.no_grad()
def _tokens(
    anatomy: Anatomy, images: Images, points: tuple[str, ...] = POINTS
) -> dict[tuple[str, int], Float[Tensor, "b patches d"]]:
    """Returns the patches' tokens by point and block, on the CPU."""
    wanted = frozenset({"states" if point == STATE else point for point in points})
    trace = record(anatomy, images, wanted)
    blocks = {STATE: trace.states[1:], "attention": trace.attention, "mlp": trace.mlp}
    return {
        (point, block): tokens[:, anatomy.n_prefix :].float().cpu()
        for point in points
        for block, tokens in enumerate(blocks[point])
    }
