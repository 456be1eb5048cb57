"""What the tokens of a ViT say by its class embedding, item by item.

Source: Vilas et al. 2023, of which the abstract was at hand.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from matplotlib.figure import Figure

from featinv_diffusion.backbones import load_backbone
from featinv_diffusion.backbones.names import canonical_name
from featinv_diffusion.class_embedding.removal import PROBE
from featinv_diffusion.class_embedding.study import TokenReading, read_tokens
from featinv_diffusion.errors import InputError
from featinv_diffusion.metrics.statistics import Interval
from featinv_diffusion.papers.base import Answer, Finding, Request, cell, percent

N_TOKENS, N_PROBED = 200, 1000
PROBED_SHARE = 0.9
"""Of the images of each class, what the probes are fitted on."""
PUBLISHED = {
    "vit_base_patch32_224.augreg_in21k_ft_in1k": ("ViT-B/32", 60.73),
    "vit_base_patch16_224.augreg_in21k_ft_in1k": ("ViT-B/16", 67.04),
    "vit_large_patch16_224.augreg_in21k_ft_in1k": ("ViT-L/16", 72.58),
    "vit_base_patch16_224_miil.in21k_ft_in1k": ("MIIL", 78.52),
    "vit_base_patch16_rpn_224.sw_in1k": ("GAP", 52.09),
}
"""Name and share of the image tokens, in %, of the published models that timm has."""


def measure_tokens_of_paper(request: Request) -> Finding:
    """Reads the tokens of a ViT by its class embedding, beside random weights and ablations."""
    reading = _read(
        request,
        request.settings.models("tiny/vit")[0],
        N_TOKENS,
        ablations=True,
        null=True,
        perturbation=True,
    )
    metrics = dict(reading.metrics)
    image = _curve(metrics, "image")
    rate = _interval(metrics["intervals"]["identifiability_rate"])
    alone = _interval(metrics["ablations"]["self_only"])
    layers = {name: one["image"] for name, one in metrics["layer_change_rate"].items()}
    attention, mlp = (sum(layers[n]) / len(layers[n]) for n in ("attention", "mlp"))
    first, last = (
        _removal(metrics["perturbation"], "negative"),
        _removal(metrics["perturbation"], "positive"),
    )
    chance = (1 + 1 / reading.anatomy.n_classes) / 2
    answers = {
        "tokens-identifiability": Answer(
            f"image tokens by block: {', '.join(f'{v.value:.2f}' for v in image)}",
            image[-1].low > image[0].high and image[-1].low > chance,
        ),
        "tokens-attention": Answer(
            f"tokens that say their class: {percent(rate)}, without attention to others "
            f"{percent(alone)}",
            alone.high < rate.low,
        ),
        "tokens-layers": Answer(
            f"image tokens whose class score a layer raises, mean of blocks: attention "
            f"{attention:.2f}, MLP {mlp:.2f}",
            abs(attention - mlp) > 0.05,
        ),
        "tokens-relevance": Answer(
            f"area minus random: least relevant first {cell(first)}, most relevant first "
            f"{cell(last)}",
            first.low > 0 and last.high < 0,
        ),
    }
    tables = [
        (
            "Identifiability",
            ("block", "image tokens"),
            [[str(i + 1), cell(v)] for i, v in enumerate(image)],
        )
    ]
    drawn = {"identifiability.png": reading.identifiability_figure()}
    if (perturbation := reading.perturbation_figure()) is not None:
        drawn["perturbation.png"] = perturbation
    return Finding(answers, tables, drawn, metrics, list(reading.images.ids))


def _read(request: Request, name: str, n_images: int, **measures: Any) -> TokenReading:
    """Reads the tokens of a model, of the published ones at the published interpolation."""
    choice = request.settings.images
    if choice.data is None:
        raise InputError("This item reads a data set with classes. Name it with --data.")
    backbone = load_backbone(name)
    if canonical_name(name) in PUBLISHED:
        backbone.preprocessing = replace(backbone.preprocessing, interpolation="bilinear")
    if measures.get("perturbation"):
        measures |= {"n_points": 5, "n_random": 1}
    return read_tokens(
        backbone,
        choice.data,
        split=choice.split,
        classes=choice.classes,
        n_images=request.settings.n_images or n_images,
        inverters=(),
        seed=request.settings.seed,
        batch_size=request.settings.batch_size,
        **measures,
    )


def measure_probes(request: Request) -> Finding:
    """Compares the class embedding with linear probes: which names classes, which finds tokens."""
    name = request.settings.models("tiny/vit")[0]
    per_class = Counter(request.select(N_PROBED)[0].labels or [0])
    wanted = request.settings.n_images or N_PROBED
    fitted = max(1, int(PROBED_SHARE * wanted / len(per_class)))
    reading = _read(request, name, N_PROBED, perturbation=True, probes_per_class=fitted)
    drawn = {}
    if (perturbation := reading.perturbation_figure()) is not None:
        drawn["perturbation.png"] = perturbation
    return report_probes(dict(reading.metrics), list(reading.images.ids), drawn)


def report_probes(metrics: dict[str, Any], ids: list[str], drawn: Mapping[str, Figure]) -> Finding:
    """Returns what naming and removal say of the class embedding beside probes."""
    states = metrics["probes"]["hidden"]
    own, probe, ahead = (
        [_interval(one) for one in states[key]] for key in ("projection", "probe", "difference")
    )
    removed = metrics["perturbation"]
    # Beyond a random order, paired by image: areas themselves vary with how hard the images are.
    found = {
        f"{method}/{direction}": _interval(removed[f"{method}/{direction}"]["area_minus_random"])
        for method in ("gradient", PROBE)
        for direction in ("negative", "positive")
    }
    keeps = found["gradient/negative"].low > found[f"{PROBE}/negative"].high
    loses = found["gradient/positive"].high < found[f"{PROBE}/positive"].low
    areas = "; ".join(
        f"{words} {cell(found[f'{method}/negative'])} and {cell(found[f'{method}/positive'])}"
        for method, words in (("gradient", "gradient"), (PROBE, "probes"))
    )
    answer = Answer(
        f"top-1 of image tokens after the last block {percent(own[-1])} by the class embedding, "
        f"{percent(probe[-1])} by probes, difference {percent(ahead[-1])}; area of the "
        "perturbation test minus that of a random order, least and most relevant first: "
        f"{areas}",
        ahead[-1].low > 0 and keeps and loses,
    )
    rows = [
        [str(i + 1), percent(a), percent(b), percent(d)]
        for i, (a, b, d) in enumerate(zip(own, probe, ahead, strict=True))
    ]
    cells = [
        [
            method,
            direction,
            cell(_interval(removed[f"{method}/{direction}"]["area"])),
            cell(found[f"{method}/{direction}"]),
            cell(_interval(removed[f"{method}/{direction}"]["area_minus_wrong"])),
        ]
        for method in ("gradient", PROBE)
        for direction in ("negative", "positive")
    ]
    tables = [
        ("Top-1 of image tokens", ("block", "class embedding", "probes", "difference"), rows),
        (
            "Perturbation test",
            ("order by", "removed first", "area", "minus random", "minus a wrong class's"),
            cells,
        ),
    ]
    note = (
        f"Probes are fitted on {metrics['probes']['n_fitted']} images and measured on {len(ids)} "
        "others. The gradient is of the class score, which the class embedding gives; negative "
        "removes the least relevant first."
    )
    return Finding({"tokens-probes": answer}, tables, drawn, metrics, ids, [note])


def measure_token_models(request: Request) -> Finding:
    """Reads the tokens of several models: the table of the seven, one row for each model."""
    rows, metrics, ids = [], {}, []
    known: list[bool] = []
    shares = {}
    for name in request.settings.models("tiny/vit"):
        reading = _read(request, name, N_TOKENS, null=True)
        found = reading.metrics
        names = ("identifiability_rate", "any_identified", "accuracy")
        own = {n: _interval(found["intervals"][n]) for n in names if n in found["intervals"]}
        random = found["random_model"]["identifiability_rate"]
        published = PUBLISHED.get(canonical_name(name))
        shares[name] = own["identifiability_rate"]
        known.append(shares[name].low > random)
        rows.append(
            [
                published[0] if published else name,
                *(percent(own[n]) if n in own else "–" for n in names),
                f"{100 * random:.2f} %",
                f"{published[1]:.2f} %" if published else "–",
            ]
        )
        metrics[name] = dict(found)
        ids = list(reading.images.ids)
    header = (
        "model",
        "image tokens that say their class",
        "images with such a token",
        "accuracy",
        "random weights",
        "published",
    )
    words = ", ".join(
        f"{name} {percent(share)}, random weights {row[4]}"
        for (name, share), row in zip(shares.items(), rows, strict=True)
    )
    answers = {"tokens-models": Answer(words, all(known))}
    return Finding(answers, [("Models", header, rows)], {}, metrics, ids)


def _curve(metrics: dict[str, Any], kind: str) -> list[Interval]:
    found = metrics["intervals"][f"identifiability_by_block/{kind}"]
    return [_interval(one) for one in found]


def _interval(one: Mapping[str, Any]) -> Interval:
    return Interval(**one)


def _removal(metrics: Mapping[str, Any], direction: str) -> Interval:
    """Returns the area of an order by the gradient minus that of a random one."""
    return _interval(metrics[f"gradient/{direction}"]["area_minus_random"])
