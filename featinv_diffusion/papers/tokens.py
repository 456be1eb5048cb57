"""What the tokens of a ViT say by its class embedding, item by item.

Source: Vilas et al. 2023, of which the abstract was at hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from featinv_diffusion.backbones import load_backbone
from featinv_diffusion.class_embedding.study import read_tokens
from featinv_diffusion.errors import InputError
from featinv_diffusion.metrics.statistics import Interval
from featinv_diffusion.papers.base import Answer, Finding, Request, cell, percent

N_TOKENS = 200


def measure_tokens_of_paper(request: Request) -> Finding:
    """Reads the tokens of a ViT by its class embedding, beside random weights and ablations."""
    backbone = load_backbone(request.settings.models("tiny/vit")[0])
    choice = request.settings.images
    if choice.data is None:
        raise InputError("This item reads a data set with classes. Name it with --data.")
    reading = read_tokens(
        backbone,
        choice.data,
        split=choice.split,
        classes=choice.classes,
        n_images=request.settings.n_images or N_TOKENS,
        ablations=True,
        null=True,
        perturbation=True,
        n_points=5,
        n_random=1,
        inverters=(),
        seed=request.settings.seed,
        batch_size=request.settings.batch_size,
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


def _curve(metrics: dict[str, Any], kind: str) -> list[Interval]:
    found = metrics["intervals"][f"identifiability_by_block/{kind}"]
    return [_interval(one) for one in found]


def _interval(one: Mapping[str, Any]) -> Interval:
    return Interval(**one)


def _removal(metrics: Mapping[str, Any], direction: str) -> Interval:
    """Returns the area of an order by the gradient minus that of a random one."""
    return _interval(metrics[f"gradient/{direction}"]["area_minus_random"])
