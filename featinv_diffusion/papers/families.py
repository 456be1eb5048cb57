"""Swin and DeiT beside ViT and DETR: inverses of any timm classifier's stages, trained on the spot.

Source: a later version of the follow-up "Understanding Transformer-based Vision Models through
Inversion", of which a summary was at hand. What is asked of each family is what `spatial` asks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from featinv_diffusion.backbones import load_backbone
from featinv_diffusion.backbones.names import canonical_name
from featinv_diffusion.errors import InputError
from featinv_diffusion.figures.board import draw_bars, draw_grid
from featinv_diffusion.inverters.modular import (
    InverseSet,
    ModularInverter,
    PathInfo,
    classifier_path,
)
from featinv_diffusion.inverters.path import IMAGE, ClassifierPath
from featinv_diffusion.inverters.swin import is_swin
from featinv_diffusion.metrics.statistics import Interval, bootstrap_mean
from featinv_diffusion.papers.base import Answer, Finding, Request, cell
from featinv_diffusion.papers.cost import EPOCHS, fit_modules
from featinv_diffusion.papers.reconstruction import short
from featinv_diffusion.papers.spatial import compare_stages, make_changes, weight_of
from featinv_diffusion.studies.stages import AVERAGE, open_modular, stage_mse
from featinv_diffusion.studies.study import to_dicts
from featinv_diffusion.training.inverter import (
    ModuleConfig,
    make_inverse,
    measure_statistics,
    set_statistics,
)
from featinv_diffusion.types import Images

N_DEFAULT, N_HELD = 600, 100
DETR, DETR_STAGE = "detr", "encoder"
"""What is compared with: the bundled DETR with its bundled inverses, which trained for longer."""
DEPTH, WIDTH = 2, 64
"""Blocks of each inverse, and channels of the first hidden map on the way to pixels."""


@dataclass(frozen=True, eq=False)
class _Stage:
    """A stage of a model, over the held-out images."""

    mse: Interval
    average: Interval
    place: Interval
    inside: Interval
    colour: Interval


def measure_families(request: Request) -> Finding:
    """Trains inverses of the stages of each model, and compares its last stage with a DETR's."""
    found: dict[str, _Stage] = {}
    columns: dict[str, Images] = {}
    last: list[str] = []
    for name in request.settings.models("tiny/swin", "tiny/vit"):
        path = open_classifier(name)
        fit, held, ids = _split(request, max(path.input_size))
        inverter = _train(request, path, fit)
        stages = inverter.inverses.stages
        measured, drawn = _measure(request, inverter, stages, held, short(name))
        found |= measured
        columns |= drawn
        last.append(f"{short(name)}: {stages[-1]}")
    _, held, ids = _split(request, max(open_modular(DETR).path.input_size))
    found |= _measure(request, open_modular(DETR), [DETR_STAGE], held, DETR)[0]
    return _report(found, last, columns, ids, len(held))


def open_classifier(name: str) -> ClassifierPath:
    """Opens the forward path of any timm ViT, DeiT or Swin.

    Raises:
        InputError: another model.
    """
    backbone = load_backbone(name)
    return classifier_path(backbone, "swin" if is_swin(backbone.model) else "vit")


def module_configs(path: ClassifierPath) -> dict[str, ModuleConfig]:
    """Returns an inverse for each stage of a Swin, or for half and all of the blocks of a ViT.

    Blocks have the heads and windows of those that they undo.
    """
    strides = _factors(path.input_size[0] // _grid(path)[0])
    channels = tuple(max(16, WIDTH // 2**i) for i in range(len(strides) - 1))
    configs = {"patches": ModuleConfig(channels=channels, kernels=strides, strides=strides)}
    model: Any = path.model
    if path.family == "swin":
        before = "patches"
        for i, layer in enumerate(model.layers):
            first = layer.blocks[0]
            configs[f"layers.{i}"] = ModuleConfig(
                "swin",
                before,
                depth=DEPTH,
                n_heads=first.attn.num_heads,
                window=max(first.window_size),
            )
            before = f"layers.{i}"
        return configs
    heads = model.blocks[0].attn.num_heads
    for stage in (f"blocks.{(len(model.blocks) - 1) // 2}", "encoder"):
        configs[stage] = ModuleConfig("blocks", "patches", depth=DEPTH, n_heads=heads)
    return configs


def _grid(path: ClassifierPath) -> tuple[int, int]:
    spec = path.spec("patches")
    return spec.grid if spec.kind == "map" else path.spec("last").grid


def _factors(n: int) -> tuple[int, ...]:
    """Returns the prime factors of n, the largest first: a stride for each."""
    found, divisor = [], 2
    while n > 1:
        while n % divisor == 0:
            found.append(divisor)
            n //= divisor
        divisor += 1
    return tuple(reversed(found)) or (1,)


def _split(request: Request, side: int) -> tuple[Images, Images, list[str]]:
    pictures = request.pictures(N_DEFAULT, side)
    n_held = min(N_HELD, len(pictures) // 2)
    if n_held < 1:
        raise InputError(f"This item needs at least 2 images, got {len(pictures)}. Take more.")
    return pictures.images[:-n_held], pictures.images[-n_held:], pictures.ids


def _train(request: Request, path: ClassifierPath, images: Images) -> ModularInverter:
    """Trains every module on its own against the embedding that it writes."""
    seed, batch = request.settings.seed, min(request.settings.batch_size, len(images))
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        modules = {s: make_inverse(path, s, one) for s, one in module_configs(path).items()}
        inverses = InverseSet(modules, PathInfo(path.family, canonical_name(path.name)))
        read = {IMAGE} | set(modules) | {one.writes.layer for one in modules.values()}
        set_statistics(inverses, measure_statistics(path, sorted(read), images, batch))
        for module in modules.values():
            fit_modules(path, [module.train()], images, batch, seed)
    finally:
        torch.set_rng_state(state)
    return ModularInverter(inverses.eval(), path)


def _measure(
    request: Request, inverter: ModularInverter, stages: list[str], held: Images, name: str
) -> tuple[dict[str, _Stage], dict[str, Images]]:
    seed, size = request.settings.seed, request.settings.batch_size
    changes = make_changes(held, torch.ones(len(held), *held.shape[2:], dtype=torch.bool), seed)
    average = bootstrap_mean(stage_mse({}, held)[AVERAGE])
    found, drawn = {}, {f"{name}: input": changes.turned}
    for stage, one in compare_stages(inverter, stages, held, changes, seed, size).items():
        measured, drawn[f"{name}: {stage}"] = one
        found[f"{name}: {stage}"] = _Stage(
            mse=bootstrap_mean(measured.mse),
            average=average,
            place=bootstrap_mean(measured.place),
            inside=bootstrap_mean(measured.inside),
            colour=weight_of(measured.passed),
        )
    return found, drawn


def _report(
    found: dict[str, _Stage],
    last: list[str],
    columns: dict[str, Images],
    ids: list[str],
    n_held: int,
) -> Finding:
    detr = found[f"{DETR}: {DETR_STAGE}"]
    nearer = [
        found[one].mse.high < detr.mse.low
        and found[one].place.low > detr.place.high
        and found[one].inside.low > detr.inside.high
        and found[one].colour.low > detr.colour.high
        for one in last
    ]
    shown = [*last, f"{DETR}: {DETR_STAGE}"]
    words = "; ".join(
        f"{what} {', '.join(f'{n} {getattr(found[n], field).value:.{digits}f}' for n in shown)}"
        for what, field, digits in (
            ("MSE", "mse", 4),
            ("content follows its cell:", "place", 2),
            ("share of a patch's change inside it:", "inside", 2),
            ("colour passed on:", "colour", 2),
        )
    )
    rows = [
        [
            name,
            cell(one.mse, 4),
            cell(one.average, 4),
            cell(one.place, 2),
            cell(one.inside, 2),
            cell(one.colour, 2),
        ]
        for name, one in found.items()
    ]
    header = (
        "stage",
        "MSE",
        "of the average image",
        "follows its cell",
        "patch's change inside",
        "colour passed on",
    )
    note = (
        f"Inverses of the classifiers: {EPOCHS} epochs of {len(ids) - n_held} images, measured on "
        f"{n_held} others; those of the DETR are the bundled ones, which trained for longer. "
        "Pictures: hue turned by 120°."
    )
    drawn = {
        "mse.png": draw_bars(
            {n: one.mse for n, one in found.items()}, "From each stage", "MSE, 95 % interval"
        ),
    }
    sizes = {images.shape[-2:] for images in columns.values()}
    if len(sizes) == 1:
        drawn["pictures.png"] = draw_grid(columns, "Hue turned by 120°, each stage", [], 4)
    metrics = {
        name: to_dicts({"mse": one.mse, "average_image": one.average, "place": one.place,
                        "inside": one.inside, "colour": one.colour})
        for name, one in found.items()
    }  # fmt: skip
    return Finding(
        {"vit-families": Answer(words, all(nearer))},
        [("Stages of each family", header, rows)],
        drawn,
        {"stages": metrics, "epochs": EPOCHS, "n_held_out": n_held},
        ids,
        [note],
    )
