"""The pictures at the head of pages whose tables they draw; a number is read from the page itself.

    python benchmarks/lead_pictures.py

Writes docs/figures/{encoders,full-scale,papers,parity,performance}.png.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from featinv_diffusion.figures.board import BLUE, GREEN, GREY, INK, ORANGE, write_figure
from featinv_diffusion.papers.items import STATES, TEXTS, list_items

PAGES, FIGURES = Path("docs"), Path("docs/figures")
NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e-?\d+)?")


def read_table(page: str, first_cell: str) -> list[list[str]]:
    """Returns the rows of the page's table whose head begins with this cell, as plain text.

    Raises:
        LookupError: the page has no such table.
    """
    lines = (PAGES / page).read_text("utf-8").splitlines()
    head = f"| {first_cell} |" if first_cell else "| |"
    for i, line in enumerate(lines):
        if line.startswith(head):
            rows = []
            for row in lines[i + 2 :]:
                if not row.startswith("|"):
                    break
                rows.append([re.sub(r"[`*]", "", c).strip() for c in row.strip("|").split("|")])
            return rows
    raise LookupError(f"{page} has no table that begins with {head}")


def number(cell: str) -> float:
    found = NUMBER.search(cell.replace(",", ""))
    if found is None:
        raise LookupError(f"{cell!r} holds no number.")
    return float(found.group())


def draw_bars(axes: Axes, names: Sequence[str], values: Sequence[float], xlabel: str) -> None:
    axes.barh(names, values, color=BLUE, height=0.6)
    axes.invert_yaxis()
    for y, value in enumerate(values):
        axes.text(value, y, f" {value:g}", va="center", fontsize=7, color=INK)
    axes.set_xlim(0, 1.15 * max(values))
    axes.set_xlabel(xlabel)


def draw_performance() -> Figure:
    training = read_table("performance.md", "side | images/s")
    start = read_table("performance.md", "fresh process | CPU s")
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    above, below = figure.subplots(2, 1)
    names = [row[0].partition(":")[0] for row in training]
    draw_bars(above, names, [number(row[1]) for row in training], "training: images/s")
    names = [row[0] for row in start]
    values = [number(row[1]) for row in start]
    draw_bars(below, names, values, "a fresh process: CPU s")
    return figure


def draw_parity() -> Figure:
    first = read_table("parity.md", "")
    second = read_table("parity.md", "module")
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    zero = 1e-8
    names = [row[0] for row in first if "tensors" not in row[1]] + [row[0] for row in second]
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    for column, colour, label in ((1, BLUE, "small"), (2, GREEN, "full size")):
        for row in first:
            if row[0] in names:
                cell = row[column] if column < len(row) else row[-1]
                axes.plot(max(number(cell), zero), names.index(row[0]), "o", color=colour, ms=4)
        axes.plot([], [], "o", color=colour, ms=4, label=label)
    for row in second:
        axes.plot(max(number(row[1]), zero), names.index(row[0]), "o", color=BLUE, ms=4)
    axes.set_xscale("log")
    axes.set_xlim(zero / 2, 1)
    axes.set_xticks([zero, 1e-6, 1e-4, 1e-2, 1], ["0", "1e-6", "1e-4", ".01", "1"])
    axes.xaxis.minorticks_off()
    axes.set_xlabel("largest absolute difference")
    axes.legend(frameon=False, fontsize=7)
    return figure


def draw_encoders() -> Figure:
    rows = read_table("encoders.md", "encoder")
    shapes = [[int(n) for n in re.findall(r"\d+", row[3])[:3]] for row in rows]
    figure = Figure(figsize=(6.4, 0.3 + 0.17 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    cells = [height * width for _, height, width in shapes]
    axes.barh([row[0] for row in rows], cells, color=BLUE, height=0.6)
    axes.invert_yaxis()
    for y, (n, (channels, _, _)) in enumerate(zip(cells, shapes, strict=True)):
        axes.text(n, y, f" {n:,} of {channels:,}", va="center", fontsize=7, color=INK)
    axes.set_xlim(0, 1.2 * max(cells))
    axes.set_xlabel("cells of the map")
    axes.margins(y=0.01)
    return figure


def draw_papers() -> Figure:
    figure = Figure(figsize=(6.4, 2.2), layout="constrained")
    axes = figure.add_subplot()
    texts = list(TEXTS)
    names = [title.partition(",")[0].partition(":")[0] for title in TEXTS.values()]
    before = [0] * len(texts)
    for state, colour in zip(STATES, (BLUE, ORANGE, GREY), strict=True):
        counts = Counter(item.text for item in list_items() if item.state == state)
        values = [counts[text] for text in texts]
        axes.barh(names, values, left=before, color=colour, height=0.6, label=state)
        for y, value in enumerate(values):
            if value:
                x = before[y] + value / 2
                axes.text(x, y, str(value), ha="center", va="center", fontsize=7, color="white")
        before = [a + b for a, b in zip(before, values, strict=True)]
    axes.invert_yaxis()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("figures, tables and claims")
    figure.legend(frameon=False, fontsize=7, loc="outside upper right", ncols=len(STATES))
    return figure


def draw_full_scale() -> Figure:
    rows = read_table("full-scale.md", "memory, batch 8, `run.mixed_precision=bf16`")
    figure = Figure(figsize=(6.4, 2.2), layout="constrained")
    names = [row[0].partition(":")[0].partition(" (")[0] for row in rows]
    values = [number(row[1]) for row in rows]
    draw_bars(figure.add_subplot(), names, values, "GiB, computed, before activations")
    return figure


def main() -> None:
    drawn = {
        "encoders": draw_encoders,
        "full-scale": draw_full_scale,
        "papers": draw_papers,
        "parity": draw_parity,
        "performance": draw_performance,
    }
    for name, draw in drawn.items():
        write_figure(draw(), FIGURES / f"{name}.png")


if __name__ == "__main__":
    with mpl.rc_context({"font.size": 8}):
        main()
