"""The figure of a comparison of encoders: a panel of bars for each metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from featinv_diffusion.analysis import figures
from featinv_diffusion.analysis.encoders import NULL
from featinv_diffusion.analysis.encoders_summary import title_of

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
