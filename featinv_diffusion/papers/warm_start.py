"""A ControlNet that begins with another backbone's, against one that begins with the UNet.

Source: "FeatInv: Spatially resolved mapping from feature space to input space", which says that to
fine-tune a trained model for another backbone could be beneficial.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor, nn

from featinv_diffusion.diffusion.featinv_controlnet import FeatureControlNet
from featinv_diffusion.errors import InputError
from featinv_diffusion.figures.board import (
    BLUE,
    GREY,
    ORANGE,
    TEXT,
    TITLE,
    draw_grid,
    plain_figure,
)
from featinv_diffusion.inverters.diffusion import DiffusionInverter
from featinv_diffusion.metrics import feature_cosine
from featinv_diffusion.metrics.statistics import (
    Interval,
    bootstrap_difference,
    bootstrap_mean,
)
from featinv_diffusion.papers.base import Answer, Finding, Request, cell
from featinv_diffusion.papers.reconstruction import draw_samples, features_of, open_pipeline, short
from featinv_diffusion.seeds import derive_seed, make_generator
from featinv_diffusion.studies.study import to_dicts
from featinv_diffusion.training.config import OptimConfig
from featinv_diffusion.training.controlnet import (
    ControlNetConfig,
    ControlNetModelConfig,
    ControlNetTask,
    FrozenParts,
    begin_with,
    make_controlnet,
    set_feature_statistics,
)
from featinv_diffusion.training.latents import encode_posterior
from featinv_diffusion.training.loop import learning_rate, make_optimizer
from featinv_diffusion.types import Features, Images

COLD, WARM = "cold", "warm"
COLOURS = {COLD: BLUE, WARM: ORANGE}
N_DEFAULT, EPOCHS, N_HELD = 504, 5, 24
"""Images, passes over those of them that are trained on, and images that are measured on."""
POINTS = (1 / 10, 1 / 5, 1 / 2, 1.0)
"""Where the curves are measured, as shares of the steps."""
OPTIM = OptimConfig(optimizer="muon", lr=0.01, weight_decay=0.0, warmup_steps=20, schedule="linear")
"""That of the bundled models, whose ControlNets it was chosen for."""


@dataclass(frozen=True, eq=False)
class _Curve:
    """What a ControlNet reaches while it is trained.

    Args:
        cosine, null: of each held-out image at each point, to its own map and to another's.
        images: samples of the held-out maps at the end.
    """

    cosine: Float[Tensor, "points b"]
    null: Float[Tensor, "points b"]
    images: Images


def measure_warm_start(request: Request) -> Finding:
    """Trains a ControlNet twice with the same batches and noise, and follows what it reaches."""
    names = request.settings.models("tiny/swin", "tiny/convnext")
    if len(names) != 2:
        raise InputError(
            "A warm start needs two pipelines of one base, as --model MINE,OTHER: the one that is "
            f"trained, and the one whose ControlNet it begins with; got {len(names)}."
        )
    inverter = open_pipeline(names[0], request.settings.device)
    inverter.pipeline.unet.requires_grad_(False)
    other = open_pipeline(names[1], request.settings.device).pipeline.controlnet
    assert isinstance(other, FeatureControlNet)
    pictures = request.pictures(N_DEFAULT, max(inverter.image_size))
    n_held = min(N_HELD, max(1, len(pictures) // 4))
    if len(pictures) <= n_held:
        raise InputError(f"A training needs at least 2 images, got {len(pictures)}. Take more.")
    fit, held = pictures.images[:-n_held], pictures.images[-n_held:]
    size = min(request.settings.batch_size, len(fit))
    n_steps = EPOCHS * (len(fit) // size)
    points = sorted({max(1, round(share * n_steps)) for share in POINTS})
    held_back = (held, pictures.seeds[-n_held:])
    curves = {
        name: _train(request, inverter, source, fit, held_back, points, size)
        for name, source in ((COLD, None), (WARM, other))
    }
    return _report(names, pictures.ids, held, curves, points, size)


def _train(
    request: Request,
    inverter: DiffusionInverter,
    source: FeatureControlNet | None,
    images: Images,
    held: tuple[Tensor, Sequence[int]],
    points: Sequence[int],
    batch_size: int,
) -> _Curve:
    """Trains a fresh ControlNet of the pipeline, from the UNet's encoder or from another's weights.

    Everything drawn at random, the weights of the feature encoder too, is the same for both.
    """
    seed, pipeline = request.settings.seed, inverter.pipeline
    backbone = inverter.require_backbone()
    parts = FrozenParts.of(inverter)
    config = pipeline.controlnet.config
    model = ControlNetModelConfig(
        feature_hidden_channels=config["feature_hidden_channels"],
        pooled=config["feature_pooled"],
    )
    state = torch.get_rng_state()
    torch.manual_seed(derive_seed(seed, "initial weights"))
    try:
        controlnet: Any = make_controlnet(model, parts)
        controlnet.to(inverter.pipeline.device)
    finally:
        torch.set_rng_state(state)
    if source is not None:
        begin_with(controlnet, source)
    set_feature_statistics(controlnet, backbone, images, batch_size)
    task = ControlNetTask(controlnet, parts, ControlNetConfig(seed=seed, model=model), held[0])
    data = _encode(inverter, images, batch_size)
    parameters = [p for p in controlnet.parameters() if p.requires_grad]
    optimizer = make_optimizer(parameters, OPTIM)
    wanted = features_of(backbone, held[0], batch_size)
    rows, found = [], []
    for step in range(points[-1]):
        if not rows:
            order = torch.randperm(len(images), generator=make_generator(seed, "epoch", step))
            rows = [part for part in order.split(batch_size) if len(part) == batch_size]
        chosen = rows.pop()
        batch = {name: values[chosen] for name, values in data.items()}
        batch["seed"] = torch.tensor([derive_seed(seed, step, i) for i in chosen.tolist()])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(OPTIM, step, points[-1])
        loss, _ = task.loss(controlnet, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, OPTIM.max_grad_norm)
        optimizer.step()
        if step + 1 in points:
            found.append(_reached(inverter, controlnet, wanted, held[1], batch_size))
    own, another = (torch.stack(x) for x in zip(*(f[:2] for f in found), strict=True))
    return _Curve(own, another, found[-1][2])


@torch.no_grad()
def _encode(inverter: DiffusionInverter, images: Images, batch_size: int) -> dict[str, Tensor]:
    """Returns the features and the posterior of the latents of all images, which do not change."""
    backbone, pipeline = inverter.require_backbone(), inverter.pipeline
    side = max(inverter.image_size)
    features = features_of(backbone, images, batch_size)
    posterior = [
        encode_posterior(pipeline.vae, x.to(pipeline.device), side)
        for x in images.split(batch_size)
    ]
    mean, std = (torch.cat(parts) for parts in zip(*posterior, strict=True))
    return {"features": features.to(mean.device), "latent_mean": mean, "latent_std": std}


@torch.no_grad()
def _reached(
    inverter: DiffusionInverter,
    controlnet: FeatureControlNet,
    wanted: Features,
    seeds: Sequence[int],
    batch_size: int,
) -> tuple[Tensor, Tensor, Images]:
    """Samples the held-out maps with the weights as they are now."""
    own = inverter.pipeline.controlnet
    inverter.pipeline.register_modules(controlnet=controlnet.eval())
    try:
        images, cosine = draw_samples(inverter, wanted, seeds, batch_size)
    finally:
        inverter.pipeline.register_modules(controlnet=own)
        controlnet.train()
    seen = features_of(inverter.require_backbone(), images, batch_size)
    null = feature_cosine(wanted, seen.roll(max(1, len(seen) // 2), 0))
    return cosine, null, images


def _report(
    names: Sequence[str],
    ids: Sequence[str],
    held: Images,
    curves: dict[str, _Curve],
    points: Sequence[int],
    batch_size: int,
) -> Finding:
    cosine = {n: [bootstrap_mean(row) for row in one.cosine] for n, one in curves.items()}
    null = bootstrap_mean(curves[WARM].null[-1])
    ahead = [
        bootstrap_difference(w, c)
        for w, c in zip(curves[WARM].cosine, curves[COLD].cosine, strict=True)
    ]
    mean_gap = bootstrap_difference(curves[WARM].cosine.mean(0), curves[COLD].cosine.mean(0))
    last = cosine[COLD][-1].value
    reached = [p for p, one in zip(points, cosine[WARM], strict=True) if one.value >= last]
    saved = f"the warm start is there after {reached[0]}" if reached else "the warm start is not"
    first = f"{cosine[COLD][0].value:.2f} and {cosine[WARM][0].value:.2f} after {points[0]}"
    answer = Answer(
        f"{short(names[0])}, cold and from {short(names[1])}: cosine {first} steps, "
        f"{last:.2f} and {cosine[WARM][-1].value:.2f} after {points[-1]} steps of {batch_size} "
        f"images; where the cold start ends, {saved}; mean gap over the curve {cell(mean_gap, 2)}; "
        f"of another image {null.value:.2f}",
        mean_gap.low > 0 and ahead[-1].high > 0,
    )
    rows = [
        [str(p), cell(cosine[COLD][i]), cell(cosine[WARM][i]), cell(ahead[i])]
        for i, p in enumerate(points)
    ]
    note = f"{points[-1]} steps of {batch_size} images; full trainings take many times as many."
    columns = {"original": held, **{n: one.images for n, one in curves.items()}}
    drawn = {
        "curves.png": _draw(cosine, null, points),
        "pictures.png": draw_grid(columns, f"Held-out maps of {names[0]} at the end", [note], 6),
    }
    metrics = {
        "steps": list(points),
        "batch_size": batch_size,
        **{n: [to_dicts({"c": v})["c"] for v in one] for n, one in cosine.items()},
        "ahead": [to_dicts({"d": v})["d"] for v in ahead],
        "mean_gap": to_dicts({"d": mean_gap})["d"],
        "another_image": to_dicts({"n": null})["n"],
        "n_held_out": len(held),
    }
    tables = [("Cosine of held-out maps", ("steps", COLD, WARM, "warm − cold"), rows)]
    return Finding({"featinv-warm-start": answer}, tables, drawn, metrics, ids, [note])


def _draw(cosine: dict[str, list[Interval]], null: Interval, points: Sequence[int]) -> Figure:
    figure, axes = plain_figure(4.4, 3.0)
    for name, values in cosine.items():
        axes.plot(
            points, [v.value for v in values], "o-", color=COLOURS[name], label=f"{name} start"
        )
        axes.fill_between(
            points, [v.low for v in values], [v.high for v in values],
            color=COLOURS[name], alpha=0.2, linewidth=0,
        )  # fmt: skip
    axes.axhline(null.value, color=GREY, linestyle="--", label="to another image's map")
    axes.set_xlabel("steps", fontsize=TEXT)
    axes.set_ylabel("cosine of held-out maps", fontsize=TEXT)
    axes.set_title("Warm start against cold start", fontsize=TITLE)
    axes.legend(frameon=False, fontsize=TEXT)
    return figure
