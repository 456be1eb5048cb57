"""Measure the items of the papers, keep them in the package, and write docs/papers.md.

    python benchmarks/papers.py --data validation.parquet --boxes TINY_IMAGENET_200 \\
        --machine '2-core AMD EPYC, AVX2'

`--data` are images that nothing was trained or chosen on; `--boxes` is the folder of
Tiny-ImageNet-200, of which the last 10 training images of each class were held back. Every study is
what `featinv paper NAME` runs, and leaves its folder below outputs/papers. `--only STUDY …` takes
some of them, `--page` writes the page from what was measured before.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
import traceback
from datetime import date
from pathlib import Path
from typing import Any

from featinv_diffusion.papers import items as kept
from featinv_diffusion.papers.items import MEASURED, Item, list_items
from featinv_diffusion.papers.page import to_markdown
from featinv_diffusion.papers.run import STUDIES, run_item
from featinv_diffusion.papers.settings import PaperSettings
from featinv_diffusion.settings import from_flat

ROOT, PAGE = Path("outputs/papers"), Path("docs/papers.md")
CLASSES = "configs/tiny/classes.txt"
BOXED = ("stages", "recolouring", "prototypes", "grey", "shape", "other domains")
"""Studies that need boxes, or classes that nothing was trained on."""
N_IMAGES = {
    "reconstruction": 200,
    "settings": 32,
    "other domains": 60,
    "mixtures": 100,
    "spread": 24,
    "concepts": 60,
    "warm start": 504,
    "tokens": 150,
    "probes": 1000,
    "token models": 500,
    "stages": 500,
    "recolouring": 200,
    "prototypes": 500,
    "grey": 500,
    "layers": 200,
    "shape": 300,
    "spatial": 300,
    "families": 200,
    "cost": 120,
    "swap": 600,
    "suppression": 400,
    "colourisation": 600,
    "channels": 200,
    "conditions": 400,
    "time": 4,
    "encoders": 200,
    "readout": 400,
}
"""Images of each study; the studies that are left out here need weights that are not bundled."""


def first_item(study: str) -> Item:
    """Returns an item that the study speaks of."""
    return next(item for item in list_items() if item.study == study)


def settings_of(study: str, data: str, boxes: str, n_images: int | None) -> dict[str, Any]:
    """Returns the settings of a study, as `featinv paper` takes them."""
    given: dict[str, Any] = {"data": data}
    if study in BOXED:
        given = {"data": boxes, "split": "train", "classes": CLASSES, "held_back_per_class": 10}
    return {**given, "n_images": n_images or N_IMAGES[study]}


def command_of(item: Item, given: dict[str, Any]) -> str:
    """Returns the command that does the same, with the places of the data left open."""
    shown = {**given, "data": "TINY_IMAGENET_200" if "classes" in given else "validation.parquet"}
    options = [f"--{k.replace('_', '-')} {shlex.quote(str(v))}" for k, v in shown.items()]
    return " ".join(["featinv paper", item.name, *options])


def record(study: str, found: Any, given: dict[str, Any], when: str) -> None:
    """Adds what a study says of each item to the package's record."""
    content = json.loads(MEASURED.read_text("utf-8")) if MEASURED.is_file() else {}
    names = {item.name: item for item in list_items() if item.study == study}
    for name, answer in found.answers.items():
        if name in names:
            content[name] = {
                "ours": answer.ours,
                "holds": bool(answer.holds),
                "n_images": len(found.ids),
                "command": command_of(names[name], given),
                "when": when,
            }
    ordered = {item.name: content[item.name] for item in list_items() if item.name in content}
    MEASURED.write_text(json.dumps(ordered, indent=2, ensure_ascii=False) + "\n", "utf-8")


def write_page() -> None:
    """Writes the page from what the package holds."""
    kept.list_items.cache_clear()
    PAGE.write_text(to_markdown(list_items()), "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data")
    parser.add_argument("--boxes")
    parser.add_argument("--machine", default="")
    parser.add_argument("--n-images", type=int)
    parser.add_argument("--only", nargs="+", choices=[*N_IMAGES], default=[*N_IMAGES])
    parser.add_argument("--page", action="store_true")
    arguments = parser.parse_args()
    failed = []
    for study in [] if arguments.page else arguments.only:
        begin = time.perf_counter()
        given = settings_of(study, arguments.data, arguments.boxes, arguments.n_images)
        item, folder = first_item(study), ROOT / study.replace(" ", "-")
        try:
            settings = from_flat(PaperSettings, given)
            found, _ = run_item(item, settings, folder, command_of(item, given))
        except Exception:  # the other studies go on; the exit code tells
            failed.append(study)
            traceback.print_exc()
            continue
        record(study, found, given, f"{date.today().isoformat()}, {arguments.machine}")
        print(f"{study}: {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
    write_page()
    if failed:
        sys.exit(f"Error: these studies failed: {', '.join(failed)}.")


if __name__ == "__main__":
    assert set(N_IMAGES) <= set(STUDIES)
    main()
