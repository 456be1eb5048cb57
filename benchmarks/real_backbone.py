"""Figures and picture of the member for EfficientNet-Lite0, for docs/real-backbone.md.

    OMP_NUM_THREADS=1 python benchmarks/real_backbone.py --data validation.parquet --photos PHOTOS

`--data` and `--photos` are pictures that nothing was trained or chosen on; what is done is not done
again. The picture shows scikit-learn's two photos.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from pages import interval, run, table

from featinv_diffusion.images import builtin_photo

PIPELINE = "tiny/efficientnet-lite0"
FIGURE = Path("docs/figures/real-backbone.png")
MEASURES = (("cosine", 3), ("centred_cosine", 3), ("top1_match", 3), ("top5_match", 3), ("psnr", 2))
SECOND = "tiny/convnext"


def evaluate(output: Path, data: str, n_images: int | None) -> dict[str, Any]:
    arguments = ["evaluate", "--pipeline", PIPELINE, "--data", data, "--evaluated-by", SECOND]
    arguments += ["--n-null-images", "100" if n_images else "24"]
    if n_images:
        arguments += ["--n-images", str(n_images)]
    run(output / "metrics.json", arguments)
    return json.loads((output / "metrics.json").read_text())


def rows_of(metrics: dict[str, Any]) -> list[list[str]]:
    """Returns a row for each measure, then what the second eye sees."""
    ceilings = metrics["ceilings"]["vae_round_trip"]
    rows = []
    for name, digits in MEASURES:
        own = metrics[name]
        nulls = [interval(own["nulls"][null], digits) for null in ("other_image", "permuted_cells")]
        rows.append([name, interval(own, digits), *nulls, interval(ceilings[name], digits)])
    seen = metrics["evaluated_by"][SECOND]
    for name in ("cosine", "top5_match"):
        own = seen[name]
        nulls = [interval(own["nulls"][null], 3) for null in ("other_image", "permuted_cells")]
        rows.append([f"{name}, seen by {SECOND}", interval(own, 3), *nulls, "–"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--photos", required=True)
    parser.add_argument("--n-images", type=int, default=1000)
    parser.add_argument("--output", type=Path, default=Path("outputs/real-backbone"))
    options = parser.parse_args()
    for name, data, n in (
        ("validation", options.data, options.n_images),
        ("photos", options.photos, None),
    ):
        metrics = evaluate(options.output / name, data, n)
        print(f"\n{metrics['n_images']} images: {name}\n")
        head = "measure|samples|another image|cells permuted|autoencoder"
        print(table(head, rows_of(metrics)), flush=True)
    sampled = options.output / "sample"
    photos = [str(builtin_photo(name)) for name in ("flower.jpg", "china.jpg")]
    command = [sys.executable, "-m", "featinv_diffusion", "sample", *photos]
    if not sampled.exists():
        subprocess.run([*command, "--pipeline", PIPELINE, "-o", str(sampled)], check=True)
    shutil.copy(sampled / "grid.png", FIGURE)


if __name__ == "__main__":
    main()
