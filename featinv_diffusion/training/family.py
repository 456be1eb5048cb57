"""Packs what the recipes of configs/tiny trained into the members that ship in the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from omegaconf import OmegaConf
from transformers import CLIPTextModel, CLIPTokenizer, TimmWrapperForImageClassification

from featinv_diffusion.config import load_config
from featinv_diffusion.diffusion.bundled import write_bundled
from featinv_diffusion.diffusion.featinv_controlnet import FeatureControlNet
from featinv_diffusion.diffusion.featinv_pipeline import FeatInvPipeline
from featinv_diffusion.diffusion.model_card import CardInfo
from featinv_diffusion.errors import InputError
from featinv_diffusion.training.controlnet import ControlNetConfig
from featinv_diffusion.training.entry import load_component

STAGES = (
    ("classifier", "configs/tiny/convnext.yaml"),
    ("autoencoder", "configs/tiny/autoencoder.yaml"),
    ("text_to_image", "configs/tiny/text_to_image.yaml"),
    ("controlnet", "configs/tiny/controlnet-convnext.yaml"),
)
"""(script in train/, config) in the order of training."""

DATA_NOTE = """\
## Data

Tiny-ImageNet-200's training split, the 100 classes of `configs/tiny/classes.txt`, 64 × 64 pixels,
without the last 10 images of each class. ImageNet's terms hold: non-commercial research.

## Training

The weights of 2026-11-20 took about 80 minutes for all four stages on one to two cores of an AMD
EPYC, bf16, without a GPU. The autoencoder is what limits the sharpness of their pictures.

## Limits

A demonstration at 64 pixels, small enough to run on a laptop: it shows what the method does and is
what the tests run on. Conclusions about a model need a ControlNet trained at full scale.
"""


def pack_member(config_path: str, family: Path) -> Path:
    """Writes the member that `config_path` trained into `family`, with its figures on the card.

    The sampling settings of validation become the defaults of the pipeline.
    """
    config = load_config(ControlNetConfig, config_path)
    base, name = Path(config.model.base), config.model.backbone_name
    if name is None:
        raise InputError(f"model.backbone_name must name the member, but {config_path} has none.")
    final = Path(config.run.output) / "final"
    if not final.exists():
        raise InputError(f"{final} must hold trained weights. Run train/controlnet.py to its end.")
    pipeline = FeatInvPipeline(
        vae=load_component(AutoencoderKL, str(base / "vae")),
        text_encoder=load_component(CLIPTextModel, str(base / "text_encoder")),
        tokenizer=CLIPTokenizer.from_pretrained(base / "tokenizer"),
        unet=load_component(UNet2DConditionModel, str(base / "unet")),
        controlnet=load_component(FeatureControlNet, str(final / "controlnet")),
        scheduler=_scheduler(base / "scheduler"),
        backbone=load_component(TimmWrapperForImageClassification, config.model.backbone),
        default_prompt=config.model.prompt,
        default_num_inference_steps=config.validation.num_inference_steps,
        default_guidance_scale=config.validation.guidance_scale,
        default_guidance=config.validation.guidance,
    )
    info = CardInfo(
        command="python train/tiny.py --data TINY_IMAGENET_200",
        license="other",
        notes=f"{_figures()}\n{DATA_NOTE}",
    )
    return write_bundled(pipeline, family, name.split("/")[-1], info, replace_base=True)


def _scheduler(folder: Path) -> Any:
    return DDIMScheduler.from_pretrained(folder)


def _figures() -> str:
    """The last validation record of every stage, as a table."""
    rows = []
    for script, path in STAGES:
        output = OmegaConf.load(path).run.output
        record = json.loads((Path(output) / "validation.jsonl").read_text().splitlines()[-1])
        step = record.pop("step")
        rows += [f"| {script}, {step} steps | {key} | {x:.3f} |" for key, x in record.items()]
    table = "\n".join(rows)
    return (
        "## Figures\n\nOn held-back training images, which chose nothing: the classifier on all "
        "1,000, the autoencoder on 250, the\nControlNet on 64 with one sample each.\n\n"
        f"| stage | | |\n|---|---|---|\n{table}\n"
    )
