"""Packs what the recipes of configs/tiny trained into the members that ship in the package."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import (
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedModel,
    SiglipVisionModel,
    TimmWrapperForImageClassification,
)

from featinv_diffusion.backbones.base import without_progress_bars
from featinv_diffusion.backbones.transformers import PROCESSOR_FILE, load_transformers
from featinv_diffusion.config import load_config, read_setting
from featinv_diffusion.data.selection import select_items
from featinv_diffusion.data.sets import open_images
from featinv_diffusion.diffusion.featinv_controlnet import FeatureControlNet
from featinv_diffusion.diffusion.featinv_pipeline import FeatInvPipeline
from featinv_diffusion.diffusion.folders import (
    BASE,
    CERTAINTY_FILE,
    SCOPE_FILE,
    CardInfo,
    load_member,
    make_timm_wrapper,
)
from featinv_diffusion.diffusion.objective import make_scheduler
from featinv_diffusion.errors import InputError
from featinv_diffusion.features.natural_maps import NaturalMaps
from featinv_diffusion.features.operators import FOLDER as OPERATORS
from featinv_diffusion.features.operators import SUFFIX
from featinv_diffusion.files import write_text
from featinv_diffusion.inverters import DiffusionInverter
from featinv_diffusion.inverters.detr import DETECTOR, load_detr
from featinv_diffusion.inverters.modular import FOLDER, InverseSet
from featinv_diffusion.inverters.quality import PRESETS, other_qualities
from featinv_diffusion.inverters.reconstructor import BACKBONE, Reconstructor, load_reconstructor
from featinv_diffusion.inverters.reconstructor import FOLDER as RECONSTRUCTOR
from featinv_diffusion.runs.certainty import fit_certainty
from featinv_diffusion.runs.scope import sampling_of
from featinv_diffusion.runs.scope_fit import fit_scope, recalibrate, split_images
from featinv_diffusion.settings import Selection
from featinv_diffusion.studies.operators import fit_operator
from featinv_diffusion.training.controlnet import ControlNetConfig
from featinv_diffusion.training.entry import load_component
from featinv_diffusion.training.reconstructor import ReconstructorConfig
from train.tiny_family.pack import (
    replace_folder,
    to_half,
    write_bundled,
    write_bundled_backbone,
)

# ---- Packs trained detectors ----


@dataclass(frozen=True)
class Recipe:
    """The configs of a member in configs/tiny.

    Args:
        inverter: of its inverse modules.
        detector: of the DETR they undo; None where the member has its model already.
    """

    inverter: str
    detector: str | None = None


RECIPES = {"detr": Recipe("inverter-detr.yaml", "detr.yaml"), "vit": Recipe("inverter-vit.yaml")}
"""By the name of the member."""
WEAK = 0.7
"""MSE by the variance above which a card warns of a module."""
RECONSTRUCTORS = ("siglip", "siglip2")
"""Members that are an encoder with its reconstructor, trained by `reconstructor-NAME.yaml`."""

CARD = """\
Inverse modules of `{family}/{name}`, which `featinv sample --inverter {name}` uses: small
deterministic networks, each trained on its own to undo one part of the model. What they show is
what a mean-square reconstruction keeps, so detail that a stage does not determine is blurred.

A demonstration at 64 pixels. The figures below are those of held-back training images: of each
module the MSE by the variance of what it writes (1 is what the mean would score), and the PSNR of
the image from each stage in dB. A module whose figure is near 1 tells little about its stage.

| figure | at the end of training |
|---|---|
{rows}

The data are those of the other members: ImageNet's terms hold, non-commercial research.

Made by `python train/inverter.py --config configs/tiny/{config}`.
"""

RECONSTRUCTOR_CARD = """\
# {family}/{name}

A small SigLIP encoder that `load_backbone('{family}/{name}')` gives, and its reconstructor, which
`featinv sample --inverter {name}` uses: a deterministic network trained with a mean-square error,
so that detail which the features do not determine is blurred.

A demonstration at 64 pixels, without the pooling head of the encoder, which the features do not
pass. The figures are those of held-back training images.

| encoder | at the end of training |
|---|---|
{encoder}

| reconstructor | at the end of training |
|---|---|
{reconstructor}

What a folder `operators` holds was fitted on training images by `python -m train.tiny_family`:
`featinv operator apply --operator {family}/{name}/NAME`.

The mean-square error is that of pixels normalised to [-1, 1], the PSNR is in dB. The data are those
of the other members: ImageNet's terms hold, non-commercial research.

Made by `python -m train.tiny_family.contrastive --config configs/tiny/{name}.yaml` and
`python train/inverter.py --config configs/tiny/reconstructor-{name}.yaml`.
"""


def pack_inverters(family: Path, configs: Path) -> Iterator[Path]:
    """Packs every member whose inverter is trained and yields its folder.

    Raises:
        InputError: a file is larger than what may be bundled, or a weight does not fit float16.
    """
    for name, recipe in RECIPES.items():
        config = configs / recipe.inverter
        if not config.is_file() or not _final_inverter(config).is_dir():
            continue
        final = _final_inverter(config)
        if recipe.detector is not None:
            model = load_detr(str(_final_inverter(configs / recipe.detector) / DETECTOR))
            replace_folder(family / name / DETECTOR, to_half(model).save_pretrained)
        inverses = InverseSet.from_pretrained(final / FOLDER)
        replace_folder(family / name / FOLDER, to_half(inverses).save_pretrained)
        card = _card(family.name, name, recipe, final.parent)
        write_text(family / name / FOLDER / "README.md", card)
        yield family / name


def pack_reconstructors(family: Path, configs: Path) -> Iterator[Path]:
    """Packs every encoder whose reconstructor is trained, with that, and yields its folder.

    Raises:
        InputError: as `pack_inverters`.
    """
    for name in RECONSTRUCTORS:
        config = configs / f"reconstructor-{name}.yaml"
        if not config.is_file() or not _final_inverter(config).is_dir():
            continue
        weights = Path(read_setting("model.weights", config))
        encoder, _ = load_transformers(str(weights), pretrained=True)
        replace_folder(family / name / BACKBONE, to_half(without_head(encoder)).save_pretrained)
        shutil.copyfile(weights / PROCESSOR_FILE, family / name / BACKBONE / PROCESSOR_FILE)
        folder = _final_inverter(config) / RECONSTRUCTOR
        reconstructor = Reconstructor.from_pretrained(folder, use_safetensors=True)
        replace_folder(family / name / RECONSTRUCTOR, to_half(reconstructor).save_pretrained)
        card = RECONSTRUCTOR_CARD.format(
            family=family.name,
            name=name,
            encoder=_figures(weights.parents[1]),
            reconstructor=_figures(_final_inverter(config).parent),
        )
        write_text(family / name / "README.md", card)
        yield family / name


def without_head(encoder: PreTrainedModel) -> SiglipVisionModel:
    """Returns the encoder without the head that pools its map: features are read before it."""
    config: Any = deepcopy(encoder.config)
    config.vision_use_head = False
    bare = SiglipVisionModel(config)
    weights = {k: v for k, v in encoder.state_dict().items() if k in bare.state_dict()}
    bare.load_state_dict(weights)
    return bare.eval()


def _card(family: str, name: str, recipe: Recipe, output: Path) -> str:
    card = CARD.format(family=family, name=name, rows=_figures(output), config=recipe.inverter)
    return card + _warning(output)


def _warning(output: Path) -> str:
    """Names the modules that hardly do better than the mean of what they write."""
    record = json.loads((output / "validation.jsonl").read_text().splitlines()[-1])
    stages = [key.removeprefix("psnr_") for key in record if key.startswith("psnr_")]
    weak = [f"`{stage}` ({record[stage]:.2f})" for stage in stages if record.get(stage, 0.0) > WEAK]
    if not weak:
        return ""
    return f"\nWarning: weak, and no ground for conclusions about its stage: {', '.join(weak)}.\n"


def _figures(output: Path) -> str:
    """The last validation record of a run, as rows of a table."""
    record = json.loads((output / "validation.jsonl").read_text().splitlines()[-1])
    values = {
        k: f"{v:g}" if k == "step" else f"{v:.3f}" for k, v in record.items() if k != "minutes"
    }
    return "\n".join(f"| {key} | {value} |" for key, value in values.items())


def _final_inverter(config: Path) -> Path:
    return Path(read_setting("run.output", config)) / "final"


CONFIGS = Path("configs/tiny")
MEMBERS = {
    "convnext": "controlnet-convnext.yaml",
    "convnext-pooled": "controlnet-convnext-pooled.yaml",
    "convnext-stages.1": "controlnet-convnext-stages.1.yaml",
    "resnet": "controlnet-resnet.yaml",
    "swin": "controlnet-swin.yaml",
    "vit": "controlnet-vit.yaml",
    "efficientnet-lite0": "controlnet-efficientnet-lite0.yaml",
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
"""(program, config) in an order in which each finds what it needs."""
N_SCOPE_IMAGES = 10_000
"""Training images whose maps the natural maps of a member are fitted on."""
FEWER_SCOPE_IMAGES = {"efficientnet-lite0": 4_000}
"""By member whose backbone takes long for each."""

COMMAND = "python -m train.tiny_family --data TINY_IMAGENET_200"
CURVES = """\
Configs in `configs/tiny`; held-back training images: all 1,000 for the classifier, 250 for the
autoencoder, one sample of each of 64 for the ControlNet, where its config has no other number.
"""
LIMITS_OF_REAL = """\
## Data

Tiny-ImageNet-200's training split, 64 × 64 pixels, all 200 classes, without the last 10 images of
each: 98,000, of which every second one for the regression. ImageNet's terms hold: non-commercial
research.

## As trained

The weights of 2026-11-30 differ from the recipe in this: up to step 250 the learning rate was that
of 5,000 steps. The maps were computed by torch.compile, which changes them by 4 parts in a million.

## Limits

The backbone is a real one, with the public weights that the extra `real` installs; the pictures are
those of a small demonstration at 64 pixels, through which the backbone sees every picture. What it
reads of sharper ones is not inverted here.
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
    public = None
    if Path(config.model.backbone).is_dir():
        backbone = load_component(TimmWrapperForImageClassification, config.model.backbone)
    else:
        public = config.model.backbone
        backbone: Any = make_timm_wrapper(public)
    pipeline = FeatInvPipeline(
        vae=load_component(AutoencoderKL, str(base / "vae")),
        text_encoder=load_component(CLIPTextModel, str(base / "text_encoder")),
        tokenizer=CLIPTokenizer.from_pretrained(base / "tokenizer"),
        unet=load_component(UNet2DConditionModel, str(base / "unet")),
        controlnet=load_component(FeatureControlNet, str(final / "controlnet")),
        scheduler=scheduler,
        backbone=backbone,
        default_prompt=config.model.prompt,
        default_num_inference_steps=validation.num_inference_steps,
        default_guidance_scale=validation.guidance_scale,
        default_guidance=validation.guidance,
        best_refine=0 if name in NOT_REFINED else 4,
        best_refine_at="end" if name in NOT_REFINED else "steps",
        through=config.data.size if public else None,
    )
    stages = {f"ControlNet ({config_path})": final.parent}
    if public is None:
        stages = {
            "classifier": Path(config.model.backbone).parents[1],
            "autoencoder": Path(read_setting("model.vae", CONFIGS / TEXT_TO_IMAGE)).parents[1],
            "text-to-image model": base.parent,
            **stages,
        }
    notes = f"{_curves(stages)}\n{LIMITS if public is None else LIMITS_OF_REAL}"
    info = CardInfo(command=COMMAND, license="other", notes=notes)
    warm_start = Path(config.model.warm_start or "")
    return write_bundled(
        pipeline,
        family,
        name,
        info,
        replace_base=replace_base,
        trunk=warm_start.parent.name if config.model.trained != ("*",) else None,
        public_backbone=public,
    )


NOT_REFINED = ("resnet",)
"""Members of whose refinement the outside eye sees nothing, see docs/quality.md."""


def fit_scopes(family: Path, data: str | None = None) -> Iterator[Path]:
    """Fits the natural maps of each packed member that has none yet, and yields their files.

    Those that are there are calibrated for the qualities that they lack, and no longer for those
    that there are no more.

    The images are those of the member's own training, calibrated on those that it holds back.

    Args:
        data: the images' folder; None takes that of the config.
    """
    for name, config_name in MEMBERS.items():
        path = family / name / SCOPE_FILE
        if not path.parent.is_dir():
            continue
        with without_progress_bars():
            pipeline = load_member(path.parent)
        pipeline.set_progress_bar_config(disable=True)
        config = load_config(ControlNetConfig, str(CONFIGS / config_name)).data
        images = open_images(data or config.root, config.split, config.classes)
        n_images = FEWER_SCOPE_IMAGES.get(name, N_SCOPE_IMAGES)
        split = split_images(images, config.held_back_per_class, n_images)
        inverter = DiffusionInverter(pipeline)
        others = other_qualities(inverter)
        if not path.is_file():
            fit_scope(inverter, images, split, others=others).save(path)
            yield path
            continue
        natural = NaturalMaps.load(path)
        missing = [one for one in others if natural.calibrated_for(sampling_of(one)) is None]
        if missing and natural.sampling is not None:
            found = recalibrate(natural, missing, images, split)
            assert found.sampling is not None
            new = ((found.sampling, found.calibration.cosines), *found.others)
            wanted = [sampling_of(one) for one in others]
            kept = (one for one in natural.others if one[0] in wanted)
            replace(natural, others=(*kept, *new)).save(path)
            yield path


CERTAINTY = {"convnext": {"standard": (128, 8), "draft": (200, 8)}}
"""By member and quality: how many held-back pictures its certainty is calibrated on, and how many
samples of each; of the other members, `CERTAINTY_OF_OTHERS`."""
CERTAINTY_OF_OTHERS = {"standard": (40, 4)}


def fit_certainties(family: Path, data: str | None = None) -> Iterator[Path]:
    """Calibrates the certainty of each packed member that has none yet, and yields their files.

    The pictures are of those that the member's own training holds back.

    Args:
        data: the images' folder; None takes that of the config.
    """
    for name, config_name in MEMBERS.items():
        path = family / name / CERTAINTY_FILE
        if not path.parent.is_dir() or path.is_file():
            continue
        with without_progress_bars():
            pipeline = load_member(path.parent)
        pipeline.set_progress_bar_config(disable=True)
        config = load_config(ControlNetConfig, str(CONFIGS / config_name)).data
        images = open_images(data or config.root, config.split, config.classes)
        found = None
        for quality, (n, n_samples) in CERTAINTY.get(name, CERTAINTY_OF_OTHERS).items():
            inverter = DiffusionInverter(
                pipeline, num_inference_steps=PRESETS[quality].get("steps")
            )
            held_back = Selection(n_images=n, held_back_per_class=config.held_back_per_class)
            new = fit_certainty(inverter, images, select_items(images, held_back), n_samples)
            found = new if found is None else new.with_models_of(found)
        assert found is not None
        found.save(path)
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
    return Path(read_setting("run.output", config_path)) / "final"


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


# ---- Fits the operators in feature space that ship with the tiny family --------------------------

MEMBER = "siglip2"
METHODS = {"swap": "orthogonal", "suppress": "linear", "colourise": "linear"}
"""By the operation; a rotation cannot forget a channel, nor make colours of grey."""
N_IMAGES = 1024


def fit_operators(family: Path, data: str | None = None) -> Iterator[Path]:
    """Fits the operators of the packed encoder that are not there yet, and yields their files.

    Args:
        data: folder of the images; None takes that of the reconstructor's config.

    Raises:
        InputError: as `fit_operator`.
    """
    if not (family / MEMBER).is_dir():
        return
    backbone = load_reconstructor(str(family / MEMBER)).require_backbone()
    path = CONFIGS / f"reconstructor-{MEMBER}.yaml"
    config = load_config(ReconstructorConfig, path).data
    images = open_images(data or config.root, config.split, config.classes)
    for name, method in METHODS.items():
        path = family / MEMBER / OPERATORS / f"{name}{SUFFIX}"
        if path.is_file():
            continue
        operator = fit_operator(backbone, images, name, method=method, n_images=N_IMAGES)
        path.parent.mkdir(exist_ok=True)
        replace(operator, matrix=operator.matrix.to(torch.float32)).save(path)
        yield path
