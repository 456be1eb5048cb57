"""`featinv analyze`: what encoders and their stages keep, seen through their inverters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featinv_diffusion.cli import options
from featinv_diffusion.cli.command_line import command_line

if TYPE_CHECKING:
    from featinv_diffusion.studies.encoders import EncoderSettings

ENCODERS = "encoders"
NAMES = ("stages", "layers", "colour", "tradeoff", ENCODERS)
OF_ENCODERS = ("config", "scorers", "grey", "seed", "batch_size", "device")


def analyze(
    name: Annotated[
        str,
        typer.Argument(
            metavar="|".join(NAMES),
            help="MSE by stage; states within stages; recoloured objects; MSE against detection; "
            "encoders ranked.",
        ),
    ],
    *,
    inverter: Annotated[
        str | None,
        typer.Option(
            metavar="NAME_OR_FOLDER",
            help="detr, vit, or the folder of a trained one; for tradeoff several as A,B. For "
            "encoders several of any kind, each NAME, NAME@STAGE or NAME:PIPELINE: siglip,siglip2,"
            "vit@blocks.2,rae:FOLDER,diffusion:tiny/swin.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="PATH_OR_NAME",
            help="COCO or Tiny-ImageNet-200 (with boxes), else a folder, parquet file or Hub name.",
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            help="Of the data; train for Tiny-ImageNet's boxes.", show_default="validation"
        ),
    ] = None,
    n_images: Annotated[
        int | None,
        typer.Option(
            help="Spread evenly over the data; for encoders, as `evaluate` draws, 2 or more.",
            show_default="250, or all",
        ),
    ] = None,
    classes: Annotated[
        str | None, typer.Option(metavar="FILE", help="Only these class folders, one a line.")
    ] = None,
    held_back_per_class: Annotated[
        int | None,
        typer.Option(
            help="Of images with boxes, or for encoders, only the last k of each class.",
            show_default="0",
        ),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            metavar="NAME_OR_FILE",
            help="For encoders: settings from a YAML file or a config of the package such as "
            "evaluation/siglip-coco; options win.",
            show_default="",
        ),
    ] = None,
    scorers: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="For encoders: backbones that measure similarity.",
            show_default="a bundled classifier",
        ),
    ] = None,
    grey: Annotated[
        bool | None,
        typer.Option("--grey", help="For encoders: similarity without colour too."),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="For encoders: of noise and bootstrap.", show_default="0"),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="For encoders: images per batch.", show_default="32")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="For encoders: auto, cpu, cuda …", show_default="auto"),
    ] = None,
    output: options.Output = Path("outputs/analyze"),
) -> None:
    """Analyse what encoders, or the stages of a DETR or a ViT, keep, through their inverters.

    Writes figures and metrics.json (each figure with its interval); for encoders also metrics.md
    and per_image.parquet, with paired tests of every two.
    """
    given = {key: value for key, value in locals().items() if value is not None}
    chosen = {key: given[key] for key in given if key not in ("name", "output")}
    from featinv_diffusion.cli.run import quiet_libraries
    from featinv_diffusion.errors import InputError, choices_hint
    from featinv_diffusion.studies.stages import STUDIES

    quiet_libraries()
    if name not in NAMES:
        raise InputError(f"No analysis is named {name!r}; {choices_hint(name, list(NAMES))}")
    if name == ENCODERS:
        _compare(_read_settings(chosen), output)
        return
    if strange := [f"--{key.replace('_', '-')}" for key in OF_ENCODERS if key in chosen]:
        raise InputError(f"{', '.join(strange)} is for `analyze {ENCODERS}` alone. Leave it out.")
    for key in ("inverter", "data"):
        if key not in chosen:
            raise InputError(f"`analyze {name}` needs --{key}; see --help.")
    _study(STUDIES[name], name, chosen, output)


def _read_settings(chosen: dict[str, Any]) -> EncoderSettings:
    from featinv_diffusion.config import load_config
    from featinv_diffusion.studies.encoders import EncoderSettings

    if "inverter" in chosen:
        chosen["inverters"] = _split(chosen.pop("inverter"))
    if "scorers" in chosen:
        chosen["scorers"] = _split(chosen["scorers"])
    settings = load_config(EncoderSettings, chosen.pop("config", None))
    return replace(settings, **chosen)


def _compare(settings: EncoderSettings, output: Path) -> None:
    from featinv_diffusion.cli.run import progress_bar
    from featinv_diffusion.studies.encoders_report import order_line, run_comparison

    metrics = run_comparison(settings, output, progress_bar, command_line())
    for metric in metrics["ranking"]:
        print(order_line(metrics, metric))
    print("Best first; ≈: not told apart by both paired tests (corrected p < .05).")
    print(f"Wrote {output / 'metrics.md'}, metrics.json, per_image.parquet and figures.")


def _study(study: Any, name: str, chosen: dict[str, Any], output: Path) -> None:
    import json

    from featinv_diffusion.errors import InputError
    from featinv_diffusion.files import write_text
    from featinv_diffusion.inverters.modular import load_modular
    from featinv_diffusion.studies.stages import PictureChoice, load_pictures

    names = _split(chosen.pop("inverter"))
    if not names:
        raise InputError("--inverter must name an inverter, or several as A,B.")
    choice = PictureChoice(**chosen)
    pictures = load_pictures(choice, load_modular(names[0]).path.input_size)
    output.mkdir(parents=True, exist_ok=True)
    metrics = study(names, pictures, output)
    content = {"analysis": name, "command": command_line(), "n_images": len(pictures), **metrics}
    write_text(output / "metrics.json", json.dumps(content, indent=2) + "\n")
    print(f"Wrote {output / 'metrics.json'} and figures.")


def _split(names: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in names.split(",") if part.strip())
