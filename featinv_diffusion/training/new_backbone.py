"""A FeatInv for a backbone that has none, in a given time: a new head on the trunk of a pipeline.

What the time buys on this machine is measured before anything is trained. The head is fitted to the
trunk's own by regression first, which needs no UNet, then trained with the diffusion loss.
"""

from __future__ import annotations

import json
import logging
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from featinv_diffusion import schema
from featinv_diffusion.backbones import Backbone
from featinv_diffusion.backbones.names import resolve_backbone
from featinv_diffusion.config import to_yaml
from featinv_diffusion.data import crops
from featinv_diffusion.data.crops import (
    CropDataset,
    DataConfig,
    open_training_images,
    to_images,
)
from featinv_diffusion.diffusion.featinv_pipeline import FeatInvPipeline
from featinv_diffusion.diffusion.folders import (
    BASE,
    CONTROLNET,
    CardInfo,
    bundled_folder,
    feature_spec_of,
    list_bundled,
    load_controlnet,
    make_timm_wrapper,
)
from featinv_diffusion.diffusion.hub import export_pipeline, load_pipeline
from featinv_diffusion.errors import InputError
from featinv_diffusion.files import write_text
from featinv_diffusion.metrics.features import centred_cosine, feature_cosine, shuffled_cosine
from featinv_diffusion.seeds import derive_seed, make_generator
from featinv_diffusion.training.config import (
    TRAINED,
    NewBackboneSettings,
    OptimConfig,
    RunConfig,
)
from featinv_diffusion.training.controlnet import (
    ControlNetConfig,
    ControlNetModelConfig,
    ControlNetTask,
    FrozenParts,
    ValidationConfig,
    load_frozen_parts,
    make_controlnet,
    open_data,
    read_pipeline_pairs,
    set_feature_statistics,
    train_controlnet,
)
from featinv_diffusion.training.entry import make_datasets, stack_images, stack_items
from featinv_diffusion.training.feature_cache import ControlNetCacheConfig
from featinv_diffusion.training.imitation import BATCH, ImitationConfig, imitate
from featinv_diffusion.training.latents import encode_posterior
from featinv_diffusion.training.loop import frozen_dtype, make_optimizer
from featinv_diffusion.trust import FACTORY
from featinv_diffusion.types import Features

PLAN, FIGURES, PIPELINE, CACHE = "plan.json", "figures.json", "pipeline", "cache"
IMITATION_SHARE, REST_SHARE = 0.5, 0.1
"""Shares of the time: of reading and the regression, and of validation, evaluation and packing."""
IMITATED_BYTES, EPOCHS = 4 * 2**30, 5
"""Memory that the maps and conditions of the regression may take, and passes over them."""
DISK_SHARE = 0.5
"""Of the free disk, what the maps and latents of the images may take."""
MIN_STEPS = 10
N_TIMED = 2


@dataclass(frozen=True)
class Costs:
    """Seconds on this machine, and the memory that a step took.

    Args:
        step: of one step of training.
        read: per image, of its latent, its map and the condition to be given of it.
        regression: of one step of the regression.
        memory: bytes, of the GPU where there is one, else of the process.
        pair: bytes of memory per image of the regression.
        row: bytes of disk per image.
        features_dtype: number format of the maps, on which both bytes depend.
    """

    step: float
    read: float
    regression: float
    memory: int
    pair: int
    row: int
    features_dtype: str


@dataclass(frozen=True)
class Plan:
    """What a time buys; kept in the output folder, so that a resumed run has the same.

    Args:
        n_images: read once; the regression and the training have no others.
        n_imitated, epochs: of the regression.
        n_steps: of training.
    """

    minutes: float
    batch_size: int
    n_images: int
    n_imitated: int
    epochs: int
    n_steps: int
    costs: Costs

    @classmethod
    def of(cls, minutes: float, batch_size: int, n_images: int, costs: Costs) -> Plan:
        """Divides the time; a regression on fewer images than a batch is left out.

        Args:
            n_images: that there are, and room for.
        """
        seconds = 60 * minutes * (1 - REST_SHARE)
        first, regression = IMITATION_SHARE * seconds, EPOCHS * costs.regression / BATCH
        fitting = IMITATED_BYTES // costs.pair
        n = first / (costs.read + regression)
        if n > fitting:
            n = max(fitting, (first - fitting * regression) / costs.read)
        n = max(min(int(n), n_images), min(batch_size, n_images))
        n_imitated = min(n, fitting) if n >= BATCH else 0
        rest = seconds - n * costs.read - n_imitated * regression
        n_steps = max(MIN_STEPS, int(rest / costs.step))
        return cls(minutes, batch_size, n, n_imitated, EPOCHS, n_steps, costs)

    def __str__(self) -> str:
        costs, n_trained = self.costs, self.n_steps * self.batch_size
        regression = self.n_imitated * self.epochs * costs.regression / BATCH / 60
        reading = self.n_images * costs.read / 60
        fitted = (
            f"a regression of the head on {self.n_imitated:,} of them ({regression:.1f} min), "
            if self.n_imitated
            else ""
        )
        return (
            f"A step of {self.batch_size} images takes {costs.step:.2f} s here and "
            f"{costs.memory / 2**30:.1f} GiB of memory. {self.minutes:g} minutes buy "
            f"about {self.n_images:,} images, whose maps take {reading:.1f} min "
            f"and {self.n_images * costs.row / 2**30:.1f} GiB of disk until the end, {fitted}and "
            f"{self.n_steps:,} steps, {n_trained / self.n_images:.1f} times through them "
            f"({self.n_steps * costs.step / 60:.1f} min); the rest is for validation and figures."
        )


@dataclass(frozen=True)
class Result:
    """What came of it.

    Args:
        folder: of the pipeline.
        figures: of the held-back images.
    """

    folder: Path
    plan: Plan
    figures: dict[str, float]


def make_new_backbone(
    name: str,
    settings: NewBackboneSettings,
    output: Path,
    *,
    command: str = "",
    say: Callable[[str], object] = print,
) -> Result:
    """Trains, evaluates and packs a pipeline for a backbone; the same call goes on where it ended.

    Args:
        name: for `load_backbone`.
        output: gets `training/`, `plan.json`, `figures.json` and the pipeline as `pipeline/`; and
            `cache/` while it runs.
        command: the command that the pipeline's card names.
        say: is told what the time buys, and what is done.

    Raises:
        InputError: settings that cannot be met.
    """
    with _each_note_once():
        config = make_config(name, settings, output)
        parts = load_frozen_parts(config.model, config.run.channels_last)
        plan = _read_plan(output / PLAN, settings)
        if plan is None:
            costs = measure_costs(config, parts, settings.trunk)
            n_images = len(open_data(config)[0])  # pyright: ignore[reportArgumentType]
            output.mkdir(parents=True, exist_ok=True)
            room = int(DISK_SHARE * shutil.disk_usage(output).free) // costs.row
            n_images = min(n_images, max(room, settings.batch_size))
            plan = Plan.of(settings.minutes, settings.batch_size, n_images, costs)
            write_text(output / PLAN, json.dumps(asdict(plan), indent=2) + "\n")
        say(str(plan))
        config = planned(config, plan, settings.trunk)
        final = train_controlnet(config)
        pipeline = assemble_new(name, config, final, settings.trunk)
        figures = evaluate_new(pipeline, parts.backbone, config, settings)
        write_text(output / FIGURES, json.dumps(figures, indent=2) + "\n")
        say(describe(figures))
        folder = output / PIPELINE
        if not folder.exists():
            export_pipeline(
                pipeline, folder, CardInfo(command or name, notes=_notes(config, figures))
            )
        shutil.rmtree(output / CACHE, ignore_errors=True)
        return Result(folder, plan, figures)


@contextmanager
def _each_note_once() -> Iterator[None]:
    """Keeps what a data set has to say from being said each time that it is opened."""
    said: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        new = text not in said
        said.add(text)
        return new

    notes = logging.getLogger(crops.__name__)
    notes.addFilter(is_new)
    try:
        yield
    finally:
        notes.removeFilter(is_new)


def make_config(name: str, settings: NewBackboneSettings, output: Path) -> ControlNetConfig:
    """Returns the training of a new head on a trunk, without its lengths."""
    if not settings.data:
        raise InputError("Images must be named to train on: --data FOLDER.")
    base, controlnet = _find_trunk(settings.trunk)
    trunk = load_controlnet(Path(controlnet))
    data = DataConfig(
        root=settings.data, split=settings.split, crop="center", num_workers=1, hflip=True
    )
    pictures = open_training_images(data)
    n_classes = len(set(pictures.labels or [0]))
    held_back = -(-settings.n_evaluated // n_classes)
    if held_back * n_classes * 2 > len(pictures):
        raise InputError(
            f"Images to train on must be left, but {settings.data} has {len(pictures)} and "
            f"{held_back * n_classes} are held back. Give more images, or a smaller --n-evaluated."
        )
    pipeline = load_pipeline(settings.trunk)
    width = trunk.config["feature_hidden_channels"]
    size = pipeline.unet.config["sample_size"] * pipeline.vae_scale_factor
    precision: Any = settings.mixed_precision  # one of the choices, as the next
    dtype: Any = settings.features_dtype
    validation = ValidationConfig(
        num_inference_steps=pipeline.config["default_num_inference_steps"],
        guidance_scale=pipeline.config["default_guidance_scale"],
        guidance=pipeline.config["default_guidance"],
        scheduler="dpmsolver++",
    )
    return ControlNetConfig(
        seed=settings.seed,
        data=replace(data, held_back_per_class=held_back, size=size),
        model=ControlNetModelConfig(
            base=base,
            backbone=name,
            layer=settings.layer,
            feature_hidden_channels=width,
            feature_projection_channels=width,
            statistics_images=min(512, len(pictures)),
            warm_start=controlnet,
            trained=TRAINED[settings.trunk_is],
            prompt=pipeline.config["default_prompt"],
        ),
        imitation=ImitationConfig(epochs=EPOCHS),
        cache=ControlNetCacheConfig(str(output / CACHE), 1, features=True, features_dtype=dtype),
        optim=OptimConfig(
            optimizer="muon",
            lr=0.002,
            weight_decay=0.0,
            batch_size=settings.batch_size,
            epochs=100_000,
            schedule="linear",
            ema_decay=0.98,
        ),
        validation=validation,
        run=RunConfig(
            output=str(output / "training"),
            mixed_precision=precision,
            channels_last=True,
            n_validation_images=min(16, settings.n_evaluated),
        ),
    )


def _find_trunk(name: str) -> tuple[str, str]:
    """Returns the folder of the base and that of the ControlNet of a pipeline.

    Raises:
        InputError: neither a bundled pipeline with a whole ControlNet nor a folder.
    """
    if name in list_bundled():
        folder = bundled_folder(name)
        base = folder.parent / BASE
    else:
        folder = base = Path(name).expanduser()
    if not (folder / CONTROLNET).is_dir():
        raise InputError(
            f"The trunk must be a bundled pipeline, one of {', '.join(list_bundled())}, or a "
            f"pipeline folder with its {CONTROLNET}, but {name!r} is neither."
        )
    return str(base), str(folder / CONTROLNET)


def planned(config: ControlNetConfig, plan: Plan, trunk: str) -> ControlNetConfig:
    """Returns the config with the lengths of a plan, and of each class as many images."""
    n_classes = len(set(open_training_images(config.data).labels or [0]))
    data = replace(config.data, train_per_class=-(-plan.n_images // n_classes))
    imitation = config.imitation
    if plan.n_imitated:
        imitation = replace(imitation, pipeline=trunk, n_images=plan.n_imitated, epochs=plan.epochs)
    optim = replace(config.optim, max_steps=plan.n_steps, warmup_steps=min(50, plan.n_steps // 10))
    run = replace(
        config.run,
        validate_every=max(1, plan.n_steps // 5),
        checkpoint_every=max(1, min(50, plan.n_steps // 10)),
    )
    return replace(config, data=data, imitation=imitation, optim=optim, run=run)


def measure_costs(config: ControlNetConfig, parts: FrozenParts, trunk: str) -> Costs:
    """Times a few steps of what is to be run, after one that is not counted."""
    torch.manual_seed(derive_seed(config.seed, "initial weights"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train, validation = open_data(config)
    assert isinstance(train, CropDataset)
    controlnet: Any = make_controlnet(config.model, parts)
    task = ControlNetTask(controlnet, parts, config, validation)
    dtype = frozen_dtype(config.run)
    task.to(device, dtype)
    controlnet.to(device)
    if config.run.channels_last:
        controlnet.to(memory_format=torch.channels_last)
    trained = [p for p in controlnet.parameters() if p.requires_grad]
    optimizer = make_optimizer(trained, config.optim)

    few = stack_items(train, min(16, len(train)))
    images, n = to_images(few["pixels"]).to(device), len(few["pixels"])
    set_feature_statistics(controlnet, parts.backbone, images)
    imitation = replace(config.imitation, pipeline=trunk, epochs=1, n_images=n)
    kept_in = config.cache.features_dtype
    two = replace(imitation, n_images=2)
    read_pipeline_pairs(parts, train, two, kept_in)  # loads the pipeline, not counted
    start = time.perf_counter()
    pairs = read_pipeline_pairs(parts, train, imitation, kept_in)
    mean, std = encode_posterior(parts.vae, images, parts.image_size)
    read = (time.perf_counter() - start) / n
    start = time.perf_counter()
    imitate(controlnet, pairs, imitation)
    regression = (time.perf_counter() - start) * BATCH / min(BATCH, n)
    rows = torch.arange(config.optim.batch_size) % n
    batch = {
        "features": pairs.features[rows].to(device),
        "latent_mean": mean[rows],
        "latent_std": std[rows],
        "seed": few["seed"][rows].to(device),
    }

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = task.loss(controlnet, batch)[0]
        loss.backward()
        optimizer.step()

    per_step = _seconds(step, device)
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device)
    else:  # kilobytes, but on macOS bytes
        unit = 1 if sys.platform == "darwin" else 1024
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    pair = (pairs.features.nbytes + pairs.conditions.nbytes) // n
    row = (pairs.features.nbytes + 2 * mean.half().nbytes) // n
    return Costs(per_step, read, regression, memory, pair, row, kept_in)


def _seconds(step: Callable[[], None], device: torch.device) -> float:
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(N_TIMED):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / N_TIMED


def assemble_new(name: str, config: ControlNetConfig, final: Path, trunk: str) -> FeatInvPipeline:
    """Joins the trained ControlNet with the other parts of the trunk's pipeline.

    A backbone that is no timm model cannot travel in a pipeline, which then is opened with
    `--backbone`.
    """
    pipeline = load_pipeline(trunk)
    backbone: Any = None
    if not FACTORY.fullmatch(name) and resolve_backbone(name).source == "timm":
        backbone = make_timm_wrapper(resolve_backbone(name).target)
    parts = pipeline.components | {
        "controlnet": load_controlnet(final),
        "backbone": backbone,
    }
    defaults = {
        key: pipeline.config[key]
        for key in (
            "default_prompt",
            "default_num_inference_steps",
            "default_guidance_scale",
            "default_guidance",
        )
    }
    return FeatInvPipeline(**parts, **defaults, through=config.data.size)


@torch.no_grad()
def evaluate_new(
    pipeline: FeatInvPipeline,
    backbone: Backbone,
    config: ControlNetConfig,
    settings: NewBackboneSettings,
) -> dict[str, float]:
    """Returns figures of one sample of each held-back image, beside their nulls.

    Keys: `cosine` and `centred_cosine`, less the mean cell of these maps; both with the suffixes
    `_of_another_image` and, for the first, `_of_shuffled_cells`; `n_images`.
    """
    _, held = make_datasets(open_training_images(config.data), config.data, config.seed)
    images = stack_images(held, settings.n_evaluated)[0]
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(backbone.device)
    maps: list[Features] = []
    again: list[Features] = []
    for first in range(0, len(images), settings.batch_size):
        features = backbone.features(
            images[first : first + settings.batch_size].to(backbone.device)
        )
        generators = [
            make_generator(settings.seed, "evaluation", first + i) for i in range(len(features))
        ]
        samples: Any = pipeline(features=features, generator=generators, output_type="pt")
        maps.append(features.cpu())
        again.append(backbone.features(samples.images.float()).cpu())
    original, seen = torch.cat(maps), torch.cat(again)
    mean = original.float().mean(dim=(0, 2, 3))[:, None, None]
    shuffled = shuffled_cosine(original, seen, make_generator(settings.seed))
    values = {
        "cosine": feature_cosine(original, seen),
        "cosine_of_another_image": feature_cosine(original.roll(1, 0), seen),
        "cosine_of_shuffled_cells": shuffled,
        "centred_cosine": centred_cosine(original, seen, mean),
        "centred_cosine_of_another_image": centred_cosine(original.roll(1, 0), seen, mean),
    }
    return {name: float(value.mean()) for name, value in values.items()} | {
        "n_images": float(len(original))
    }


def describe(figures: dict[str, float]) -> str:
    """Returns the figures as sentences, each beside its nulls."""
    own, other = figures["cosine"], figures["cosine_of_another_image"]
    text = (
        f"On {figures['n_images']:.0f} held-back images: cosine {own:.3f} (another image "
        f"{other:.3f}, cells shuffled {figures['cosine_of_shuffled_cells']:.3f}); centred "
        f"{figures['centred_cosine']:.3f} (another image "
        f"{figures['centred_cosine_of_another_image']:.3f})."
    )
    if own <= other:
        text += " The samples show nothing of the maps yet: an effect below its null is none."
    return text


def _read_plan(path: Path, settings: NewBackboneSettings) -> Plan | None:
    """Returns the plan of an interrupted run.

    Raises:
        InputError: a plan of another time, batch size or number format.
    """
    if not path.is_file():
        return None
    advice = "Remove it, or name another --output."
    plan: Plan = schema.convert(
        schema.read_json(path, dict[str, Any], advice), Plan, str(path), advice
    )
    wanted = settings.minutes, settings.batch_size, settings.features_dtype
    if (plan.minutes, plan.batch_size, plan.costs.features_dtype) != wanted:
        raise InputError(
            f"{path.parent} holds a run of {plan.minutes:g} minutes in batches of "
            f"{plan.batch_size} with maps in {plan.costs.features_dtype}. Go on with these, or "
            "name another --output."
        )
    return plan


def _notes(config: ControlNetConfig, figures: dict[str, float]) -> str:
    spec = feature_spec_of(load_controlnet(Path(config.run.output) / "final"))
    shown = f"\n{describe(figures)}\n"
    through = f"The backbone sees pictures through {config.data.size} pixels.\n"
    text = to_yaml(replace(config, run=RunConfig(), data=replace(config.data, root=None)))
    return f"## Figures\n{shown}\n{through}\nFeatures: {spec}.\n\n```yaml\n{text}```"
