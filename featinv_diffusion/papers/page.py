"""The list of all items as lines of a terminal, and as the page docs/papers.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from featinv_diffusion.papers.items import STATES, TEXTS, Item

HEAD = """\
# Every figure, table and claim of the five texts

![Bars: items of each text that are reproduced, are not, or need real weights](figures/papers.png)

How many items of each text are reproduced here, on the tiny family.

Written by `python benchmarks/papers.py --page` from `featinv paper list`; a test holds the two
together. Titles are our own words. `featinv paper NAME [--model …] [--data …]` runs an item and
writes our figure and table beside what is published, with a manifest, into one folder. Without
`--data` it takes crops of two photos, which show an item and measure nothing.

Where a row names a command of `featinv paper` as its source, it was measured by
`python benchmarks/papers.py --data validation.parquet --boxes TINY_IMAGENET_200` on images that
nothing was trained or chosen on; date, machine and number of images stand in the last column.
Other rows name the page that has their figures. Brackets are 95 % bootstrap intervals over images.
Whether a claim holds is decided by the figures, by a rule in the code of its study; what is
published without a number is put into one of our own first.

The bundled models are small (64 pixels, 100 classes), so that "not reproduced here" says nothing of
the published models. Of the follow-up on ViTs a summary was at hand, of the class embedding the
abstract, and of the appendices of FeatInv what the main text says of them.
"""
LABELS = {"reproduced here": "✓", "not reproduced here": "✗", "needs real weights": "weights"}


def to_lines(items: Sequence[Item]) -> str:
    """Returns a line for each item, and how many there are of each state."""
    width = max(len(item.name) for item in items)
    lines = []
    for text, title in TEXTS.items():
        lines.append(title)
        for item in items:
            if item.text == text:
                lines.append(f"  {item.name:<{width}}  {item.state:<19}  {item.title}")
    return "\n".join([*lines, summary(items)])


def summary(items: Sequence[Item]) -> str:
    """Returns how many items there are, by state."""
    counts = Counter(item.state for item in items)
    parts = ", ".join(f"{counts[state]} {state}" for state in STATES)
    return f"{len(items)} items: {parts}."


def to_markdown(items: Sequence[Item]) -> str:
    """Returns the page."""
    parts = [HEAD, summary(items) + "\n"]
    for text, title in TEXTS.items():
        parts.append(f"## {title}\n")
        parts += [_section(item) for item in items if item.text == text]
    return "\n".join(parts)


def _section(item: Item) -> str:
    """Returns an item as a short section; tables of five long columns cannot be read."""
    lines = [
        f"### {LABELS[item.state]} `{item.name}`: {item.title}\n",
        f"- **State**: {item.state} ({item.kind})",
        f"- **Command**: `{item.command}`" if item.command != "–" else "- **Command**: none",
        f"- **Published**: {item.published}",
        f"- **Ours**: {item.ours}" + (f" (from {_link(item.source)})" if item.source else ""),
        f"- **Verdict**: {item.verdict}",
    ]
    if item.weights:
        lines.append(f"- **With the real weights**: `{item.weights}`")
    return "\n".join(lines) + "\n"


def _link(source: str) -> str:
    name = source.removeprefix("docs/")
    return f"[{name}]({name})" if source.startswith("docs/") else source
