"""Measure the modular inverters of the tiny family; prints the tables of docs/modular-inverters.md.

    python benchmarks/modular.py --data validation.parquet --boxes TINY_IMAGENET_200 \\
        --tuned .checkpoints/tiny/detr-lambda-0/final/inverter …

`--data` are images that nothing was trained or chosen on; `--boxes` is the folder of
Tiny-ImageNet-200, of which the last 10 training images of each class were held back; `--tuned` are
inverters that `configs/tiny/inverter-detr-tuned.yaml` made, one for each λ. Every run is a command
below outputs/modular; one whose figures are there is not repeated.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from featinv_diffusion.backbones import load_backbone
from featinv_diffusion.evaluation.dataset import open_images
from featinv_diffusion.evaluation.report import to_cell
from featinv_diffusion.images import builtin_photo, center_square, read_image, to_tensor, write_png
from featinv_diffusion.inverters.detr_path import DetrPath
from featinv_diffusion.inverters.modular import load_modular
from featinv_diffusion.inverters.vit_path import VitPath
from featinv_diffusion.metrics import ClassifierFeatures, FeatureMoments, frechet_distance
from featinv_diffusion.metrics.statistics import bootstrap_difference

ROOT, FIGURES = Path("outputs/modular"), Path("docs/figures")
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


def run(name: str, arguments: Sequence[str]) -> None:
    output = ROOT / name
    if (output / "metrics.json").exists():
        return
    command = [*arguments, "--output", str(output)]
    print("+ featinv", shlex.join(command), file=sys.stderr)
    subprocess.run([sys.executable, "-m", "featinv_diffusion", *command], check=True)


def read(name: str) -> dict[str, Any]:
    return json.loads((ROOT / name / "metrics.json").read_text())


def table(header: str, rows: Sequence[Sequence[str]]) -> str:
    names = header.split("|")
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def interval(figure: Mapping[str, float], digits: int = 4) -> str:
    value, low, high = (f"{figure[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def exactness(photos: Path) -> str:
    """Largest differences between the stages one after another and the model's own output."""
    rows = []
    for family in FAMILIES:
        path = load_modular(family).path
        stages = [stage for stage in path.main_stages if stage != "detection"]  # ours, not its own
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
        rows.append([family, " → ".join(stages), f"{difference:.1e}"])
    return table("model|stages|max abs difference", rows)


def _own_output(path: Any, pixels: torch.Tensor) -> torch.Tensor:
    if isinstance(path, DetrPath):
        found = path.model(pixels)
        return torch.cat([found.logits, found.pred_boxes], -1)
    return path.model(pixels)


def stages_table(family: str) -> str:
    metrics = read(f"stages-{family}")
    rows = [[name, interval(value)] for name, value in metrics["stage_mse"].items()]
    lines = table("from|MSE", rows)
    if patches := metrics.get("patch_embedding"):
        lines += (
            f"\n\nAnalytic inverse of the patch embedding in float64: largest error of a pixel "
            f"{patches['max_error']:.1e}, condition number {patches['condition_number']:.0f}."
        )
    return lines


def layers_table(family: str) -> str:
    rows = [
        [stage, name, interval(value)]
        for stage, states in read(f"layers-{family}")["layer_mse"].items()
        for name, value in states.items()
    ]
    return table("inverse of|state|MSE", rows)


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
            interval(row["mse"]),
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
    originals = _moments(_originals(data, frames[0]))
    cells = [f"{_distance(originals, ROOT / name, frames[0]):.2f}" for name in runs]
    rows.append([f"Fréchet distance, {SCORER}", *cells, ""])
    return table("|deterministic|diffusion|difference", rows)


def _distance(originals: FeatureMoments, folder: Path, frame: pd.DataFrame) -> float:
    files = {path.stem: path for path in (folder / "images").glob("*.png")}
    pictures = [read_image(path) for _, path in sorted(files.items())]
    assert len(pictures) == len(frame)
    return float(frechet_distance(_moments(to_tensor(pictures)), originals).value)


def _originals(data: str, frame: pd.DataFrame) -> torch.Tensor:
    images = open_images(data, "validation", None)
    wanted = set(frame.index)
    rows = [i for i, name in enumerate(images.ids) if name in wanted]
    return to_tensor([center_square(images.read(i), 64) for i in rows])


def _moments(images: torch.Tensor) -> FeatureMoments:
    extractor = ClassifierFeatures(load_backbone(SCORER))
    moments = FeatureMoments(extractor.dim)
    for batch in images.split(100):
        moments.update(extractor(batch))
    return moments


def sharpness(data: str) -> str:
    """Share of the originals' energy of differences between neighbouring pixels."""
    frame = pd.read_parquet(ROOT / "vit-modular" / "per_image.parquet").set_index("id")
    energies = {"originals": _energy(_originals(data, frame))}
    for name in ("vit-modular", "vit-diffusion"):
        files = sorted((ROOT / name / "images").glob("*.png"))
        energies[name] = _energy(to_tensor([read_image(path) for path in files]))
    base = energies.pop("originals")
    return ", ".join(f"{name} {100 * value / base:.0f} %" for name, value in energies.items())


def _energy(images: torch.Tensor) -> float:
    across, down = images.diff(dim=-1), images.diff(dim=-2)
    return float(np.mean([across.square().mean().item(), down.square().mean().item()]))


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
    for family in FAMILIES:
        for name, figure in (
            (f"stages-{family}", "stage_mse"),
            (f"stages-{family}-photos", "stages"),
            (f"colour-{family}", "pairwise_mse"),
        ):
            shutil.copy(ROOT / name / f"{figure}.png", FIGURES / f"{family}-{figure}.png")
        for path in (ROOT / f"layers-{family}-photos").glob("layers-*.png"):
            shutil.copy(path, FIGURES / f"{family}-{path.name}")
    shutil.copy(ROOT / "tradeoff" / "tradeoff.png", FIGURES / "detr-tradeoff.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--boxes", required=True)
    parser.add_argument("--tuned", nargs="+", required=True)
    parser.add_argument("--n-images", type=int, default=1000)
    arguments = parser.parse_args()
    write_photos(ROOT / "photos")
    for name, command in plan(arguments.data, arguments.boxes, arguments.tuned, arguments.n_images):
        run(name, command)
    copy_figures()
    print("## Stages\n\n" + exactness(ROOT / "photos"))
    for family in FAMILIES:
        print(f"\n## {family}\n\n{stages_table(family)}\n\n{colour_table(family)}")
        print("\n" + layers_table(family))
    print(f"\n## λ\n\n{tradeoff_table()}")
    print(f"\n## Deterministic and diffusion\n\n{comparison_table(arguments.data)}")
    print(f"\nEnergy of edges: {sharpness(arguments.data)}")


if __name__ == "__main__":
    main()
