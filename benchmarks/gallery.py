"""Run every command that draws on the package's own photos and write docs/gallery.md.

    python benchmarks/gallery.py

Below each figure stands the command that made it, and what it printed.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pages import crops
from PIL import Image

from featinv_diffusion.images import builtin_photo, read_image, write_png

ROOT = Path("outputs/gallery")
PAGE, FIGURES = Path("docs/gallery.md"), Path("docs/figures")
WIDTH = 1200
"""Pixels of a figure on the page, at most."""


@dataclass(frozen=True)
class Entry:
    """One figure of the gallery.

    Args:
        title: heading.
        text: what is shown.
        see: what a reader should see.
        command: its arguments after `featinv`.
        figure: what it draws, below `ROOT`.
    """

    title: str
    text: str
    see: str
    command: list[str]
    figure: str


def entries() -> Iterator[Entry]:
    yield Entry(
        "Reconstructions",
        "One photo, its feature map of 8×8 cells, four images that have about this map.",
        "Layout, colours and large shapes return in every sample; leaves, windows and other fine "
        "detail differ, since the map does not hold them.",
        ["sample", "photos", "--n-samples", "4", "--output", "sample"],
        "sample/grid.png",
    )
    yield Entry(
        "Interpolation",
        "Weighted sums of two maps, all with the same noise.",
        "The outer columns are the two photos. Half-way neither is seen well, the cosine to the "
        "mixed map is lowest, and a mark says where no photo has such a map.",
        ["interpolate", "photos/flower.jpg", "photos/china.jpg", "--output", "interpolate"],
        "interpolate/figure.png",
    )
    yield Entry(
        "Composition",
        "Cells of one map pasted into another: a region of the map is a region of the image.",
        "The lower row of numbers: far more changes inside the outlined half than outside of it.",
        [
            *["compose", "photos/china.jpg", "photos/flower.jpg", "--box", "0,.5,1,1"],
            *["--output", "compose"],
        ],
        "compose/figure.png",
    )
    yield Entry(
        "Variability",
        "What one map fixes, and what it leaves to the prior.",
        "The mean of all samples is still sharp at large edges; the map of deviations is bright "
        "along fine texture.",
        ["variability", "photos/flower.jpg", "--n-samples", "32", "--output", "variability"],
        "variability/figure.png",
    )
    yield Entry(
        "Concepts",
        "Subspaces of the cells of 64 crops of the two photos, by multi-dimensional concept "
        "discovery, and where they are active. With a folder of images of one class they are the "
        "concepts of that class.",
        "Each pair of rows is one concept: the outlines lie on similar things in all its pictures. "
        "One threshold outlines them all, so that a picture without the concept has no outline.",
        ["concepts", "crops", "--n-concepts", "3", "--output", "concepts/concepts.safetensors"],
        "concepts/concepts.png",
    )
    yield Entry(
        "FeatInv-Viz",
        "What the samples show when the concept with the most energy in the picture fades from the "
        "map, beside equally long parts in random subspaces of natural maps.",
        "In the row of measures the black dot of the concept against the grey ones of the nulls: "
        "only where it lies beyond all of them the samples show this concept rather than any. "
        "Beside the map as published, which always lights up somewhere, the last picture marks "
        "what moves more than with each null, or nothing.",
        [
            *["viz", "photos/flower.jpg", "--concepts", "concepts/concepts.safetensors"],
            *["--factor", "0.25", "--output", "viz"],
        ],
        "viz/figure.png",
    )
    yield Entry(
        "Class embedding",
        "What the tokens of the ViT say of the class, block by block, read without inversion, and "
        "which patches it rests on.",
        "Identifiability rises with depth. Relevance is red where attention speaks for the class, "
        "blue where against it, and white for most patches.",
        ["classemb", "crops/flower-02.png", "--output", "classemb"],
        "classemb/00-flower-02.png",
    )
    yield Entry(
        "Deterministic inversion",
        "The reconstructor of a small SigLIP 2: one picture for a map, without noise.",
        "One picture that is blurred where a probabilistic inverter would invent detail.",
        ["sample", "photos", "crops/flower-02.png", "--inverter", "siglip2", "--output", "siglip2"],
        "siglip2/grid.png",
    )
    yield Entry(
        "Operators in feature space",
        "A rotation of the feature vectors, the same for all cells, that swaps red and blue; "
        "applied twice it nearly brings them back.",
        "Q turns the red flower blue and leaves shapes alone; Q to the 2 is near the first column.",
        [
            *["operator", "apply", "photos", "crops/flower-02.png", "--power", "0,1,2"],
            *["--operator", "tiny/siglip2/swap", "--inverter", "siglip2", "--output", "swap"],
        ],
        "swap/grid.png",
    )


def write_photos() -> None:
    """Puts the package's photos, and crops of them, below `ROOT`."""
    for path in (builtin_photo(), builtin_photo().with_name("china.jpg")):
        photo = read_image(path)
        _write(photo, ROOT / "photos" / path.name)
    for name, crop in crops(8, 4):
        write_png(crop, ROOT / "crops" / f"{name}.png")


def _write(photo: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    photo.save(path, quality=95)


def run(entry: Entry) -> str:
    """Runs a command in `ROOT`, copies its figure and returns its section of the page."""
    command = [sys.executable, "-m", "featinv_diffusion", *entry.command]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"featinv {shlex.join(entry.command)} failed:\n{done.stderr}")
    name = f"gallery-{Path(entry.figure).parent.name}.png"
    with Image.open(ROOT / entry.figure) as figure:
        figure.thumbnail((WIDTH, 4 * WIDTH))
        write_png(figure.convert("RGB"), FIGURES / name)
    return (
        f"## {entry.title}\n\n{entry.text} What to see: {entry.see}\n\n"
        f"![{entry.title}](figures/{name})\n\n"
        f"```console\n$ featinv {shlex.join(entry.command)}\n{done.stdout.strip()}\n```"
    )


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    (ROOT / "crops").mkdir(parents=True, exist_ok=True)
    write_photos()
    sections = [run(entry) for entry in entries()]
    head = (
        "# Gallery\n\nEverything here is made by `python benchmarks/gallery.py` with the bundled "
        "tiny family at 64 pixels, from the two photos that scikit-learn ships (danielbuechele and "
        "vultilion, CC BY 2.0). Neither shows one of the 100 classes that the tiny classifiers "
        "know, so that a class named here is only what a classifier answers; measures on pictures "
        "of known classes are in [applications.md](applications.md)."
    )
    tail = (
        "## Does it come back?\n\nA direction that fires on fish need not make fish. `featinv "
        "steerability` sets each latent high in many pictures, decodes, encodes again, and counts "
        "what arrived, beside random directions: [your own SAE](dictionaries.md#steerability)."
    )
    PAGE.write_text("\n\n".join([head, *sections, tail]) + "\n")
    print(f"Wrote {PAGE}")


if __name__ == "__main__":
    main()
