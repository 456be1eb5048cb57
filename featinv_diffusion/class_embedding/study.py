"""`read_tokens`: what the tokens of a vision transformer say of a class, block by block."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from featinv_diffusion import __version__
from featinv_diffusion.backbones import load_backbone
from featinv_diffusion.backbones.base import Backbone, without_progress_bars
from featinv_diffusion.class_embedding.anatomy import Anatomy, make_random, read_anatomy
from featinv_diffusion.class_embedding.images import (
    PREDICTED,
    TARGET,
    Batch,
    FindMask,
    TokenImages,
    class_name,
    find_masks,
    hold_pictures,
    open_token_images,
    to_input,
)
from featinv_diffusion.class_embedding.measures import (
    Tally,
    class_context_difference,
    class_identifiability,
    identified,
    memory_metrics,
    null_metrics,
    to_metrics,
)
from featinv_diffusion.class_embedding.pictures import (
    BlockInverter,
    TokenPicture,
    draw_blocks,
    draw_identifiability,
    draw_removal,
    match_inverters,
)
from featinv_diffusion.class_embedding.probes import ProbeTest, split_off
from featinv_diffusion.class_embedding.reading import STATES, Reading, read_images
from featinv_diffusion.class_embedding.removal import RemovalTest, read_ablated, read_tokens_alone
from featinv_diffusion.class_embedding.settings import ImageChoice, TokenMeasures, TokenSettings
from featinv_diffusion.data.classes import find_class
from featinv_diffusion.devices import find_device
from featinv_diffusion.diffusion.folders import list_bundled
from featinv_diffusion.errors import InputError
from featinv_diffusion.images import Pictures, builtin_photo, to_pil
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.inverters.open import open_inverter
from featinv_diffusion.metrics.statistics import bootstrap_mean
from featinv_diffusion.runs.progress import progress_bar
from featinv_diffusion.runs.record import RunFolder, count, read_environment, to_png
from featinv_diffusion.settings import SampleSettings, to_flat
from featinv_diffusion.types import Source

logger = logging.getLogger(__name__)

METRICS, TABLE = "metrics.json", "per_image.parquet"
PER_IMAGE = ("label", "predicted", "identifiability_rate", "any_identified")
READ_CLASS = {PREDICTED: "predicted class", TARGET: "target class"}


def read_tokens(
    backbone: Backbone,
    pictures: Pictures | Sequence[Source],
    *,
    target: str | int | None = None,
    inverters: Sequence[Inverter] | None = None,
    masks: str | Path | None = None,
    split: str = "validation",
    classes: str | None = None,
    per_class: int | None = None,
    n_images: int | None = None,
    ablations: bool = False,
    null: bool = False,
    perturbation: bool = False,
    n_points: int | None = None,
    n_random: int = 3,
    probes_per_class: int | None = None,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = False,
) -> TokenReading:
    """Projects the tokens of a vision transformer on its class embedding (Vilas et al. 2023).

    Args:
        backbone: a ViT with a linear head on its class token or on the mean of its tokens.
        pictures: one or several paths, PIL images, arrays or tensors, or the feature maps of
            pictures; or a folder, a parquet file or a Hub name, as `featinv classemb` takes them.
            They are squashed to the input size. Tensors are rounded to 8 bits.
        target: class to read in all pictures, an index or a name. By default it is the picture's
            own class where the data has classes that match the backbone's, else the predicted one.
        inverters: inverters of blocks, whose reconstructions the figures show. None is the bundled
            pipeline of the backbone, where there is one.
        masks: folder of object masks, PNGs with the paths of their images: measures tokens on the
            object beside tokens of its context.
        split, classes, per_class, n_images: which images of a data set, see `ImageChoice`.
        ablations, null, perturbation, n_points, n_random, probes_per_class: what else to measure,
            see `TokenMeasures`.
        seed: random seed of the reconstructions, the random weights and the random orders.
        batch_size: images per batch.
        progress: show a progress bar on stderr.

    Raises:
        InputError: no such ViT, pictures that cannot be read, an unknown class, masks that belong
            to no image, an inverter of another backbone, or probes of images without classes.
    """
    is_path = isinstance(pictures, str | Path)
    settings = TokenSettings(
        data=str(pictures) if is_path else None,
        backbone=backbone.name,
        target=None if target is None else str(target),
        masks=None if masks is None else str(masks),
        choice=ImageChoice(split, classes, per_class, n_images),
        device=str(backbone.device),
        measures=TokenMeasures(
            batch_size=batch_size,
            ablations=ablations,
            null=null,
            perturbation=perturbation,
            n_points=n_points,
            n_random=n_random,
            probes_per_class=probes_per_class,
            seed=seed,
        ),
    )
    anatomy = read_anatomy(backbone)
    if is_path:
        images = open_token_images(pictures, backbone, settings.choice)
    else:
        images = hold_pictures(pictures)
    shown = open_inverters(settings, backbone) if inverters is None else inverters
    return _measure(settings, anatomy, images, shown, progress)


def read_tokens_of(
    settings: TokenSettings, exclude: Path | None = None, *, progress: bool = False
) -> TokenReading:
    """As `read_tokens`, of settings that name everything.

    Args:
        exclude: folder whose pictures are left out, i.e. the output.

    Raises:
        InputError: as `read_tokens`, or names of nothing.
    """
    backbone = _load_backbone(settings)
    anatomy = read_anatomy(backbone)
    data = settings.data or builtin_photo()
    images = open_token_images(data, backbone, settings.choice, exclude)
    return _measure(settings, anatomy, images, None, progress)


def open_inverters(settings: TokenSettings, backbone: Backbone) -> list[Inverter]:
    """Opens the inverters that the settings name, or else the backbone's bundled pipeline.

    Raises:
        InputError: no inverter of that name, or stages without a modular inverter.
    """
    if settings.stages and settings.inverter is None:
        raise InputError("--stage is of a modular inverter; name one with --inverter.")
    own = [backbone.name] if backbone.name in list_bundled() else []
    names = settings.pipelines or (own if settings.inverter is None else [])
    device, seed = settings.device, settings.measures.seed
    chosen = [SampleSettings(pipeline=name, device=device, seed=seed) for name in names]
    if settings.inverter is not None:
        chosen += [
            SampleSettings(inverter=settings.inverter, stage=stage, device=device)
            for stage in settings.stages or (None,)
        ]
    with without_progress_bars():
        return [open_inverter(one) for one in chosen]


def _load_backbone(settings: TokenSettings) -> Backbone:
    """Loads the backbone on its device, with the interpolation asked for."""
    with without_progress_bars():
        backbone = load_backbone(settings.backbone).to(find_device(settings.device))
    if settings.interpolation is not None:
        backbone.preprocessing = replace(
            backbone.preprocessing, interpolation=settings.interpolation
        )
    return backbone


def _measure(
    settings: TokenSettings,
    anatomy: Anatomy,
    images: TokenImages,
    inverters: Sequence[Inverter] | None,
    progress: bool,
) -> TokenReading:
    for note in images.notes:
        logger.warning(note)
    target = None
    if settings.target is not None:
        target = find_class(
            settings.target, anatomy.backbone.labels, anatomy.n_classes, anatomy.backbone.name
        )
        images = images.with_target(target)
    fitted = None
    if settings.measures.probes_per_class is not None:
        images, fitted = split_off(images, settings.measures.probes_per_class)
    if inverters is None:
        inverters = open_inverters(settings, anatomy.backbone)
    shown = match_inverters(anatomy, inverters)
    masks = None
    if settings.masks is not None:
        masks = find_masks(Path(settings.masks), images, anatomy.grid)
    n_all = len(images) + len(fitted or ())
    with progress_bar(n_all, progress, doing="reading", noun="images") as advance:
        probes = None
        if fitted is not None:
            probes = ProbeTest.fit(anatomy, fitted, settings.measures.batch_size, advance)
        tally, metrics = measure_tokens(anatomy, images, settings.measures, masks, advance, probes)
    arguments = {**to_flat(settings), "target": target}
    return TokenReading(settings, arguments, anatomy, images, shown, tally, metrics)


@dataclass(frozen=True, eq=False, repr=False)
class TokenReading:
    """What the tokens of pictures say of a class; it shows the figure of the first in a notebook.

    Args:
        arguments: what was asked, as `metrics.json` keeps it.
        anatomy: the model and its parts.
        images: the pictures.
        inverters: by the block that they read, from 1.
        tally: the measures of each picture.
        metrics: their means; lists have one entry per block.
    """

    settings: TokenSettings
    arguments: Mapping[str, Any]
    anatomy: Anatomy
    images: TokenImages
    inverters: Mapping[int, BlockInverter]
    tally: Tally
    metrics: Mapping[str, Any]

    def figure(self, index: int = 0) -> Figure:
        """Draws what each block says, and shows by its inverter, of the picture of this index."""
        anatomy, name = self.anatomy, self.images.ids[index]
        backbone = anatomy.backbone
        pixels = to_input([self.images.read(index)], backbone)
        labels = self.images.labels
        chosen = None if labels is None else torch.tensor([labels[index]])
        reading = read_images(anatomy, pixels, chosen)
        noise, seed = PurePosixPath(name).name, self.settings.measures.seed
        item = TokenPicture(
            picture=to_pil(pixels)[0],
            name=name,
            class_name=class_name(backbone, int(reading.labels[0])),
            predicted_name=class_name(backbone, int(reading.logits.argmax())),
            reading=reading,
            shown={
                block: inverter.reconstruct(pixels, noise, seed)
                for block, inverter in self.inverters.items()
            },
        )
        return draw_blocks(anatomy, item)

    def identifiability_figure(self) -> Figure:
        """Draws the identifiability of the class by token and block, mean over the pictures."""
        n, metrics = len(self.images), self.metrics
        kinds = ["image"] + (["cls"] if metrics["identifiability_by_block_cls"] else [])
        curves = {kind: metrics["intervals"][f"identifiability_by_block/{kind}"] for kind in kinds}
        tokens = torch.as_tensor(self.tally.token_identifiability) / n
        return draw_identifiability(self.anatomy, tokens, curves, n)

    def perturbation_figure(self) -> Figure | None:
        """Draws the perturbation test; None where it was not asked for."""
        found = self.metrics["perturbation"]
        return draw_removal(found, len(self.images)) if found else None

    def rows(self) -> list[dict[str, Any]]:
        """Returns one dict per picture."""
        columns = {name: self.tally.column(name).tolist() for name in PER_IMAGE}
        return [
            {"id": image_id, **{name: column[i] for name, column in columns.items()}}
            for i, image_id in enumerate(self.images.ids)
        ]

    def numbers(self) -> dict[str, Any]:
        """Returns what `metrics.json` holds."""
        backbone = self.anatomy.backbone
        return {
            "version": __version__,
            "command": "classemb",
            "arguments": dict(self.arguments),
            "backbone": backbone.name,
            "n_blocks": len(self.anatomy.blocks),
            "n_classes": self.anatomy.n_classes,
            "input_size": list(backbone.preprocessing.size),
            "interpolation": backbone.preprocessing.interpolation,
            "label_source": self.images.label_source,
            "environment": read_environment(str(backbone.device)),
            **self.metrics,
            "figures": self._figure_names(),
        }

    def summary(self) -> str:
        """Returns how many tokens say the class, and the areas of the perturbation test."""
        metrics, source = self.metrics, self.images.label_source
        accuracy = metrics["accuracy"]
        right = "" if accuracy is None else f" Accuracy {accuracy:.1%}."
        return (
            f"{count(len(self.images), 'image')}: {metrics['identifiability_rate']:.1%} of the "
            f"image tokens are closest to the {READ_CLASS.get(source, 'class')} after the last "
            f"block; {metrics['any_identified']:.1%} of the images have such a token.{right}"
            f"{self._perturbation_words()}"
        )

    def _perturbation_words(self) -> str:
        found = self.metrics["perturbation"]
        if found is None:
            return ""
        words = {
            "": "the label's",
            "/predicted": "the predicted class's",
            "/wrong": "a wrong one's",
        }
        if self.images.label_source in READ_CLASS:
            words[""] = f"the {READ_CLASS[self.images.label_source]}'s"
        areas = [
            f"{found[name]['area']['value']:.3f} by {of}"
            for source, of in words.items()
            if (name := f"gradient/negative{source}") in found
        ]
        return (
            " Perturbation test, the least relevant patches removed first: the area is "
            f"{', '.join(areas)} gradient, and {found['random']['area']['value']:.3f} at random."
        )

    def save(self, folder: str | Path) -> Path:
        """Writes what `featinv classemb` writes: figures, `per_image.parquet`, `metrics.json`."""
        run = RunFolder(folder, completing=METRICS)
        for index, name in enumerate(self._figure_names()):
            run.figure(name, self.figure(index))
        run.figure("identifiability.png", self.identifiability_figure())
        if (perturbation := self.perturbation_figure()) is not None:
            run.figure("perturbation.png", perturbation)
        run.table(TABLE, self.rows())
        run.complete(self.numbers())
        return run.folder

    def _figure_names(self) -> list[str]:
        n_figures = min(self.settings.n_figures, len(self.images))
        stems = [PurePosixPath(image_id).stem for image_id in self.images.ids[: max(n_figures, 0)]]
        return [f"{i:02d}-{stem.replace(':', '-')}.png" for i, stem in enumerate(stems)]

    def _repr_png_(self) -> bytes:
        return to_png(self.figure())

    def __repr__(self) -> str:
        return f"TokenReading of {self.anatomy.backbone.name}: {self.summary()}"


# ---- All measures of one pass over the images ----------------------------------------------------


def measure_tokens(
    anatomy: Anatomy,
    images: TokenImages,
    wanted: TokenMeasures,
    find_mask: FindMask | None = None,
    on_progress: Callable[[int], None] | None = None,
    probes: ProbeTest | None = None,
) -> tuple[Tally, dict[str, Any]]:
    """Measures all images; returns values per image and figures for `metrics.json`.

    Args:
        probes: fitted on other images.

    Raises:
        InputError: images that cannot be read, masks that fit none.
    """
    tally = Tally(anatomy)
    random = make_random(anatomy, wanted.seed) if wanted.null else None
    random_tally = Tally(random) if random else None
    ablations = {kind: Tally(anatomy, tally.tables) for kind in _ablations(anatomy, wanted)}
    removal = _removal_test(anatomy, images, wanted, probes) if wanted.perturbation else None
    contexts: list[_Context] = []
    for batch in images.batches(anatomy.backbone, wanted.batch_size):
        reading = read_images(anatomy, batch.images, batch.labels)
        tally.add(reading)
        if random and random_tally:
            random_tally.add(read_images(random, batch.images, reading.labels, STATES))
        for kind, found in ablations.items():
            found.add(read_ablated(anatomy, batch.images, reading.labels, kind, STATES))
        if probes is not None:
            probes.add(batch.images, reading.labels)
        if removal is not None:
            removal.add(batch.images, reading, batch.ids)
        if find_mask is not None:
            contexts += _read_context(anatomy, batch, reading, find_mask)
        if on_progress is not None:
            on_progress(len(batch.indices))
    metrics = to_metrics(tally, has_labels=images.has_labels)
    metrics["class_value_agreement"] = memory_metrics(anatomy, random)
    metrics["ablations"] = {
        kind: found.interval("identifiability_rate") for kind, found in ablations.items()
    }
    metrics["random_model"] = null_metrics(random_tally) if random_tally else None
    metrics["perturbation"] = removal.to_metrics() if removal is not None else None
    metrics["probes"] = probes.to_metrics() if probes is not None else None
    metrics["context"] = _context_metrics(contexts) if find_mask is not None else None
    return tally, metrics


def _removal_test(
    anatomy: Anatomy, images: TokenImages, wanted: TokenMeasures, probes: ProbeTest | None
) -> RemovalTest:
    return RemovalTest(
        anatomy,
        wanted.n_points,
        wanted.n_random,
        wanted.seed,
        probe=probes.importance if probes is not None else None,
        label_is_predicted=images.label_source == PREDICTED,
    )


def _ablations(anatomy: Anatomy, wanted: TokenMeasures) -> list[str]:
    if not wanted.ablations:
        return []
    return ["self_only", "no_cls"] if anatomy.has_class_token else ["self_only"]


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
