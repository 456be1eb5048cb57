"""The figures of a comparison of encoders: means, ranks, paired tests, and a page of Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations, pairwise
from typing import Any

from featinv_diffusion.analysis.encoders import NULL, Comparison
from featinv_diffusion.evaluation.report import to_cell
from featinv_diffusion.metrics.paired import bootstrap_p_value, holm, wilcoxon_signed_rank
from featinv_diffusion.metrics.statistics import bootstrap_difference, bootstrap_mean

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
