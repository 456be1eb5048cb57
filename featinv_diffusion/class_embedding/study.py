"""`featinv classemb` without the terminal: images → measures in one pass, and what is asked."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from featinv_diffusion.backbones.base import Backbone
from featinv_diffusion.class_embedding import measures
from featinv_diffusion.class_embedding.anatomy import (
    Anatomy,
    AttentionEdit,
    attention_weights,
    editing_attention,
    keeping_tokens,
    make_random,
    merge_heads,
)
from featinv_diffusion.class_embedding.measures import (
    SubLayer,
    agreement_p_values,
    class_identifiability,
    class_memories,
    class_value_agreement,
    identified,
    key_value_agreement,
    memory_classes,
    memory_compositionality,
)
from featinv_diffusion.class_embedding.reading import MEASURES, PointReading, Reading, read_images
from featinv_diffusion.class_embedding.removal import RemovalTest
from featinv_diffusion.data.selection import Selection, select_items
from featinv_diffusion.data.sets import ImageSet, open_images
from featinv_diffusion.errors import InputError, choices_hint
from featinv_diffusion.evaluation.run import match_labels
from featinv_diffusion.features.edits import CellMask
from featinv_diffusion.images import SUFFIXES, read_image, to_tensor
from featinv_diffusion.metrics.statistics import bootstrap_mean
from featinv_diffusion.types import Images

# ---- What image tokens can say without attention to others ----

AttentionAblation = Literal["self_only", "no_cls"]
STATES = frozenset({"states"})


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


# ---- Tokens on the object beside tokens of its context, by a mask --------------------------------

UNLABELLED = (0, 1000)
"""Background and `ignore` of ImageNet-S."""


@dataclass(frozen=True)
class Difference:
    """Mean of class tokens − mean of context tokens.

    Args:
        p_value: share of permutations of the token labels with a difference at least as large,
            the observed one counted: one-sided.
        n_images: that have tokens of both kinds.
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
            "Class and context can be compared only where an image has tokens of both kinds, but "
            "none has. Look at the masks: the object must not fill or miss the whole image."
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


def token_mask(picture: Image.Image, grid: tuple[int, int]) -> CellMask:
    """Marks the patches of which more than half the area belongs to the object.

    Args:
        picture: labels R + 256 G as in ImageNet-S, of which the most frequent other than 0
            (background) and 1000 (ignored) is the object; a black and white mask is one label.
        grid: (h, w) of the patches; the whole mask is laid over it, as images are squashed.
    """
    pixels = torch.from_numpy(np.array(picture.convert("RGB"))).long()
    labels = pixels[..., 0] + 256 * pixels[..., 1]
    known = labels[~torch.isin(labels, torch.tensor(UNLABELLED))]
    found, counts = known.unique(return_counts=True)
    marked = labels == found[counts.argmax()] if len(found) else torch.zeros_like(labels).bool()
    return F.adaptive_avg_pool2d(marked[None].float(), grid)[0] > 0.5


def box_token_mask(
    box: tuple[float, float, float, float], size: tuple[int, int], grid: tuple[int, int]
) -> CellMask:
    """Marks the patches of which more than half the area lies in a box.

    Args:
        box: (x0, y0, x1, y1) in pixels, ends included, as Tiny-ImageNet has them.
        size: (width, height) of the image.
    """
    x0, y0, x1, y1 = box
    marked = torch.zeros(size[1], size[0])
    marked[int(y0) : int(y1) + 1, int(x0) : int(x1) + 1] = 1
    return F.adaptive_avg_pool2d(marked[None], grid)[0] > 0.5


def _difference(values: Tensor, is_class: Tensor) -> Tensor:
    on = (values * is_class).sum(dim=1) / is_class.sum(dim=1)
    off = (values * ~is_class).sum(dim=1) / (~is_class).sum(dim=1)
    return (on - off).mean()


# ---- The images that are read ----

RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True)
class TokenImages:
    """Images to read, decoded when they are asked for.

    Args:
        labels: class of the backbone of each; None where the predicted class is read.
        label_source: `name`, `number` or `wordnet`: how the data's classes were matched with the
            backbone's; `predicted` where there are none or they cannot be.
        read: decodes one.
        notes: what a user may not expect, a sentence each.
    """

    ids: list[str]
    labels: list[int] | None
    label_source: str
    read: Callable[[int], Image.Image]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)


def open_token_images(
    data: str,
    backbone: Backbone,
    *,
    split: str = "validation",
    classes: str | None = None,
    per_class: int | None = None,
    n_images: int | None = None,
    exclude: Path | None = None,
) -> TokenImages:
    """Opens a picture, or whatever `featinv evaluate --data` reads.

    Args:
        classes: text file with the class folders to take.
        per_class, n_images: at most so many, drawn evenly over classes.
        exclude: folder whose pictures are left out, i.e. the output.

    Raises:
        InputError: nothing there, or fewer images than asked for.
    """
    path = Path(data).expanduser()
    if path.suffix.lower() in SUFFIXES:
        return TokenImages([path.name], None, "predicted", lambda _index: read_image(path))
    images = open_images(data, split, classes, exclude)
    source, class_of_label = match_classes(images, backbone)
    settings = Selection(
        n_images=n_images,
        per_class=per_class,
        selection="random" if images.labels is not None else "first",
        n_null_images=0,
    )
    items = select_items(images, settings)
    notes = images.notes
    labels = None
    if class_of_label is not None:
        labels = [class_of_label[item.label] for item in items if item.label is not None]
    elif images.labels is not None:
        notes += (
            f"The classes of the images cannot be matched with those of {backbone.name}, so that "
            "the predicted class is read.",
        )
    return TokenImages(
        ids=[item.id for item in items],
        labels=labels,
        label_source=source,
        read=lambda index: images.read(items[index].index),
        notes=notes,
    )


def match_classes(images: ImageSet, backbone: Backbone) -> tuple[str, list[int] | None]:
    """Returns how classes are matched, and the backbone's class of each label.

    Beside the ways of `match_labels`, folders that are named by WordNet ids are those classes of a
    backbone of ImageNet, also where there are fewer.
    """
    source, class_of_label = match_labels(images, backbone)
    if class_of_label is None and images.labels is not None:
        class_of_label = _by_wordnet(images.class_names or [], backbone)
        source = "wordnet" if class_of_label else None
    return source or "predicted", class_of_label


def _by_wordnet(names: Sequence[str], backbone: Backbone) -> list[int] | None:
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset(backbone.model)
    if not names or subset is None or not all(re.fullmatch(r"n\d{8}", name) for name in names):
        return None
    number = {name: i for i, name in enumerate(ImageNetInfo(subset).label_names())}
    return [number[name] for name in names] if set(names) <= set(number) else None


def to_input(pictures: Sequence[Image.Image], backbone: Backbone) -> Images:
    """Squashes whole pictures to the backbone's input size.

    So were all published models read but MIIL, which had a central crop of 0.875.
    """
    height, width = backbone.input_size
    filter_ = RESAMPLING[backbone.preprocessing.interpolation]
    squashed = [picture.resize((width, height), filter_) for picture in pictures]
    return to_tensor(squashed).to(backbone.device)


def class_name(backbone: Backbone, label: int) -> str:
    """Returns the name of a class, or `class 7`."""
    labels = backbone.labels
    return labels[label].split(",")[0] if labels else f"class {label}"


# ---- All measures of one pass over the images ----

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


FindMask = Callable[[int], Tensor | None]
"""From the number of an image to its patches on the object `[h, w]`; None where it has no mask."""


@dataclass(frozen=True)
class TokenSettings:
    """What is measured beside the pass that every run takes.

    Args:
        ablations: attention ablations, two more passes.
        null: the same model with random weights, one more pass.
        perturbation: the perturbation test, many more passes.
        n_points: counts of kept tokens in it; None is all, as published.
        n_random: random orders in it.
        target: read this class in all images instead of their own.
    """

    batch_size: int = 16
    ablations: bool = False
    null: bool = False
    perturbation: bool = False
    n_points: int | None = None
    n_random: int = 3
    seed: int = 0
    target: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "n_random"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, but {getattr(self, name)} came.")


@dataclass(frozen=True, eq=False)
class Batch:
    """Images `[b, 3, h, w]` at the model's input size, and which they are."""

    indices: list[int]
    ids: list[str]
    images: Images
    labels: Tensor | None


def read_batches(images: TokenImages, anatomy: Anatomy, settings: TokenSettings) -> Iterator[Batch]:
    """Yields the images in order, decoded and squashed."""
    for start in range(0, len(images), settings.batch_size):
        indices = list(range(start, min(start + settings.batch_size, len(images))))
        pictures: list[Image.Image] = [images.read(i) for i in indices]
        labels = images.labels
        if settings.target is not None:
            chosen = torch.full((len(indices),), settings.target)
        else:
            chosen = None if labels is None else torch.tensor([labels[i] for i in indices])
        ids = [images.ids[i] for i in indices]
        yield Batch(indices, ids, to_input(pictures, anatomy.backbone), chosen)


def measure_tokens(
    anatomy: Anatomy,
    images: TokenImages,
    settings: TokenSettings,
    find_mask: FindMask | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> tuple[Tally, dict[str, Any]]:
    """Measures all images; returns values per image and figures for `metrics.json`.

    Raises:
        InputError: images that cannot be read, masks that fit none.
    """
    tally = Tally(anatomy)
    random = make_random(anatomy, settings.seed) if settings.null else None
    random_tally = Tally(random) if random else None
    ablations = _ablations(anatomy, settings, tally.tables)
    removal = RemovalTest(anatomy, settings.n_points, settings.n_random, settings.seed)
    contexts: list[_Context] = []
    for batch in read_batches(images, anatomy, settings):
        reading = read_images(anatomy, batch.images, batch.labels)
        tally.add(reading)
        if random and random_tally:
            random_tally.add(read_images(random, batch.images, reading.labels, STATES))
        for kind, found in ablations.items():
            found.add(read_ablated(anatomy, batch.images, reading.labels, kind, STATES))
        if settings.perturbation:
            removal.add(batch.images, reading, batch.ids)
        if find_mask is not None:
            contexts += _read_context(anatomy, batch, reading, find_mask)
        if on_progress is not None:
            on_progress(len(batch.indices))
    has_labels = settings.target is None and images.labels is not None
    metrics = to_metrics(tally, has_labels=has_labels)
    metrics["class_value_agreement"] = memory_metrics(anatomy, random)
    metrics["ablations"] = {
        kind: found.interval("identifiability_rate") for kind, found in ablations.items()
    }
    metrics["random_model"] = null_metrics(random_tally) if random_tally else None
    metrics["perturbation"] = removal.to_metrics() if settings.perturbation else None
    metrics["context"] = _context_metrics(contexts) if find_mask is not None else None
    return tally, metrics


def _ablations(anatomy: Anatomy, settings: TokenSettings, tables: MemoryTables) -> dict[str, Tally]:
    if not settings.ablations:
        return {}
    kinds = ["self_only", "no_cls"] if anatomy.has_class_token else ["self_only"]
    return {kind: Tally(anatomy, tables) for kind in kinds}


@dataclass(frozen=True, eq=False)
class _Context:
    """One image with a mask.

    Args:
        identifiability, attention: of its patches, `[blocks, patches]`.
        rates: shares by name, NaN where there is no such token.
    """

    is_class: Tensor
    identifiability: Tensor
    attention: Tensor
    rates: dict[str, float]


def _read_context(
    anatomy: Anatomy, batch: Batch, reading: Reading, find_mask: FindMask
) -> list[_Context]:
    looked_up = {i: find_mask(index) for i, index in enumerate(batch.indices)}
    masks = {i: mask for i, mask in looked_up.items() if mask is not None}
    if not masks:
        return []
    assert reading.states is not None
    assert reading.attention is not None
    rows = list(masks)
    is_class = torch.stack([mask.flatten() for mask in masks.values()])
    labels = reading.labels[rows]
    unperturbed = identified(reading.states.rank[rows], anatomy.n_prefix).float()
    columns: dict[str, Tensor] = {}
    for name, kept in (("class_tokens", is_class), ("context_tokens", ~is_class)):
        alone = read_tokens_alone(anatomy, batch.images[rows], labels, kept)
        columns[f"{name}/alone"] = alone.rate
        columns[f"{name}/in_whole_image"] = (unperturbed * kept).sum(dim=1) / kept.sum(dim=1)
    image = slice(anatomy.n_prefix, None)
    ranks = reading.states.rank[rows, 1:, image]
    identifiability = class_identifiability(ranks, anatomy.n_classes)
    return [
        _Context(
            is_class[i],
            identifiability[i],
            reading.attention.score[row][:, image],
            {name: float(values[i]) for name, values in columns.items()},
        )
        for i, row in enumerate(rows)
    ]


def _context_metrics(found: list[_Context]) -> dict[str, Any]:
    if not found:
        return {"n_images": 0}
    is_class = torch.stack([context.is_class for context in found])
    is_mixed = bool((is_class.any(dim=1) & ~is_class.all(dim=1)).any())
    result: dict[str, Any] = {"n_images": len(found)}
    for name in ("identifiability", "attention"):
        values = torch.stack([getattr(context, name) for context in found])
        result[f"{name}_difference_by_block"] = (
            [asdict(class_context_difference(row, is_class)) for row in values.unbind(dim=1)]
            if is_mixed
            else None
        )
    for name in found[0].rates:
        rates = [c.rates[name] for c in found if c.rates[name] == c.rates[name]]
        result[name] = asdict(bootstrap_mean(rates)) if rates else None
    return result
