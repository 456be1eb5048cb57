"""The whole path at full size with random weights: two optimizer steps, two sampling steps, 256 px.

    python benchmarks/full_size.py --folder outputs/full-size

SD 1.x UNet, VAE and CLIP-L text encoder in bf16, ConvNeXt-B at 288 px, FeatureControlNet in fp32.
Prints parameters, seconds and peak memory. Needs about 16 GB of memory and 4 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

from featinv_diffusion.config import load_config
from featinv_diffusion.data.crops import open_training_images, to_images
from featinv_diffusion.diffusion.featinv_pipeline import FeatInvPipeline
from featinv_diffusion.training import controlnet as training
from featinv_diffusion.training.entry import make_datasets
from featinv_diffusion.training.loop import fit, make_accelerator
from train.tiny_family.classifier import ClassifierModelConfig, make_classifier
from train.tiny_family.tokenizer import make_tokenizer

ASSETS = Path(training.__file__).parents[1] / "assets/sd15"


def write_random_base(folder: Path) -> None:
    """Writes a Stable Diffusion 1.x folder with random bf16 weights, and eight noise images."""
    if (folder / "scheduler").exists():
        return
    torch.manual_seed(0)
    for name, model_class in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
        config = json.loads((ASSETS / name / "config.json").read_text())
        model_class.from_config(config).to(torch.bfloat16).save_pretrained(folder / name)
    config = CLIPTextConfig(**json.loads((ASSETS / "text_encoder/config.json").read_text()))
    CLIPTextModel(config).to(torch.bfloat16).save_pretrained(folder / "text_encoder")
    make_tokenizer(["", training.PUBLISHED_PROMPT], 77).save_pretrained(str(folder / "tokenizer"))
    names = [f"class {i}" for i in range(1000)]
    architecture = ClassifierModelConfig("convnext_base.fb_in22k_ft_in1k")
    make_classifier(architecture, names, 288).save_pretrained(folder / "backbone")
    pixels = np.random.default_rng(0)
    (folder / "images/train/noise").mkdir(parents=True, exist_ok=True)
    for i in range(8):
        image = Image.fromarray(pixels.integers(0, 256, (320, 320, 3), dtype=np.uint8))
        image.save(folder / f"images/train/noise/{i}.png")
    scheduler = json.loads((ASSETS / "scheduler/scheduler_config.json").read_text())
    DDIMScheduler.from_config(scheduler).save_pretrained(folder / "scheduler")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("outputs/full-size"))
    folder = parser.parse_args().folder
    write_random_base(folder)
    config = load_config(
        training.ControlNetConfig,
        "configs/controlnet/convnext.yaml",
        [
            f"data.root={folder / 'images'}",
            "data.num_workers=0",
            f"model.base={folder}",
            f"model.backbone={folder / 'backbone'}",
            "optim.batch_size=1",
            "optim.max_steps=2",
            f"run.output={folder / 'run'}",
            "run.tracker=none",
            "run.mixed_precision=bf16",
            "run.cpu=true",
        ],
    )
    parts = training.load_frozen_parts(config.model)
    train, held = make_datasets(open_training_images(config.data), config.data, 0)
    controlnet = training.make_controlnet(config.model, parts)
    networks = {
        "unet": parts.unet,
        "controlnet": controlnet,
        "feature encoder": controlnet.feature_encoder,
        "vae": parts.vae,
        "backbone": parts.backbone,
    }
    for name, network in networks.items():
        print(f"{name}: {sum(p.numel() for p in network.parameters()) / 1e6:.1f} M parameters")

    task = _Timed(controlnet, parts, config)
    accelerator = make_accelerator(config.optim, config.run)
    fit(task, train, accelerator, config.optim, config.run, "run: {}")
    print(f"one optimizer step, batch 1: {task.starts[1] - task.starts[0]:.1f} s")

    pipeline = FeatInvPipeline(
        vae=parts.vae.float(),
        text_encoder=None,
        tokenizer=None,
        unet=parts.unet,
        controlnet=controlnet.to(torch.bfloat16),
        scheduler=parts.scheduler,
    )
    features = parts.backbone.features(to_images(held[0]["pixels"][None]))
    print(f"features: {tuple(features.shape)}")
    start = time.monotonic()
    images = pipeline(
        features=features,
        prompt_embeds=parts.prompt_embeds[:1].bfloat16(),
        negative_prompt_embeds=parts.prompt_embeds[1:].bfloat16(),
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    print(f"two sampling steps with guidance: {time.monotonic() - start:.1f} s, {images.shape}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory: {peak:.1f} GiB")


class _Timed(training.ControlNetTask):
    """Notes when each step begins; the validation pictures are left to the sampling below."""

    def __init__(self, controlnet, parts, config):
        super().__init__(controlnet, parts, config, validation=torch.empty(0))
        self.starts: list[float] = []

    def loss(self, module, batch):
        self.starts.append(time.monotonic())
        return super().loss(module, batch)

    def validate(self, module):
        self.starts.append(time.monotonic())
        return {}, {}


if __name__ == "__main__":
    main()
