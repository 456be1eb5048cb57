"""`featinv analyze`: what encoders and their stages keep, seen through their inverters."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from featinv_diffusion.cli import options, terminal
from featinv_diffusion.cli.command_line import command_line
from featinv_diffusion.errors import InputError, choices_hint
from featinv_diffusion.settings import to_flat
from featinv_diffusion.studies.settings import EncoderSettings

if TYPE_CHECKING:
    from featinv_diffusion.runs.parts import Division

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
    worker: options.WorkerOption = None,
) -> None:
    """Analyse what encoders, or the stages of a DETR or a ViT, keep, through their inverters.

    Writes figures and metrics.json (each measure with its interval); for encoders also metrics.md
    and per_image.parquet, with paired tests of every two encoders. The images of `encoders` can be
    shared among workers that never talk, with --worker; `featinv merge` then writes these files.
    """
    from featinv_diffusion.cli.run import quiet_libraries, work
    from featinv_diffusion.processes import find_worker
    from featinv_diffusion.runs.parts import WHOLE
    from featinv_diffusion.runs.record import reserved
    from featinv_diffusion.runs.workers import Call

    quiet_libraries()
    if name not in NAMES:
        raise InputError(f"No analysis is named {name!r}; {choices_hint(name, list(NAMES))}")
    if inverter is not None:
        settings = replace(settings, inverters=options.to_names(inverter, "--inverter"))
    one = find_worker(worker) if name == ENCODERS else _refuse_worker(name, worker)
    if one is not None:
        call = Call("analyze encoders", one.num_processes, to_flat(settings), line=command_line())
        compared = partial(compare, settings, output, call.line)
        raise typer.Exit(work(one, output, call, compared))
    with reserved(output):
        if name == ENCODERS:
            compare(settings, output, command_line(), WHOLE)
        else:
            _study(name, settings, output)


def _refuse_worker(name: str, worker: str | None) -> None:
    from featinv_diffusion.processes import WHOLE as ONE_PROCESS

    if worker not in (None, ONE_PROCESS):
        raise InputError(
            f"`analyze {name}` takes seconds to minutes and has no units that workers could share. "
            "Leave --worker out."
        )


def compare(settings: EncoderSettings, output: Path, line: str, division: Division) -> None:
    """Compares encoders, writes what was found and prints it.

    Args:
        line: the command as it was typed.
    """
    from featinv_diffusion import __version__
    from featinv_diffusion.studies.encoders import compare_encoders

    found = compare_encoders(settings, exclude=output, progress=True, division=division)
    found.save(output, version=__version__, analysis=ENCODERS, command=line)
    print(found.summary())
    print("Best first; ≈: not told apart by both paired tests (corrected p < .05).")
    print(f"Wrote {output / 'metrics.md'}, metrics.json, per_image.parquet and figures.")
    terminal.finish(output / "metrics.json", output)


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
    terminal.finish(output / "metrics.json", output)
