"""Measure the tiny family's reconstructors and operators; prints docs/reconstruction.md's tables.

    python benchmarks/reconstruction.py --data validation.parquet --fit TINY_IMAGENET_200

`--data` are images that nothing was trained or chosen on; operators are fitted on 1,024 images
drawn from the folder `--fit`. Every run is a command below outputs/reconstruction; one that is
finished is not repeated.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from pages import interval, run, table

from featinv_diffusion.evaluation.report import to_cell
from featinv_diffusion.images import builtin_photo, read_image, write_png

ROOT, FIGURES = Path("outputs/reconstruction"), Path("docs/figures")
CLASSES = "configs/tiny/classes.txt"
ENCODERS = ("siglip", "siglip2")
OPERATIONS = {
    "swap": (["swap"], ("orthogonal", "self-adjoint", "self-adjoint-direct", "linear")),
    "suppress": (["suppress", "--alpha", "0.9"], ("orthogonal", "linear")),
    "colourise": (["colourise"], ("orthogonal", "linear")),
}
"""Arguments of `--operation`, and the methods that are compared."""
COLUMNS = ("psnr", "ssim", "cosine")

Run = tuple[Path, list[str]]


def plan(data: str, fit: str, n_images: int) -> Iterator[Run]:
    """Yields (file that says that it is done, arguments of `featinv` without the output)."""
    unseen = ["--data", data, "--n-images", str(n_images)]
    for name in ENCODERS:
        nulls = ["--n-null-images", "300", "--evaluated-by", "tiny/convnext,tiny/resnet"]
        yield ROOT / name / "metrics.json", ["evaluate", "--inverter", name, *unseen, *nulls]
    scorers = ["--scorers", "tiny/convnext,tiny/swin", "--grey"]
    command = ["analyze", "encoders", "--inverter", ",".join(ENCODERS), *unseen, *scorers]
    yield ROOT / "encoders" / "metrics.json", command
    for encoder in ENCODERS:
        for key, (operation, methods) in OPERATIONS.items():
            for method in methods:
                yield from _operator_runs(encoder, key, operation, method, data, fit)


def _operator_runs(
    encoder: str, key: str, operation: Sequence[str], method: str, data: str, fit: str
) -> Iterator[Run]:
    file = ROOT / f"{encoder}-{key}-{method}.safetensors"
    source = ["--backbone", f"tiny/{encoder}", "--data", fit, "--classes", CLASSES]
    how = ["--method", method, "--n-images", "1024"]
    yield file, ["operator", "fit", *source, "--operation", *operation, *how]
    for name, pictures in ((file.stem, ["--data", data, "--n-images", "500"]), *_photos(file.stem)):
        analyze = ["operator", "analyze", "--operator", str(file), "--inverter", encoder]
        yield ROOT / name / "metrics.json", [*analyze, *pictures]


def _photos(stem: str) -> Iterator[tuple[str, list[str]]]:
    if stem.startswith(ENCODERS[-1] + "-"):
        yield f"{stem}-photos", ["--data", str(ROOT / "photos"), "--n-images", "4"]


def read(name: str) -> dict[str, Any]:
    return json.loads((ROOT / name / "metrics.json").read_text())


def reconstruction_table() -> str:
    rows = []
    for name in ENCODERS:
        metrics = read(name)
        other = metrics["cosine"]["nulls"]["other_image"]
        seen = metrics["evaluated_by"]["tiny/convnext"]["top5_match"]
        cells = [to_cell(metrics[column], column) for column in COLUMNS]
        rows.append([name, *cells, to_cell(other), to_cell(seen, "match")])
    return table("encoder|PSNR|SSIM|cosine|another image|top-5 of tiny/convnext", rows)


def better_shares() -> str:
    """Share of the images in which the second encoder is better, by measure."""
    frame = pd.read_parquet(ROOT / "encoders" / "per_image.parquet")
    names = ("psnr", "ssim", "delta_e_2000", "similarity_tiny/convnext", "similarity_tiny/swin")
    parts = []
    for name in names:
        first, second = (frame[f"tiny/{encoder}/{name}"] for encoder in ENCODERS)
        better = second < first if name == "delta_e_2000" else second > first
        parts.append(f"{name} {100 * better.mean():.0f} %")
    return f"{ENCODERS[1]} is better in: {', '.join(parts)}."


def spectrum_table(encoder: str) -> str:
    rows = []
    for key, (_, methods) in OPERATIONS.items():
        for method in methods:
            for found in read(f"{encoder}-{key}-{method}")["spectrum"]:
                moduli = found["modulus"]
                counts = [found["n_near_plus_one"], found["n_near_minus_one"]]
                rows.append(
                    [
                        f"{key}, {method}",
                        str(found["power"]),
                        *(str(n) for n in counts),
                        str(found["n_negative_real"]),
                        f"{moduli['min']:.3f} … {moduli['max']:.3f}",
                        f"{found['twice_from_identity']:.3f}",
                    ]
                )
    return table("operator|power|near +1|near −1|Re < 0|moduli|twice − identity", rows)


def operator_table(encoder: str) -> str:
    rows = []
    for key, (_, methods) in OPERATIONS.items():
        for method in methods:
            for power, held in read(f"{encoder}-{key}-{method}")["held_out"].items():
                values = [
                    held[f"delta_e_{role}"]["value"] for role in ("floor", "operator", "ceiling")
                ]
                rows.append(
                    [
                        f"{key}, {method}",
                        power,
                        interval(held["cosine"], 3),
                        interval(held["cosine_nothing"], 3),
                        *(f"{value:.2f}" for value in values),
                        interval(held["delta_e_position"], 2),
                    ]
                )
    header = "operator|power|cosine|doing nothing|ΔE floor|ΔE operator|ΔE nothing|position"
    return table(header, rows)


def write_photos(folder: Path) -> None:
    """Four crops of the package's two photos."""
    for path in (builtin_photo(), builtin_photo().with_name("china.jpg")):
        photo = read_image(path)
        side = photo.height // 2
        for i in range(2):
            x, y = (1 - i) * (photo.width - side), i * (photo.height - side)
            crop = photo.crop((x, y, x + side, y + side)).resize((64, 64))
            write_png(crop, folder / f"{path.stem}-{i}.png")


def copy_figures() -> None:
    """Those of the page, which show the package's photos or no picture."""
    encoder = ENCODERS[-1]
    for key, method in (("swap", "orthogonal"), ("suppress", "linear"), ("colourise", "linear")):
        run_of = ROOT / f"{encoder}-{key}-{method}"
        shutil.copy(f"{run_of}-photos/pictures.png", FIGURES / f"operator-{key}.png")
        if key != "colourise":
            shutil.copy(run_of / "eigenvalues.png", FIGURES / f"operator-{key}-spectrum.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--fit", required=True)
    parser.add_argument("--n-images", type=int, default=1000)
    arguments = parser.parse_args()
    write_photos(ROOT / "photos")
    for done, command in plan(arguments.data, arguments.fit, arguments.n_images):
        run(done, command)
    copy_figures()
    print("## Reconstruction\n\n" + reconstruction_table())
    print("\n## Encoders\n\n" + (ROOT / "encoders" / "metrics.md").read_text())
    print(better_shares())
    for encoder in ENCODERS:
        print(f"\n## Operators of {encoder}\n\n{spectrum_table(encoder)}")
        print("\n" + operator_table(encoder))


if __name__ == "__main__":
    main()
