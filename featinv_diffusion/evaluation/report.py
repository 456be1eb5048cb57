"""The figures as a page of Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from featinv_diffusion.evaluation.evaluator import CEILINGS, NULLS
from featinv_diffusion.evaluation.summary import METRICS

Figure = Mapping[str, Any]
TITLES = {
    "cosine": "cosine",
    "top1_match": "top-1 match",
    "top5_match": "top-5 match",
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "lpips": "LPIPS",
}
NOTE = """\
95 % bootstrap intervals over images. Cosine: mean over cells between the features of original and
reconstruction. Match: the original's top class is among the top k of the reconstruction. Nulls are
compared with the same originals: reconstructions from permuted cells, of another image, and
samples without features. Normalised agreement: (cosine − other image) / (VAE round trip − other
image)."""


def to_markdown(metrics: Figure) -> str:
    """Returns a page: agreement beside nulls and ceilings, other backbones, distances, settings."""
    settings = metrics["settings"]
    lines = [
        f"# Evaluation of {settings['pipeline']}",
        "",
        f"{metrics['n_images']} images of {settings['data']}, backbone {settings['backbone']}, "
        f"layer {settings['layer']}, {settings['steps']} steps of {settings['scheduler']}, "
        f"guidance {settings['guidance']} {settings['guidance_scale']:g}, strength "
        f"{settings['strength']:g}, seed {settings['seed']}.",
        "",
        *_agreement_table(metrics),
        "",
        f"Normalised agreement: {to_cell(metrics['normalised_agreement'])}.",
    ]
    labels = metrics["label_accuracy"]
    if labels["original"]:
        lines += [
            f"Label accuracy: original {to_cell(labels['original'], 'top1_match')}, "
            f"reconstruction {to_cell(labels['reconstruction'], 'top1_match')}."
        ]
    if metrics["evaluated_by"]:
        lines += ["", *_evaluated_by_table(metrics)]
    if metrics.get("distribution"):
        lines += ["", *_distribution_table(metrics["distribution"])]
    if metrics["failures"]:
        n = len(metrics["failures"])
        lines += ["", f"{n} image{'' if n == 1 else 's'} could not be measured."]
    lines += ["", NOTE, "", "```", metrics["command"], json.dumps(settings), "```", ""]
    return "\n".join(lines)


def _agreement_table(metrics: Figure) -> list[str]:
    header = ["", "reconstruction", *(name.replace("_", " ") for name in (*NULLS, *CEILINGS))]
    rows = []
    for name in METRICS:
        if figure := metrics.get(name):
            ceilings = [(metrics["ceilings"][c] or {}).get(name) for c in CEILINGS]
            others = [*(figure["nulls"][null] for null in NULLS), *ceilings]
            rows.append([TITLES[name], *(to_cell(x, name) for x in (figure, *others))])
    return _table(header, rows)


def _evaluated_by_table(metrics: Figure) -> list[str]:
    names = [metrics["settings"]["backbone"], *metrics["evaluated_by"]]
    figures = [metrics, *metrics["evaluated_by"].values()]
    agreement = ("cosine", "top1_match", "top5_match")
    rows = [
        [name, *(to_cell(figure.get(metric), metric) for metric in agreement)]
        for name, figure in zip(names, figures, strict=True)
    ]
    return _table(["evaluated by", *(TITLES[metric] for metric in agreement)], rows)


def _distribution_table(distribution: Figure) -> list[str]:
    rows = [
        [name, f"{figure['value']:.4g}", _count(figure["n"]), _count(figure["n_reference"])]
        for name, figure in distribution.items()
        if figure is not None
    ]
    return _table(["distance of distributions", "value", "n", "n reference"], rows)


def _count(n: int | None) -> str:
    return "unknown" if n is None else str(n)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def to_cell(figure: Figure | None, metric: str = "") -> str:
    """Returns a figure with its interval, matches in percent; a dash where there is none."""
    if figure is None:
        return "–"
    scale, digits, unit = (100, 1, " %") if "match" in metric else (1, 3, "")
    digits = 2 if metric == "psnr" else digits
    value, low, high = (f"{scale * figure[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value}{unit} [{low}, {high}]"
