"""A comparison of encoders from its settings to a folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pyarrow import parquet

from featinv_diffusion import __version__
from featinv_diffusion.data.selection import digest, select_items
from featinv_diffusion.data.sets import open_images
from featinv_diffusion.errors import InputError
from featinv_diffusion.evaluation.report import to_cell
from featinv_diffusion.figures import board as figures
from featinv_diffusion.figures.board import write_grid
from featinv_diffusion.files import replacing, write_text
from featinv_diffusion.metrics.statistics import (
    bootstrap_difference,
    bootstrap_mean,
    bootstrap_p_value,
    holm,
    wilcoxon_signed_rank,
)
from featinv_diffusion.runs.record import read_environment
from featinv_diffusion.studies.encoders import (
    NULL,
    Comparison,
    EncoderSettings,
    compare_encoders,
    open_encoders,
    open_scorers,
)
from featinv_diffusion.studies.stages import N_DEFAULT

# ---- The figures of a comparison of encoders ----

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


def summarise(comparison: Comparison, seed: int = 0) -> dict[str, Any]:
    """Returns means with intervals, the rank of each encoder, and a test of every two.

    Args:
        seed: of the bootstrap.
    """
    metrics = comparison.metrics
    encoders = []
    for encoder in comparison.encoders:
        columns = comparison.columns[encoder.label]
        figures = {name: asdict(bootstrap_mean(v, seed=seed)) for name, v in columns.items()}
        encoders.append({**encoder.describe(), "figures": figures})
    return {
        "compared_at": comparison.size,
        "encoders": encoders,
        "ranking": {metric: rank(encoders, metric) for metric in metrics},
        "pairs": {metric: _test_pairs(comparison, metric, seed) for metric in metrics},
    }


def rank(encoders: Sequence[Mapping[str, Any]], metric: str) -> list[str]:
    """Returns the labels, the best first."""
    sign = 1 if metric in LOWER_IS_BETTER else -1
    ordered = sorted(encoders, key=lambda e: sign * e["figures"][metric]["value"])
    return [encoder["label"] for encoder in ordered]


def is_told_apart(pairs: Sequence[Mapping[str, Any]], first: str, second: str) -> bool:
    """Whether both adjusted tests of these two encoders are significant.

    Args:
        pairs: of one metric, as of `summarise`.
    """
    (pair,) = [pair for pair in pairs if {pair["a"], pair["b"]} == {first, second}]
    return all(pair[test]["p_holm"] < SIGNIFICANCE for test in ("wilcoxon", "bootstrap"))


def order_line(metrics: Mapping[str, Any], metric: str) -> str:
    """Returns the order, best first: > (or < where lower is better) only for who is told apart."""
    labels, pairs = metrics["ranking"][metric], metrics["pairs"][metric]
    sign = "<" if metric in LOWER_IS_BETTER else ">"
    text = labels[0]
    for better, worse in pairwise(labels):
        text += f" {sign if is_told_apart(pairs, better, worse) else '≈'} {worse}"
    return f"{title_of(metric)}: {text}"


def title_of(metric: str) -> str:
    """Returns a metric's name for people."""
    if metric in TITLES:
        return TITLES[metric]
    kind, _, scorer = metric.partition("similarity_")
    return f"similarity by {scorer}" + (", grey" if kind else "")


def to_markdown(metrics: Mapping[str, Any]) -> str:
    """Returns a page: a table of the encoders, one of the pairs, and what was run."""
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
    return "\n".join([*lines, "", note, "", "```", metrics["command"], "```", ""])


def _test_pairs(comparison: Comparison, metric: str, seed: int) -> list[dict[str, Any]]:
    rows = []
    for first, second in combinations([encoder.label for encoder in comparison.encoders], 2):
        a, b = (comparison.columns[label][metric] for label in (first, second))
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
    """The first in rank, and those that are not told apart from it."""
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


# ---- The figure of a comparison of encoders: a panel of bars for each metric ---------------------

PER_ROW = 4


def write_comparison(metrics: Mapping[str, Any], path: Path, title: str) -> None:
    """Draws each metric's means with their intervals, and the null of another image as a dash."""
    names, encoders = list(metrics["ranking"]), metrics["encoders"]
    n_columns = min(PER_ROW, len(names))
    n_rows = -(-len(names) // n_columns)
    width = max(1.5, 0.7 + 0.42 * len(encoders))
    size = (n_columns * width + 0.4, n_rows * 2.6 + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, fontsize=figures.TITLE, x=0.01, ha="left", weight="bold")
    note = f"{metrics['n_images']} images, 95 % intervals"
    if any(name.startswith(NULL) for name in encoders[0]["figures"]):
        note += "; line: the reconstruction of another image"
    figure.supxlabel(note, fontsize=figures.TEXT, color=figures.GREY, x=0.01, ha="left")
    panels = figure.subplots(n_rows, n_columns, squeeze=False).flatten()
    for axes, name in zip(panels, names, strict=False):
        _draw_panel(axes, name, encoders)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    figures.write_figure(figure, path)


def _draw_panel(axes: Axes, name: str, encoders: Sequence[Mapping[str, Any]]) -> None:
    values = [encoder["figures"][name] for encoder in encoders]
    heights = [v["value"] for v in values]
    errors = [
        [v["value"] - v["low"] for v in values],
        [v["high"] - v["value"] for v in values],
    ]
    places = range(len(encoders))
    axes.bar(places, heights, yerr=errors, color=figures.BLUE, width=0.65, capsize=3)
    nulls = [encoder["figures"].get(NULL + name) for encoder in encoders]
    for place, null in zip(places, nulls, strict=True):
        if null is not None:
            ends = (place - 0.32, place + 0.32)
            axes.hlines(null["value"], *ends, color=figures.ORANGE, linewidth=1.5)
    labels = [encoder["label"] for encoder in encoders]
    axes.set_xticks(places, labels, rotation=30, ha="right", rotation_mode="anchor")
    axes.set_title(title_of(name), fontsize=figures.TEXT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=figures.TEXT)


ProgressBar = Callable[[int], AbstractContextManager[Callable[[float], None]]]
"""From the number of samples to a bar that is advanced by samples."""

TITLE = "Images from the features of each encoder"


def run_comparison(
    settings: EncoderSettings, output: Path, progress_bar: ProgressBar, command: str
) -> dict[str, Any]:
    """Compares, writes metrics.json, metrics.md, per_image.parquet and two figures.

    Raises:
        InputError: settings, images or models that cannot be used.
    """
    images = open_images(settings.data, settings.split, settings.classes, exclude=output)
    items = select_items(images, settings.selection)
    if settings.n_images is None:
        items = items[:N_DEFAULT]
    if len(items) < 2:
        raise InputError("A comparison needs at least 2 images, but 1 was chosen. Take more.")
    encoders = open_encoders(settings)
    backbones = [encoder.inverter.spec.backbone for encoder in encoders]
    scorers = open_scorers(settings.scorers, backbones, settings.grey)
    output.mkdir(parents=True, exist_ok=True)  # a place that refuses is found before the work
    with progress_bar(len(items) * len(encoders)) as advance:
        size = settings.batch_size
        result = compare_encoders(encoders, scorers, images, items, size, advance)
    metrics = {
        "version": __version__,
        "analysis": "encoders",
        "command": command,
        "settings": {**asdict(settings), "scorers": [s.backbone.name for s in scorers]},
        "n_images": len(items),
        "images_sha256": digest(item.id for item in items),
        **summarise(result, settings.seed),
        "environment": read_environment(str(encoders[0].backbone.device)),
    }
    _write(result, metrics, output)
    return metrics


def _write(result: Comparison, metrics: dict[str, Any], output: Path) -> None:
    """metrics.json comes last: it completes the folder."""
    (output / "metrics.json").unlink(missing_ok=True)
    columns = {"original": result.original, **result.examples}
    note = f"{metrics['n_images']} images; pixels are compared at {result.size}×{result.size}."
    write_grid(columns, output / "reconstructions.png", TITLE, [note])
    write_comparison(metrics, output / "encoders.png", TITLE)
    table: dict[str, Any] = {"id": result.ids}
    for label, figures in result.columns.items():
        table |= {f"{label}/{name}": values.tolist() for name, values in figures.items()}
    with replacing(output / "per_image.parquet") as partial:
        parquet.write_table(pa.table(table), partial)
    write_text(output / "metrics.md", to_markdown(metrics))
    write_text(output / "metrics.json", json.dumps(metrics, indent=2) + "\n")
