"""Measure the tiny family and write docs/tiny-results.md with its pictures.

    python benchmarks/tiny_results.py --data tiny-imagenet-val.parquet --machine 'two-core AMD EPYC'

`--data` is anything that `featinv evaluate` reads. Every row is one run of that command below
outputs/tiny-results, resumable: shards that are finished are not sampled again. `--only TABLE …`
takes some of the tables, `--write-only` writes the page from the runs that exist.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from PIL import Image
from torch.nn import functional as F

from featinv_diffusion.backbones import list_backbones
from featinv_diffusion.data.selection import select_items
from featinv_diffusion.data.sets import open_images
from featinv_diffusion.diffusion.folders import list_bundled, load_bundled
from featinv_diffusion.evaluation.evaluator import NULLS
from featinv_diffusion.evaluation.report import to_cell
from featinv_diffusion.evaluation.settings import EvaluationSettings
from featinv_diffusion.figures.grid import GridRow, make_grid
from featinv_diffusion.images import builtin_photo, center_square, read_image, to_tensor, write_png
from featinv_diffusion.inverters.open import open_inverter
from featinv_diffusion.metrics import feature_cosine, top_k_match
from featinv_diffusion.metrics.statistics import bootstrap_difference
from featinv_diffusion.seeds import make_generator
from featinv_diffusion.settings import SampleSettings

ROOT = Path("outputs/tiny-results")
PAGE, FIGURES = Path("docs/tiny-results.md"), Path("docs/figures")
MEMBERS = ("convnext", "convnext-pooled", "resnet", "swin", "convnext-stages.1", "vit")
BACKBONES = ("resnet", "convnext", "swin", "vit")
SAMPLERS = (
    ("ddim", 50),
    ("ddim", 20),
    ("dpmsolver++", 20),
    ("dpmsolver++", 10),
    ("unipc", 20),
    ("unipc", 10),
)
GUIDANCE = (
    ("features", 1.0),
    ("features", 1.5),
    ("features", 2.0),
    ("features", 3.0),
    ("text", 1.75),
    ("text", 3.0),
)
STRENGTHS = (0.5, 0.75, 1.0, 1.25)
DEFAULT = "default"
SHIPPED = (("dpmsolver++", 10), ("features", 3.0), 1.0)
"""Sampler, guidance and strength of the run `DEFAULT`, a row of each curve."""
N_CURVE = 300
N_FEWER, MEASURED_ON_FEWER = 1000, ("convnext-stages.1", "vit")
TABLES = ("members", "samplers", "guidance", "strength")


def plan(data: str, n_images: int, tables: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yields (name of the run, arguments of `featinv evaluate`)."""
    curve = ["--pipeline", "tiny/convnext", "--n-images", str(N_CURVE), "--n-null-images", "0"]
    common = ["--data", data, "--batch-size", "16"]
    backbones = [f"tiny/{name}" for name in BACKBONES if f"tiny/{name}" in list_backbones()]
    for member in MEMBERS if "members" in tables else ():
        if f"tiny/{member}" in list_bundled():
            own = f"tiny/{member.partition('-')[0]}"
            others = ",".join(name for name in backbones if name != own)
            n = min(n_images, N_FEWER) if member in MEASURED_ON_FEWER else n_images
            size = ["--n-images", str(n), "--n-null-images", "300"]
            yield (
                member,
                [*common, "--pipeline", f"tiny/{member}", *size, "--evaluated-by", others],
            )
    curves: dict[str, list[str]] = {}
    for name, steps in SAMPLERS if "samplers" in tables else ():
        curves[sampler_run(name, steps)] = ["--scheduler", name, "--steps", str(steps)]
    for name, scale in GUIDANCE if "guidance" in tables else ():
        curves[guidance_run(name, scale)] = ["--guidance", name, "--guidance-scale", str(scale)]
    for strength in STRENGTHS if "strength" in tables else ():
        curves[strength_run(strength)] = ["--strength", str(strength)]
    for name, options in curves.items():
        yield name, [*common, *curve, *([] if name == DEFAULT else options)]


def sampler_run(name: str, steps: int) -> str:
    return DEFAULT if (name, steps) == SHIPPED[0] else f"sampler-{name}-{steps}"


def guidance_run(name: str, scale: float) -> str:
    return DEFAULT if (name, scale) == SHIPPED[1] else f"guidance-{name}-{scale}"


def strength_run(strength: float) -> str:
    return DEFAULT if strength == SHIPPED[2] else f"strength-{strength}"


def measure(name: str, arguments: Sequence[str], processes: int) -> None:
    output = ROOT / name  # a run of other weights, images or settings is refused there
    command = ["-m", "featinv_diffusion", "evaluate", *arguments, "--output", str(output)]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [*launcher, *command]
    subprocess.run([sys.executable, *command], check=True)


def read(name: str) -> dict[str, Any] | None:
    path = ROOT / name / "metrics.json"
    return json.loads(path.read_text()) if path.exists() else None


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def members_table() -> str:
    rows = []
    for member in MEMBERS:
        if m := read(member):
            ceiling = m["ceilings"]["vae_round_trip"]
            rows.append(
                [
                    f"{member} ({m['settings']['layer']})",
                    str(m["n_images"]),
                    to_cell(m["cosine"]),
                    to_cell(ceiling["cosine"]),
                    to_cell(m["normalised_agreement"]),
                    to_cell(m["top5_match"], "match"),
                    to_cell(m["top1_match"], "match"),
                    to_cell(m["psnr"], "psnr"),
                    to_cell(m["label_accuracy"]["original"], "match"),
                ]
            )
    header = "features of|images|cosine|its ceiling|normalised|top-5|top-1|PSNR|classifier"
    return table(header.split("|"), rows)


def nulls_table() -> str:
    rows = []
    for member in MEMBERS:
        if m := read(member):
            for metric in ("cosine", "top5_match", "top1_match"):
                nulls = [to_cell(m[metric]["nulls"][null], metric) for null in NULLS]
                rows.append([member, metric.replace("_", " "), to_cell(m[metric], metric), *nulls])
    names = [null.replace("_", " ") for null in NULLS]
    return table(["features of", "", "reconstruction", *names], rows)


def ceilings_table() -> str:
    rows = []
    for member in MEMBERS:
        if m := read(member):
            c = m["ceilings"]["vae_round_trip"]
            metrics = ("cosine", "top5_match", "top1_match", "psnr")
            rows.append([member, *(to_cell(c[metric], metric) for metric in metrics)])
    return table(["features of", "cosine", "top-5", "top-1", "PSNR"], rows)


def patch_pca_psnr(data: str, n_images: int, factor: int, channels: int) -> float:
    """Mean PSNR of `channels` principal components of factor×factor patches, fitted on the same."""
    settings = EvaluationSettings(data=data, n_images=n_images)
    images = open_images(data, settings.split, None)
    squares = [
        center_square(images.read(i.index), 64) for i in select_items(images, settings.chosen)
    ]
    patches = F.unfold(to_tensor(squares), factor, stride=factor).movedim(1, 2)
    cells = patches.flatten(0, 1).double()
    cells = cells - cells.mean(0)
    basis = torch.linalg.eigh(cells.T @ cells).eigenvectors[:, -channels:]
    error = (cells - cells @ basis @ basis.T).square().view(len(squares), -1).mean(1)
    return float(-10 * error.log10().mean())


def cross_model_table() -> str:
    """Table 2 of the paper: rows conditioned on, columns evaluated by; top-5 / top-1."""
    rows = []
    for member in MEMBERS:
        if m := read(member):
            own = member.partition("-")[0]
            cells = []
            for backbone in BACKBONES:
                by = m if backbone == own else m["evaluated_by"].get(f"tiny/{backbone}")
                metrics = ("top5_match", "top1_match")
                cells.append(" / ".join(to_cell(by[x], x) for x in metrics) if by else "–")
            rows.append([member, *cells])
    return table(["features of", *(f"seen by {name}" for name in BACKBONES)], rows)


def pooled_gap() -> str:
    """The paired difference of unpooled and pooled convnext, image by image."""
    paths = [ROOT / name / "per_image.parquet" for name in ("convnext", "convnext-pooled")]
    if not all(path.exists() for path in paths):
        return ""
    frames = [pd.read_parquet(path).set_index("id").sort_index() for path in paths]
    assert list(frames[0].index) == list(frames[1].index)
    cells = []
    for metric in ("cosine", "top5_match", "top1_match"):
        values = [torch.tensor(f[metric].to_numpy(float)).numpy() for f in frames]
        gap = bootstrap_difference(*values)
        figure = {"value": gap.value, "low": gap.low, "high": gap.high}
        cells.append(f"{metric.replace('_', ' ')} {to_cell(figure, metric)}")
    return f"Paired gap, unpooled − pooled convnext: {', '.join(cells)}."


def curve_table(first: str, runs: Sequence[tuple[str, str]]) -> str:
    metrics = ("cosine", "top5_match", "top1_match", "psnr")
    rows = [
        [label, *(to_cell(m[x], x) for x in metrics)] for name, label in runs if (m := read(name))
    ]
    return table([first, "cosine", "top-5", "top-1", "PSNR"], rows)


def draw_figures() -> None:
    """Originals beside one sample per member, with cosines: the paper's figures 1 and 3 in one."""
    photos = [builtin_photo(), builtin_photo().with_name("china.jpg")]
    pictures = [(p.stem, center_square(read_image(p), 256)) for p in photos]
    pictures += [(f"{n}, detail", p.crop((40, 40, 168, 168))) for n, p in pictures]
    rows: dict[str, GridRow] = {}
    for name, picture in pictures:
        rows[name] = GridRow(center_square(picture, 64), name, [], [])
    for member in MEMBERS:
        if f"tiny/{member}" not in list_bundled():
            continue
        inverter = open_inverter(SampleSettings(pipeline=f"tiny/{member}"))
        assert inverter.backbone is not None
        originals = to_tensor([row.original for row in rows.values()])
        features, logits = inverter.backbone.features_and_logits(originals)
        noise = [make_generator(0, name) for name in rows]
        images = inverter.invert(features, generator=noise)
        again, logits_again = inverter.backbone.features_and_logits(images)
        cosines = feature_cosine(features, again).tolist()
        assert logits is not None
        assert logits_again is not None
        match = top_k_match(logits, logits_again, 5).tolist()
        for i, (name, row) in enumerate(rows.items()):
            caption = f"{cosines[i]:.2f}{'' if match[i] else ' *'}"
            picture = Image.fromarray(
                (images[i].permute(1, 2, 0) * 255).round().byte().cpu().numpy()
            )
            rows[name] = GridRow(
                row.original, name, [*row.samples, picture], [*row.captions, caption]
            )
    figure = make_grid(
        list(rows.values()),
        title="One sample from the features of each backbone",
        subtitle="Under each: cosine of its features to the original's; * where the original's "
        "class is not among the top 5.",
        min_tile=128,
        headers=[member for member in MEMBERS if f"tiny/{member}" in list_bundled()],
    )
    write_png(figure, FIGURES / "tiny-family.png")


def write_page(arguments: argparse.Namespace) -> None:
    own = f"python benchmarks/tiny_results.py --data {Path(arguments.data).name}"
    first = next((name for name in MEMBERS if read(name)), None)
    run = read(first) if first else None
    if first is None or run is None:
        sys.exit("Error: no member is measured yet; leave --write-only out.")
    s = run["settings"]
    measured = date.fromtimestamp((ROOT / first / "metrics.json").stat().st_mtime)
    parts = [
        "# What the tiny family reaches",
        f"Measured {measured} by `{own}` on {arguments.machine}, on {run['n_images']} validation "
        "images of Tiny-ImageNet's 100 classes, none of which was trained or chosen on. One sample "
        f"per image at the shipped defaults: {s['steps']} steps of {s['scheduler']}, guidance "
        f"{s['guidance']} {s['guidance_scale']:g}. In brackets: 95 % bootstrap intervals over "
        "images. Each row repeats with `featinv evaluate`.",
        "## Pooled and unpooled (the paper's Table 1)",
        members_table(),
        pooled_gap(),
        "Normalised: (cosine − other image) / (its ceiling − other image). The ceiling "
        "is the autoencoder's round trip. Classifier: top-1 accuracy on the originals.",
        "![One sample per backbone](figures/tiny-family.png)",
        "## Nulls",
        nulls_table(),
        "Permuted cells and prior only are samples of their own, for 300 images. Chance is 1 % "
        "top-1 and 5 % top-5.",
        "## The autoencoder alone",
        ceilings_table(),
        _autoencoder_note(arguments.data, run["n_images"]),
        "## Across models (the paper's Table 2): top-5 / top-1",
        cross_model_table(),
        f"## Sampler, convnext, {N_CURVE} images",
        curve_table(
            "sampler, steps",
            [(sampler_run(name, steps), f"{name}, {steps}") for name, steps in SAMPLERS],
        ),
        f"## Guidance, convnext, {N_CURVE} images",
        curve_table(
            "convention, scale",
            [(guidance_run(name, scale), f"{name}, {scale:g}") for name, scale in GUIDANCE],
        ),
        f"## Strength of the ControlNet, convnext, {N_CURVE} images",
        curve_table("strength", [(strength_run(x), f"{x:g}") for x in STRENGTHS]),
        "## Commands",
        "```sh\n"
        + "\n".join(
            shlex.join(["featinv", "evaluate", *arguments])
            for _, arguments in plan("TINY_IMAGENET_VAL", run["n_images"], ("members",))
        )
        + "\n```",
    ]
    PAGE.write_text("\n\n".join(part for part in parts if part) + "\n")
    print(f"Wrote {PAGE}")


def _autoencoder_note(data: str, n_images: int) -> str:
    config: Any = load_bundled("tiny/convnext").vae.config
    factor, channels = 2 ** (len(config["block_out_channels"]) - 1), config["latent_channels"]
    psnr = patch_pca_psnr(data, n_images, factor, channels)
    return (
        f"PSNR of {channels} principal components of {factor}×{factor} patches, as many numbers as "
        f"its latents have, fitted on these very images: {psnr:.2f} dB."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--n-images", type=int, default=3000)
    parser.add_argument("--only", nargs="*", choices=TABLES, default=TABLES)
    parser.add_argument("--machine", required=True, help="its kind, for the page")
    parser.add_argument("--processes", type=int, default=1, help="share each run's images")
    parser.add_argument("--write-only", action="store_true")
    arguments = parser.parse_args()
    if not arguments.write_only:
        for name, options in plan(arguments.data, arguments.n_images, arguments.only):
            measure(name, options, arguments.processes)
        draw_figures()
    write_page(arguments)


if __name__ == "__main__":
    main()
