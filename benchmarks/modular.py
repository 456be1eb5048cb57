"""Measure the modular inverters of the tiny family; prints the tables of docs/modular-inverters.md.

    python benchmarks/modular.py --data validation.parquet --boxes TINY_IMAGENET_200 \\
        --tuned .checkpoints/tiny/detr-lambda-{1.0,0.9,0.5,0.1,0.0}/final/inverter

`--data` are images that nothing was trained or chosen on; `--boxes` is the folder of
Tiny-ImageNet-200, of which the last 10 training images of each class were held back; `--tuned` are
inverters that `configs/tiny/inverter-detr-tuned.yaml` made, one for each λ. Every run is a command
below outputs/modular; one whose figures are there is not repeated.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from pages import interval, run, table
from PIL import Image
from torch import Tensor

from featinv_diffusion.backbones import load_backbone
from featinv_diffusion.data.sets import open_images
from featinv_diffusion.evaluation.report import to_cell
from featinv_diffusion.images import builtin_photo, center_square, read_image, to_tensor, write_png
from featinv_diffusion.inverters.detr import DetrPath
from featinv_diffusion.inverters.modular import load_modular
from featinv_diffusion.inverters.vit import VitPath
from featinv_diffusion.metrics import (
    ClassifierFeatures,
    FeatureMoments,
    bootstrap_difference,
    bootstrap_statistic,
    frechet_distance,
    kernel_distance,
)
from featinv_diffusion.studies.stages import AVERAGE

ROOT, FIGURES = Path("outputs/modular"), Path("docs/figures")
WIDTH = 1400
"""Pixels of a figure on the page, at most."""
CLASSES = "configs/tiny/classes.txt"
FAMILIES = ("detr", "vit")
SCORER = "tiny/convnext"
"""Reads neither the features that are inverted nor those that the prior was chosen by."""
COLUMNS = ("psnr", "ssim", "cosine", "top5_match", "top1_match")
STAGE = "last"
"""What the diffusion inverter of the vit reads."""

Run = tuple[str, list[str]]


def plan(data: str, boxes: str, tuned: Sequence[str], n_images: int) -> Iterator[Run]:
    """Yields (name, arguments of `featinv`)."""
    held = ["--data", boxes, "--split", "train", "--classes", CLASSES]
    held += ["--held-back-per-class", "10", "--n-images", str(n_images)]
    unseen = ["--data", data, "--n-images", str(n_images)]
    photos = ["--data", str(ROOT / "photos"), "--n-images", "8"]
    for family in FAMILIES:
        for analysis in ("stages", "layers"):
            command = ["analyze", analysis, "--inverter", family]
            yield f"{analysis}-{family}", [*command, *unseen]
            yield f"{analysis}-{family}-photos", [*command, *photos]
        yield f"colour-{family}", ["analyze", "colour", "--inverter", family, *held]
    names = ",".join(["detr", *tuned])
    yield "tradeoff", ["analyze", "tradeoff", "--inverter", names, *held]
    common = [*unseen, "--n-null-images", "300", "--batch-size", "16", "--save-images"]
    common += ["--evaluated-by", "tiny/resnet,tiny/convnext,tiny/swin"]
    yield "vit-modular", ["evaluate", "--inverter", "vit", "--stage", STAGE, *common]
    yield "vit-diffusion", ["evaluate", "--pipeline", "tiny/vit", *common]


def read(name: str) -> dict[str, Any]:
    return json.loads((ROOT / name / "metrics.json").read_text())


def exactness(photos: Path) -> str:
    """Largest differences between the stages one after another and the model's own output."""
    rows = []
    for family in FAMILIES:
        path = load_modular(family).path
        end = "encoder" if isinstance(path, VitPath) else "prediction"  # what the model has too
        stages = path.main_stages[: path.main_stages.index(end) + 1]
        pictures = [read_image(p) for p in sorted(photos.glob("*.png"))]
        images = to_tensor([center_square(p, path.input_size[0]) for p in pictures])
        with torch.no_grad():
            pixels = path.preprocess(images)
            state: Any = pixels
            for stage in stages:
                state = path.advance(stage, state)[stage]
            output = _own_output(path, pixels)
            state = path.logits(state) if isinstance(path, VitPath) else state
        difference = float((state - output).abs().max())
        name = " → ".join([*stages, "logits"] if family == "vit" else stages)
        rows.append([family, name, f"{difference:.1e}"])
    return table("model|stages|max abs difference", rows)


def _own_output(path: Any, pixels: Tensor) -> Tensor:
    if isinstance(path, DetrPath):
        found = path.model(pixels)
        return torch.cat([found.logits, found.pred_boxes], -1)
    return path.model(pixels)


def stages_table(family: str) -> str:
    metrics = read(f"stages-{family}")
    rows = [[name, interval(value, 4)] for name, value in metrics["stage_mse"].items()]
    lines = table("from|MSE", rows)
    if patches := metrics.get("patch_embedding"):
        lines += (
            f"\n\nAnalytic inverse of the patch embedding in float64: largest error of a pixel "
            f"{patches['max_error']:.1e}, condition number {patches['condition_number']:.0f}."
        )
    return lines


def layers_table(family: str) -> str:
    """States by the inverse through which they go."""
    metrics = read(f"layers-{family}")["layer_mse"]
    states = dict.fromkeys(name for found in metrics.values() for name in found if name != AVERAGE)
    rows = [
        [name, *(f"{f[name]['value']:.3f}" if name in f else "" for f in metrics.values())]
        for name in [*states, AVERAGE]
    ]
    return table("|".join(["state", *(f"{stage}⁻¹" for stage in metrics)]), rows)


def colour_table(family: str) -> str:
    metrics = read(f"colour-{family}")
    rows = [[name, interval(value, 5)] for name, value in metrics["pairwise_mse"].items()]
    text = table("version of|pairwise MSE", rows)
    if detection := metrics.get("detection"):
        names = list(next(iter(detection.values())))
        cells = [[key, *(f"{v[name]:.3f}" for name in names)] for key, v in detection.items()]
        text += "\n\n" + table("|".join(["filter", *names]), cells)
    return text


def tradeoff_table() -> str:
    rows = read("tradeoff")["tradeoff"]
    names = [name for name in rows[0] if name not in ("weight", "mse")]
    cells = [
        [
            "isolated" if row["weight"] is None else f"{row['weight']:g}",
            interval(row["mse"], 4),
            *(f"{row[name]:.3f}" for name in names),
        ]
        for row in rows
    ]
    return table("|".join(["λ", "MSE", *names]), cells)


def comparison_table(data: str) -> str:
    """Deterministic against diffusion on the same features of the same images."""
    runs = ("vit-modular", "vit-diffusion")
    frames = [pd.read_parquet(ROOT / r / "per_image.parquet").set_index("id") for r in runs]
    frames = [frame.sort_index() for frame in frames]
    assert list(frames[0].index) == list(frames[1].index)
    metrics = [read(name) for name in runs]
    rows = []
    for name in COLUMNS:
        values = [frame[name].to_numpy(float) for frame in frames]
        gap = bootstrap_difference(values[1], values[0])
        cells = [to_cell(m[name], name) for m in metrics]
        difference = {"value": gap.value, "low": gap.low, "high": gap.high}
        rows.append([name.replace("_", " "), *cells, to_cell(difference, name)])
    for other in metrics[0]["evaluated_by"]:
        cells = [to_cell(m["evaluated_by"][other]["top5_match"], "match") for m in metrics]
        rows.append([f"top5 match, seen by {other}", *cells, ""])
    originals = _originals(data, list(frames[0].index))
    made = [_pictures(ROOT / name / "images", list(frames[0].index)) for name in runs]
    rows += _perception_rows(originals, made)
    return table("|deterministic|diffusion|difference", rows)


def _perception_rows(originals: Tensor, made: Sequence[Tensor]) -> list[list[str]]:
    """Energy of edges by the originals', and distances of distributions in the eyes of `SCORER`."""
    sharp = [_edges(images) for images in made]
    energies = [
        bootstrap_statistic({"a": x, "b": _edges(originals)}, lambda m: m["a"] / m["b"])
        for x in sharp
    ]
    vectors = [_describe(images) for images in made]
    real = _describe(originals)
    distances = [frechet_distance(_moments(x), _moments(real)).value for x in vectors]
    kernels = [kernel_distance(x, real, subset_size=len(real) // 2) for x in vectors]
    return [
        ["edge energy by the originals'", *(interval(asdict(e), 2) for e in energies), ""],
        [f"Fréchet distance, {SCORER}", *(f"{d:.1f}" for d in distances), ""],
        [f"kernel distance, {SCORER}", *(f"{k.mean:.3f} ± {k.std:.3f}" for k in kernels), ""],
    ]


def _originals(data: str, ids: Sequence[str]) -> Tensor:
    images = open_images(data, "validation", None)
    rows = {name: i for i, name in enumerate(images.ids)}
    return to_tensor([center_square(images.read(rows[name]), 64) for name in ids])


def _pictures(folder: Path, ids: Sequence[str]) -> Tensor:
    return to_tensor([read_image(folder / f"{name.replace(':', '-')}.png") for name in ids])


def _describe(images: Tensor) -> Tensor:
    extractor = ClassifierFeatures(load_backbone(SCORER))
    return torch.cat([extractor(batch) for batch in images.split(100)])


def _moments(vectors: Tensor) -> FeatureMoments:
    moments = FeatureMoments(vectors.shape[1])
    moments.update(vectors)
    return moments


def _edges(images: Tensor) -> Tensor:
    """Mean squared difference between neighbouring pixels of each image."""
    across, down = images.diff(dim=-1).square(), images.diff(dim=-2).square()
    return across.mean((1, 2, 3)) + down.mean((1, 2, 3))


def write_photos(folder: Path) -> None:
    """Eight crops of the package's two photos."""
    for path in (builtin_photo(), builtin_photo().with_name("china.jpg")):
        photo = read_image(path)
        side = photo.height // 2
        for i in range(4):
            x, y = i * (photo.width - side) // 3, (i % 2) * (photo.height - side)
            crop = photo.crop((x, y, x + side, y + side)).resize((64, 64))
            write_png(crop, folder / f"{path.stem}-{i}.png")


def copy_figures() -> None:
    """Those of the page, which show the package's photos or no picture."""
    for family in FAMILIES:
        stages, layers = ROOT / f"stages-{family}-photos", ROOT / f"layers-{family}-photos"
        _copy(stages / "stages.png", FIGURES / f"{family}-stages.png")
        _copy(layers / "layers-encoder.png", FIGURES / f"{family}-layers.png")
    _copy(ROOT / "tradeoff" / "tradeoff.png", FIGURES / "detr-tradeoff.png")


def _copy(source: Path, target: Path) -> None:
    with Image.open(source) as figure:
        figure.thumbnail((WIDTH, 4 * WIDTH))
        write_png(figure.convert("RGB"), target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--boxes", required=True)
    parser.add_argument("--tuned", nargs="+", required=True)
    parser.add_argument("--n-images", type=int, default=1000)
    arguments = parser.parse_args()
    write_photos(ROOT / "photos")
    for name, command in plan(arguments.data, arguments.boxes, arguments.tuned, arguments.n_images):
        run(ROOT / name / "metrics.json", command)
    copy_figures()
    print("## Stages\n\n" + exactness(ROOT / "photos"))
    for family in FAMILIES:
        print(f"\n## {family}\n\n{stages_table(family)}\n\n{colour_table(family)}")
        print("\n" + layers_table(family))
    print(f"\n## λ\n\n{tradeoff_table()}")
    print(f"\n## Deterministic and diffusion\n\n{comparison_table(arguments.data)}")


if __name__ == "__main__":
    main()
