"""Packs trained detectors, modular inverters and reconstructors into the family that ships."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from transformers import PreTrainedModel, SiglipVisionModel

from featinv_diffusion.backbones.load_transformers import PROCESSOR_FILE, load_transformers
from featinv_diffusion.diffusion.bundled import MAX_FILE_MB, to_half
from featinv_diffusion.diffusion.quiet import without_progress_bars
from featinv_diffusion.errors import InputError
from featinv_diffusion.files import new_folder, write_text
from featinv_diffusion.inverters.detr_model import DETECTOR, load_detr
from featinv_diffusion.inverters.modular import FOLDER, InverseSet
from featinv_diffusion.inverters.reconstructor import BACKBONE, Reconstructor
from featinv_diffusion.inverters.reconstructor import FOLDER as RECONSTRUCTOR


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

What a folder `operators` holds was fitted on training images by `python train/tiny.py`:
`featinv operator apply --operator {family}/{name}/NAME`.

The mean-square error is that of pixels normalised to [-1, 1], the PSNR is in dB. The data are those
of the other members: ImageNet's terms hold, non-commercial research.

Made by `python train/contrastive.py --config configs/tiny/{name}.yaml` and
`python train/inverter.py --config configs/tiny/reconstructor-{name}.yaml`.
"""


def pack_inverters(family: Path, configs: Path) -> Iterator[Path]:
    """Packs every member whose inverter is trained and yields its folder.

    Raises:
        InputError: a file is larger than what may be bundled, or a weight does not fit float16.
    """
    for name, recipe in RECIPES.items():
        config = configs / recipe.inverter
        if not config.is_file() or not _final(config).is_dir():
            continue
        final = _final(config)
        if recipe.detector is not None:
            model = load_detr(str(_final(configs / recipe.detector) / DETECTOR))
            _write(family / name / DETECTOR, to_half(model))
        inverses = InverseSet.from_pretrained(final / FOLDER)
        _write(family / name / FOLDER, to_half(inverses))
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
        if not config.is_file() or not _final(config).is_dir():
            continue
        weights = Path(OmegaConf.load(config).model.weights)
        encoder, _ = load_transformers(str(weights), pretrained=True)
        _write(family / name / BACKBONE, to_half(without_head(encoder)))
        shutil.copyfile(weights / PROCESSOR_FILE, family / name / BACKBONE / PROCESSOR_FILE)
        folder = _final(config) / RECONSTRUCTOR
        reconstructor = Reconstructor.from_pretrained(folder, use_safetensors=True)
        _write(family / name / RECONSTRUCTOR, to_half(reconstructor))
        card = RECONSTRUCTOR_CARD.format(
            family=family.name,
            name=name,
            encoder=_figures(weights.parents[1]),
            reconstructor=_figures(_final(config).parent),
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


def _write(target: Path, model: torch.nn.Module) -> None:
    fresh = target.with_name(f"{target.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    with new_folder(fresh) as folder, without_progress_bars():
        model.save_pretrained(folder)  # pyright: ignore[reportCallIssue]
        for path in folder.rglob("config.json"):
            settings = json.loads(path.read_text())
            settings.pop("_name_or_path", None)  # where it was trained
            write_text(path, json.dumps(settings, indent=2, sort_keys=True) + "\n")
        for path in folder.rglob("*"):
            if path.is_file() and path.stat().st_size > MAX_FILE_MB * 10**6:
                raise InputError(
                    f"No bundled file may be larger than {MAX_FILE_MB} MB, but {path.name} has "
                    f"{path.stat().st_size / 1e6:.1f} MB. Make the model smaller."
                )
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)


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


def _final(config: Path) -> Path:
    return Path(OmegaConf.load(config).run.output) / "final"
