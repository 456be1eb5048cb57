"""All measures of one pass over the images, reduced batch by batch to one value per image."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from featinv_diffusion.class_embedding import measures
from featinv_diffusion.class_embedding.anatomy import Anatomy
from featinv_diffusion.class_embedding.memories import (
    SubLayer,
    agreement_p_values,
    class_memories,
    class_value_agreement,
    key_value_agreement,
    memory_classes,
    memory_compositionality,
)
from featinv_diffusion.class_embedding.reading import PointReading, Reading
from featinv_diffusion.metrics.statistics import bootstrap_mean

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
        columns: per image, `[n_images]` or `[n_images, blocks]`, after `column`.
        token_identifiability: sum over images, blocks with the embeddings first, `[B + 1, n]`.
    """

    def __init__(self, anatomy: Anatomy, tables: MemoryTables | None = None):
        self.anatomy = anatomy
        self.tables = tables or MemoryTables.of(anatomy)
        self.token_identifiability: Tensor | float = 0.0
        self._columns: defaultdict[str, list[Tensor]] = defaultdict(list)

    def add(self, reading: Reading) -> None:
        """Takes a reading of the states alone, or of all measures."""
        assert reading.states is not None
        states = reading.states
        self._add("label", reading.labels)
        self._add("predicted", reading.logits.argmax(dim=1))
        self._add("accuracy", measures.accuracy(reading.logits, reading.labels))
        n_prefix = self.anatomy.n_prefix
        self._add("identifiability_rate", measures.identifiability_rate(states.rank, n_prefix))
        self._add("any_identified", measures.any_identified(states.rank, n_prefix))
        self._add_identifiability(states)
        self._add("block_change_rate", measures.block_change_rate(states, n_prefix))
        if reading.attention is None or reading.mlp is None:
            return
        found = measures.residual_composition(states, reading.attention, reading.mlp)
        for name, share in found.items():
            self._add(f"composition/{name}", share)
        self._add_layer("attention", reading.attention, reading.attention_memories, reading)
        self._add_layer("mlp", reading.mlp, reading.mlp_memories, reading)

    def column(self, name: str) -> Tensor:
        return torch.cat(self._columns[name])

    def __contains__(self, name: str) -> bool:
        return name in self._columns

    def mean(self, name: str) -> Any:
        """Returns the mean over images, a number or a list with one per block."""
        return self.column(name).double().mean(dim=0).tolist()

    def class_mean(self, name: str) -> Any:
        """Returns the mean over classes of their means over images."""
        return measures.mean_over_classes(self.column(name).double(), self.column("label")).tolist()

    def interval(self, name: str, block: int | None = None) -> dict[str, float]:
        """Returns the mean over images with its 95 % bootstrap interval."""
        column = self.column(name)
        return asdict(bootstrap_mean(column if block is None else column[:, block]))

    def _add_identifiability(self, states: PointReading) -> None:
        anatomy = self.anatomy
        found = measures.class_identifiability(states.rank, anatomy.n_classes)
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
        rate = measures.layer_change_rate(points, reading.states, image)
        self._add(f"change/{layer}/image", rate)
        if self.anatomy.has_class_token:
            rate = measures.layer_change_rate(points, reading.states, slice(0, 1))
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
