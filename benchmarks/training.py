"""Training steps of a FeatureControlNet: this package's loop against two plain ones.

    OMP_NUM_THREADS=1 python benchmarks/training.py --data .data/tiny-imagenet-200

All train the same modules of the bundled family on the same pictures, one thread, each in a process
of its own, in blocks of steps that take turns, so that a busy machine slows all of them alike:

- `plain`: in the style of diffusers' examples with accelerate: a data loader of crops, VAE and
  backbone on each batch, UNet and ControlNet, `torch.optim.AdamW` as it is.
- `published`: in the style of the released code: fp32, the backbone on one image at a time inside
  the data set.
- `ours`: the steps of `featinv_diffusion.training` without a cache; `latents` with one of latents,
  `features` with one of latents and features, `compiled` with these and `run.compile`.

Loading counts. Filling the caches and compiling, which are done once, do not.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accelerate import Accelerator
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from featinv_diffusion.backbones.names import ASSETS
from featinv_diffusion.cli.process import keep_freed_memory
from featinv_diffusion.config import load_config, to_yaml
from featinv_diffusion.data.crops import CropDataset, open_training_images, to_images
from featinv_diffusion.training.checkpoint import TrainingBar
from featinv_diffusion.training.config import OptimConfig
from featinv_diffusion.training.controlnet import (
    ControlNetConfig,
    ControlNetTask,
    FrozenParts,
    _cached,
    load_frozen_parts,
    make_controlnet,
)
from featinv_diffusion.training.entry import make_datasets
from featinv_diffusion.training.loop import _LossLog, _Run, make_accelerator

Step = Callable[[], None]


def make_config(data: str, batch_size: int, dtype: str, folder: Path, *more: str) -> Any:
    settings = {
        "data.root": data,
        "data.size": 64,
        "data.crop": "shift",
        "data.shift": 0,
        "data.num_workers": 0,
        "model.base": ASSETS / "tiny/base",
        "model.backbone": ASSETS / "tiny/convnext/backbone",
        "model.feature_hidden_channels": 128,
        "optim.batch_size": batch_size,
        "optim.epochs": 10_000,
        "run.output": folder,
        "run.tracker": "none",
        "run.mixed_precision": dtype,
        "run.channels_last": True,
    }
    values = [f"{key}={value}" for key, value in settings.items()]
    return load_config(ControlNetConfig, None, [*values, *more])


def forever(loader: Any) -> Iterator[dict[str, Any]]:
    while True:
        yield from loader


def ours(config: ControlNetConfig, train: CropDataset, accelerator: Accelerator) -> Step:
    """A step of the loop of this package, with its log, on a new ControlNet."""
    parts = load_frozen_parts(config.model)
    if config.cache.folder:
        train = _cached(config, parts, train, config.cache.folder, accelerator)
    net = make_controlnet(config.model, parts)
    task = ControlNetTask(net, parts, config, torch.empty(0))
    run = _Run(task, train, accelerator, config.optim, config.run, to_yaml(config))
    run.output.mkdir(parents=True, exist_ok=True)
    run.started, run.log = time.monotonic(), _LossLog(run.output / "losses.jsonl")
    bar = TrainingBar(run.n_steps, 0, config.optim.batch_size, enabled=False)
    batches = run._batches()
    return lambda: run._micro_step(next(batches), bar)


class _WithFeatures(Dataset):
    """Items of crops with the features of each image, computed alone."""

    def __init__(self, crops: CropDataset, parts: FrozenParts):
        self.crops, self.parts = crops, parts

    def __len__(self) -> int:
        return len(self.crops)

    @torch.no_grad()
    def __getitem__(self, i: int) -> dict[str, Any]:
        item = self.crops[i]
        image = to_images(item["pixels"][None]).to(self.parts.backbone.device)
        with torch.autocast(image.device.type, enabled=False):
            return {**item, "features": self.parts.backbone.features(image)[0]}


def plain(config: ControlNetConfig, train: CropDataset, accelerator: Any, published: bool) -> Step:
    """A step as scripts write it; `published` has features one image at a time and no autocast."""
    parts, device = load_frozen_parts(config.model), accelerator.device
    vae: Any = parts.vae.to(device)  # pyright: ignore[reportCallIssue, reportArgumentType]
    unet: Any = parts.unet.to(device)  # pyright: ignore[reportCallIssue, reportArgumentType]
    parts.backbone.to(device)
    scheduler: Any = parts.scheduler
    prompts = parts.prompt_embeds.to(device)
    net: Any = make_controlnet(config.model, parts)
    optimizer: Any = torch.optim.AdamW(net.parameters(), lr=config.optim.lr)
    data = _WithFeatures(train, parts) if published else train
    loader = DataLoader(data, config.optim.batch_size, shuffle=True, drop_last=True)
    net, optimizer, loader = accelerator.prepare(net, optimizer, loader)
    batches = forever(loader)

    def step() -> None:
        batch = next(batches)
        images = to_images(batch["pixels"].to(device))
        kind = torch.bfloat16 if config.run.mixed_precision == "bf16" else torch.float16
        reduced = config.run.mixed_precision != "fp32" and not published
        with torch.autocast(device.type, kind, enabled=reduced):
            with torch.no_grad():
                latents = vae.encode(images * 2 - 1).latent_dist.sample()
                given = batch["features"].to(device) if published else None
                features = parts.backbone.features(images) if given is None else given
            latents = latents * vae.config["scaling_factor"]
            noise = torch.randn_like(latents)
            times = torch.randint(0, 1000, (len(latents),), device=device)
            noisy = scheduler.add_noise(latents, noise, times)
            keep = torch.rand(len(latents), device=device) >= config.model.dropout
            prompt = prompts[(~keep).long()]
            down, middle = net(noisy, times, prompt, features, keep=keep, return_dict=False)
            predicted = unet(
                noisy,
                times,
                prompt,
                down_block_additional_residuals=down,
                mid_block_additional_residual=middle,
                return_dict=False,
            )[0]
            loss = F.mse_loss(predicted.float(), noise.float())
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return step


@dataclass(frozen=True)
class Setting:
    """What all sides train on."""

    data: str
    batch_size: int
    n_images: int
    dtype: str
    optimizer: str


CACHES = {
    "ours": [],
    "latents": ["cache.folder={folder}/cache"],
    "features": ["cache.folder={folder}/cache", "cache.features=true"],
    "compiled": ["cache.folder={folder}/cache", "cache.features=true", "run.compile=true"],
}
SIDES = ("published", "plain", *CACHES)
"""All that can be measured."""


def make_side(name: str, setting: Setting, folder: Path) -> Step:
    """Returns the step of a side; ours runs with the allocator as `featinv train` sets it."""
    base = make_config(setting.data, setting.batch_size, setting.dtype, folder)
    accelerator = make_accelerator(OptimConfig(batch_size=setting.batch_size), base.run)
    images = open_training_images(base.data)
    images = images.pick(range(0, len(images), max(1, len(images) // setting.n_images)))
    train, _ = make_datasets(images, base.data, 0)
    if name not in CACHES:
        return plain(base, train, accelerator, published=name == "published")
    keep_freed_memory()
    more = [option.format(folder=folder) for option in CACHES[name]]
    more += [f"optim.optimizer={setting.optimizer}"]
    config = make_config(setting.data, setting.batch_size, setting.dtype, folder, *more)
    return ours(config, train, accelerator)


def serve(name: str, setting: Setting, orders: Connection) -> None:
    """Runs as many steps as it is told and answers with seconds per step, until told None."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    with tempfile.TemporaryDirectory() as folder:
        step = make_side(name, setting, Path(folder))
        step()  # warms up
        orders.send(None)
        while (n_steps := orders.recv()) is not None:
            wait()
            began = clock()
            for _ in range(n_steps):
                step()
            wait()
            orders.send((clock() - began) / n_steps)


def measure(
    setting: Setting, sides: Sequence[str], n_blocks: int, n_steps: int
) -> dict[str, list[float]]:
    """Returns seconds per step of each block; the sides take turns, each in a process of its own.

    Seconds are those of the CPU without a GPU, which other work disturbs less.
    """
    spawn = multiprocessing.get_context("spawn")
    told: dict[str, Connection] = {}
    for name in sides:
        told[name], other = spawn.Pipe()
        spawn.Process(target=serve, args=(name, setting, other), daemon=True).start()
        told[name].recv()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(n_blocks):
        for name, orders in told.items():
            orders.send(n_steps)
            seconds[name].append(orders.recv())
    for orders in told.values():
        orders.send(None)
    return seconds


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main(
    data: Annotated[str, typer.Option(help="Folder of Tiny-ImageNet.")],
    batch_size: Annotated[int, typer.Option(help="Pictures of a step.")] = 32,
    n_blocks: Annotated[int, typer.Option(help="Blocks of each side.")] = 5,
    n_steps: Annotated[int, typer.Option(help="Steps of a block.")] = 2,
    n_images: Annotated[int, typer.Option(help="Pictures to train on.")] = 256,
    dtype: Annotated[str, typer.Option(help="Precision of all but `published`.")] = "fp32",
    optimizer: Annotated[str, typer.Option(help="Of our sides; the plain ones have AdamW.")] = (
        "adamw"
    ),
    sides: Annotated[str, typer.Option(help="With commas between them.")] = (",".join(SIDES)),
    output: Annotated[Path | None, typer.Option(help="JSON of all blocks.")] = None,
) -> None:
    """Print images per second of each side, and the ratios to the two plain ones."""
    setting = Setting(data, batch_size, n_images, dtype, optimizer)
    seconds = measure(setting, sides.split(","), n_blocks, n_steps)
    rates = {name: batch_size / sorted(s)[len(s) // 2] for name, s in seconds.items()}
    opponents = [name for name in ("plain", "published") if name in rates]
    print("| side | images/s |" + "".join(f" × {name} |" for name in opponents))
    print("|" + "---|" * (2 + len(opponents)))
    for name, rate in rates.items():
        ratios = "".join(f" {rate / rates[other]:.2f} |" for other in opponents)
        print(f"| {name} | {rate:.1f} |{ratios}")
    if output is not None:
        record = {**asdict(setting), "seconds_per_step": seconds}
        output.write_text(json.dumps({**record, "images_per_second": rates}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
