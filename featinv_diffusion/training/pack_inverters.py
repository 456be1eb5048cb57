"""Packs trained detectors and modular inverters into the family that ships in the package."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import OmegaConf

from featinv_diffusion.diffusion.bundled import MAX_FILE_MB, to_half
from featinv_diffusion.diffusion.quiet import without_progress_bars
from featinv_diffusion.errors import InputError
from featinv_diffusion.files import new_folder, write_text
from featinv_diffusion.inverters.detr_model import DETECTOR, load_detr
from featinv_diffusion.inverters.modular import FOLDER, InverseSet


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

Made by `python train/inverter.py --config configs/tiny/{config}`.
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
    record = json.loads((output / "validation.jsonl").read_text().splitlines()[-1])
    rows = "\n".join(f"| {key} | {value:.3f} |" for key, value in record.items())
    return CARD.format(family=family, name=name, rows=rows, config=recipe.inverter)


def _final(config: Path) -> Path:
    return Path(OmegaConf.load(config).run.output) / "final"
