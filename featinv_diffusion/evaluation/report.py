"""Rows of per-image figures → means with intervals, nulls and ceilings → words, page, picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from featinv_diffusion.errors import InputError
from featinv_diffusion.evaluation.baselines import BASELINES, OPTIMISE
from featinv_diffusion.evaluation.evaluator import (
    CEILINGS,
    NULLS,
    OTHER_IMAGE,
    PERMUTED_CELLS,
    VAE_ROUND_TRIP,
)
from featinv_diffusion.figures.board import draw_bars
from featinv_diffusion.metrics.statistics import (
    LEAST_BOOTSTRAP,
    Interval,
    bootstrap_mean,
    bootstrap_statistic,
    few_images_note,
)
from featinv_diffusion.runs.record import count
from featinv_diffusion.settings import BY_GRADIENT, DIFFUSION, refined_by

AGREEMENT = ("centred_cosine", "cosine", "top1_match", "top5_match")
METRICS = (*AGREEMENT, "psnr", "ssim", "lpips")

SHARES = ("match", "label_correct")
"""Words in the names of columns of zeros and ones."""

TITLES = {
    "centred_cosine": "centred cosine",
    "cosine": "cosine",
    "top1_match": "top-1 match",
    "top5_match": "top-5 match",
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "lpips": "LPIPS, lower is better",
}

Columns = Mapping[str, np.ndarray]
Estimate = Mapping[str, Any]
"""A figure with its interval, or several by name."""


def summarise(columns: Columns, evaluated_by: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the figures of `metrics.json`; None stands where something was not measured."""
    figures: dict[str, Any] = {
        name: with_nulls(columns, name) for name in METRICS if name in columns
    }
    figures["normalised_agreement"] = normalised_agreement(columns)
    figures["label_accuracy"] = {
        "original": interval(columns, "label_correct_original"),
        "reconstruction": interval(columns, "label_correct_reconstruction"),
    }
    figures["ceilings"] = {ceiling: _of_pictures(columns, ceiling) for ceiling in CEILINGS}
    figures["baselines"] = {name: _of_pictures(columns, name, evaluated_by) for name in BASELINES}
    figures["evaluated_by"] = {
        name: {
            **{
                metric: {
                    **(with_nulls(columns, f"evaluated_by_{name}_{metric}") or {}),
                    "ceilings": {
                        ceiling: interval(columns, f"{ceiling}_evaluated_by_{name}_{metric}")
                        for ceiling in CEILINGS
                    },
                }
                for metric in AGREEMENT
                if interval(columns, f"evaluated_by_{name}_{metric}")
            },
            "normalised_agreement": normalised_agreement(columns, f"evaluated_by_{name}_"),
        }
        for name in evaluated_by
    }
    return figures


def few_images_notes(columns: Columns) -> list[str]:
    """Returns what must be said of figures of few images, of the nulls on their own."""
    notes = []
    for name, what in (("cosine", "images"), (f"{PERMUTED_CELLS}_cosine", "images of the nulls")):
        n = int(np.isfinite(columns.get(name, np.empty(0))).sum())
        if n and (note := few_images_note(n, what)) is not None:
            notes.append(note)
            break  # the nulls rest on no more than the images
    return notes


def with_nulls(columns: Columns, name: str) -> Estimate | None:
    """Returns the interval of a column's mean, and under `nulls` those of the same on the nulls."""
    figure = interval(columns, name)
    if figure is None:
        return None
    return {**figure, "nulls": {null: interval(columns, f"{null}_{name}") for null in NULLS}}


def interval(columns: Columns, name: str) -> Estimate | None:
    """Returns `value`, `low`, `high`, `n` of a column's mean; rows without a value are left out."""
    if name not in columns:
        return None
    values = columns[name][np.isfinite(columns[name])]
    return mean_of(values, any(word in name for word in SHARES)) if len(values) else None


def mean_of(values: np.ndarray, is_share: bool = False) -> Estimate:
    """Returns `value`, `low`, `high`, `n` of a mean.

    Args:
        is_share: of zeros and ones.
    """
    return asdict(bootstrap_mean(values.astype(bool) if is_share else values))


def normalised_agreement(columns: Columns, seen: str = "") -> Estimate | None:
    """Returns (cosine − other image) / (VAE round trip − other image), of means.

    0 is what any image of the data agrees, 1 what the autoencoder lets through. None where one of
    the three is missing, or where the round trip is not above another image on every resample of
    the images, of few on each of them: a ratio whose denominator may change its sign says nothing.

    Args:
        seen: the prefix of the columns of a backbone that evaluates; the own one by default.
    """
    kinds = ("", f"{OTHER_IMAGE}_", f"{VAE_ROUND_TRIP}_")
    names = [f"{kind}{seen}cosine" for kind in kinds]
    if any(name not in columns for name in names):
        return None
    table = np.stack([columns[name] for name in names])
    cosine, other, ceiling = table[:, np.isfinite(table).all(axis=0)]
    few = len(cosine) < LEAST_BOOTSTRAP
    if not len(cosine) or (few and (ceiling <= other).any()):
        return None  # where all can be drawn anew as any one of them
    try:
        return asdict(
            bootstrap_statistic(
                {"cosine": cosine, "other": other, "ceiling": ceiling},
                _share_of_span,
            )
        )
    except InputError:
        return None


def _share_of_span(means: Mapping[str, float]) -> float:
    span = means["ceiling"] - means["other"]
    return (means["cosine"] - means["other"]) / span if span > 0 else float("nan")


def _of_pictures(columns: Columns, kind: str, evaluated_by: Sequence[str] = ()) -> Estimate | None:
    """Returns the figures of other pictures than the reconstructions; None without any."""
    figures: dict[str, Any] = {
        metric: interval(columns, f"{kind}_{metric}")
        for metric in METRICS
        if f"{kind}_{metric}" in columns
    }
    if figures and evaluated_by:
        figures["evaluated_by"] = {
            name: {
                metric: interval(columns, f"{kind}_evaluated_by_{name}_{metric}")
                for metric in AGREEMENT
            }
            for name in evaluated_by
        }
    return figures or None


NOTE = """\
95 % intervals over images: percentile bootstrap, below 30 images Student's, of shares Wilson's.
Cosine: mean over cells between the features of original and reconstruction. Centred cosine: the
same less the mean cell of these images, so that another image has about 0. Match: the original's
top class is among the top k of the reconstruction. Nulls are compared with the same originals:
reconstructions from permuted cells, of another image, and samples without features. n stands where
a figure rests on other numbers of images than the page. Normalised agreement: (cosine − other
image) / (VAE round trip − other image); none where the round trip is not above another image on
every resample."""
DEFICIENT = """\
Rank-deficient: a set has no more images than the features have dimensions, so that the distance is
too large; compare such figures only at equal n."""


def describe(metrics: Estimate) -> str:
    """Returns the main figures in one sentence; what was optimised comes last."""
    own = metrics.get("optimised_for")
    parts = [
        f"cosine by {name} {to_cell(figures['cosine'])}"
        for name, figures in metrics["evaluated_by"].items()
        if own is not None
    ]
    if metrics.get("centred_cosine"):
        parts.append(f"centred cosine {to_cell(metrics['centred_cosine'])}")
    parts.append(f"cosine {to_cell(metrics['cosine'])}")
    if own is not None:
        parts[-1] = f"{parts[-1]} by {own}, which the pictures were optimised for"
    if normalised := metrics["normalised_agreement"]:
        parts.append(f"normalised {to_cell(normalised)}")
    for name in ("top1_match", "top5_match"):
        if name in metrics:
            parts.append(f"{TITLES[name]} {to_cell(metrics[name], name)}")
    if retrieval := metrics.get("retrieval"):
        found = to_cell(retrieval["top1"], "match")
        parts.append(f"own original found among {retrieval['n_gallery']} {found}")
    return f"{count(metrics['n_images'], 'image')}: {', '.join(parts)}."


def cosine_bars(metrics: Estimate) -> Figure:
    """Draws the cosine, centred where it was, of reconstructions, nulls, ceilings and baselines."""
    metric = "centred_cosine" if metrics.get("centred_cosine") else "cosine"
    found = {"reconstruction": metrics[metric], **metrics[metric]["nulls"]}
    for others in (metrics["ceilings"], metrics.get("baselines", {})):
        found |= {name: (figures or {}).get(metric) for name, figures in others.items()}
    bars = {
        name.replace("_", " "): Interval(*(figure[key] for key in ("value", "low", "high", "n")))
        for name, figure in found.items()
        if figure is not None
    }
    return draw_bars(bars, "Features that come back", f"{TITLES[metric]}, mean over cells")


def to_markdown(metrics: Estimate) -> str:
    """Returns a page: agreement beside nulls and ceilings, other backbones, distances, settings."""
    settings = metrics["settings"]
    optimised = metrics.get("optimised_for")
    others = ["", *_evaluated_by_table(metrics)] if metrics["evaluated_by"] else []
    lines = [
        f"# Evaluation of {_subject(settings)}",
        "",
        f"{metrics['n_images']} images of {settings['data']}, backbone {settings['backbone']}, "
        f"layer {settings['layer']}{_sampling_words(settings)}.",
        *(_optimised_lines(optimised, others) if optimised else []),
        "",
        *_agreement_table(metrics),
        "",
        f"Normalised agreement: {_cell(metrics['normalised_agreement'], '', metrics)}.",
        *_similarity_lines(metrics),
    ]
    lines += _label_lines(metrics)
    lines += [] if optimised else others
    lines += _baseline_lines(metrics)
    if metrics.get("distribution"):
        lines += ["", *_distribution_table(metrics["distribution"])]
    if metrics["failures"]:
        lines += ["", f"{_images(metrics['failures'])} could not be measured."]
    if metrics["partial_failures"]:
        figures = sorted({failure["figure"] for failure in metrics["partial_failures"]})
        lines += [
            "",
            f"Figures of {_images(metrics['partial_failures'])} are missing: {', '.join(figures)}.",
        ]
    lines += [line for note in metrics["notes"] for line in ("", f"Note: {note}")]
    command = [metrics["command"]] if metrics["command"] else []
    lines += ["", NOTE, "", "```", *command, json.dumps(settings), "```", ""]
    return "\n".join(lines)


def _optimised_lines(own: str, others: list[str]) -> list[str]:
    """Returns who is no judge of the pictures, after what the others see."""
    warning = (
        f"The pictures were optimised for {own}: what it sees in them is no evidence. "
        "The other backbones took no part."
    )
    return ["", warning, *others]


def _subject(settings: Estimate) -> str:
    inverter = settings["inverter"]
    if inverter == DIFFUSION:
        return settings["pipeline"] or "a pipeline that was built by hand"
    pipeline = settings["pipeline"]
    return f"the inverter {inverter}" + (f" of {pipeline}" if pipeline else "")


def _sampling_words(settings: Estimate) -> str:
    if settings["inverter"] in BY_GRADIENT:
        return f", {settings['steps']} steps, seed {settings['seed']}"
    if settings["inverter"] != DIFFUSION:
        return ", deterministic"
    scheduler = f" of {settings['scheduler']}" if settings["scheduler"] else ""
    refined = ""
    if settings.get("refine"):
        refined = f", {refined_by(settings['refine'], settings.get('refine_at'))}"
    return (
        f", {settings['steps']} steps{scheduler}{refined}, guidance "
        f"{settings['guidance']} {settings['guidance_scale']:g}, strength "
        f"{settings['strength']:g}, seed {settings['seed']}"
    )


def _label_lines(metrics: Estimate) -> list[str]:
    """Returns the accuracy, and how labels are matched with classes, which decides it."""
    labels = metrics["label_accuracy"]
    if not labels["original"]:
        has_labels = metrics["data"]["n_classes"] is not None
        return ["Label accuracy: the labels match no classes of the backbone."] * has_labels
    original, again = (
        _cell(labels[side], "top1_match", metrics) for side in ("original", "reconstruction")
    )
    return [
        f"Label accuracy: original {original}, reconstruction {again}; labels and classes are "
        f"matched by {labels['labels_matched_by']}."
    ]


def _similarity_lines(metrics: Estimate) -> list[str]:
    """Returns retrieval and CKA beside their nulls and ceilings."""
    lines = []
    if retrieval := metrics.get("retrieval"):
        n = retrieval["n_gallery"]
        ceiling = (retrieval["ceilings"][VAE_ROUND_TRIP] or {}).get("top1")
        words = f"Own original found first among {n}: {_cell(retrieval['top1'], 'match', metrics)}"
        words += f" (chance {100 / n:.2g} %"
        words += f", after the autoencoder alone {to_cell(ceiling, 'match')})" if ceiling else ")"
        if hard := retrieval["same_class"]:
            words += (
                f"; among the {hard['mean_gallery']:.1f} of its class "
                f"{_cell(hard['top1'], 'match', metrics)} (chance {100 * hard['chance']:.2g} %)"
            )
        lines.append(f"{words}.")
    if cka := metrics.get("linear_cka"):
        null, ceiling = cka["nulls"][OTHER_IMAGE], cka["ceilings"][VAE_ROUND_TRIP]
        lines.append(
            f"Linear CKA of whole maps: {_cell(cka, '', metrics)}; other image {to_cell(null)}, "
            f"after the autoencoder alone {to_cell(ceiling)}."
        )
    return [line for text in lines for line in ("", text)]


def _baseline_lines(metrics: Estimate) -> list[str]:
    """Returns the table of what needs no trained inverter."""
    found = {name: x for name, x in metrics.get("baselines", {}).items() if x}
    if not found:
        return []
    eyes = list(metrics["evaluated_by"])
    shown = [name for name in METRICS if name in metrics]
    header = ["baseline", *(TITLES[name] for name in shown), *(f"cosine by {x}" for x in eyes)]
    rows = []
    for name, figures in {"reconstruction": metrics, **found}.items():
        seen = [(figures["evaluated_by"][eye]).get("cosine") for eye in eyes]
        cells = [_cell(figures.get(metric), metric, metrics) for metric in shown]
        label = name.replace("_", " ") + (" (optimised)" if name == OPTIMISE else "")
        rows.append([label, *cells, *(_cell(x, "", metrics) for x in seen)])
    return ["", *_table(header, rows)]


def _images(failures: Sequence[Mapping[str, str]]) -> str:
    return count(len({failure["id"] for failure in failures}), "image")


def _agreement_table(metrics: Estimate) -> list[str]:
    header = ["", "reconstruction", *(name.replace("_", " ") for name in (*NULLS, *CEILINGS))]
    rows = []
    for name in METRICS:
        if figure := metrics.get(name):
            ceilings = [(metrics["ceilings"][c] or {}).get(name) for c in CEILINGS]
            others = [*(figure["nulls"][null] for null in NULLS), *ceilings]
            cells = (_cell(x, name, metrics) for x in (figure, *others))
            rows.append([TITLES[name], *cells])
    return _table(header, rows)


def _evaluated_by_table(metrics: Estimate) -> list[str]:
    own = metrics["settings"]["backbone"]
    names = [own, *metrics["evaluated_by"]]
    figures = [metrics, *metrics["evaluated_by"].values()]
    if metrics.get("optimised_for"):  # whoever took no part comes first
        names = [*names[1:], f"{own} (optimised)"]
        figures = [*figures[1:], figures[0]]
    shown = [*AGREEMENT, "normalised_agreement"]
    rows = [
        [name, *(_cell(figure.get(metric), metric, metrics) for metric in shown)]
        for name, figure in zip(names, figures, strict=True)
    ]
    return _table(["evaluated by", *(TITLES[metric] for metric in AGREEMENT), "normalised"], rows)


def _distribution_table(distribution: Estimate) -> list[str]:
    figures = {name: figure for name, figure in distribution.items() if figure is not None}
    rows = [
        [name, _distance(figure), _count(figure["n"]), _count(figure["n_reference"])]
        for name, figure in figures.items()
    ]
    table = _table(["distance of distributions", "value", "n", "n reference"], rows)
    is_deficient = any(figure.get("rank_deficient") for figure in figures.values())
    return [*table, "", DEFICIENT] if is_deficient else table


def _distance(figure: Estimate) -> str:
    return f"{figure['value']:.4g}{' (rank-deficient)' if figure.get('rank_deficient') else ''}"


def _count(n: int | None) -> str:
    return "unknown" if n is None else str(n)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def _cell(figure: Estimate | None, metric: str, page: Estimate) -> str:
    """Returns `to_cell`, with n where it is not that of the page."""
    is_other = figure is not None and figure["n"] != page["n_images"]
    return to_cell(figure, metric) + (f", n = {figure['n']}" if figure and is_other else "")


def to_cell(figure: Estimate | None, metric: str = "") -> str:
    """Returns a figure with its interval, matches in percent; a dash where there is none."""
    if figure is None:
        return "–"
    scale, digits, unit = (100, 1, " %") if "match" in metric else (1, 3, "")
    digits = 2 if metric == "psnr" else digits
    value, low, high = (f"{scale * figure[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value}{unit} [{low}, {high}]"
