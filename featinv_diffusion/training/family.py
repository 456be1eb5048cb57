"""Packs what the recipes of configs/tiny trained into the members that ship in the package."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from omegaconf import OmegaConf
from transformers import CLIPTextModel, CLIPTokenizer, TimmWrapperForImageClassification

from featinv_diffusion.analysis.scope_fit import fit_scope, split_images
from featinv_diffusion.config import load_config
from featinv_diffusion.diffusion.bundled import (
    BASE,
    load_member,
    write_bundled,
    write_bundled_backbone,
)
from featinv_diffusion.diffusion.featinv_controlnet import FeatureControlNet
from featinv_diffusion.diffusion.featinv_pipeline import FeatInvPipeline
from featinv_diffusion.diffusion.model_card import CardInfo
from featinv_diffusion.diffusion.pipeline_folder import SCOPE_FILE
from featinv_diffusion.diffusion.quiet import without_progress_bars
from featinv_diffusion.diffusion.schedulers import make_scheduler
from featinv_diffusion.errors import InputError
from featinv_diffusion.evaluation.dataset import open_images
from featinv_diffusion.inverters import DiffusionInverter
from featinv_diffusion.training.controlnet import ControlNetConfig
from featinv_diffusion.training.entry import load_component
from featinv_diffusion.training.pack_inverters import (
    RECONSTRUCTORS,
    pack_inverters,
    pack_reconstructors,
)

CONFIGS = Path("configs/tiny")
MEMBERS = {
    "convnext": "controlnet-convnext.yaml",
    "convnext-pooled": "controlnet-convnext-pooled.yaml",
    "convnext-stages.1": "controlnet-convnext-stages.1.yaml",
    "resnet": "controlnet-resnet.yaml",
    "swin": "controlnet-swin.yaml",
    "vit": "controlnet-vit.yaml",
}
"""Member → config of its ControlNet; the first is packed with the base that all share."""
TEXT_TO_IMAGE = "text_to_image.yaml"
CLASSIFIERS = {"vit": "vit.yaml"}
"""Member → config of its classifier, which ships alone until its ControlNet is trained."""
STAGES = (
    *(("classifier", name) for name in ("resnet-small.yaml", "resnet.yaml", "convnext.yaml")),
    *(("classifier", name) for name in ("swin.yaml", "vit-half.yaml", "vit.yaml")),
    ("detector", "detr.yaml"),
    ("inverter", "inverter-detr.yaml"),
    ("inverter", "inverter-vit.yaml"),
    *(("contrastive", f"{name}.yaml") for name in RECONSTRUCTORS),
    *(("inverter", f"reconstructor-{name}.yaml") for name in RECONSTRUCTORS),
    ("autoencoder", "autoencoder.yaml"),
    ("text_to_image", TEXT_TO_IMAGE),
    *(("controlnet", name) for name in MEMBERS.values()),
)
"""(script in train/, config) in an order in which each finds what it needs."""
N_SCOPE_IMAGES = 10_000
"""Training images whose maps the natural maps of a member are fitted on."""

COMMAND = "python train/tiny.py --data TINY_IMAGENET_200"
CURVES = """\
Configs in `configs/tiny`; held-back training images: all 1,000 for the classifier, 250 for the
autoencoder, one sample of each of 64 for the ControlNet.
"""
LIMITS = """\
## Data

Tiny-ImageNet-200's training split, the 100 classes of `configs/tiny/classes.txt`, 64 × 64 pixels,
without the last 10 images of each class. ImageNet's terms hold: non-commercial research.

## As trained

The weights of 2026-11-20 differ from the recipes in this: the autoencoder followed the learning
rate of 4,000 steps up to step 1,500, then that of 2,500; group norms of the autoencoder and of the
UNet were summed in bfloat16.

## Limits

A demonstration at 64 pixels, small enough to run on a laptop: it shows what the method does and is
what the tests run on. Conclusions about a model need a ControlNet trained at full scale.
README.md of the repository has figures on validation images that nothing was trained or chosen on.
"""


def pack_family(family: Path) -> Iterator[Path]:
    """Packs every member whose training is finished, the first with the base, and yields them.

    What else the family held is removed: it was trained on another base.

    Raises:
        InputError: the first member is not trained yet, or one was trained on another base.
    """
    packed = {BASE}
    for number, (name, config) in enumerate(MEMBERS.items()):
        path = CONFIGS / config
        if number == 0 or _final(path).exists():
            packed.add(name)
            yield pack_member(path, family, name, replace_base=number == 0)
    for name, config in CLASSIFIERS.items():
        if name not in packed and _final(CONFIGS / config).exists():
            packed.add(name)
            yield pack_classifier(CONFIGS / config, family, name)
    for pack in (pack_inverters, pack_reconstructors):
        for folder in pack(family, CONFIGS):
            packed.add(folder.name)
            yield folder
    for folder in family.iterdir():
        if folder.is_dir() and folder.name not in packed:
            shutil.rmtree(folder)


def pack_member(config_path: Path, family: Path, name: str, *, replace_base: bool) -> Path:
    """Writes the pipeline that `config_path` trained into `family`, with its figures on the card.

    The sampling settings of validation become the defaults of the pipeline.
    """
    config = load_config(ControlNetConfig, str(config_path))
    base, final = Path(config.model.base), _final(config_path)
    if not final.exists():
        raise InputError(f"{final} must hold trained weights. Run train/controlnet.py to its end.")
    validation = config.validation
    scheduler: Any = DDIMScheduler.from_pretrained(base / "scheduler")
    if validation.scheduler:
        scheduler = make_scheduler(validation.scheduler, scheduler.config)
    pipeline = FeatInvPipeline(
        vae=load_component(AutoencoderKL, str(base / "vae")),
        text_encoder=load_component(CLIPTextModel, str(base / "text_encoder")),
        tokenizer=CLIPTokenizer.from_pretrained(base / "tokenizer"),
        unet=load_component(UNet2DConditionModel, str(base / "unet")),
        controlnet=load_component(FeatureControlNet, str(final / "controlnet")),
        scheduler=scheduler,
        backbone=load_component(TimmWrapperForImageClassification, config.model.backbone),
        default_prompt=config.model.prompt,
        default_num_inference_steps=validation.num_inference_steps,
        default_guidance_scale=validation.guidance_scale,
        default_guidance=validation.guidance,
    )
    text_to_image = OmegaConf.load(CONFIGS / TEXT_TO_IMAGE)
    stages = {
        "classifier": Path(config.model.backbone).parents[1],
        "autoencoder": Path(text_to_image.model.vae).parents[1],
        "text-to-image model": base.parent,
        f"ControlNet ({config_path})": final.parent,
    }
    notes = f"{_curves(stages)}\n{LIMITS}"
    info = CardInfo(command=COMMAND, license="other", notes=notes)
    return write_bundled(pipeline, family, name, info, replace_base=replace_base)


def fit_scopes(family: Path, data: str | None = None) -> Iterator[Path]:
    """Fits the natural maps of each packed member that has none yet, and yields their files.

    The images are those of the member's own training, calibrated on those that it holds back.

    Args:
        data: the images' folder; None takes that of the config.
    """
    for name, config_name in MEMBERS.items():
        path = family / name / SCOPE_FILE
        if path.is_file() or not path.parent.is_dir():
            continue
        with without_progress_bars():
            pipeline = load_member(path.parent)
        pipeline.set_progress_bar_config(disable=True)
        config = load_config(ControlNetConfig, str(CONFIGS / config_name)).data
        images = open_images(data or config.root, config.split, config.classes)
        split = split_images(images, config.held_back_per_class, N_SCOPE_IMAGES)
        fit_scope(DiffusionInverter(pipeline), images, split).save(path)
        yield path


def pack_classifier(config_path: Path, family: Path, name: str) -> Path:
    """Writes the classifier that `config_path` trained as a member without a pipeline."""
    final = _final(config_path)
    wrapper = load_component(TimmWrapperForImageClassification, str(final / "classifier"))
    architecture = wrapper.config.architecture
    card = (
        f"---\nlibrary_name: timm\nlicense: other\n---\n\n# {family.name}/{name}\n\n"
        f"A small {architecture} that `load_backbone('{family.name}/{name}')` gives.\n\n"
        f"Made by `{COMMAND}`.\n\n"
        f"{_curves({f'classifier ({config_path})': final.parent})}\n{LIMITS}"
    )
    return write_bundled_backbone(wrapper, family, name, card)


def _final(config_path: Path) -> Path:
    return Path(OmegaConf.load(config_path).run.output) / "final"


def _curves(stages: dict[str, Path]) -> str:
    """The validation records of each stage as tables: its curves, and in the last row its end."""
    parts = ["## Recipe and figures while training\n", CURVES]
    for title, output in stages.items():
        path = output / "validation.jsonl"
        if not path.exists():
            raise InputError(f"{path} must hold the figures of the {title}, but is not there.")
        records = [json.loads(line) for line in path.read_text().splitlines()]
        names = [name for name in records[-1] if name != "step"]
        parts.append(f"| {title}: step | {' | '.join(names)} |")
        parts.append("|---" * (1 + len(names)) + "|")
        for record in records:
            values = (f"{record[name]:.3f}" if name in record else "–" for name in names)
            parts.append(f"| {record['step']} | {' | '.join(values)} |")
        parts.append("")
    return "\n".join(parts)
