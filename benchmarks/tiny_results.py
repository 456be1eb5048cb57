"""Measure the tiny family and write docs/tiny-results.md with its pictures.

    python benchmarks/tiny_results.py --data tiny-imagenet-val.parquet \\
        --training tiny-imagenet-200 --machine 'two-core AMD EPYC'

`--data` is anything that `featinv evaluate` reads; `--training` holds the images of the baselines.
Every row is one run of that command below outputs/tiny-results, resumable: shards that are finished
are not sampled again. `--only TABLE …` takes some of the tables, `--write-only` writes the page
from the runs that exist. A table without runs stays as the page has it.
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
from featinv_diffusion.evaluation.report import normalised_agreement, to_cell
from featinv_diffusion.figures.grid import GridRow, make_grid
from featinv_diffusion.images import builtin_photo, center_square, read_image, to_tensor, write_png
from featinv_diffusion.inverters.open import open_inverter
from featinv_diffusion.metrics import feature_cosine, top_k_match
from featinv_diffusion.metrics.statistics import bootstrap_difference
from featinv_diffusion.seeds import make_generator
from featinv_diffusion.settings import SampleSettings, Selection

ROOT = Path("outputs/tiny-results")
PAGE, FIGURES = Path("docs/tiny-results.md"), Path("docs/figures")
LEAD = """\
![One sample per backbone](figures/tiny-family.png)

Two photos and two details of them, and one sample of the map that each bundled backbone makes of
it."""
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
N_NULL, N_BASELINE, N_OPTIMISED = 40, 1000, 8
N_GALLERY = 900
"""Validation images beside those of the run among which the own original is looked for."""
OUTSIDE = "tf_efficientnet_lite0"
"""Public ImageNet weights (extra `real`), which share nothing with the family."""
FITTED = ("convnext", "resnet", "vit")
"""Members with baselines."""
INVERTERS = ("siglip", "siglip2", "vit", "detr")
"""Deterministic inverters, which have no prior and no autoencoder."""
TABLES = ("members", "inverters", "samplers", "guidance", "strength")


def plan(
    data: str, training: str, n_images: int, tables: Sequence[str]
) -> Iterator[tuple[str, list[str]]]:
    """Yields (name of the run, arguments of `featinv evaluate`)."""
    curve = ["--pipeline", "tiny/convnext", "--n-images", str(N_CURVE), "--n-null-images", "0"]
    common = ["--data", data, "--batch-size", "16"]
    gallery = ["--n-gallery-images", str(N_GALLERY)]
    backbones = [f"tiny/{name}" for name in BACKBONES if f"tiny/{name}" in list_backbones()]
    for member in MEMBERS if "members" in tables else ():
        if f"tiny/{member}" in list_bundled():
            own = f"tiny/{member.partition('-')[0]}"
            others = ",".join([*(name for name in backbones if name != own), OUTSIDE])
            size = ["--n-images", str(n_images), "--n-null-images", str(N_NULL), *gallery]
            baselines = ["--baselines-from", training, "--n-baseline-images", str(N_BASELINE)]
            slow = ["--n-optimised-images", str(N_OPTIMISED)] if member == "convnext" else []
            options = [*size, "--evaluated-by", others, *(baselines if member in FITTED else [])]
            yield member, [*common, "--pipeline", f"tiny/{member}", *options, *slow]
    for name in INVERTERS if "inverters" in tables else ():
        size = ["--n-images", str(n_images), "--n-null-images", "0", *gallery]
        yield name_of(name), [*common, "--inverter", name, *size, "--evaluated-by", OUTSIDE]
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


def name_of(inverter: str) -> str:
    return f"inverter-{inverter}"


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


def runs() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yields the runs that were measured: their names, those in the tables, and the figures."""
    for name in (*MEMBERS, *map(name_of, INVERTERS)):
        if m := read(name):
            known = m["settings"]["inverter"] == "diffusion"
            shown = name if known else f"inverter {name.removeprefix('inverter-')}"
            yield name, f"{shown} ({m['settings']['layer']})", m


def members_table() -> str:
    rows = []
    for name, label, m in runs():
        retrieval, trip = m["retrieval"], m["ceilings"]["vae_round_trip"]
        rows.append(
            [
                label,
                str(m["n_images"]),
                to_cell(m["centred_cosine"]),
                to_cell(m["centred_cosine"]["nulls"]["other_image"]),
                to_cell(trip["centred_cosine"] if trip else None),
                to_cell(retrieval["top1"], "match"),
                to_cell(retrieval["same_class"]["top1"], "match"),
                to_cell(m["linear_cka"]),
                outside_cell(name, m),
                to_cell(m["evaluated_by"][OUTSIDE]["top5_match"], "match"),
            ]
        )
    header = (
        "features of|images|centred cosine|another image|autoencoder|own original found|"
        "in its class|CKA|outside eye|its top-5"
    )
    return table(header.split("|"), rows)


def outside_cell(name: str, m: dict[str, Any]) -> str:
    """Returns what the outside eye sees, normalised and as it is.

    The ends of a run without an autoencoder are those of the first member, on the same images.
    """
    seen = f"evaluated_by_{OUTSIDE}_"
    frames = [pd.read_parquet(ROOT / run / "per_image.parquet") for run in (name, MEMBERS[0])]
    own, first = (frame.set_index("id").sort_index() for frame in frames)
    assert list(own.index) == list(first.index)
    ends = own if m["ceilings"]["vae_round_trip"] else first
    columns = {f"{seen}cosine": own[f"{seen}cosine"].to_numpy()}
    for kind in ("other_image", "vae_round_trip"):
        columns[f"{kind}_{seen}cosine"] = ends[f"{kind}_{seen}cosine"].to_numpy()
    cosine = m["evaluated_by"][OUTSIDE]["cosine"]
    return f"{to_cell(normalised_agreement(columns, seen))}, cosine {to_cell(cosine)}"


def matches_table() -> str:
    rows = []
    for name, label, m in runs():
        metrics = ("cosine", "normalised_agreement", "top5_match", "top1_match", "psnr")
        cells = [to_cell(m.get(metric), metric) for metric in metrics]
        accuracy = to_cell(m["label_accuracy"]["original"], "match")
        rows.append([label, *cells, accuracy, outside_cell(name, m)])
    header = "features of|cosine|normalised|top-5|top-1|PSNR|classifier|outside eye"
    return table(header.split("|"), rows)


def baselines_table() -> str:
    rows = []
    for member in MEMBERS:
        if (m := read(member)) and m["baselines"]["nearest_neighbour"]:
            found = {"reconstruction": m, **m["baselines"]}
            for name, figures in found.items():
                if figures is None:
                    continue
                n = figures["cosine"]["n"]
                label = name.replace("_", " ") + (f", {n} images" if n < m["n_images"] else "")
                metrics = ("centred_cosine", "cosine", "top5_match", "top1_match", "psnr")
                cells = [to_cell(figures[x], x) for x in metrics]
                outside = to_cell(figures["evaluated_by"][OUTSIDE]["cosine"])
                rows.append([member, label, *cells, outside])
    header = "features of|made by|centred cosine|cosine|top-5|top-1|PSNR|cosine, outside eye"
    return table(header.split("|"), rows)


def headline(m: dict[str, Any]) -> str:
    """Returns what the columns of the first table mean."""
    n, hard = m["retrieval"]["n_gallery"], m["retrieval"]["same_class"]["mean_gallery"]
    return HEADLINE.format(n=f"{n:,}", hard=f"{hard:.0f}", outside=OUTSIDE)


def outside_span(m: dict[str, Any]) -> str:
    seen = m["evaluated_by"][OUTSIDE]["cosine"]
    ends = seen["nulls"]["other_image"], seen["ceilings"]["vae_round_trip"]
    return f"another image {to_cell(ends[0])}, the autoencoder alone {to_cell(ends[1])}"


def nulls_table() -> str:
    rows = []
    for member in MEMBERS:
        if m := read(member):
            for metric in ("centred_cosine", "cosine", "top5_match", "top1_match"):
                nulls = [to_cell(m[metric]["nulls"][null], metric) for null in NULLS]
                rows.append([member, metric.replace("_", " "), to_cell(m[metric], metric), *nulls])
    names = [null.replace("_", " ") for null in NULLS]
    return table(["features of", "", "reconstruction", *names], rows)


def ceilings_table() -> str:
    rows = []
    for member in MEMBERS:
        if m := read(member):
            c = m["ceilings"]["vae_round_trip"]
            metrics = ("centred_cosine", "cosine", "top5_match", "top1_match", "psnr")
            own = m["retrieval"]["ceilings"]["vae_round_trip"]["top1"]
            outside = m["evaluated_by"][OUTSIDE]["cosine"]["ceilings"]["vae_round_trip"]
            cells = [to_cell(c[metric], metric) for metric in metrics]
            rows.append([member, *cells, to_cell(own, "match"), to_cell(outside)])
    header = "features of|centred cosine|cosine|top-5|top-1|PSNR|own original found|outside eye"
    return table(header.split("|"), rows)


def patch_pca_psnr(data: str, n_images: int, factor: int, channels: int) -> float:
    """Mean PSNR of `channels` principal components of factor×factor patches, fitted on the same."""
    images = open_images(data, "validation", None)
    items = select_items(images, Selection(n_images=n_images))
    squares = [center_square(images.read(item.index), 64) for item in items]
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
            for name in (*(f"tiny/{backbone}" for backbone in BACKBONES), OUTSIDE):
                by = m if name == f"tiny/{own}" else m["evaluated_by"].get(name)
                metrics = ("top5_match", "top1_match")
                cells.append(" / ".join(to_cell(by[x], x) for x in metrics) if by else "–")
            rows.append([member, *cells])
    names = [*BACKBONES, "the outside eye"]
    return table(["features of", *(f"seen by {name}" for name in names)], rows)


def pooled_gap() -> str:
    """The paired difference of unpooled and pooled convnext, image by image."""
    paths = [ROOT / name / "per_image.parquet" for name in ("convnext", "convnext-pooled")]
    if not all(path.exists() for path in paths):
        return ""
    frames = [pd.read_parquet(path).set_index("id").sort_index() for path in paths]
    assert list(frames[0].index) == list(frames[1].index)
    cells = []
    outside = f"evaluated_by_{OUTSIDE}_cosine"
    for metric in ("centred_cosine", "cosine", "top5_match", "top1_match", outside):
        values = [torch.tensor(f[metric].to_numpy(float)).numpy() for f in frames]
        gap = bootstrap_difference(*values)
        figure = {"value": gap.value, "low": gap.low, "high": gap.high}
        name = "cosine by the outside eye" if metric == outside else metric.replace("_", " ")
        cells.append(f"{name} {to_cell(figure, metric)}")
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
    own += f" --training {Path(arguments.training).name} --n-images {arguments.n_images}"
    first = next((name for name in MEMBERS if read(name)), None)
    run = read(first) if first else None
    if first is None or run is None:
        sys.exit("Error: no member is measured yet; leave --write-only out.")
    s = run["settings"]
    measured = date.fromtimestamp((ROOT / first / "metrics.json").stat().st_mtime)
    commands = [
        shlex.join(["featinv", "evaluate", *options])
        for _, options in plan("VAL", "TRAINING", run["n_images"], ("members", "inverters"))
    ]
    kept = sections(PAGE.read_text())
    parts = {
        "": f"Measured {measured} by `{own}` on {arguments.machine}, on {run['n_images']} "
        "validation images of Tiny-ImageNet's 100 classes, none of which was trained or chosen on. "
        f"One sample per image at the shipped defaults: {s['steps']} steps of {s['scheduler']}, "
        f"guidance {s['guidance']} {s['guidance_scale']:g}. In brackets: 95 % intervals over "
        "images. Each row repeats with `featinv evaluate`.",
        "What comes back": f"{members_table()}\n\n{headline(run)} There: {outside_span(run)}.",
        "What needs no trained inverter": f"{baselines_table()}\n\n{BASELINES}",
        "Pooled and unpooled (the paper's Table 1)": f"{matches_table()}\n\n{pooled_gap()}\n\n"
        "Normalised: (cosine − other image) / (that of the autoencoder's round trip − other "
        "image). Classifier: top-1 accuracy on the originals.",
        "Nulls": f"{nulls_table()}\n\nPermuted cells and prior only are samples of their own, for "
        f"{N_NULL} images. Chance is 1 % top-1 and 5 % top-5.",
        "The autoencoder alone": ceilings_table()
        + "\n\n"
        + _autoencoder_note(arguments.data, run["n_images"]),
        "Across models (the paper's Table 2): top-5 / top-1": cross_model_table(),
        **curves(),
        "Commands": "```sh\n" + "\n".join(commands) + "\n```",
    }
    for title, text in kept.items():  # measured by other scripts, or of an earlier day
        parts.setdefault(title, text)
    last = parts.pop("Commands")
    text = "\n\n".join(
        f"## {title}\n\n{text}" if title else text
        for title, text in [*parts.items(), ("Commands", last)]
    )
    PAGE.write_text(f"# What the tiny family reaches\n\n{LEAD}\n\n{text}\n")
    print(f"Wrote {PAGE}")


def sections(page: str) -> dict[str, str]:
    """Returns the texts of a page by their headings."""
    parts = page.split("\n## ")[1:]
    return {part.partition("\n")[0]: part.partition("\n")[2].strip() for part in parts}


def curves() -> dict[str, str]:
    """Returns the tables of the curves that were measured."""
    tables = {
        "Sampler": (
            "sampler, steps",
            [(sampler_run(name, steps), f"{name}, {steps}") for name, steps in SAMPLERS],
        ),
        "Guidance": (
            "convention, scale",
            [(guidance_run(name, scale), f"{name}, {scale:g}") for name, scale in GUIDANCE],
        ),
        "Strength of the ControlNet": (
            "strength",
            [(strength_run(x), f"{x:g}") for x in STRENGTHS],
        ),
    }
    return {
        f"{title}, convnext, {N_CURVE} images": curve_table(first, rows)
        for title, (first, rows) in tables.items()
        if all(read(name) for name, _ in rows)
    }


def _autoencoder_note(data: str, n_images: int) -> str:
    config: Any = load_bundled("tiny/convnext").vae.config
    factor, channels = 2 ** (len(config["block_out_channels"]) - 1), config["latent_channels"]
    psnr = patch_pca_psnr(data, n_images, factor, channels)
    return (
        f"PSNR of {channels} principal components of {factor}×{factor} patches, as many numbers as "
        f"its latents have, fitted on these very images: {psnr:.2f} dB."
    )


HEADLINE = (  # of a run, see `headline`
    "Centred cosine: the mean cell of the images is taken away first, so that another image has "
    "about 0. Own original found: first among {n} images by the centred maps, and among the {hard} "
    "of its class. CKA: linear, of whole maps, without the bias of small samples. The outside eye "
    "is {outside} with public ImageNet weights, which share nothing with the family: its cosine "
    "between another image (0) and the autoencoder (1), and its match of 1,000 classes."
)
BASELINES = (
    f"Nearest neighbour: that of {N_BASELINE:,} training images with the most similar map. Ridge: "
    "from each cell and its neighbours to the latents (decoded) or to the pixels below it, fitted "
    "on the same images, the penalty chosen on a tenth of them. Optimise: gradient steps on "
    "latents through the backbone itself, whose own cosine and match are therefore no evidence."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--training", required=True, help="training images, for the baselines")
    parser.add_argument("--n-images", type=int, default=3000)
    parser.add_argument("--only", nargs="*", choices=TABLES, default=TABLES)
    parser.add_argument(
        "--machine", default="a machine of unnamed kind", help="its kind, for the page"
    )
    parser.add_argument("--processes", type=int, default=1, help="share each run's images")
    parser.add_argument("--write-only", action="store_true")
    arguments = parser.parse_args()
    if not arguments.write_only:
        for name, options in plan(
            arguments.data, arguments.training, arguments.n_images, arguments.only
        ):
            measure(name, options, arguments.processes)
        draw_figures()
    write_page(arguments)


if __name__ == "__main__":
    main()
