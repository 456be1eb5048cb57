"""The measures of Vilas et al. 2023: one value per image each, and their means over images.

Images are the unit of every mean and interval: the tokens of an image are not independent. Block
b of a result stands at position b − 1.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import wilcoxon
from torch import Tensor
from torch.nn import functional as F

from featinv_diffusion.class_embedding.anatomy import Anatomy
from featinv_diffusion.class_embedding.reading import PointReading, Reading
from featinv_diffusion.errors import InputError
from featinv_diffusion.metrics.statistics import bootstrap_mean


def class_identifiability(rank: Float[Tensor, "*shape"], n_classes: int) -> Float[Tensor, "*shape"]:
    """r = 1 − rank / |C|: 1 where the class is first, 1 / |C| where it is last."""
    return 1 - rank / n_classes


def chance_identifiability(n_classes: int) -> float:
    """Returns the mean of r over all ranks, (|C| + 1) / 2|C|."""
    return (n_classes + 1) / (2 * n_classes)


def identified(rank: Float[Tensor, "b blocks n"], n_prefix: int) -> Bool[Tensor, "b patches"]:
    """Marks the image tokens that are closest to their class after the last block."""
    return rank[:, -1, n_prefix:] == 0


def identifiability_rate(rank: Float[Tensor, "b blocks n"], n_prefix: int) -> Float[Tensor, " b"]:
    """Share of image tokens with rank 0 after the last block."""
    return identified(rank, n_prefix).float().mean(dim=1)


def any_identified(rank: Float[Tensor, "b blocks n"], n_prefix: int) -> Float[Tensor, " b"]:
    """1 for images with at least one image token of rank 0 after the last block."""
    return identified(rank, n_prefix).any(dim=1).float()


def block_change_rate(states: PointReading, n_prefix: int) -> Float[Tensor, "b blocks"]:
    """Share of image tokens whose class score rises through each block.

    The first block's, from the embeddings, is not in the publication.
    """
    score = states.score[:, :, n_prefix:]
    return (score[:, 1:] > score[:, :-1]).float().mean(dim=2)


def layer_change_rate(
    layer: PointReading, states: PointReading, tokens: slice
) -> Float[Tensor, "b blocks"]:
    """Share of tokens where what a sub-layer adds scores higher than the block's input.

    Both sub-layers are compared with the input of the block, as published.
    """
    higher = layer.score[:, :, tokens] > states.score[:, :-1, tokens]
    return higher.float().mean(dim=2)


def residual_composition(
    states: PointReading, attention: PointReading, mlp: PointReading
) -> dict[str, Float[Tensor, "b blocks"]]:
    """Share of tokens whose top class after a block is that of one of its sources.

    Sources are the block's input (`previous`), its attention and its MLP, which may agree;
    `composition` is the share that agrees with none of the three.
    """
    after = states.top[:, 1:]
    matches = {
        "previous": after == states.top[:, :-1],
        "attention": after == attention.top,
        "mlp": after == mlp.top,
    }
    matches["composition"] = ~(matches["previous"] | matches["attention"] | matches["mlp"])
    return {name: match.float().mean(dim=2) for name, match in matches.items()}


def accuracy(logits: Float[Tensor, "b k"], labels: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
    """1 where the label's class scores highest."""
    return (logits.argmax(dim=1) == labels).float()


def mean_over_classes(values: Float[Tensor, "b ..."], labels: Int[Tensor, " b"]) -> Tensor:
    """Returns the mean of the classes' means, so that a class with many images weighs no more.

    Raises:
        InputError: no image.
    """
    if not len(labels):
        raise InputError("A mean over classes needs at least one image, got none.")
    return torch.stack([values[labels == c].mean(dim=0) for c in labels.unique()]).mean(dim=0)


# ---- Tokens on the object beside tokens of its context -------------------------------------------


@dataclass(frozen=True)
class Difference:
    """Mean of class tokens − mean of context tokens.

    Args:
        p_value: share of permutations of the token labels with a difference at least as large,
            the observed one counted: one-sided.
        n_images: images that have tokens of both kinds.
    """

    value: float
    p_value: float
    n_images: int


def class_context_difference(
    values: Float[Tensor, "b n"],
    is_class: Bool[Tensor, "b n"],
    *,
    n_permutations: int = 300,
    seed: int = 0,
) -> Difference:
    """Compares tokens on the class with tokens of the context, within each image.

    Differences are taken per image and averaged, and labels are permuted within an image, since
    its tokens are not independent of each other. Images of one kind of token are left out.

    Raises:
        InputError: no image has tokens of both kinds.
    """
    mixed = is_class.any(dim=1) & ~is_class.all(dim=1)
    if not mixed.any():
        raise InputError(
            "Class and context can be compared only in images with tokens of both kinds, but none "
            "has both. Look at the masks: the object must not fill or miss the whole image."
        )
    values, is_class = values[mixed].double(), is_class[mixed]
    observed = _difference(values, is_class)
    generator = torch.Generator().manual_seed(seed)
    n_larger = 0
    for _ in range(n_permutations):
        shuffled = torch.rand(values.shape, generator=generator).argsort(dim=1)
        n_larger += int(_difference(values, is_class.gather(1, shuffled)) >= observed)
    p_value = (1 + n_larger) / (1 + n_permutations)
    return Difference(float(observed), p_value, int(mixed.sum()))


def _difference(values: Tensor, is_class: Tensor) -> Tensor:
    on = (values * is_class).sum(dim=1) / is_class.sum(dim=1)
    off = (values * ~is_class).sum(dim=1) / (~is_class).sum(dim=1)
    return (on - off).mean()


# ---- The sub-layers as key–value memories --------------------------------------------------------

SubLayer = Literal["attention", "mlp"]


def memory_values(anatomy: Anatomy, layer: SubLayer, block: int) -> Float[Tensor, "d m"]:
    """Returns the memories of block `block` (from 0) as columns: the weights, not a copy."""
    parts = anatomy.blocks[block]
    linear = parts.attention_values if layer == "attention" else parts.mlp_values
    return linear.weight.detach()


def class_value_agreement(anatomy: Anatomy, layer: SubLayer) -> Float[Tensor, "blocks k"]:
    """Returns max_m cos(E_c, v_m) of each class: how near a memory of the block comes to it."""
    embedding = F.normalize(anatomy.head.weight.detach().float(), dim=1)
    scores = [
        (embedding @ F.normalize(memory_values(anatomy, layer, b).float(), dim=0)).amax(dim=1)
        for b in range(len(anatomy.blocks))
    ]
    return torch.stack(scores).cpu()


def agreement_p_values(
    agreement: Float[Tensor, "blocks k"], null: Float[Tensor, "blocks k"]
) -> list[float]:
    """Returns one p-value per block that classes agree more than in a model of random weights.

    Wilcoxon's signed-rank test, paired by class, one-sided.
    """
    pairs = zip(agreement.double().numpy(), null.double().numpy(), strict=True)
    tests: list[Any] = [wilcoxon(a, b, alternative="greater") for a, b in pairs]
    return [float(test.pvalue) for test in tests]


def class_memories(anatomy: Anatomy, layer: SubLayer, n: int = 5) -> Int[Tensor, "blocks k n_top"]:
    """Returns the memories with the largest E_c · v_m of each class."""
    return torch.stack([p.topk(n, dim=1).indices for p in _projections(anatomy, layer)]).cpu()


def memory_classes(anatomy: Anatomy, layer: SubLayer) -> Int[Tensor, "blocks m"]:
    """Returns the class with the largest E_c · v_m of each memory."""
    return torch.stack([p.argmax(dim=0) for p in _projections(anatomy, layer)]).cpu()


def key_value_agreement(
    activated: Int[Tensor, "b blocks n n_top"],
    memories: Int[Tensor, "blocks k n_class"],
    labels: Int[Tensor, " b"],
) -> Bool[Tensor, "b blocks n"]:
    """Marks tokens that activate one of their class's memories.

    A token agrees where any of its most activated memories is one of the memories nearest to its
    class. (The text of the publication words it per memory; this is what its code and figures do.)
    """
    of_class = memories[:, labels].transpose(0, 1)[:, :, None, None, :]
    return (activated[..., None] == of_class).flatten(3).any(dim=-1)


def memory_compositionality(
    activated: Int[Tensor, "b blocks n n_top"],
    classes: Int[Tensor, "blocks m"],
    top: Int[Tensor, "b blocks n"],
) -> Bool[Tensor, "b blocks n"]:
    """Marks tokens whose sub-layer says the class that one of their activated memories says."""
    blocks = torch.arange(len(classes))[None, :, None, None]
    return (classes[blocks, activated] == top[..., None]).any(dim=-1)


def _projections(anatomy: Anatomy, layer: SubLayer) -> list[Float[Tensor, "k m"]]:
    embedding = anatomy.head.weight.detach()
    return [embedding @ memory_values(anatomy, layer, b) for b in range(len(anatomy.blocks))]


# ---- All measures of many images -----------------------------------------------------------------

LAYERS: tuple[SubLayer, ...] = get_args(SubLayer)


@dataclass(frozen=True, eq=False)
class MemoryTables:
    """What the weights say of the memories of each sub-layer, computed once."""

    memories: dict[str, Tensor]
    classes: dict[str, Tensor]

    @classmethod
    def of(cls, anatomy: Anatomy) -> MemoryTables:
        return cls(
            {layer: class_memories(anatomy, layer) for layer in LAYERS},
            {layer: memory_classes(anatomy, layer) for layer in LAYERS},
        )


class Tally:
    """Collects readings; tokens are reduced to shares and means of each image.

    Attributes:
        token_identifiability: sum over images, blocks with the embeddings first, `[B + 1, n]`.
    """

    def __init__(self, anatomy: Anatomy, tables: MemoryTables | None = None):
        self.anatomy = anatomy
        self.tables = tables or MemoryTables.of(anatomy)
        self.token_identifiability: Tensor | float = 0.0
        self._columns: defaultdict[str, list[Tensor]] = defaultdict(list)

    def add(self, reading: Reading) -> None:
        """Adds a reading of the states alone, or of all measures."""
        assert reading.states is not None
        states = reading.states
        self._add("label", reading.labels)
        self._add("predicted", reading.logits.argmax(dim=1))
        self._add("accuracy", accuracy(reading.logits, reading.labels))
        n_prefix = self.anatomy.n_prefix
        self._add("identifiability_rate", identifiability_rate(states.rank, n_prefix))
        self._add("any_identified", any_identified(states.rank, n_prefix))
        self._add_identifiability(states)
        self._add("block_change_rate", block_change_rate(states, n_prefix))
        if reading.attention is None or reading.mlp is None:
            return
        found = residual_composition(states, reading.attention, reading.mlp)
        for name, share in found.items():
            self._add(f"composition/{name}", share)
        self._add_layer("attention", reading.attention, reading.attention_memories, reading)
        self._add_layer("mlp", reading.mlp, reading.mlp_memories, reading)

    def column(self, name: str) -> Tensor:
        """Returns the values of all images, `[n_images]` or `[n_images, blocks]`."""
        return torch.cat(self._columns[name])

    def __contains__(self, name: str) -> bool:
        return name in self._columns

    def mean(self, name: str) -> Any:
        """Returns the mean over images, a number or a list with one per block."""
        return self.column(name).double().mean(dim=0).tolist()

    def class_mean(self, name: str) -> Any:
        """Returns the mean over classes of their means over images."""
        return mean_over_classes(self.column(name).double(), self.column("label")).tolist()

    def interval(self, name: str, block: int | None = None) -> dict[str, float]:
        """Returns the mean over images with its 95 % bootstrap interval."""
        column = self.column(name)
        return asdict(bootstrap_mean(column if block is None else column[:, block]))

    def _add_identifiability(self, states: PointReading) -> None:
        anatomy = self.anatomy
        found = class_identifiability(states.rank, anatomy.n_classes)
        self.token_identifiability = self.token_identifiability + found.double().sum(dim=0)
        self._add("identifiability/image", found[:, 1:, anatomy.n_prefix :].mean(dim=2))
        if anatomy.has_class_token:
            self._add("identifiability/cls", found[:, 1:, 0])

    def _add_layer(
        self, layer: str, points: PointReading, activated: Tensor | None, reading: Reading
    ) -> None:
        assert reading.states is not None
        assert activated is not None
        image = slice(self.anatomy.n_prefix, None)
        rate = layer_change_rate(points, reading.states, image)
        self._add(f"change/{layer}/image", rate)
        if self.anatomy.has_class_token:
            rate = layer_change_rate(points, reading.states, slice(0, 1))
            self._add(f"change/{layer}/cls", rate)
        agreed = key_value_agreement(activated, self.tables.memories[layer], reading.labels)
        self._add(f"key_value/{layer}", agreed.float().mean(dim=2))
        matched = memory_compositionality(activated, self.tables.classes[layer], points.top)
        self._add(f"compositionality/{layer}", matched.float().mean(dim=2))

    def _add(self, name: str, values: Tensor) -> None:
        self._columns[name].append(values)


def to_metrics(tally: Tally, *, has_labels: bool) -> dict[str, Any]:
    """Returns the figures of a pass; lists have one entry per block.

    `accuracy` is None where the label is what the model predicted.
    """
    figures = ["identifiability_rate", "any_identified"] + (["accuracy"] if has_labels else [])
    kinds = ["image"] + (["cls"] if "identifiability/cls" in tally else [])
    n_blocks = len(tally.anatomy.blocks)
    return {
        "n_images": len(tally.column("label")),
        "accuracy": tally.mean("accuracy") if has_labels else None,
        "identifiability_rate": tally.mean("identifiability_rate"),
        "any_identified": tally.mean("any_identified"),
        "identifiability_by_block": tally.mean("identifiability/image"),
        "identifiability_by_block_cls": (
            tally.mean("identifiability/cls") if "cls" in kinds else None
        ),
        "block_change_rate": tally.mean("block_change_rate"),
        "layer_change_rate": {
            layer: {kind: tally.mean(f"change/{layer}/{kind}") for kind in kinds}
            for layer in LAYERS
        },
        "residual_composition": {
            source: tally.mean(f"composition/{source}")
            for source in ("previous", "attention", "mlp", "composition")
        },
        "key_value_agreement": {layer: tally.class_mean(f"key_value/{layer}") for layer in LAYERS},
        "memory_compositionality": {
            layer: tally.mean(f"compositionality/{layer}") for layer in LAYERS
        },
        "intervals": {
            **{name: tally.interval(name) for name in figures},
            **{
                f"identifiability_by_block/{kind}": [
                    tally.interval(f"identifiability/{kind}", b) for b in range(n_blocks)
                ]
                for kind in kinds
            },
        },
    }


def null_metrics(tally: Tally) -> dict[str, Any]:
    """Returns what a random model reaches on the same labels."""
    names = ("identifiability_rate", "any_identified", "accuracy")
    by_block = tally.mean("identifiability/image")
    return {**{name: tally.mean(name) for name in names}, "identifiability_by_block": by_block}


def memory_metrics(anatomy: Anatomy, null: Anatomy | None) -> dict[str, Any]:
    """Returns class–value agreement by block, and beside a random model its p-values."""
    result: dict[str, Any] = {}
    for layer in LAYERS:
        found = class_value_agreement(anatomy, layer)
        result[layer] = {"mean": found.double().mean(dim=1).tolist()}
        if null is not None:
            random = class_value_agreement(null, layer)
            result[layer]["random"] = random.double().mean(dim=1).tolist()
            result[layer]["p_value"] = agreement_p_values(found, random)
    return result
