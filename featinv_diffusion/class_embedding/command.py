"""`featinv classemb` from its arguments to a folder: figures, `metrics.json`, a table of images."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import torch
from jaxtyping import Float
from pyarrow import parquet
from torch import Tensor

from featinv_diffusion import __version__
from featinv_diffusion.backbones import load_backbone, same_backbone, wrap_model
from featinv_diffusion.backbones.base import LAST, Backbone
from featinv_diffusion.class_embedding.anatomy import Anatomy, read_anatomy
from featinv_diffusion.class_embedding.pictures import (
    TokenPicture,
    draw_blocks,
    draw_identifiability,
    draw_removal,
)
from featinv_diffusion.class_embedding.reading import read_images
from featinv_diffusion.class_embedding.study import (
    RESAMPLING,
    FindMask,
    Tally,
    TokenImages,
    TokenSettings,
    class_name,
    measure_tokens,
    open_token_images,
    to_input,
    token_mask,
)
from featinv_diffusion.data.classes import find_class
from featinv_diffusion.diffusion.folders import list_bundled, without_progress_bars
from featinv_diffusion.errors import InputError, choices_hint
from featinv_diffusion.figures.board import write_figure
from featinv_diffusion.files import replacing, write_text
from featinv_diffusion.images import builtin_photo, read_image, to_pil
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.inverters.chain import MapChain
from featinv_diffusion.inverters.open import find_device, open_chosen
from featinv_diffusion.runs.record import read_environment
from featinv_diffusion.seeds import make_generator
from featinv_diffusion.settings import SampleSettings
from featinv_diffusion.types import FeatureSpec, Images

# ---- What a block shows: images that inverters make of its patches -------------------------------


@dataclass(frozen=True, eq=False)
class BlockInverter:
    """An inverter and the block whose patches it reads.

    Args:
        block: from 1; the last one also stands for the layer `last`, after the final norm.
        backbone: the model of the anatomy at that layer.
    """

    block: int
    backbone: Backbone
    inverter: Inverter

    def reconstruct(self, images: Images, name: str, seed: int = 0) -> Float[Tensor, "b 3 h w"]:
        """Returns one image for each; noise derives from (seed, name, 0) as in `sample`."""
        generators = [make_generator(seed, name, 0) for _ in range(len(images))]
        return self.inverter.invert(self.backbone.features(images), generator=generators)


def match_inverters(anatomy: Anatomy, inverters: Sequence[Inverter]) -> dict[int, BlockInverter]:
    """Finds the block that each inverter reads.

    Raises:
        InputError: an inverter of another backbone, of no block, or two of one block.
    """
    found: dict[int, BlockInverter] = {}
    for inverter in inverters:
        matched = _match(anatomy, inverter)
        if matched.block in found:
            raise InputError(
                f"There must be one inverter per block, but two read block {matched.block}: "
                f"{found[matched.block].inverter.spec} and {inverter.spec}."
            )
        found[matched.block] = matched
    return found


def _match(anatomy: Anatomy, inverter: Inverter) -> BlockInverter:
    own, spec = anatomy.backbone, inverter.spec
    if not same_backbone(spec.backbone, own.name):
        raise InputError(
            f"The inverter reads a {spec}, but the tokens are those of {own.name!r}. Use an "
            "inverter that was trained on this backbone."
        )
    if isinstance(inverter, MapChain):
        return BlockInverter(_block_of_stage(anatomy, spec), inverter.backbone, inverter)
    backbone = wrap_model(own.model, name=own.name, layer=spec.layer, input_size=own.input_size)
    backbone.preprocessing = own.preprocessing
    spec.check_matches(backbone.spec)
    if spec.layer == LAST:
        return BlockInverter(len(anatomy.blocks), backbone, inverter)
    layer = own.model.get_submodule(spec.layer)
    blocks = [b for b, parts in enumerate(anatomy.blocks, start=1) if parts.block is layer]
    if not blocks:
        raise InputError(
            f"The inverter must read a block, but reads a {spec}. Use one of a block, such as the "
            "layer 'blocks.5', or of the layer 'last'."
        )
    return BlockInverter(blocks[0], backbone, inverter)


def _block_of_stage(anatomy: Anatomy, spec: FeatureSpec) -> int:
    """A chain names the blocks as `VitPath` does, and reads tokens of a model of its own."""
    last = len(anatomy.blocks)
    stages = {f"blocks.{b}": b + 1 for b in range(last)} | {"encoder": last, LAST: last}
    if spec.layer not in stages:
        raise InputError(
            f"The inverter must read a block, but reads a {spec}. Take the stage of one: "
            f"{', '.join(stages)}."
        )
    return stages[spec.layer]


logger = logging.getLogger(__name__)

ProgressBar = Callable[[int], AbstractContextManager[Callable[[float], None]]]


@dataclass(frozen=True)
class TokenCommand:
    """The arguments of `featinv classemb` beside `TokenSettings`; `metrics.json` records them.

    Args:
        data: a picture, or what `open_token_images` reads; None is the built-in photo.
        backbone: a name of `load_backbone`.
        pipelines: diffusion inverters of its blocks; without one and a modular inverter, that
            which the backbone is bundled with.
        inverter: modular inverter of the backbone: the name of a bundled one, or its folder.
        stages: the stages of it, each a block.
        target: class to read in all images, by number or name.
        masks: folder of masks with the paths of their images.
        interpolation: `bilinear` or `bicubic`; None is the backbone's.
    """

    data: str | None = None
    backbone: str = "tiny/vit"
    pipelines: tuple[str, ...] = ()
    inverter: str | None = None
    stages: tuple[str, ...] = ()
    target: str | None = None
    masks: str | None = None
    split: str = "validation"
    classes: str | None = None
    per_class: int | None = None
    n_images: int | None = None
    n_figures: int = 4
    interpolation: str | None = None
    device: str = "auto"


def run_command(
    command: TokenCommand, settings: TokenSettings, output: Path, progress_bar: ProgressBar
) -> list[str]:
    """Measures, draws and writes; returns what to print.

    Raises:
        InputError: arguments or pictures that cannot be used.
    """
    anatomy = load_anatomy(command)
    images = open_token_images(
        command.data or str(builtin_photo()),
        anatomy.backbone,
        split=command.split,
        classes=command.classes,
        per_class=command.per_class,
        n_images=command.n_images,
        exclude=output,
    )
    for note in images.notes:
        logger.warning(note)
    if command.target is not None:
        target = find_class(
            command.target, anatomy.backbone.labels, anatomy.n_classes, anatomy.backbone.name
        )
        settings = replace(settings, target=target)
    inverters = _open_inverters(command, anatomy, settings.seed)
    with progress_bar(len(images)) as advance:
        tally, metrics = measure_tokens(
            anatomy, images, settings, _mask_finder(command, images, anatomy), advance
        )
    output.mkdir(parents=True, exist_ok=True)
    names = _write_figures(anatomy, images, settings, inverters, command.n_figures, output)
    head = _describe(command, settings, anatomy, images)
    _write(tally, images, {**head, **metrics, "figures": names}, output)
    return _summarise(metrics, head, output)


def load_anatomy(command: TokenCommand) -> Anatomy:
    """Loads the backbone on its device, with the interpolation asked for.

    Raises:
        InputError: unknown names, or no vision transformer.
    """
    with without_progress_bars():
        backbone = load_backbone(command.backbone).to(find_device(command.device))
    if command.interpolation is not None:
        if command.interpolation not in RESAMPLING:
            hint = choices_hint(command.interpolation, list(RESAMPLING))
            raise InputError(f"No interpolation is named {command.interpolation!r}; {hint}")
        backbone.preprocessing = replace(
            backbone.preprocessing, interpolation=command.interpolation
        )
    return read_anatomy(backbone)


def _open_inverters(command: TokenCommand, anatomy: Anatomy, seed: int) -> dict[int, BlockInverter]:
    if command.stages and command.inverter is None:
        raise InputError("--stage is of a modular inverter; name one with --inverter.")
    own = [anatomy.backbone.name] if anatomy.backbone.name in list_bundled() else []
    names = command.pipelines or (own if command.inverter is None else [])
    chosen = [SampleSettings(pipeline=name, device=command.device, seed=seed) for name in names]
    if command.inverter is not None:
        chosen += [
            SampleSettings(inverter=command.inverter, stage=stage, device=command.device)
            for stage in command.stages or (None,)
        ]
    with without_progress_bars():
        return match_inverters(anatomy, [open_chosen(settings)[0] for settings in chosen])


def _mask_finder(command: TokenCommand, images: TokenImages, anatomy: Anatomy) -> FindMask | None:
    if command.masks is None:
        return None
    folder = Path(command.masks)
    if not folder.is_dir():
        raise InputError(f"A folder of masks must exist at {folder}, but there is none.")

    paths = [folder / PurePosixPath(name).with_suffix(".png") for name in images.ids]
    if len(set(paths)) < len(paths) or not any(path.is_file() for path in paths):
        raise InputError(
            "Masks must belong to the images, but none has one of its own: a mask is a PNG with "
            "the path of its image below the folder of masks."
        )

    def find(index: int) -> torch.Tensor | None:
        path = paths[index]
        return token_mask(read_image(path), anatomy.grid) if path.is_file() else None

    return find


def _write_figures(
    anatomy: Anatomy,
    images: TokenImages,
    settings: TokenSettings,
    inverters: dict[int, BlockInverter],
    n_figures: int,
    output: Path,
) -> list[str]:
    names: list[str] = []
    for index in range(min(n_figures, len(images))):
        item = make_picture(anatomy, images, index, settings, inverters)
        stem = PurePosixPath(images.ids[index]).stem.replace(":", "-")
        name = f"{index:02d}-{stem}.png"
        write_figure(draw_blocks(anatomy, item), output / name)
        names.append(name)
    return names


def make_picture(
    anatomy: Anatomy,
    images: TokenImages,
    index: int,
    settings: TokenSettings,
    inverters: dict[int, BlockInverter],
) -> TokenPicture:
    """Reads one image for its figure."""
    pixels = to_input([images.read(index)], anatomy.backbone)
    label = settings.target
    if label is None and images.labels is not None:
        label = images.labels[index]
    chosen = None if label is None else torch.tensor([label])
    reading = read_images(anatomy, pixels, chosen)
    name = images.ids[index]
    noise = PurePosixPath(name).name
    backbone = anatomy.backbone
    return TokenPicture(
        picture=to_pil(pixels)[0],
        name=name,
        class_name=class_name(backbone, int(reading.labels[0])),
        predicted_name=class_name(backbone, int(reading.logits.argmax())),
        reading=reading,
        shown={
            block: inverter.reconstruct(pixels, noise, settings.seed)[0].cpu()
            for block, inverter in inverters.items()
        },
    )


def _describe(
    command: TokenCommand, settings: TokenSettings, anatomy: Anatomy, images: TokenImages
) -> dict[str, Any]:
    preprocessing = anatomy.backbone.preprocessing
    source = "target" if settings.target is not None else images.label_source
    return {
        "version": __version__,
        "command": "classemb",
        "arguments": {**asdict(command), **asdict(settings)},
        "backbone": anatomy.backbone.name,
        "n_blocks": len(anatomy.blocks),
        "n_classes": anatomy.n_classes,
        "input_size": list(preprocessing.size),
        "interpolation": preprocessing.interpolation,
        "label_source": source,
        "environment": read_environment(str(anatomy.backbone.device)),
    }


def _write(tally: Tally, images: TokenImages, metrics: dict[str, Any], output: Path) -> None:
    kinds = ["image"] + (["cls"] if metrics["identifiability_by_block_cls"] else [])
    curves = {kind: metrics["intervals"][f"identifiability_by_block/{kind}"] for kind in kinds}
    tokens = torch.as_tensor(tally.token_identifiability) / metrics["n_images"]
    drawn = draw_identifiability(tally.anatomy, tokens, curves, metrics["n_images"])
    write_figure(drawn, output / "identifiability.png")
    if metrics["perturbation"]:
        drawn = draw_removal(metrics["perturbation"], metrics["n_images"])
        write_figure(drawn, output / "perturbation.png")
    columns = ("label", "predicted", "identifiability_rate", "any_identified")
    table = {"id": images.ids, **{name: tally.column(name).tolist() for name in columns}}
    with replacing(output / "per_image.parquet") as partial:
        parquet.write_table(pa.table(table), partial)
    text = json.dumps(metrics, indent=2, allow_nan=False) + "\n"
    write_text(output / "metrics.json", text)


def _summarise(metrics: dict[str, Any], head: dict[str, Any], output: Path) -> list[str]:
    n = metrics["n_images"]
    label = {
        "predicted": "predicted class",
        "target": "class asked for",
    }.get(head["label_source"], "class")
    accuracy = metrics["accuracy"]
    counted = f"{n} image" + ("s" if n > 1 else "")
    lines = [
        f"{counted}: {metrics['identifiability_rate']:.1%} of the image tokens are closest to the "
        f"{label} after the last block; {metrics['any_identified']:.1%} of the images have one."
    ]
    if accuracy is not None:
        lines[0] += f" Accuracy {accuracy:.1%}."
    lines.append(f"Wrote {output / 'metrics.json'}, identifiability.png and the figures of images.")
    return lines
