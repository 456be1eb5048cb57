"""Sampling settings of a bundled pipeline against agreement, on held-back training images.

    python benchmarks/tiny_sampling.py --data .data/tiny-imagenet-200

Prints a table: cosine, its shuffled null, match, PSNR and seconds; first the autoencoder alone,
which is the ceiling of all others.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

from featinv_diffusion import load_backbone, load_pipeline
from featinv_diffusion.config import load_config
from featinv_diffusion.data import load_records
from featinv_diffusion.diffusion.schedulers import make_scheduler
from featinv_diffusion.metrics.features import feature_cosine, shuffled_cosine, top_k_match
from featinv_diffusion.seeds import make_generator
from featinv_diffusion.training.controlnet import ControlNetConfig
from featinv_diffusion.training.entry import make_datasets, stack_images

CONFIG = "configs/tiny/controlnet-convnext.yaml"
SETTINGS = [
    ("ddim", 20, "features", 1.0),
    ("ddim", 20, "features", 1.5),
    ("ddim", 20, "features", 2.0),
    ("ddim", 20, "features", 3.0),
    ("ddim", 50, "features", 2.0),
    ("ddim", 20, "text", 1.75),
    ("dpmsolver++", 10, "features", 2.0),
    ("unipc", 10, "features", 2.0),
]


class Sampler:
    """A pipeline, its backbone and the images that are reconstructed again and again."""

    def __init__(self, name: str, images: Tensor):
        self.pipeline, self.backbone = load_pipeline(name), load_backbone(name)
        self.pipeline.set_progress_bar_config(disable=True)
        self.base = self.pipeline.scheduler.config
        self.images = images
        self.features, self.logits = self.backbone.features_and_logits(images)

    def row(self, name: str, images: Tensor, seconds: float) -> str:
        features, logits = self.backbone.features_and_logits(images)
        cosine = feature_cosine(self.features, features).mean()
        null = shuffled_cosine(self.features, features, make_generator(0)).mean()
        match = [top_k_match(self.logits, logits, k).float().mean() for k in (1, 5)]
        psnr = -10 * (images - self.images).square().mean((1, 2, 3)).log10().mean()
        return (
            f"| {name} | {cosine:.3f} | {null:.3f} | {match[0]:.2f} | {match[1]:.2f} | {psnr:.1f} "
            f"| {seconds:.1f} |"
        )

    @torch.no_grad()
    def round_trip(self) -> Tensor:
        vae = self.pipeline.vae
        decoded = vae.decode(vae.encode(self.images * 2 - 1).latent_dist.mode()).sample
        return (decoded / 2 + 0.5).clamp(0, 1)

    def sample(self, scheduler: str, steps: int, guidance: str, scale: float) -> Tensor:
        self.pipeline.scheduler = make_scheduler(scheduler, self.base)
        parts = []
        for start in range(0, len(self.features), 25):
            features = self.features[start : start + 25]
            seeds = range(start, start + len(features))
            parts.append(
                self.pipeline(
                    features=features,
                    num_inference_steps=steps,
                    guidance=guidance,
                    guidance_scale=scale,
                    generator=[make_generator("benchmark", i) for i in seeds],
                    output_type="pt",
                ).images
            )
        return torch.cat(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="Tiny-ImageNet-200 folder")
    parser.add_argument("--pipeline", default="tiny/convnext")
    parser.add_argument("--n-images", type=int, default=100)
    arguments = parser.parse_args()
    overrides = [f"data.root={arguments.data}", "data.in_memory=false"]
    config = load_config(ControlNetConfig, CONFIG, overrides)
    _, held = make_datasets(load_records(config.data), config.data, config.seed)
    sampler = Sampler(arguments.pipeline, stack_images(held, arguments.n_images)[0])
    print("| | cosine | shuffled | top-1 | top-5 | PSNR | seconds |\n|---|---|---|---|---|---|---|")
    print(sampler.row("autoencoder alone", sampler.round_trip(), 0))
    for setting in SETTINGS:
        start = time.monotonic()
        images = sampler.sample(*setting)
        scheduler, steps, guidance, scale = setting
        name = f"{scheduler} {steps}, {guidance} {scale:g}"
        print(sampler.row(name, images, time.monotonic() - start), flush=True)


if __name__ == "__main__":
    main()
