"""Encoders compared by how well their features are turned back into images.

Source: "Image Reconstruction as a Tool for Feature Analysis", section 4. This code differs from the
published one in these points. Images are central squares, as in configs/inverters/siglip.yaml and
siglip2.yaml; the published code trains on whole images squashed to squares and evaluates on the
central crops of DINOv2. Similarity is measured in colour, and without colour only on request; the
published code always turns images grey. Its scorers are CLIP ViT-L/14 and SigLIP2-L, the second of
which belongs to the family that it ranks. Pixels and colours are measured too, and each mean has
its interval.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import combinations, pairwise
from pathlib import Path, PurePath
from typing import Any

import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from featinv_diffusion.backbones import Backbone, load_backbone
from featinv_diffusion.backbones.base import weights_sha256
from featinv_diffusion.backbones.names import canonical_name
from featinv_diffusion.backbones.timm import TimmBackbone
from featinv_diffusion.backbones.transformers import TransformersBackbone
from featinv_diffusion.data.selection import Item, digest, select_items
from featinv_diffusion.data.sets import ImageSet, open_images
from featinv_diffusion.errors import InputError
from featinv_diffusion.evaluation.evaluator import find_partners
from featinv_diffusion.evaluation.report import to_cell
from featinv_diffusion.features.pixel_operations import to_grey
from featinv_diffusion.figures import board as figures
from featinv_diffusion.figures.board import add_bars, draw_grid
from featinv_diffusion.files import expand_path
from featinv_diffusion.images import center_square, to_tensor
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.inverters.open import open_inverter
from featinv_diffusion.metrics.colour import delta_e_2000
from featinv_diffusion.metrics.features import psnr, ssim
from featinv_diffusion.metrics.statistics import (
    Interval,
    bootstrap_difference,
    bootstrap_mean,
    bootstrap_p_value,
    holm,
    wilcoxon_signed_rank,
)
from featinv_diffusion.runs.parts import WHOLE, Division, Part, describe_sampling
from featinv_diffusion.runs.progress import Advance, progress_bar
from featinv_diffusion.runs.record import RunFolder, read_environment
from featinv_diffusion.runs.sampling import batched, sample_each
from featinv_diffusion.settings import SampleSettings, Selection, to_flat
from featinv_diffusion.studies.settings import EncoderSettings
from featinv_diffusion.studies.study import N_DEFAULT, Analysis
from featinv_diffusion.types import Images

N_EXAMPLES = 8
NULL = "null_"
"""Prefix of the null of a similarity: to the reconstruction of another image, if possible of
another class."""
PIXEL_METRICS = {"psnr": psnr, "ssim": ssim, "delta_e_2000": delta_e_2000}
TITLE = "Images from the features of each encoder"


@dataclass(frozen=True, eq=False, repr=False)
class Comparison(Analysis):
    """A comparison of encoders; its rows are those of `per_image.parquet`."""

    def _write(self, run: RunFolder, made_by: Mapping[str, Any]) -> None:
        run.table("per_image.parquet", self.table)
        run.text("metrics.md", to_markdown({**made_by, **self.metrics}))


def compare_encoders(
    settings: EncoderSettings,
    *,
    exclude: Path | None = None,
    progress: bool = False,
    division: Division = WHOLE,
) -> Comparison:
    """Compares encoders by how well their features are turned back into images.

    Args:
        exclude: folder whose pictures are left out, i.e. the output.
        progress: show a progress bar on stderr.
        division: of the images among processes.

    Raises:
        InputError: fewer than two inverters or images, or settings, images or models that cannot
            be used.
    """
    pictures = settings.pictures
    choice = pictures.images
    images = open_images(choice.data, choice.split, choice.classes, exclude=exclude)
    items = select_items(images, select(settings), settings.seed)
    if pictures.n_images is None:
        items = items[:N_DEFAULT]
    if len(items) < 2:
        raise InputError("A comparison needs at least 2 images, got 1. Take more.")
    encoders = open_encoders(settings.inverters, settings.device)
    backbones = [encoder.inverter.spec.backbone for encoder in encoders]
    scorers = open_scorers(settings.scorers, backbones, settings.grey)
    n_samples = division.share(len(items)) * len(encoders)
    with progress_bar(n_samples, progress) as advance:
        size = settings.batch_size
        found = measure_encoders(encoders, scorers, images, items, size, advance, division)
    metrics = {
        "settings": {**to_flat(settings), "scorers": [s.backbone.name for s in scorers]},
        "n_images": len(items),
        "images_sha256": digest(found.ids),
        **summarise(found, settings.seed),
        "environment": read_environment(str(encoders[0].backbone.device)),
    }
    note = f"{len(items)} images; pixels are compared at {found.size}×{found.size}."
    drawings = {
        "encoders.png": draw_comparison(metrics),
        "reconstructions.png": draw_grid(
            {"original": found.original, **found.examples}, TITLE, [note]
        ),
    }
    lines = [order_line(metrics, metric) for metric in metrics["ranking"]]
    return Comparison(metrics, drawings, lines, found.rows())


def select(settings: EncoderSettings) -> Selection:
    """Returns the choice of images; an evaluation with the same choice takes the same ones."""
    pictures = settings.pictures
    return Selection(n_images=pictures.n_images, held_back_per_class=pictures.held_back_per_class)


# ---- Scorers -------------------------------------------------------------------------------------

BUNDLED_SCORERS = ("tiny/convnext", "tiny/resnet", "tiny/swin", "tiny/vit")


@dataclass(frozen=True, eq=False)
class Scorer:
    """An encoder that measures how similar a reconstruction is to its original.

    Args:
        grey: turn images grey first, as the published code does; the paper does not say so.
    """

    backbone: Backbone
    grey: bool = False

    @property
    def column(self) -> str:
        """The name of the measure in tables."""
        return f"{'grey_' if self.grey else ''}similarity_{self.backbone.name}"

    @torch.no_grad()
    def embed(self, images: Images) -> Float[Tensor, "b c"]:
        """Returns a unit vector for each image."""
        if self.grey:
            images = to_grey(resize(images, self.backbone.input_size))
        return F.normalize(pooled_embedding(self.backbone, images).float(), dim=1)


def pooled_embedding(backbone: Backbone, images: Images) -> Float[Tensor, "b c"]:
    """Returns the pooled features of a model: what a timm head reads, or `pooler_output`.

    A tower of transformers without a pooler gives the mean of its patches. For CLIP the embedding
    is the one before the projection, which towers do not hold; for SigLIP it is the one that is
    contrasted.
    """
    if isinstance(backbone, TimmBackbone):
        model: Any = backbone.model
        features = model.forward_features(backbone.preprocess(images))
        return model.forward_head(features, pre_logits=True).flatten(1)
    if not isinstance(backbone, TransformersBackbone):
        return backbone.features(images).mean(dim=(2, 3))
    outputs: list[Any] = []
    handle = backbone.tower.register_forward_hook(lambda _m, _i, output: outputs.append(output))
    try:
        features = backbone.features(images)
    finally:
        handle.remove()
    pooled = getattr(outputs[0], "pooler_output", None)
    return features.mean(dim=(2, 3)) if pooled is None else pooled


def resize(images: Images, size: tuple[int, int]) -> Float[Tensor, "b 3 _ _"]:
    """Resizes bilinearly with antialiasing; images of this size are returned unchanged."""
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    return F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)


def open_scorers(names: Sequence[str], compared: Collection[str], grey: bool) -> list[Scorer]:
    """Loads the scorers, and with `grey` each of them without colour too.

    Args:
        names: names of backbones; none takes the first bundled classifier that is not compared.
        compared: the backbones whose reconstructions are scored.

    Raises:
        InputError: a scorer that is among the compared encoders, is named twice or cannot be
            loaded.
    """
    taken = {canonical_name(name) for name in compared}
    free = [name for name in BUNDLED_SCORERS if canonical_name(name) not in taken]
    if not names and not free:
        raise InputError("All bundled classifiers are compared. Name another one with --scorers.")
    names = names or free[:1]
    if len({canonical_name(name) for name in names}) < len(names):
        raise InputError(f"--scorers must name each backbone once, got {', '.join(names)}.")
    for name in names:
        if canonical_name(name) in taken:
            raise InputError(
                f"A scorer must not be among the compared encoders, got {name!r}. Name another "
                "one, or leave --scorers out."
            )
    backbones = [load_backbone(name) for name in names]
    colours = (False, True) if grey else (False,)
    return [Scorer(backbone, colour) for colour in colours for backbone in backbones]


# ---- Encoders with their inverters ---------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Encoder:
    """An encoder in the comparison.

    Args:
        label: its name in tables and figures.
        name: the name of its inverter, as it was given.
    """

    label: str
    name: str
    inverter: Inverter

    @property
    def backbone(self) -> Backbone:
        """The encoder itself."""
        return self.inverter.require_backbone()

    def describe(self) -> dict[str, Any]:
        """Returns what `metrics.json` says about it."""
        spec = self.inverter.spec
        return {
            "label": self.label,
            "inverter": self.name,
            "backbone": spec.backbone,
            "layer": spec.layer,
            "channels": spec.channels,
            "grid": list(spec.grid),
            "input_size": list(self.backbone.input_size),
        }

    @torch.no_grad()
    def reconstruct(self, images: Images, items: Sequence[Item]) -> Float[Tensor, "b 3 _ _"]:
        """Returns the images that its inverter makes of its features, in 8-bit steps.

        Raises:
            InputError: features or samples that are not finite.
        """
        features = self.backbone.features(images)
        seeds = [item.seed for item in items]
        return sample_each(self.inverter, features, seeds).to(images.device)


def open_encoders(names: Sequence[str], device: str = "auto") -> list[Encoder]:
    """Loads inverters with their encoders.

    Args:
        names: see `parse_inverter`.

    Raises:
        InputError: fewer than two inverters, one that is named twice or unknown, or a device that
            is not there.
    """
    chosen = {name: parse_inverter(name) for name in names}
    _check_different(names, chosen.values())
    opened = {
        name: open_inverter(replace(source, device=device)) for name, source in chosen.items()
    }
    resolved = [one.settings for one in opened.values() if one.settings is not None]
    _check_different(names, resolved)  # a default may be what another one names
    labels = make_labels([(one.spec.backbone, name) for name, one in opened.items()])
    return [Encoder(label, *one) for label, one in zip(labels, opened.items(), strict=True)]


def parse_inverter(text: str) -> SampleSettings:
    """Reads NAME[@STAGE][:PIPELINE] or FOLDER[@STAGE]; a folder's name may contain `@` and `:`.

    Raises:
        InputError: an `@` or `:` with nothing before or after it.
    """
    folder, _, stage = text.rpartition("@")
    pipeline = None
    if _is_folder(text):
        name, stage = text, None
    elif _is_folder(folder):
        name = folder
    else:
        name, *pipelines = text.split(":", maxsplit=1)
        name, *stages = name.split("@", maxsplit=1)
        pipeline, stage = (parts[0] if parts else None for parts in (pipelines, stages))
    if "" in (name, stage, pipeline):
        raise InputError(
            f"An inverter must be given as NAME, NAME@STAGE or NAME:PIPELINE, got {text!r}."
        )
    return SampleSettings(inverter=name, stage=stage, pipeline=pipeline)


def _check_different(names: Sequence[str], sources: Iterable[SampleSettings]) -> None:
    if len({_resolve(source) for source in sources}) < max(2, len(names)):
        raise InputError(
            "A comparison needs at least two different inverters, e.g. --inverter siglip,siglip2, "
            f"got {', '.join(names) or 'none'}."
        )


def _is_folder(text: str) -> bool:
    return text != "" and expand_path(text).is_dir()


def _resolve(source: SampleSettings) -> tuple[str | None, ...]:
    """Returns name, stage and pipeline; folders by their real path."""
    names = (source.inverter, source.stage, source.pipeline)
    return tuple(
        str(expand_path(name).resolve()) if name and _is_folder(name) else name for name in names
    )


def make_labels(named: Sequence[tuple[str, str]]) -> list[str]:
    """Returns distinct labels of (backbone, inverter).

    A label is the name of the backbone if no other has it. Otherwise it is the name of the
    inverter; for a folder as many of its last parts, at least two, as distinguish it.

    Raises:
        InputError: an inverter that is named twice.
    """
    candidates = [_label_candidates(*one) for one in named]
    while True:
        labels = [names[0] for names in candidates]
        counts = Counter(labels)
        shared = [names for names in candidates if counts[names[0]] > 1]
        if not shared:
            return labels
        longer = [names for names in shared if len(names) > 1]
        if not longer:
            raise InputError(f"Each inverter must be named once, got {shared[0][0]!r} twice.")
        for names in longer:
            names.pop(0)


def _label_candidates(backbone: str, name: str) -> list[str]:
    """Returns the possible labels, the shortest first and the whole name last."""
    path = PurePath(name)
    return [backbone, *("/".join(path.parts[-n:]) for n in range(2, len(path.parts))), str(path)]


# ---- Measurements --------------------------------------------------------------------------------


@dataclass(eq=False)
class Measured:
    """Measurements of each image, by encoder and metric; row i belongs to the image `ids[i]`.

    Args:
        size: side in pixels at which pixels are compared, the largest input of the encoders.
        original: the first originals.
        examples: their reconstructions, by label.
    """

    encoders: list[Encoder]
    size: int
    ids: list[str] = field(default_factory=list)
    columns: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    original: Images = field(default_factory=lambda: torch.empty(0, 3, 0, 0))
    examples: dict[str, Images] = field(default_factory=dict)

    @property
    def metrics(self) -> list[str]:
        """The names of the metrics, without the nulls."""
        names = next(iter(self.columns.values()))
        return [name for name in names if not name.startswith(NULL)]

    def rows(self) -> list[dict[str, Any]]:
        """Returns one dict per image."""
        table: dict[str, list[Any]] = {"id": self.ids}
        for label, measured in self.columns.items():
            table |= {f"{label}/{name}": values.tolist() for name, values in measured.items()}
        return [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]


def measure_encoders(
    encoders: Sequence[Encoder],
    scorers: Sequence[Scorer],
    images: ImageSet,
    items: Sequence[Item],
    batch_size: int,
    advance: Advance = lambda n: None,
    division: Division = WHOLE,
) -> Measured:
    """Reconstructs every image from every encoder; originals are decoded once.

    Raises:
        InputError: an image that cannot be read, or samples that are not finite.
    """
    device = encoders[0].backbone.device
    for scorer in scorers:
        scorer.backbone.to(device)
    side = max(max(encoder.backbone.picture_size) for encoder in encoders)

    def measure(chunk: tuple[int, list[Item]]) -> Part:
        first, batch = chunk
        squares = [center_square(images.read(item.index), side) for item in batch]
        originals = to_tensor(squares).to(device)
        n_shown = max(0, N_EXAMPLES - first)
        tensors = {f"{ORIGINAL}/{s.column}": s.embed(originals).cpu() for s in scorers}
        tensors |= {f"{SHOWN}/{ORIGINAL}": originals[:n_shown].cpu()} if n_shown else {}
        for i, encoder in enumerate(encoders):
            samples = encoder.reconstruct(originals, batch)
            measured = _measure(originals, samples, scorers)
            tensors |= {f"{i}/{name}": values for name, values in measured.items()}
            tensors |= {f"{SHOWN}/{i}": samples[:n_shown].cpu()} if n_shown else {}
            advance(len(batch))
        return Part(tensors)

    def describe() -> dict[str, Any]:
        return {
            "inverters": {
                encoder.name: describe_sampling(encoder.inverter) for encoder in encoders
            },
            "scorers": {s.column: weights_sha256({"": s.backbone.model}) for s in scorers},
            "batch_size": batch_size,
            "images_sha256": digest(map(repr, items)),
            "data_fingerprint": images.fingerprint,
        }

    chunks = [(n * batch_size, batch) for n, batch in enumerate(batched(items, batch_size))]
    labels = [encoder.label for encoder in encoders]
    found: dict[str, list[Tensor]] = {}
    for part in division.each(chunks, measure, describe):
        for name, values in part.tensors.items():
            found.setdefault(name, []).append(values)
    joined = {name: torch.cat(values) for name, values in found.items()}
    result = Measured(list(encoders), side, [item.id for item in items])
    result.original = joined[f"{SHOWN}/{ORIGINAL}"]
    embeddings = _of(joined, ORIGINAL)
    partners = find_partners([item.label for item in items])
    for i, label in enumerate(labels):
        result.examples[label] = joined[f"{SHOWN}/{i}"]
        result.columns[label] = _compare_embeddings(_of(joined, str(i)), embeddings, partners)
    return result


ORIGINAL, SHOWN = "original", "shown"
"""Where a part keeps the embeddings of originals, and the first pictures."""


def _of(tensors: Mapping[str, Tensor], owner: str) -> dict[str, Tensor]:
    """Returns the tensors of the originals or of an encoder, by their own names."""
    start = f"{owner}/"
    return {n.removeprefix(start): values for n, values in tensors.items() if n.startswith(start)}


def _measure(
    originals: Images, samples: Float[Tensor, "b 3 _ _"], scorers: Sequence[Scorer]
) -> dict[str, Tensor]:
    """Returns the pixel metrics, and the embeddings of the samples by scorer."""
    size = (originals.shape[-2], originals.shape[-1])
    resized = resize(samples, size).clamp(0, 1)
    measured = {name: metric(resized, originals) for name, metric in PIXEL_METRICS.items()}
    measured |= {scorer.column: scorer.embed(samples) for scorer in scorers}
    return {name: values.cpu() for name, values in measured.items()}


def _compare_embeddings(
    measured: dict[str, Tensor], embeddings: dict[str, Tensor], partners: Sequence[int]
) -> dict[str, Tensor]:
    """Replaces embeddings by their cosine with the original's, and adds the null.

    Args:
        partners: another image for each; without any, there is no null.
    """
    cosine = partial(F.cosine_similarity, dim=1)
    columns = {name: values for name, values in measured.items() if name not in embeddings}
    for name, originals in embeddings.items():
        columns[name] = cosine(originals, measured[name])
        if partners:
            columns[NULL + name] = cosine(originals, measured[name][list(partners)])
    return columns


# ---- Report --------------------------------------------------------------------------------------

LOWER_IS_BETTER = ("delta_e_2000",)
SIGNIFICANCE = 0.05
TITLES = {"psnr": "PSNR, dB", "ssim": "SSIM", "delta_e_2000": "ΔE2000, lower is better"}
NOTE = """\
95 % bootstrap intervals over images. Similarity: cosine of the pooled embeddings of original and
reconstruction; in brackets that of the original and the reconstruction of another image.
Pairs: mean difference, Wilcoxon's signed-rank test (rank-biserial effect) and paired bootstrap,
two-sided{correction}.
Order: best first, of two neighbours; ≈ where either p is not below {level}. Bold: the best, and
those that are ≈ to it.
Where the inverters of a pair are of different kinds, it compares encoder and inverter together.
Tests say nothing of what another training of an encoder or of its inverter would give."""
CORRECTION = ", each p adjusted by Holm for the pairs of its metric"


def summarise(measured: Measured, seed: int = 0) -> dict[str, Any]:
    """Returns means with intervals, the order of the encoders, and a test of each pair.

    Args:
        seed: random seed of the bootstrap.
    """
    metrics = measured.metrics
    encoders = []
    for encoder in measured.encoders:
        columns = measured.columns[encoder.label]
        figures = {name: asdict(bootstrap_mean(v, seed=seed)) for name, v in columns.items()}
        encoders.append({**encoder.describe(), "figures": figures})
    return {
        "compared_at": measured.size,
        "encoders": encoders,
        "ranking": {metric: rank(encoders, metric) for metric in metrics},
        "pairs": {metric: _test_pairs(measured, metric, seed) for metric in metrics},
    }


def rank(encoders: Sequence[Mapping[str, Any]], metric: str) -> list[str]:
    """Returns the labels, the best one first."""
    sign = 1 if metric in LOWER_IS_BETTER else -1
    ordered = sorted(encoders, key=lambda e: sign * e["figures"][metric]["value"])
    return [encoder["label"] for encoder in ordered]


def is_told_apart(pairs: Sequence[Mapping[str, Any]], first: str, second: str) -> bool:
    """Returns whether both adjusted tests of these two encoders are significant.

    Args:
        pairs: the tests of one metric, from `summarise`.
    """
    (pair,) = [pair for pair in pairs if {pair["a"], pair["b"]} == {first, second}]
    return all(pair[test]["p_holm"] < SIGNIFICANCE for test in ("wilcoxon", "bootstrap"))


def order_line(metrics: Mapping[str, Any], metric: str) -> str:
    """Returns the order, best first; neighbours that are not told apart are joined by ≈."""
    labels, pairs = metrics["ranking"][metric], metrics["pairs"][metric]
    sign = "<" if metric in LOWER_IS_BETTER else ">"
    text = labels[0]
    for better, worse in pairwise(labels):
        text += f" {sign if is_told_apart(pairs, better, worse) else '≈'} {worse}"
    return f"{title_of(metric)}: {text}"


def title_of(metric: str) -> str:
    """Returns the name of a metric in tables and figures."""
    if metric in TITLES:
        return TITLES[metric]
    kind, _, scorer = metric.partition("similarity_")
    return f"similarity by {scorer}" + (", grey" if kind else "")


def to_markdown(metrics: Mapping[str, Any]) -> str:
    """Returns a page with a table of the encoders, one of the pairs, and the command."""
    corrected = len(metrics["encoders"]) > 2
    note = NOTE.format(correction=CORRECTION if corrected else "", level=SIGNIFICANCE)
    lines = [
        "# Comparison of encoders by reconstruction",
        "",
        f"{metrics['n_images']} images of {metrics['settings']['data']}, pixels compared at "
        f"{metrics['compared_at']}×{metrics['compared_at']}.",
        "",
        *_encoder_table(metrics),
        "",
        *(f"- {order_line(metrics, metric)}" for metric in metrics["ranking"]),
        "",
        *_pair_table(metrics),
    ]
    command = ["```", metrics["command"], "```", ""] if "command" in metrics else []
    return "\n".join([*lines, "", note, "", *command])


def _test_pairs(measured: Measured, metric: str, seed: int) -> list[dict[str, Any]]:
    rows = []
    for first, second in combinations([encoder.label for encoder in measured.encoders], 2):
        a, b = (measured.columns[label][metric] for label in (first, second))
        rows.append(
            {
                "a": first,
                "b": second,
                "difference": asdict(bootstrap_difference(a, b, seed=seed)),
                "wilcoxon": asdict(wilcoxon_signed_rank(a, b)),
                "bootstrap": {"p_value": bootstrap_p_value(a, b, seed=seed)},
            }
        )
    for test in ("wilcoxon", "bootstrap"):
        adjusted = holm([row[test]["p_value"] for row in rows])
        for row, p_value in zip(rows, adjusted, strict=True):
            row[test]["p_holm"] = p_value
    return rows


def _encoder_table(metrics: Mapping[str, Any]) -> list[str]:
    names = list(metrics["ranking"])
    best = {name: _find_best(metrics, name) for name in names}
    rows = []
    for encoder in metrics["encoders"]:
        cells = [_figure_cell(encoder["figures"], name) for name in names]
        marked = [
            f"**{cell}**" if encoder["label"] in best[name] else cell
            for name, cell in zip(names, cells, strict=True)
        ]
        size = "×".join(map(str, encoder["input_size"]))
        rows.append([encoder["label"], size, *marked])
    return _table(["encoder", "pixels", *map(title_of, names)], rows)


def _find_best(metrics: Mapping[str, Any], metric: str) -> list[str]:
    """Returns the first encoder in order, and those that are not told apart from it."""
    first, *others = metrics["ranking"][metric]
    pairs = metrics["pairs"][metric]
    return [first, *(label for label in others if not is_told_apart(pairs, first, label))]


def _figure_cell(figures: Mapping[str, Any], name: str) -> str:
    null = figures.get(NULL + name)
    other = f" ({null['value']:.3f})" if null else ""
    return to_cell(figures[name], name) + other


def _pair_table(metrics: Mapping[str, Any]) -> list[str]:
    rows = [
        [
            title_of(metric),
            f"{row['a']} − {row['b']}",
            to_cell(row["difference"], metric),
            f"{row['wilcoxon']['effect']:+.2f}",
            f"{row['wilcoxon']['p_holm']:.2g}",
            f"{row['bootstrap']['p_holm']:.2g}",
        ]
        for metric, pairs in metrics["pairs"].items()
        for row in pairs
    ]
    return _table(["metric", "pair", "difference", "effect", "Wilcoxon p", "bootstrap p"], rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


PER_ROW = 4


def draw_comparison(metrics: Mapping[str, Any]) -> Figure:
    """Draws the means of each metric with their intervals, and the null as a line."""
    names, encoders = list(metrics["ranking"]), metrics["encoders"]
    n_columns = min(PER_ROW, len(names))
    n_rows = -(-len(names) // n_columns)
    width = max(1.5, 0.7 + 0.42 * len(encoders))
    size = (n_columns * width + 0.4, n_rows * 2.6 + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(TITLE, fontsize=figures.TITLE, x=0.01, ha="left", weight="bold")
    note = f"{metrics['n_images']} images, 95 % intervals"
    if any(name.startswith(NULL) for name in encoders[0]["figures"]):
        note += "; line: the reconstruction of another image"
    figure.supxlabel(note, fontsize=figures.TEXT, color=figures.GREY, x=0.01, ha="left")
    panels = figure.subplots(n_rows, n_columns, squeeze=False).flatten()
    for axes, name in zip(panels, names, strict=False):
        _draw_panel(axes, name, encoders)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    return figure


def _draw_panel(axes: Axes, name: str, encoders: Sequence[Mapping[str, Any]]) -> None:
    places = range(len(encoders))
    add_bars(axes, places, [Interval(**e["figures"][name]) for e in encoders], width=0.65)
    nulls = [encoder["figures"].get(NULL + name) for encoder in encoders]
    for place, null in zip(places, nulls, strict=True):
        if null is not None:
            ends = (place - 0.32, place + 0.32)
            axes.hlines(null["value"], *ends, color=figures.GREY, linewidth=1.5)
    labels = [encoder["label"] for encoder in encoders]
    axes.set_xticks(places, labels, rotation=30, ha="right", rotation_mode="anchor")
    axes.set_title(title_of(name), fontsize=figures.TEXT)
