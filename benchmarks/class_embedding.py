"""Measure the class-embedding projection of a ViT and write docs/class-embedding.md.

    python benchmarks/class_embedding.py --data tiny-imagenet-val.parquet --machine 'two-core EPYC'

`--data` is a parquet file of labelled images, 64 px squares with a `bbox` column [x0, y0, x1, y1]
of the object or without. The last `--n-probe` images of each class fit the linear probes and are
measured nowhere else. `--timing N` also measures N images with all measures in one pass, and with
a pass for each.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from pyarrow import parquet
from torch import Tensor

from featinv_diffusion.backbones import load_backbone
from featinv_diffusion.class_embedding.anatomy import Anatomy, read_anatomy
from featinv_diffusion.class_embedding.images import (
    Batch,
    FindMask,
    TokenImages,
    box_token_mask,
    open_token_images,
)
from featinv_diffusion.class_embedding.measures import (
    MemoryTables,
    Tally,
    chance_identifiability,
)
from featinv_diffusion.class_embedding.pictures import draw_identifiability, draw_removal
from featinv_diffusion.class_embedding.probes import POINTS, ProbeTest, split_off
from featinv_diffusion.class_embedding.reading import read_images
from featinv_diffusion.class_embedding.settings import TokenMeasures
from featinv_diffusion.class_embedding.study import measure_tokens
from featinv_diffusion.evaluation.report import to_cell
from featinv_diffusion.figures.board import write_figure

PAGE, FIGURES = Path("docs/class-embedding.md"), Path("docs/figures")
LEAD = (
    "How near each token is to its picture's class, after each block: 1 is nearest, chance is .5. "
    "The class token gets there first."
)
RAW = Path("outputs/class-embedding/metrics.json")
PARITY_TABLE = Path("outputs/class-embedding/parity.md")
PUBLISHED = (
    ("ViT-B/32", "vit_base_patch32_224.augreg_in21k_ft_in1k", "60.73", "95.58", "81.71"),
    ("ViT-B/16", "vit_base_patch16_224.augreg_in21k_ft_in1k", "67.04", "97.45", "85.69"),
    ("ViT-L/16", "vit_large_patch16_224.augreg_in21k_ft_in1k", "72.58", "97.12", "86.00"),
    ("MIIL", "vit_base_patch16_224_miil.in21k_ft_in1k", "78.52", "95.52", "86.26"),
    ("CIFAR-100", "– (the authors' checkpoint)", "90.35", "98.80", "92.00"),
    ("Refinement", "– (the authors' DeiT-B)", "79.64", "96.26", "84.97"),
    ("GAP", "vit_base_patch16_rpn_224.sw_in1k", "52.09", "98.53", "84.13"),
)
MEASURES = ("states", "attention", "mlp", "memories", "relevance")
REPEATED: dict[str, frozenset[str]] = {
    "identifiability, its rate": frozenset({"states"}),
    "block change rate": frozenset({"states"}),
    "layer change rate": frozenset({"states", "attention", "mlp"}),
    "residual composition": frozenset({"states", "attention", "mlp"}),
    "key–value agreement": frozenset({"memories"}),
    "memory compositionality": frozenset({"memories", "attention", "mlp"}),
    "relevance": frozenset({"relevance"}),
}
"""What each measure needs when it runs its own pass."""
ORDERED_FOR = {"": "the label", "predicted": "the predicted class", "wrong": "a wrong class"}


def read_boxes(data: str, images: TokenImages, anatomy: Anatomy) -> FindMask | None:
    """Returns the patches in each image's box; None where the table has no boxes."""
    if "bbox" not in parquet.read_schema(data).names:
        return None
    boxes = parquet.read_table(data, columns=["bbox"]).column("bbox").to_pylist()
    rows = [int(image_id.rpartition(":")[2]) for image_id in images.ids]

    def find(index: int) -> Tensor:
        box = boxes[rows[index]]
        size = images.read(index).size
        return box_token_mask((box[0], box[1], box[2], box[3]), size, anatomy.grid)

    return find


def time_both(anatomy: Anatomy, images: TokenImages, settings: TokenMeasures) -> dict[str, Any]:
    """CPU seconds of all measures in one pass and of a pass for each, side by side by batch.

    CPU seconds of this process, for others may compete for the cores.
    """
    tables = MemoryTables.of(anatomy)
    seconds = {"one pass": 0.0, **dict.fromkeys(REPEATED, 0.0)}
    for number, batch in enumerate(images.batches(anatomy.backbone, settings.batch_size)):
        if number == 0:
            read_images(anatomy, batch.images, batch.labels)  # not counted: first use of kernels
        seconds["one pass"] += clock(read_and_tally, anatomy, tables, batch)
        for name, wanted in REPEATED.items():
            seconds[name] += clock(read_images, anatomy, batch.images, batch.labels, wanted)
    loop = sum(seconds[name] for name in REPEATED)
    return {
        "n_images": len(images),
        "seconds": seconds,
        "loop": loop,
        "ratio": loop / seconds["one pass"],
        "threads": torch.get_num_threads(),
    }


def read_and_tally(anatomy: Anatomy, tables: MemoryTables, batch: Batch) -> None:
    Tally(anatomy, tables).add(read_images(anatomy, batch.images, batch.labels))


def clock(run: Callable[..., object], *arguments: Any) -> float:
    start = time.process_time()
    run(*arguments)
    return time.process_time() - start


# ---- the page ----------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def percent(figure: dict[str, Any] | None) -> str:
    return "–" if figure is None else to_cell(figure, "match")


def by_block(rows: dict[str, Sequence[Any]], digits: int = 2) -> str:
    """A table with a column per block; numbers or p-values."""
    n_blocks = len(next(iter(rows.values())))
    header = ["block", *map(str, range(1, n_blocks + 1))]
    return table(header, [[name, *(f"{x:.{digits}f}" for x in row)] for name, row in rows.items()])


def interval_rows(rows: dict[str, Sequence[dict[str, Any]]], shares: bool) -> str:
    n_blocks = len(next(iter(rows.values())))
    header, cell = ["block", *rows], percent if shares else to_cell
    cells = [[str(b + 1), *(cell(row[b]) for row in rows.values())] for b in range(n_blocks)]
    return table(header, cells)


def identifiability_section(m: dict[str, Any], n_classes: int) -> list[str]:
    null, intervals = m["random_model"], m["intervals"]
    rows = {
        "image tokens": intervals["identifiability_by_block/image"],
        "class token": intervals["identifiability_by_block/cls"],
    }
    return [
        "## Identifiability",
        table(
            ["", "identifiability rate", "images with ≥ 1 such token", "accuracy"],
            [
                [
                    "this model",
                    *(
                        percent(intervals[x])
                        for x in ("identifiability_rate", "any_identified", "accuracy")
                    ),
                ],
                [
                    "random weights",
                    f"{null['identifiability_rate']:.2%}",
                    f"{null['any_identified']:.1%}",
                    f"{null['accuracy']:.1%}",
                ],
                *[
                    [f"attention ablated: {kind}", percent(x), "", ""]
                    for kind, x in m["ablations"].items()
                ],
            ],
        ),
        "Rate: share of image tokens closest to their class after the last block. `self_only`: "
        "image tokens attend to themselves alone; `no_cls`: they do not attend to the class token.",
        interval_rows(rows, shares=False),
        "Of random weights, image tokens after the last block: "
        f"{null['identifiability_by_block'][-1]:.3f}; chance is "
        f"{chance_identifiability(n_classes):.3f}.",
        "What the blocks say of one picture: [gallery.md](gallery.md#class-embedding).",
    ]


def mechanism_section(m: dict[str, Any]) -> list[str]:
    change, agreement = m["layer_change_rate"], m["class_value_agreement"]
    rows = {"block: image": m["block_change_rate"]}
    for layer in ("attention", "mlp"):
        rows |= {f"{layer}: {kind}": values for kind, values in change[layer].items()}
    values = {}
    for layer in ("attention", "mlp"):
        values |= {
            f"{layer}": agreement[layer]["mean"],
            f"{layer}, random weights": agreement[layer]["random"],
        }
    p_values = {layer: agreement[layer]["p_value"] for layer in ("attention", "mlp")}
    return [
        "## Which layers build the class",
        "Share of tokens whose class score rises (the publication starts at block 2):",
        by_block(rows),
        "Share of tokens whose top class is that of a source of the residual:",
        by_block(m["residual_composition"]),
        "Class–value agreement, mean over classes of the largest cosine to a memory:",
        by_block(values),
        "Wilcoxon's p, one-sided, against random weights: "
        + "; ".join(
            f"{layer} " + ", ".join(f"{p:.1g}" for p in row) for layer, row in p_values.items()
        )
        + ".",
        "Key–value agreement rate and memory compositionality:",
        by_block(
            {
                **{f"agreement, {k}": v for k, v in m["key_value_agreement"].items()},
                **{f"compositionality, {k}": v for k, v in m["memory_compositionality"].items()},
            }
        ),
    ]


def perturbation_section(m: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    found, rows = m["perturbation"], []
    if found is None:
        return []
    for name, x in found.items():
        if name == "n_kept":
            continue
        method, direction, chosen = [*name.split("/"), "", ""][:3]
        nulls = [f"area_minus_{null}" for null in ("random", "wrong")]
        rows.append(
            [
                method.replace("_", " "),
                ORDERED_FOR[chosen] if direction else "–",
                direction or "–",
                to_cell(x["area"]),
                *[to_cell(x[null]) if null in x else "–" for null in nulls],
                "–" if x["published_area"] is None else f"{x['published_area']:.3f}",
            ]
        )
    label, predicted, wrong = (
        found[f"gradient/negative{source}"]["area"]["value"]
        for source in ("", "/predicted", "/wrong")
    )
    return [
        f"## Perturbation test, {found['random']['area']['n']} images",
        table(
            [
                "order by",
                "relevance for",
                "removed first: negative = least relevant",
                "area",
                "area − random",
                "area − wrong class",
                "published area",
            ],
            rows,
        ),
        f"Area: mean accuracy over 1 … {found['n_kept'][-1]} kept patches, run at "
        f"{len(found['n_kept'])} counts; random: {arguments.n_random} orders of each image "
        "(published: 10). Differences are paired "
        "by image. The published area divides by the curve's own maximum and leaves out the whole "
        "image. Published, ViT-B/32: gradient .836 negative, .413 positive; Chefer .845, .393; "
        "probe .739, .683; random .716.",
        "The published order is by the relevance for the true label, which leaks the answer: where "
        "the model errs on the whole image, patches that speak for the label are kept, and it "
        "becomes right. A user who does not know the label has the predicted class, whose order "
        "needs no label; the order for a wrong class, drawn from those that the image neither "
        "shows nor is taken for, is the control, for it keeps what any class would keep. Of the "
        f"gradient's {label:.3f} for the label, {predicted:.3f} remain for the predicted class, "
        f"beside {wrong:.3f} for a wrong one. Accuracy is that of the true label in all rows.",
        "![Perturbation test](figures/class-embedding-perturbation.png)",
    ]


def context_section(m: dict[str, Any]) -> list[str]:
    found = m["context"]
    if found is None:
        return []
    rows = [
        [
            str(b + 1),
            *(
                f"{found[f'{name}_difference_by_block'][b]['value']:.3f} "
                f"(p {found[f'{name}_difference_by_block'][b]['p_value']:.3f})"
                for name in ("identifiability", "attention")
            ),
        ]
        for b in range(m["n_blocks"])
    ]
    names = {"class_tokens": "on the object", "context_tokens": "on its context"}
    return [
        f"## Object and context, {found['n_images']} images with boxes",
        table(
            ["tokens", "rate in the whole image", "rate without the others"],
            [
                [
                    words,
                    percent(found[f"{name}/in_whole_image"]),
                    percent(found[f"{name}/alone"]),
                ]
                for name, words in names.items()
            ],
        ),
        "Mean on the object − mean on its context, labels permuted 300 times within each image; "
        "p is one-sided, near 1 where the context leads:",
        table(["block", "identifiability", "class score of the attention"], rows),
    ]


def probe_section(m: dict[str, Any]) -> list[str]:
    found = m["probes"]
    return [
        "## Beside linear probes",
        "Top-1 of image tokens: the state behind each block (hidden), and what its attention and "
        "its MLP add. Ridge regression on ±1, one probe per token, block and point, fitted on "
        f"{found['n_fitted']} images that are measured nowhere else (`--probes-per-class`). With "
        "`--perturbation`, patches are also removed in the order of −Σ over blocks of the rank "
        "that the hidden state's probes give to the class.",
        *(
            f"{point}:\n\n"
            + interval_rows(
                {
                    "class embedding": found[point]["projection"],
                    "linear probe": found[point]["probe"],
                    "difference": found[point]["difference"],
                },
                shares=True,
            )
            for point in POINTS
        ),
    ]


def timing_section(m: dict[str, Any]) -> list[str]:
    if "timing" not in m:
        return []
    t = m["timing"]
    per_thousand = 1000 / t["n_images"]
    rows = [[name, f"{s * per_thousand:.1f}"] for name, s in t["seconds"].items()]
    return [
        "## Time",
        table(
            ["", "CPU s per 1,000 images"],
            [*rows[:1], ["a pass for each measure", f"{t['loop'] * per_thousand:.1f}"], *rows[1:]],
        ),
        f"{t['n_images']} images, {t['threads']} thread, without decoding, measured side by "
        f"side batch by batch: one pass takes {t['ratio']:.1f} times less than a pass for each "
        "measure.",
    ]


def published_section() -> list[str]:
    return [
        "## The published table, as a target",
        "Vilas et al. 2023, ImageNet-S validation, 5 images of each of 910 classes, in %. Not "
        "measured here, for it needs the weights and the images:",
        table(
            ["model", "timm", "identifiability rate", "images with ≥ 1 token", "accuracy"],
            PUBLISHED,
        ),
        "```sh\nfeatinv classemb IMAGENET_S/validation "
        "--backbone timm/vit_base_patch32_224.augreg_in21k_ft_in1k --per-class 5 \\\n"
        "  --interpolation bilinear --masks IMAGENET_S/validation-segmentation --ablations --null "
        "--perturbation --output DIR\n```",
        "Random weights: .066 % (B/32) and .056 % (B/16). Ablated, B/32: self_only .126 %, no_cls "
        "60.71 %. The authors' choice of 5 images is not published. All 919 classes, unless "
        "`--classes` names the 910. MIIL was published with a central crop of 0.875 and is "
        "squashed here like the others.",
    ]


def write_page(m: dict[str, Any], arguments: argparse.Namespace) -> None:
    command = (
        f"python benchmarks/class_embedding.py --data {Path(arguments.data).name} --n-images "
        f"{arguments.n_images} --n-perturbed {arguments.n_perturbed} --timing {arguments.timing} "
        f"--n-points {arguments.n_points} --n-random {arguments.n_random} --machine '...'"
    )
    parts = [
        "# What the tokens of the tiny ViT say",
        "![Identifiability by token and block](figures/class-embedding-tokens.png)",
        LEAD,
        f"Measured {m['date']} by `{command}` on {arguments.machine}, on {m['n_images']} "
        f"validation images of Tiny-ImageNet's 100 classes that {m['backbone']} was not trained "
        "on. In brackets: 95 % bootstrap intervals over images. Measures: Vilas et al. 2023; "
        "formulas in [equations.md](equations.md). One folder of one's own: `featinv classemb "
        "FOLDER --ablations --null --perturbation --probes-per-class 10`.",
        *identifiability_section(m, len(load_backbone(arguments.backbone).labels or ())),
        *mechanism_section(m),
        *perturbation_section(m, arguments),
        *context_section(m),
        *probe_section(m),
        *timing_section(m),
        *published_section(),
        PARITY,
        *([PARITY_TABLE.read_text().strip()] if PARITY_TABLE.exists() else []),
    ]
    PAGE.write_text("\n\n".join(parts) + "\n")
    print(f"Wrote {PAGE}")


PARITY = """\
## Parity with the published code

`python benchmarks/parity_classemb.py CHECKOUT` runs the code of the publication and this one on a
random tiny ViT, measure by measure. Where figures differ it is by choice: its composition tests
attention twice and the MLP never; its class–value agreement normalises the live weights in place;
its relevance takes the softmax twice (the gradient of a probability, here the method
`gradient of probability`); its ablated rates count the class token, the ones they are compared
with do not; its areas leave out the whole image and divide by 4,550 images whatever the data.
Labels of tokens are
permuted within an image here. Memory compositionality is that of the last block, where the
attention's is 0 everywhere. Ranks differ by 1 where two scores are equal to the last bits of
float32; p-values are of scores in float64 here."""


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures part by part; what `RAW` holds of the same arguments is not measured again."""
    anatomy = read_anatomy(load_backbone(arguments.backbone))
    every = open_token_images(arguments.data, anatomy.backbone)
    rest, train = split_off(every, arguments.n_probe)
    test = rest.only(range(arguments.n_images))
    settings = TokenMeasures(batch_size=arguments.batch_size)
    m = read_raw(arguments)
    if "identifiability_rate" not in m or m["perturbation"] is None:
        say(f"linear probes on {len(train)} images")
        probes = ProbeTest.fit(anatomy, train, arguments.batch_size)
    if "identifiability_rate" not in m:
        say(f"one pass, ablations, null, context and probes of {len(test)} images")
        masks = read_boxes(arguments.data, test, anatomy)
        wanted = replace(settings, ablations=True, null=True)
        tally, found = measure_tokens(anatomy, test, wanted, masks, probes=probes)
        found |= {"n_blocks": len(anatomy.blocks)}
        draw(anatomy, tally, found)
        write_raw(m := m | found)
    if m["perturbation"] is None:
        say(f"perturbation test of {arguments.n_perturbed} images")
        perturbed = test.only(range(arguments.n_perturbed))
        m["perturbation"] = perturb(anatomy, perturbed, settings, probes, arguments)
        write_raw(m)
    if arguments.timing and "timing" not in m:
        say(f"timing of {arguments.timing} images")
        m["timing"] = time_both(anatomy, test.only(range(arguments.timing)), settings)
        write_raw(m)
    return m


def perturb(
    anatomy: Anatomy,
    images: TokenImages,
    settings: TokenMeasures,
    probes: ProbeTest,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    settings = replace(
        settings, perturbation=True, n_points=arguments.n_points, n_random=arguments.n_random
    )
    return measure_tokens(anatomy, images, settings, probes=probes)[1]["perturbation"]


def read_raw(arguments: argparse.Namespace) -> dict[str, Any]:
    decided = {k: v for k, v in vars(arguments).items() if k not in ("write_only", "machine")}
    held = json.loads(RAW.read_text()) if RAW.exists() else {}
    fresh = {"arguments": decided, "date": str(date.today()), "backbone": arguments.backbone}
    return held if held.get("arguments") == decided else fresh


def write_raw(m: dict[str, Any]) -> None:
    RAW.parent.mkdir(parents=True, exist_ok=True)
    RAW.write_text(json.dumps(m, indent=1))


def draw(anatomy: Anatomy, tally: Tally, m: dict[str, Any]) -> None:
    """Draws the identifiability by token and block."""
    curves = {kind: m["intervals"][f"identifiability_by_block/{kind}"] for kind in ("image", "cls")}
    tokens = torch.as_tensor(tally.token_identifiability) / m["n_images"]
    figure = draw_identifiability(anatomy, tokens, curves, m["n_images"])
    write_figure(figure, FIGURES / "class-embedding-tokens.png")


def say(words: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {words}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--backbone", default="tiny/vit")
    parser.add_argument(
        "--machine", default="a machine of unnamed kind", help="its kind, for the page"
    )
    parser.add_argument("--n-images", type=int, default=1000)
    parser.add_argument("--n-probe", type=int, default=10, help="of each class")
    parser.add_argument("--n-perturbed", type=int, default=200)
    parser.add_argument("--n-points", type=int, default=9)
    parser.add_argument("--n-random", type=int, default=2)
    parser.add_argument("--timing", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--write-only", action="store_true")
    arguments = parser.parse_args()
    found = read_raw(arguments) if arguments.write_only else measure(arguments)
    if removed := found["perturbation"]:
        figure = draw_removal(removed, removed["random"]["area"]["n"])
        write_figure(figure, FIGURES / "class-embedding-perturbation.png")
    write_page(found, arguments)


if __name__ == "__main__":
    main()
