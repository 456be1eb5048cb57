"""`featinv analyze`: what encoders and their stages keep, seen through their inverters."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated

import typer

from featinv_diffusion.cli import options, terminal
from featinv_diffusion.cli.command_line import command_line
from featinv_diffusion.errors import InputError, choices_hint
from featinv_diffusion.studies.settings import EncoderSettings

ENCODERS = "encoders"
NAMES = ("stages", "layers", "colour", "tradeoff", ENCODERS)
OF_ENCODERS = ("scorers", "grey", "seed", "batch_size", "device")


@options.with_settings(EncoderSettings, config=True)
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
            help="Modular inverter: detr, vit or the folder of a trained one; for tradeoff several "
            "as A,B. For encoders: several of any kind as NAME, NAME@STAGE or NAME:PIPELINE, such "
            "as siglip,siglip2,vit@blocks.2,rae:FOLDER,diffusion:tiny/swin.",
        ),
    ] = None,
    settings: EncoderSettings,
    output: options.Output = Path("outputs/analyze"),
) -> None:
    """Analyse what encoders, or the stages of a DETR or a ViT, keep, through their inverters.

    Writes figures and metrics.json (each measure with its interval); for encoders also metrics.md
    and per_image.parquet, with paired tests of every two encoders.
    """
    from featinv_diffusion.cli.run import quiet_libraries
    from featinv_diffusion.runs.record import reserved

    quiet_libraries()
    if name not in NAMES:
        raise InputError(f"No analysis is named {name!r}; {choices_hint(name, list(NAMES))}")
    if inverter is not None:
        settings = replace(settings, inverters=options.to_names(inverter, "--inverter"))
    with reserved(output):
        if name == ENCODERS:
            _compare(settings, output)
        else:
            _study(name, settings, output)
    terminal.finish(output / "metrics.json", output)


def _compare(settings: EncoderSettings, output: Path) -> None:
    from featinv_diffusion import __version__
    from featinv_diffusion.studies.encoders import compare_encoders

    found = compare_encoders(settings, exclude=output, progress=True)
    found.save(output, version=__version__, analysis=ENCODERS, command=command_line())
    print(found.summary())
    print("Best first; ≈: not told apart by both paired tests (corrected p < .05).")
    print(f"Wrote {output / 'metrics.md'}, metrics.json, per_image.parquet and figures.")


def _study(name: str, settings: EncoderSettings, output: Path) -> None:
    from featinv_diffusion.studies.stages import STUDIES, load_pictures, open_modular

    default = {field.name: field.default for field in fields(settings)}
    if strange := [key for key in OF_ENCODERS if getattr(settings, key) != default[key]]:
        listed = ", ".join(f"--{key.replace('_', '-')}" for key in strange)
        raise InputError(f"{listed} is for `analyze {ENCODERS}` alone. Leave it out.")
    names, pictures = settings.inverters, settings.pictures
    for key, value in (("inverter", names), ("data", pictures.images.data)):
        if not value:
            raise InputError(f"`analyze {name}` needs --{key}; see --help.")
    shown = load_pictures(pictures, open_modular(names[0]).path.input_size)
    found = STUDIES[name](names, shown)
    found.save(output, analysis=name, command=command_line())
    print(f"Wrote {output / 'metrics.json'} and figures.")
