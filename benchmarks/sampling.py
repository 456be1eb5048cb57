"""The pipeline against a plain diffusers loop of the same modules, and captured against eager.

    OMP_NUM_THREADS=1 python benchmarks/sampling.py --repeats 7
    OMP_NUM_THREADS=1 python benchmarks/sampling.py --full-size --steps 2 --repeats 3 --batches 1

Same scheduler, steps, noise and guidance: the pictures must be the same, which is checked. Pairs
alternate, so that both see the same machine; medians of CPU seconds per call, ratios against the
plain loop. Capture is traced before the clock starts; how long that took stands beside it. With
`--full-size` the modules have the shapes of Stable Diffusion 1.x at 256 px and ConvNeXt-B's
features, with random weights in float32, and nothing is captured; it needs 8 GiB.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, UNet2DConditionModel
from pages import table
from torch import Tensor

import featinv_diffusion
from featinv_diffusion import load_inverter
from featinv_diffusion.diffusion.featinv_controlnet import FeatureControlNet
from featinv_diffusion.diffusion.featinv_pipeline import FeatInvPipeline
from featinv_diffusion.inverters import DiffusionInverter
from featinv_diffusion.inverters.open import lay_out_channels_last
from featinv_diffusion.types import FeatureSpec

ASSETS = Path(featinv_diffusion.__file__).parent / "assets"


def plain_loop(pipeline: Any, features: Tensor, n_steps: int, scale: float) -> Tensor:
    """Samples as a script on plain diffusers modules does, both branches in one batch."""
    unet, controlnet, vae, scheduler = (
        pipeline.unet,
        pipeline.controlnet,
        pipeline.vae,
        pipeline.scheduler,
    )
    n, size = len(features), unet.config.sample_size
    shape = (1, unet.config.in_channels, size, size)
    x = torch.cat([torch.randn(shape, generator=g) for g in generators(n)])
    prompts = [pipeline.encode_prompt(p) for p in ("", pipeline.config["default_prompt"])]
    embeds = torch.cat([prompt.expand(n, -1, -1) for prompt in prompts])
    keep = torch.zeros(1, dtype=torch.bool)
    without = controlnet.encode_condition(features[:1], (size, size), keep=keep)
    with_features = controlnet.encode_condition(features, (size, size))
    condition = torch.cat([without.expand_as(with_features), with_features])
    scheduler.set_timesteps(n_steps)
    x = x * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(torch.cat([x, x]), t)
        down, mid = controlnet(
            given, t, encoder_hidden_states=embeds, encoded_cond=condition, return_dict=False
        )
        eps = unet(
            given,
            t,
            encoder_hidden_states=embeds,
            down_block_additional_residuals=down,
            mid_block_additional_residual=mid,
            return_dict=False,
        )[0]
        negative, positive = eps.chunk(2)
        x = scheduler.step(negative + scale * (positive - negative), t, x, return_dict=False)[0]
    return (vae.decode(x / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)


def generators(n: int) -> list[torch.Generator]:
    """Returns one generator of noise per sample."""
    return [torch.Generator().manual_seed(i) for i in range(n)]


def alternate(
    calls: dict[str, Callable[[], Any]],
    repeats: int,
    before: Callable[[str], None] = lambda name: None,
) -> dict[str, float]:
    """Returns the median of CPU seconds of each call; the calls take turns.

    Args:
        before: told the name of each call before its clock starts.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            before(name)
            began = time.process_time()
            call()
            seconds[name].append(time.process_time() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


@torch.no_grad()
def compare_full_size(batch: int, steps: int, repeats: int) -> None:
    """Prints CPU seconds of the plain loop, and of the pipeline in both layouts."""
    pipeline = random_pipeline()
    prompts = torch.randn(1, 77, 768)
    pipeline.encode_prompt = lambda prompt: prompts
    inverter = DiffusionInverter(
        pipeline, num_inference_steps=steps, guidance_scale=3.0, guidance="features"
    )
    features = torch.randn(batch, inverter.spec.channels, *inverter.spec.grid)

    def lay_out(name: str) -> None:
        if name == "channels last":
            lay_out_channels_last(pipeline)
        else:
            for part in (pipeline.unet, pipeline.controlnet, pipeline.vae):
                part.to(memory_format=torch.contiguous_format)

    def sample() -> Tensor:
        return inverter.invert(features, generator=generators(batch))

    calls: dict[str, Callable[[], Tensor]] = {
        "plain loop": lambda: plain_loop(pipeline, features, steps, 3.0),
        "pipeline": sample,
        "channels last": sample,
    }
    pictures = {}
    for name, call in calls.items():
        lay_out(name)
        pictures[name] = call()
    seconds = alternate(calls, repeats, lay_out)
    rows = [
        [
            name,
            f"{value:.1f}",
            f"{seconds['plain loop'] / value:.2f}",
            f"{float((pictures[name] - pictures['plain loop']).abs().max()):.1e}",
        ]
        for name, value in seconds.items()
    ]
    print(table("side|CPU s|times as fast|largest difference of a pixel", rows))


def random_pipeline() -> FeatInvPipeline:
    """Returns a pipeline in the shapes of Stable Diffusion 1.x with random weights."""
    torch.manual_seed(0)
    unet: Any = UNet2DConditionModel.from_config(_config("unet"))
    spec = FeatureSpec("random", "last", 1024, (9, 9))
    controlnet = FeatureControlNet.from_unet(unet, spec.channels, feature_spec=asdict(spec))
    for name, weight in controlnet.named_parameters():
        if name.endswith("weight") and not bool(weight.any()):
            torch.nn.init.normal_(weight, std=0.01)  # zeros would hide a wrong residual
    return FeatInvPipeline(
        vae=AutoencoderKL.from_config(_config("vae")),
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        controlnet=controlnet,
        scheduler=DPMSolverMultistepScheduler.from_config(_config("scheduler", "scheduler_config")),
    )


def _config(part: str, name: str = "config") -> dict[str, Any]:
    return json.loads((ASSETS / "sd15" / part / f"{name}.json").read_text())


@torch.no_grad()
def compare(batch: int, steps: int, repeats: int) -> dict[str, Any]:
    """Returns medians, ratios and differences of pictures at one batch size."""
    made: dict[str, DiffusionInverter] = {}
    for name in ("eager", "captured"):
        inverter = load_inverter(
            "tiny/convnext", steps=steps, capture=name == "captured", device="cpu"
        )
        assert isinstance(inverter, DiffusionInverter)
        made[name] = inverter
    eager = made["eager"]
    features = torch.randn(batch, eager.spec.channels, *eager.spec.grid)
    calls: dict[str, Callable[[], Tensor]] = {
        "plain": lambda: plain_loop(eager.pipeline, features, steps, eager.guidance_scale)
    }
    for name, one in made.items():
        calls[name] = lambda one=one: one.invert(features, generator=generators(batch))
    began = time.process_time()
    pictures = {name: call() for name, call in calls.items()}
    calls["captured"]()  # torch specialises a trace at its second run
    first = time.process_time() - began
    difference = {
        name: float((image - pictures["plain"]).abs().max()) for name, image in pictures.items()
    }
    seconds = alternate(calls, repeats)
    return {
        "batch": batch,
        "steps": steps,
        "seconds": seconds,
        "speed_up": {name: seconds["plain"] / value for name, value in seconds.items()},
        "largest_difference": difference,
        "warm_up_seconds": first,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--full-size", action="store_true")
    options = parser.parse_args()
    if options.full_size:
        for batch in options.batches:
            compare_full_size(batch, options.steps, options.repeats)
        return
    found = [compare(batch, options.steps, options.repeats) for batch in options.batches]
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))
    rows = [
        [
            str(one["batch"]),
            *(f"{one['seconds'][name]:.3f}" for name in ("plain", "eager", "captured")),
            *(f"{one['speed_up'][name]:.2f}" for name in ("eager", "captured")),
            f"{max(one['largest_difference'].values()):.1e}",
            f"{one['warm_up_seconds']:.1f}",
        ]
        for one in found
    ]
    header = (
        "batch|plain loop, s|pipeline, s|captured, s|pipeline, times as fast|captured, times as "
        "fast|largest difference of a pixel|first calls, s"
    )
    print(table(header, rows))


if __name__ == "__main__":
    main()
